"""Names of data sets -> what they are, whether they are here, and how they are loaded; a user's own are registered.

Every name has a Source (tasks.data.source), which says what the set can do; nothing here asks for a name.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from norms import plugins
from norms.values import nearest
from tasks.data.images import ImageData
from tasks.data.lazy import FolderData
from tasks.data.prepared import PARTS
from tasks.data.source import DatasetInfo, Preparation, Source, check_domain
from tasks.data.sources import digits, fashion, glyphs
from tasks.data.sources.checked import Checked
from tasks.data.sources.downloads import DOWNLOADS, TorchvisionSets
from tasks.data.sources.folder import PREFIX, Folder, ImageNet, expanded
from tasks.data.sources.joined import JOINED, JoinedSets
from tasks.data.sources.memory import InMemory

_OURS: dict[str, Source] = {
    "fashion_mnist_mini": fashion.MINI,
    "fashion_shifted": fashion.SHIFTED,
    "digits": digits.DIGITS,
    "glyphs": glyphs.GLYPHS,
    **dict.fromkeys(DOWNLOADS, TorchvisionSets()),
    **dict.fromkeys(JOINED, JoinedSets()),
    "imagenet": ImageNet(),
}
_FOLDER = Folder()
_SOURCES: dict[str, Source] = {}
"""Those that users register."""
_PLACES: dict[str, str] = {}  # name -> file and line that registered it
_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")


def register_dataset(name: str, source: Source, *, replace: bool = False) -> Source:
    """Add a data set of one's own; a plugin that is loaded again replaces its own.

    Args:
        name: lower case letters, digits and underscores, starting with a letter, 100 characters at most.
        source: InMemory for arrays that a function gives; any other Source for the rest.
        replace: replace one that was registered at the prompt, or by a program; for notebooks.

    Returns:
        The source.

    Raises:
        ValueError: the name is malformed, the suite's own, or taken; says where it was registered first.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f'data set name "{name!s:.80}": lower case letters, digits and underscores, starting with a letter, '
            "100 characters at most"
        )
    if name in _OURS:
        raise ValueError(f'data set "{name}" is one of the suite; choose another name')
    if Source not in type(source).__mro__:
        raise ValueError(f'data set "{name}": {type(source).__name__} does not derive from tasks.data.Source')
    caller = sys._getframe(1)
    place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
    if name in _SOURCES and (not replace or plugins.plugin_of("dataset", name) is not None):
        raise ValueError(
            f'data set "{name}" is already registered by {_PLACES[name]}; {place} must choose another name'
        )
    plugins.registered("dataset", name, lambda: _SOURCES)
    # arrays are looked at by InMemory itself
    _SOURCES[name], _PLACES[name] = source if type(source) is InMemory else Checked(source), place
    return source


def forget_dataset(name: str) -> None:
    """Take a data set of one's own away. Raises ValueError where none was registered under this name."""
    if name not in _SOURCES:
        raise ValueError(f'data set "{name}" is not registered{nearest(name, _SOURCES)}')
    del _SOURCES[name]


def _source(name: str) -> Source:
    """The source of this name. Raises ValueError with the nearest name for an unknown one."""
    if name.startswith(PREFIX) and len(name) > len(PREFIX):
        return _FOLDER
    if name not in _OURS and name not in _SOURCES and not plugins.load_offered("dataset", name):
        names = dataset_names()
        raise ValueError(f'unknown data set "{name}"; allowed: {", ".join(names)}, folder:PATH{nearest(name, names)}')
    return _OURS[name] if name in _OURS else _SOURCES[name]


def dataset_names() -> list[str]:
    """Every fixed name, then those that were registered; any `folder:PATH` is one more."""
    return [*_OURS, *_SOURCES]


def dataset_info(name: str) -> DatasetInfo:
    """What is known of a data set without reading it. Raises ValueError with the nearest name for an unknown one."""
    return _source(name).info(name)


def is_prepared(name: str, data_dir: Path) -> bool:
    """Whether `load` would find the set: always for built-in ones; arrays are not verified here.

    Raises:
        ValueError: unknown name, or what lies there is damaged or can not be read; names the file.
    """
    return _source(name).is_prepared(name, data_dir)


