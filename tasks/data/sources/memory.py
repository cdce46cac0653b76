"""A user's arrays as a data set: a function gives them, and they are looked at before anything runs on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from norms.values import cut, shown
from tasks.base import NotPrepared
from tasks.data.images import ImageData, Split, make_data
from tasks.data.manifest import PARTS
from tasks.data.source import Contents, DatasetInfo, Source, check_domain
from tasks.data.sources.checked import check_classes, check_images, failed_with

_Parts = dict[str, Split]


class InMemory(Source):
    """A data set that fits in memory, as a function gives it.

        register_dataset("mine", InMemory(parts, num_classes=10, title="Mine"))

    The function is called once in a process, when the data are first asked for. It gives
    {"train": (images, labels), "val": ..., "test": ...}: images uint8 (N, C, H, W), 0 to 255; labels int64 (N,), 0 to
    num_classes - 1; numpy arrays or tensors. With domains it gives {domain: such a dict}, all of one image shape. No
    image is in two parts of one domain. Every part has every class, or no two parts share one: a few-shot set.

    The checksum is of the arrays' content, so that a run on changed data has another key.

    Args:
        load: the function. It may raise tasks.base.NotPrepared where its files are not on this machine.
        num_classes: over all parts.
        title: for tables.
        kind: "real" or "synthetic".
        domains: their names, in the order of tables; empty without domains.
        few_shot: the parts share no class.
        image_shape: (C, H, W), where it is to be known before the arrays are read; plans read them.
        class_names: one per label (default: their numbers).
        licence: of the images.

    Raises:
        ValueError: in `load` and the other methods that read, where the function fails, or what it gives is another
            form; one line.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[str, Any]],
        *,
        num_classes: int,
        title: str,
        kind: str = "real",
        domains: Sequence[str] = (),
        few_shot: bool = False,
        image_shape: tuple[int, int, int] | None = None,
        class_names: Sequence[str] = (),
        licence: str = "its owner's",
    ):
        if type(num_classes) is not int or num_classes < 2 or (class_names and len(class_names) != num_classes):
            raise ValueError(
                f"num_classes {shown(num_classes)}, {len(class_names)} class_names: 2 or more, a name for each"
            )
        if kind not in ("real", "synthetic"):
            raise ValueError(f'kind "{kind}": allowed are real and synthetic')
        if isinstance(domains, str) or len(domains) == 1 or len(set(domains)) < len(domains):
            raise ValueError(f"domains {shown(domains)}: none, or two names or more, all different")
        if few_shot and domains:
            raise ValueError("a few-shot set has no domains")
        self._function, self._title, self._kind, self._licence = load, title, kind, licence
        self._class_names = tuple(class_names) or tuple(map(str, range(num_classes)))
        self._domains, self._few_shot, self._image_shape = tuple(domains), few_shot, image_shape
        self._held: dict[str, _Parts] | None = None
        self._checksum = ""
        self.options = ("domain", "classes") if domains else ("classes",)

    def info(self, name: str) -> DatasetInfo:
        return DatasetInfo(
            name,
            self._title,
            self._kind,
            len(self._class_names),
            self._shape(),
            {},
            self._domains,
            False,
            "registered",
            self._licence,
            self._few_shot,
        )

    def is_prepared(self, name: str, data_dir: Path) -> bool:
        try:
            self._read(name)
        except NotPrepared:
            return False
        return True

    def checksum(self, name: str, data_dir: Path) -> str:
        self._read(name)
        return self._checksum

    def contents(self, name: str, data_dir: Path) -> Contents:
        return Contents(self._class_names, self._domains, disjoint_classes=self._few_shot)

    def labels(self, name: str, data_dir: Path, domain: str | None) -> dict[str, Tensor]:
        return {part: split.labels for part, split in self._one(name, domain).items()}

    def load(
        self, name: str, data_dir: Path, *, domain: str | None = None, classes: int | None = None, **options: Any
    ) -> ImageData:
        parts = self._one(name, domain)
        return make_data(
            f"{name}/{domain}" if domain else name,
            self._title,
            parts,
            kind=self._kind,
            checksum=self._checksum,
            num_classes=len(self._class_names),
            classes=classes,
            class_names=self._class_names,
            disjoint_classes=self._few_shot,
        )

    def _shape(self) -> tuple[int, int, int] | None:
        if self._held is None:
            return self._image_shape
        channels, height, width = next(iter(self._held.values()))["train"].images.shape[1:]
        return channels, height, width

    def _one(self, name: str, domain: str | None) -> _Parts:
        if self._domains:
            check_domain(name, domain, self._domains)
        return self._read(name)[domain or ""]

    def _read(self, name: str) -> dict[str, _Parts]:
        """domain -> part -> images and labels: copies of what the function gives, so that nobody changes them later."""
        if self._held is None:
            try:
                given = self._function()
            except NotPrepared:
                raise
            except Exception as error:  # a user's function raises whatever it likes
                raise ValueError(f'data set "{name}": its function failed with {failed_with(error)}') from error
            try:
                held = {domain: self._parts(parts, domain) for domain, parts in self._by_domain(given).items()}
                shapes = {split.images.shape[1:] for parts in held.values() for split in parts.values()}
                if len(shapes) > 1:
                    raise ValueError(f"images of several shapes: {', '.join(sorted(str(tuple(s)) for s in shapes))}")
                shape = tuple(next(iter(shapes)))
                if self._image_shape is not None and shape != tuple(self._image_shape):
                    raise ValueError(f"images are {shape}, image_shape says {tuple(self._image_shape)}")
            except (ValueError, TypeError) as error:  # torch's own for types that numpy lacks
                raise ValueError(f'data set "{name}": {error}') from error
            self._held, self._checksum = held, _checksum(held, self._class_names)
        return self._held

    def _by_domain(self, given: Any) -> Mapping[str, Any]:
        if not isinstance(given, Mapping):
            raise ValueError(f"its function gives {type(given).__name__}, not a dict of parts")
        if not self._domains:
            return {"": given}
        if sorted(given, key=str) != sorted(self._domains):
            raise ValueError(f"domains are {', '.join(self._domains)}; given {', '.join(map(str, given))}")
        return {domain: given[domain] for domain in self._domains}

    def _parts(self, given: Any, domain: str) -> _Parts:
        of = f' of domain "{domain}"' if domain else ""
        if not isinstance(given, Mapping) or sorted(given, key=str) != sorted(PARTS):
            found = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            hint = "" if domain or not found else " (domains= names domains)"
            raise ValueError(f"parts{of} are {', '.join(PARTS)}; given {cut(found, 100)}{hint}")
        parts = {part: self._split(given[part], f"the {part} part{of}") for part in PARTS}
        check_images({part: split.images for part, split in parts.items()}, of)
        labels = {part: split.labels for part, split in parts.items()}
        check_classes(labels, self._class_names, disjoint=self._few_shot, of=of)
        return parts

    def _split(self, given: Any, part: str) -> Split:
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ValueError(f"{part} is not (images, labels)")
        if not all(isinstance(array, np.ndarray | Tensor) for array in given):
            raise ValueError(f"{part} is not (images, labels) as numpy arrays or tensors")
        images, labels = (array.detach().cpu().numpy() if isinstance(array, Tensor) else array for array in given)
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise ValueError(f"images of {part} are {_form(images)}; they must be uint8 (N, C, H, W), 0 to 255")
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise ValueError(f"labels of {part} are {_form(labels)}; they must be int64 (N,)")
        if len(labels) != len(images):
            raise ValueError(f"{part} has {len(images)} images and {len(labels)} labels")
        count = len(self._class_names)
        if odd := [label for label in (int(labels.min()), int(labels.max())) if not 0 <= label < count]:
            raise ValueError(f"{part} has a label {odd[0]}; with num_classes {count} they are 0 to {count - 1}")
        return Split(
            torch.from_numpy(np.array(images, np.uint8, order="C")), torch.from_numpy(np.array(labels, np.int64))
        )


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _checksum(held: dict[str, _Parts], class_names: Sequence[str]) -> str:
    """Identity of the arrays, by domain and part."""
    digest = hashlib.sha256(repr((len(class_names), *held)).encode())
    for parts in held.values():
        for part in PARTS:
            for array in (parts[part].images, parts[part].labels):
                digest.update(repr((part, tuple(array.shape))).encode())
                digest.update(array.numpy().tobytes())
    return digest.hexdigest()[:16]
