"""What users' sources give, looked at before anything runs on it: what is wrong is said in one line.

Our own sets are tested, and what lies prepared is verified by tasks.data.prepared; a class that somebody registers is
neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from norms.values import cut
from tasks.base import NotPrepared
from tasks.data.duplicates import same_images
from tasks.data.images import ImageData, Split
from tasks.data.lazy import FolderData
from tasks.data.manifest import PARTS
from tasks.data.source import Contents, DatasetInfo, Preparation, Source

_T = TypeVar("_T")


def failed_with(error: Exception) -> str:
    """What a user's code raised, in one line."""
    return cut(" ".join(f"{type(error).__name__}: {error}".split()), 300)


def check_classes(labels: Mapping[str, Tensor], class_names: Sequence[str], *, disjoint: bool, of: str = "") -> None:
    """Whether every part has every class, or, where the classes are disjoint, no two parts share one.

    Args:
        labels: part -> int64 (N,).
        class_names: one per label.
        disjoint: of a few-shot set.
        of: words for the domain.

    Raises:
        ValueError: says which part lacks which class, or which class is in two.
    """
    found = {part: set(of_part.unique().tolist()) for part, of_part in labels.items()}
    every = set().union(*found.values())
    if disjoint:
        if sum(map(len, found.values())) > len(every):
            twice = min(c for c in every if sum(c in classes for classes in found.values()) > 1)
            raise ValueError(f'few_shot: class "{class_names[twice]}" is in two parts')
        found = {"whole": every}
    hint = "" if disjoint else "; every part needs every class (few_shot=True: no class is in two parts)"
    for part, classes in found.items():
        if absent := set(range(len(class_names))) - classes:
            raise ValueError(f'the {part} part{of} has no image of class "{class_names[min(absent)]}"{hint}')


def check_images(images: Mapping[str, Tensor], of: str = "") -> None:
    """Raises ValueError where an image, uint8 (N, C, H, W), is in two parts."""
    if pairs := same_images(images):
        (later, i), (earlier, j), count = pairs[0]
        are = "image is" if count == 1 else "images are"
        raise ValueError(
            f"{count} {are} in two parts{of}: {later} also in {earlier}, such as {later} {i} and {earlier} {j}; "
            "leave them out of one, since a test of a training image shows nothing"
        )