def prepare(
    name: str, data_dir: Path, *, source: Path | None = None, size: int | None = None, force: bool = False
) -> Preparation:
    """Download or decode a data set into `data_dir`. Nothing else downloads.

    Nothing is done where that has been done, of a folder: from the same images. A joined set prepares those of its
    members that are not prepared.

    Args:
        name: one of `dataset_names()` or `folder:PATH`.
        data_dir: made if missing.
        source: the folder of `imagenet`, with `force` by default the one that it was prepared from; of a set that is
            downloaded a folder that holds its publisher's archives, so that nothing is downloaded.
        size: side of a folder's images in pixels (default: as it is prepared, else 64, and 224 for imagenet).
        force: make it again, and put it into the place of what is prepared once it is complete.

    Raises:
        ValueError: unknown name, failed download, missing or damaged archive, unsupported folder, damaged image,
            `source` or `size` where they do not apply; without `force`, a set that is prepared with another size, from
            another folder, or from one that has changed or is gone.
    """
    entry = _source(name)
    for option, value in (("source", source), ("size", size)):
        if value is not None and option not in entry.accepts:
            others = [each for each in dataset_names() if option in _source(each).accepts]
            others += ["folders"] if option in _FOLDER.accepts else []
            raise ValueError(f'data set "{name}" takes no {option}; {", ".join(others)} do')
    if source is not None:
        source = expanded(source, f'source "{source}"')
    return entry.prepare(name, data_dir, source=source, size=size, force=force)


def load(name: str, data_dir: Path, **options: Any) -> ImageData:
    """A data set with its train, val and test parts, as uint8 tensors on the CPU, verified against its checksums.

    Args:
        name: one of `dataset_names()` or `folder:PATH`.
        data_dir: folder of prepared data sets; built-in ones do not use it.
        options: `classes` (keep the first K classes) for every set; `domain` for sets with domains; `split`,
            `test_family` and `val_family` for glyphs.

    Raises:
        ValueError: unknown name or option (with the nearest), a value out of range, damaged files.
        NotPrepared: the set is not on this machine; nothing replaces it.
    """
    source = _source(name)
    for option in options:
        if option not in source.options:
            raise ValueError(
                f'data set "{name}": unknown option "{option}"; allowed: {", ".join(source.options)}'
                f"{nearest(option, source.options)}"
            )
    return source.load(name, data_dir, **options)


def load_domains(name: str, data_dir: Path, *, classes: int | None = None) -> dict[str, ImageData]:
    """Every domain of a data set, each with its own parts, in the set's order; all have one image shape.

    Raises:
        As `load`; ValueError for a set without domains.
    """
    return {d: load(name, data_dir, domain=d, classes=classes) for d in domain_names(name, data_dir)}


def domain_names(name: str, data_dir: Path) -> tuple[str, ...]:
    """The domains of a data set, without reading its images.

    Raises:
        As `load_domains`, but only a folder's domains ask for it to be prepared.
    """
    domains = _source(name).domains(name, data_dir)
    if not domains:
        with_domains = [n for n in dataset_names() if dataset_info(n).domains]
        raise ValueError(
            f'data set "{name}" has no domains; allowed: {", ".join(with_domains)}, or a folder root/domain/class/*'
        )
    return domains


def domain_labels(name: str, data_dir: Path) -> dict[str, dict[str, Tensor]]:
    """domain -> part ("train", "val", "test") -> labels, int64 (N,): how many images of which class each domain has.

    Read once per content and kept for the life of the process, labels only: they are shared, so do not change them.

    Raises:
        As `load_domains`.
    """
    domain_names(name, data_dir)
    return _domain_labels(name, data_dir, checksum(name, data_dir))


def check_domains(name: str, data_dir: Path, used: Sequence[str], classes: int | None = None) -> None:
    """Check that all these domains have all classes. Reads labels, no images.

    Args:
        name: as for `load_domains`.
        data_dir: folder of prepared data sets.
        used: the domains that will be trained or tested on.
        classes: the first K classes (default: all).

    Raises:
        ValueError: the set has no domains, a domain of `used` is unknown (with the nearest), `classes` is not in
            2..num_classes, or a part of a domain of `used` lacks a class.
        NotPrepared: as `load`.
    """
    domains = domain_names(name, data_dir)
    for domain in used:
        check_domain(name, domain, domains)
    source = _source(name)
    names = source.contents(name, data_dir).class_names
    _check_classes(name, len(names), classes)
    labels = domain_labels(name, data_dir)
    for domain in used:
        for part in PARTS:
            counts = torch.bincount(labels[domain][part], minlength=len(names))[:classes]
            if not counts.all():
                absent = names[int(counts.argmin())]
                raise ValueError(
                    f'data set "{name}": the {part} part of domain "{domain}" has no image of class "{absent}"; '
                    f"every domain needs every class in train, val and test{source.mending(domain, absent)}"
                )


def check_batch_size(
    name: str, data_dir: Path, used: Sequence[str], batch_size: int, classes: int | None = None
) -> None:
    """ValueError where the training part of a domain of `used`, its first `classes` classes, does not fill a batch."""
    for domain in used:
        labels = domain_labels(name, data_dir)[domain]["train"]
        available = len(labels) if classes is None else int((labels < classes).sum())
        if batch_size > available:
            raise ValueError(f'batch_size {batch_size} exceeds the {available} training images of domain "{domain}"')