class Checked(Source):
    """A user's source: it gives what the other one gives, once that was looked at.

    Errors of any type become ValueErrors in one line that name the set and the method. What a set decodes while it is
    read is not compared by its images, as those of large folders are not.
    """

    def __init__(self, source: Source):
        self.source = source

    @property
    def accepts(self) -> Collection[str]:  # type: ignore[override]
        return self.source.accepts

    @property
    def options(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.source.options

    def info(self, name: str) -> DatasetInfo:
        return self._given(name, self.source.info, DatasetInfo, name)

    def is_prepared(self, name: str, data_dir: Path) -> bool:
        return self._given(name, self.source.is_prepared, bool, name, data_dir)

    def checksum(self, name: str, data_dir: Path) -> str:
        return self._given(name, self.source.checksum, str, name, data_dir)

    def contents(self, name: str, data_dir: Path) -> Contents:
        return self._given(name, self.source.contents, Contents, name, data_dir)

    def labels(self, name: str, data_dir: Path, domain: str | None) -> dict[str, Tensor]:
        labels = self._given(name, self.source.labels, dict, name, data_dir, domain)
        contents = self.contents(name, data_dir)
        with _said_of(name):
            _check_labels(labels, contents.class_names, contents.disjoint_classes, domain)
        return labels

    def load(self, name: str, data_dir: Path, **options: Any) -> ImageData:
        data = self._given(name, self.source.load, ImageData, name, data_dir, **options)
        disjoint = self.contents(name, data_dir).disjoint_classes
        return self._whole(name, data_dir, data, disjoint, options.get("domain"))

    def prepare(self, name: str, data_dir: Path, **options: Any) -> Preparation:
        return self._given(name, self.source.prepare, Preparation, name, data_dir, **options)

    def domains(self, name: str, data_dir: Path) -> tuple[str, ...]:
        return self._given(name, self.source.domains, tuple, name, data_dir)

    def in_memory(self, name: str, data_dir: Path) -> bool:
        return self._given(name, self.source.in_memory, bool, name, data_dir)

    def few_shot(self, name: str, data_dir: Path) -> bool:
        return self._given(name, self.source.few_shot, bool, name, data_dir)

    def load_disjoint(self, name: str, data_dir: Path) -> ImageData:
        data = self._given(name, self.source.load_disjoint, ImageData, name, data_dir)
        return self._whole(name, data_dir, data, True, None)

    def open(self, name: str, data_dir: Path, *, workers: int | None = None, **options: Any) -> FolderData:
        return self._given(name, self.source.open, FolderData, name, data_dir, workers=workers, **options)

    def mending(self, domain: str, class_name: str) -> str:
        return self.source.mending(domain, class_name)

    def _whole(self, name: str, data_dir: Path, data: ImageData, disjoint: bool, domain: str | None) -> ImageData:
        names = self.contents(name, data_dir).class_names[: data.num_classes]
        parts = {"train": data.train, "val": data.val, "test": data.test}
        with _said_of(name):
            for part, split in parts.items():
                _check_split(split, f"the {part} part{_of(domain)}")
            _check_labels({part: split.labels for part, split in parts.items()}, names, disjoint, domain)
            check_images({part: split.images for part, split in parts.items()}, _of(domain))
        return data

    def _given(self, name: str, method: Callable[..., Any], kind: type[_T], *args: Any, **options: Any) -> _T:
        called = f'data set "{name}": {type(self.source).__name__}.{method.__name__}'
        try:
            given = method(*args, **options)
        except NotPrepared:
            raise
        except ValueError as error:  # by the rules of a Source it says what a user can mend
            raise ValueError(" ".join(str(error).split()) or called) from error
        except Exception as error:  # a user's class raises whatever it likes
            raise ValueError(f"{called} failed with {failed_with(error)}") from error
        if not isinstance(given, kind):
            raise ValueError(f"{called} gives {type(given).__name__}, not {kind.__name__}")
        return given


@contextlib.contextmanager
def _said_of(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f'data set "{name}": {error}') from error


def _of(domain: str | None) -> str:
    return f' of domain "{domain}"' if domain else ""


def _check_labels(labels: Mapping[str, Any], class_names: Sequence[str], disjoint: bool, domain: str | None) -> None:
    if sorted(labels, key=str) != sorted(PARTS):
        raise ValueError(f"parts{_of(domain)} are {', '.join(PARTS)}; given {cut(', '.join(map(str, labels)), 100)}")
    for part, given in labels.items():
        which, count = f"the {part} part{_of(domain)}", len(class_names)
        if not isinstance(given, Tensor) or given.dtype != torch.int64 or given.ndim != 1 or not len(given):
            raise ValueError(f"labels of {which} are {_form(given)}; they must be a tensor int64 (N,)")
        if odd := [label for label in (int(given.min()), int(given.max())) if not 0 <= label < count]:
            raise ValueError(f"{which} has a label {odd[0]}; with {count} class_names they are 0 to {count - 1}")
    check_classes(labels, class_names, disjoint=disjoint, of=_of(domain))


def _check_split(split: Any, which: str) -> None:
    if not isinstance(split, Split):
        raise ValueError(f"{which} is {type(split).__name__}, not tasks.data.Split")
    images = split.images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images of {which} are {_form(images)}; they must be a tensor uint8 (N, C, H, W), 0 to 255")
    if len(images) != len(split.labels):
        raise ValueError(f"{which} has {len(images)} images and {len(split.labels)} labels")


def _form(given: Any) -> str:
    return f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