def class_counts(name: str, data_dir: Path, classes: int | None = None) -> dict[str, Tensor]:
    """Part ("train", "val", "test") -> images of each class, int64 (K,), of a set without domains (of digits: mnist).

    Planning asks this. Labels are read once per content; the counts are shared, so do not change them.

    Args:
        name, data_dir: as for `load`.
        classes: K, the first classes only (default: all).

    Raises:
        As `load`; ValueError where a part is left without images.
    """
    return _class_counts(name, data_dir, classes, checksum(name, data_dir))


def in_memory(name: str, data_dir: Path) -> bool:
    """Whether `load` holds this set; the others are read by `open_folder`. Raises NotPrepared, or ValueError."""
    return _source(name).in_memory(name, data_dir)


def open_folder(
    name: str, data_dir: Path, *, domain: str | None = None, classes: int | None = None, workers: int | None = None
) -> FolderData:
    """A folder too large for memory (ImageNet), decoded while it is read; batches by tasks.data.reading.

    Args:
        name, data_dir, domain, classes: as of `load`.
        workers: processes that decode; None: tasks.data.reading's.

    Raises:
        NotPrepared, or ValueError: not a folder, damaged, or small enough for `load`; as lazy.open_folder.
    """
    source = _source(name)
    options = {"domain": domain, "classes": classes} if domain is not None else {"classes": classes}
    return source.open(name, data_dir, workers=workers, **options)


def check_classifiable(name: str, data_dir: Path, classes: int | None = None) -> None:
    """ValueError where one classifier of the first `classes` classes can not be trained and tested on this set.

    That is: its parts share no class, it has domains to choose from, or `classes` is out of range. Raises
    NotPrepared as `load` does.
    """
    source = _source(name)
    contents = source.contents(name, data_dir)
    if contents.disjoint_classes:
        raise ValueError(
            f'data set "{name}" is a few-shot one: its training and test parts share no class, so a classifier '
            "of the first says nothing on the second"
        )
    if contents.domains and not contents.default_domain:
        raise ValueError(f'data set "{name}" has domains ({", ".join(contents.domains)}); one without is needed')
    _check_classes(name, len(contents.class_names), classes)


def load_disjoint(name: str, data_dir: Path) -> ImageData:
    """A few-shot data set: its parts share no class. glyphs is cut by classes here.

    Raises:
        As `load` and `check_disjoint`.
    """
    check_disjoint(name, data_dir)
    return _source(name).load_disjoint(name, data_dir)


def check_disjoint(name: str, data_dir: Path) -> None:
    """ValueError where the parts of a data set share classes. Raises NotPrepared as `load` does."""
    if not _source(name).few_shot(name, data_dir):
        allowed = ", ".join(each for each in dataset_names() if dataset_info(each).few_shot)
        raise ValueError(
            f'data set "{name}" is no few-shot one: its parts share classes; allowed: {allowed}, or a folder '
            "root/split/class/* whose splits share no class (mini-ImageNet, CUB)"
        )


def checksum(name: str, data_dir: Path) -> str:
    """Identity of a data set: its files and the rule that cuts them. Reads declared digests only, no data.

    Raises:
        ValueError: unknown name. NotPrepared: the set is not on this machine.
    """
    return _source(name).checksum(name, data_dir)


@functools.lru_cache(maxsize=16)
def _domain_labels(name: str, data_dir: Path, content: str) -> dict[str, dict[str, Tensor]]:
    # `content` (the checksum) is part of the cache's key: a plan of 10,000 runs asks for the same labels 10,000 times
    source = _source(name)
    return {domain: source.labels(name, data_dir, domain) for domain in source.domains(name, data_dir)}


@functools.lru_cache(maxsize=64)
def _class_counts(name: str, data_dir: Path, classes: int | None, content: str) -> dict[str, Tensor]:
    # `content` is part of the cache's key, as above
    source = _source(name)
    count = len(source.contents(name, data_dir).class_names)
    labels = source.labels(name, data_dir, None)
    counts = {part: torch.bincount(labels[part], minlength=count)[:classes] for part in PARTS}
    for part, of_classes in counts.items():
        if not of_classes.any():
            raise ValueError(f'data set "{name}": no image is left in the {part} part (classes={classes})')
    return counts


def _check_classes(name: str, count: int, classes: int | None) -> None:
    if classes is not None and not 2 <= classes <= count:
        raise ValueError(f'data set "{name}" has {count} classes; num_classes={classes} is not in 2..{count}')
