"""Names of data sets -> what they are, whether they are here, and how they are loaded.

Four kinds of names: built-in sets (files in this package), torchvision's sets (downloaded by `prepare`), joined sets
(several of torchvision's, one domain each), and folders of images (`folder:PATH`, and `imagenet`, whose folder is named
when it is prepared).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from norms.values import nearest
from tasks.base import NotPrepared
from tasks.data import digits, fashion, folders, glyphs, lazy
from tasks.data.downloads import DOWNLOADS, prepare_download
from tasks.data.images import ImageData
from tasks.data.joined import JOINED, joined_checksum, joined_labels, load_joined, missing_members
from tasks.data.prepared import (
    PARTS,
    check_domain,
    command,
    is_written,
    read_labels,
    read_manifest,
    read_set,
)
from tasks.data.sources import check_source
from tasks.data.store import builtin_digest

FOLDER = "folder:"
FOLDER_SIZE = 64  # side in pixels of a prepared folder's images, unless said otherwise
IMAGENET_SIZE = 224


@dataclass(frozen=True)
class DatasetInfo:
    """What `data list` shows.

    Args:
        name, title: as for `load`, and for tables.
        kind: "real", "synthetic", or both where domains differ (each loaded domain is one of the two).
        num_classes, image_shape: as loaded; None where they depend on the folder.
        sizes: images by part; for a downloaded set "train" still includes what becomes val.
        domains: names for `load_domains`; empty for most.
        builtin: part of the repository.
        how: how to prepare it; empty for a built-in set.
        licence: as its publishers state it.
    """

    name: str
    title: str
    kind: str
    num_classes: int | None
    image_shape: tuple[int, int, int] | None
    sizes: dict[str, int]
    domains: tuple[str, ...]
    builtin: bool
    how: str
    licence: str

    def __str__(self) -> str:
        """One line for lists."""
        facts = [self.title, self.kind]
        facts += [f"{self.num_classes} classes"] if self.num_classes else []
        facts += ["x".join(map(str, self.image_shape))] if self.image_shape else []
        facts += [" + ".join(f"{count} {part}" for part, count in self.sizes.items())] if self.sizes else []
        facts += [f"domains {', '.join(self.domains)}"] if self.domains else []
        return " · ".join([*facts, "built in" if self.builtin else self.how, f"licence: {self.licence}"])


@dataclass(frozen=True)
class _Builtin:
    info: DatasetInfo
    file: str
    rule: int  # raised when the same file is cut into parts in another way: it enters the checksum
    load: Callable[..., ImageData]


def _builtin(
    name: str,
    title: str,
    kind: str,
    num_classes: int,
    channels: int,
    sizes: dict[str, int],
    licence: str,
    domains: tuple[str, ...] = (),
) -> DatasetInfo:
    return DatasetInfo(name, title, kind, num_classes, (channels, 32, 32), sizes, domains, True, "", licence)


_BUILTIN = {
    "fashion_mnist_mini": _Builtin(
        _builtin("fashion_mnist_mini", fashion.TITLE, "real", 10, 1, fashion.SIZES, "MIT"),
        fashion.FILE,
        1,
        fashion.load_fashion_mnist_mini,
    ),
    "fashion_shifted": _Builtin(
        _builtin(
            "fashion_shifted",
            fashion.SHIFTED_TITLE,
            "real and synthetic",
            10,
            1,
            fashion.SIZES,
            "MIT",
            fashion.SHIFT_DOMAINS,
        ),
        fashion.FILE,
        1,
        fashion.load_fashion_shifted,
    ),
    "digits": _Builtin(
        _builtin(
            "digits",
            "Digits in four domains",
            "real and synthetic",
            10,
            3,
            digits.SIZES,
            "CC BY-SA 3.0, CC BY 4.0, CC BY 2.0, fonts' licences",
            digits.DOMAINS,
        ),
        digits.FILE,
        1,
        digits.load_digits,
    ),
    "glyphs": _Builtin(
        _builtin("glyphs", glyphs.DESCRIPTION, "synthetic", glyphs.NUM_CLASSES, 1, glyphs.SIZES, "fonts' licences"),
        glyphs.FILE,
        1,
        glyphs.load_glyphs,
    ),
}


def dataset_names() -> list[str]:
    """Every fixed name; any `folder:PATH` is one more."""
    return [*_BUILTIN, *DOWNLOADS, *JOINED, "imagenet"]


def dataset_info(name: str) -> DatasetInfo:
    """What is known of a data set without reading it. Raises ValueError with the nearest name for an unknown one."""
    _check_name(name)
    if name in _BUILTIN:
        return _BUILTIN[name].info
    how = command(name)
    if name in DOWNLOADS:
        d = DOWNLOADS[name]
        return DatasetInfo(name, d.title, "real", d.num_classes, d.image_shape, d.sizes, (), False, how, d.licence)
    if name in JOINED:
        joined = JOINED[name]
        members = [DOWNLOADS[m] for m in joined.members]
        sizes = {part: sum(m.sizes[part] for m in members) for part in members[0].sizes}
        shape = (3, *members[0].image_shape[1:])
        licence = ", ".join(f"{m.licence} ({m.title})" for m in members)
        classes = len(joined.class_names)
        return DatasetInfo(name, joined.title, "real", classes, shape, sizes, joined.members, False, how, licence)
    if name == "imagenet":
        how, licence = f"{how} --source FOLDER (with train/ and val/; not downloaded)", "non-commercial research only"
        return DatasetInfo(name, "ImageNet", "real", None, None, {}, (), False, how, licence)
    return DatasetInfo(name, Path(name[len(FOLDER) :]).name, "real", None, None, {}, (), False, how, "its owner's")


def is_prepared(name: str, data_dir: Path) -> bool:
    """Whether `load` would find the set: always for built-in ones; arrays are not verified here.

    Raises:
        ValueError: unknown name, or what lies there is damaged or can not be read; names the file.
    """
    _check_name(name)
    if name in JOINED:
        return not missing_members(name, data_dir)
    return name in _BUILTIN or is_written(name, data_dir, _folder(name))


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did.

    Args:
        made: False where nothing was to do.
        notes: what a user should know of the images, one line each.
    """

    made: bool
    notes: tuple[str, ...] = ()


def prepare(
    name: str, data_dir: Path, *, source: Path | None = None, size: int | None = None, force: bool = False
) -> Preparation:
    """Download or decode a data set into `data_dir`. Nothing else downloads.

    Nothing is done where that has been done, of a folder: from the same images. A joined set prepares those of its
    members that are not prepared.

    Args:
        name: one of `dataset_names()` or `folder:PATH`.
        data_dir: made if missing.
        source: the folder of `imagenet`; with `force` by default the one that it was prepared from.
        size: side of a folder's images in pixels (default: as it is prepared, else 64, and 224 for imagenet).
        force: make it again, and put it into the place of what is prepared once it is complete.

    Raises:
        ValueError: unknown name, failed download, unsupported folder, damaged image, `source` or `size` where they do
            not apply; without `force`, a set that is prepared with another size, from another folder, or from one that
            has changed or is gone.
    """
    _check_name(name)
    if source is not None and name != "imagenet":
        raise ValueError(f'data set "{name}" takes no source; only imagenet does')
    if size is not None and _fixed(name):
        raise ValueError(f'data set "{name}" takes no size; only folders and imagenet do')
    if _fixed(name):
        members = JOINED[name].members if name in JOINED else (name,) if name in DOWNLOADS else ()
        missing = [member for member in members if force or not is_prepared(member, data_dir)]
        for member in missing:
            prepare_download(member, data_dir, replace=force)
        return Preparation(bool(missing))
    before = _prepared_before(name, data_dir, force)
    if name != "imagenet":
        root = folder_root(name)
    elif source is not None or "root" in before:
        root = _expanded(source, f'source "{source}"') if source is not None else Path(before["root"])
    else:
        raise ValueError("imagenet is not downloaded: give the folder that holds its train/ and val/ as source")
    if before and not force:
        if size not in (None, before["size"]):
            raise ValueError(
                f'data set "{name}" in {data_dir} is prepared with another size, {before["size"]}; '
                "--force makes it again"
            )
        return Preparation(False, check_source(name, root, data_dir, _folder(name), before))
    if size is None:
        size = before.get("size", IMAGENET_SIZE if name == "imagenet" else FOLDER_SIZE)
    return Preparation(True, tuple(folders.prepare_folder(name, root, data_dir, _folder(name), size, replace=force)))


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
    _check_name(name)
    loader: Callable[..., ImageData] = load_joined if name in JOINED else _load_prepared
    if name in _BUILTIN:
        loader = _BUILTIN[name].load
    known = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(
                f'data set "{name}": unknown option "{option}"; allowed: {", ".join(known)}{nearest(option, known)}'
            )
    if name in _BUILTIN:
        return loader(checksum(name, data_dir), **options)
    return loader(name, data_dir, **options)


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
    _check_name(name)
    if _fixed(name):
        domains = dataset_info(name).domains
    else:
        domains = tuple(d for d in read_manifest(name, data_dir, _folder(name))["domains"] if d)
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
    """Whether these domains can serve one closed set of classes. Reads labels, no images.

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
    names = _class_names(name, data_dir)
    _check_classes(name, len(names), classes)
    labels = domain_labels(name, data_dir)
    for domain in used:
        for part in PARTS:
            counts = torch.bincount(labels[domain][part], minlength=len(names))[:classes]
            if not counts.all():
                absent = names[int(counts.argmin())]
                advice = ""
                if not _fixed(name):  # its owner can mend this, and what is prepared is not read again by itself
                    advice = f"; give {domain}/{absent} 3 images or more and prepare it again with --force"
                raise ValueError(
                    f'data set "{name}": the {part} part of domain "{domain}" has no image of class "{absent}"; '
                    f"every domain needs every class in train, val and test{advice}"
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
    _check_name(name)
    if _fixed(name):
        return True
    return "index.json" not in read_manifest(name, data_dir, _folder(name))["files"]


def open_folder(
    name: str, data_dir: Path, *, domain: str | None = None, classes: int | None = None, workers: int | None = None
) -> lazy.FolderData:
    """A folder too large for memory (ImageNet), decoded while it is read; batches by tasks.data.reading.

    Args:
        name, data_dir, domain, classes: as of `load`.
        workers: processes that decode; None: tasks.data.reading's.

    Raises:
        NotPrepared, or ValueError: not a folder, damaged, or small enough for `load`; as lazy.open_folder.
    """
    _check_name(name)
    if _fixed(name):
        raise ValueError(f'data set "{name}" is not a folder of images: use load')
    return lazy.open_folder(name, data_dir, _folder(name), domain=domain, classes=classes, workers=workers)


def check_classifiable(name: str, data_dir: Path, classes: int | None = None) -> None:
    """ValueError where one classifier of the first `classes` classes can not be trained and tested on this set.

    That is: its parts share no class, it has domains to choose from, or `classes` is out of range. Raises
    NotPrepared as `load` does.
    """
    _check_name(name)
    if name in JOINED:
        raise ValueError(_one_domain(name, JOINED[name].members))
    if name in _BUILTIN:
        count = _BUILTIN[name].info.num_classes or 0
    else:
        manifest = read_manifest(name, data_dir, _folder(name))
        count = manifest["num_classes"]
        if manifest["disjoint_classes"]:
            raise ValueError(
                f'data set "{name}" is a few-shot one: its training and test parts share no class, so a classifier '
                "of the first says nothing on the second"
            )
        if manifest["domains"] != [""]:
            raise ValueError(_one_domain(name, manifest["domains"]))
    _check_classes(name, count, classes)


def load_disjoint(name: str, data_dir: Path) -> ImageData:
    """A few-shot data set: its parts share no class. glyphs is cut by classes here.

    Raises:
        As `load` and `check_disjoint`.
    """
    check_disjoint(name, data_dir)
    return load(name, data_dir, split="classes") if name == "glyphs" else load(name, data_dir)


def check_disjoint(name: str, data_dir: Path) -> None:
    """ValueError where the parts of a data set share classes. Raises NotPrepared as `load` does."""
    _check_name(name)
    if name == "glyphs" or (name in DOWNLOADS and DOWNLOADS[name].disjoint_classes):
        if name != "glyphs":
            read_manifest(name, data_dir, _folder(name))
        return
    if _fixed(name) or not read_manifest(name, data_dir, _folder(name))["disjoint_classes"]:
        raise ValueError(
            f'data set "{name}" is no few-shot one: its parts share classes; allowed: glyphs, omniglot, or a folder '
            "root/split/class/* whose splits share no class (mini-ImageNet, CUB)"
        )


def checksum(name: str, data_dir: Path) -> str:
    """Identity of a data set: its files and the rule that cuts them. Reads declared digests only, no data.

    Raises:
        ValueError: unknown name. NotPrepared: the set is not on this machine.
    """
    _check_name(name)
    if name in _BUILTIN:
        entry = _BUILTIN[name]
        return hashlib.sha256(f"{builtin_digest(entry.file)}/{entry.rule}".encode()).hexdigest()[:16]
    if name in JOINED:
        return joined_checksum(name, data_dir)
    return str(read_manifest(name, data_dir, _folder(name))["checksum"])


def _load_prepared(name: str, data_dir: Path, *, domain: str | None = None, classes: int | None = None) -> ImageData:
    return read_set(name, data_dir, _folder(name), domain=domain, classes=classes)


@functools.lru_cache(maxsize=16)
def _domain_labels(name: str, data_dir: Path, content: str) -> dict[str, dict[str, Tensor]]:
    # `content` (the checksum) is part of the cache's key: a plan of 10,000 runs asks for the same labels 10,000 times
    if name in JOINED:
        return joined_labels(name, data_dir)
    if name in _BUILTIN:
        loaded = load_domains(name, data_dir)
        return {d: {part: getattr(data, part).labels.clone() for part in PARTS} for d, data in loaded.items()}
    return {d: read_labels(name, data_dir, _folder(name), domain=d) for d in domain_names(name, data_dir)}


@functools.lru_cache(maxsize=64)
def _class_counts(name: str, data_dir: Path, classes: int | None, content: str) -> dict[str, Tensor]:
    # `content` is part of the cache's key, as above
    if name in _BUILTIN:
        data = load(name, data_dir)
        labels, count = {part: getattr(data, part).labels for part in PARTS}, data.num_classes
    else:
        count = read_manifest(name, data_dir, _folder(name))["num_classes"]
        labels = read_labels(name, data_dir, _folder(name))
    counts = {part: torch.bincount(labels[part], minlength=count)[:classes] for part in PARTS}
    for part, of_classes in counts.items():
        if not of_classes.any():
            raise ValueError(f'data set "{name}": no image is left in the {part} part (classes={classes})')
    return counts


def _class_names(name: str, data_dir: Path) -> Sequence[str]:
    """One per class of a set with domains; the only such built-in set, digits, calls its classes by their numbers."""
    if name in JOINED:
        return JOINED[name].class_names
    if name in _BUILTIN:
        return tuple(map(str, range(_BUILTIN[name].info.num_classes or 0)))
    return tuple(read_manifest(name, data_dir, _folder(name))["class_names"])


def _check_classes(name: str, count: int, classes: int | None) -> None:
    if classes is not None and not 2 <= classes <= count:
        raise ValueError(f'data set "{name}" has {count} classes; num_classes={classes} is not in 2..{count}')


def _one_domain(name: str, domains: Sequence[str]) -> str:
    return f'data set "{name}" has domains ({", ".join(domains)}); one without is needed'


def _fixed(name: str) -> bool:
    """Whether its form is known before it is prepared; a folder's is not."""
    return name in _BUILTIN or name in DOWNLOADS or name in JOINED


def _check_name(name: str) -> None:
    if name.startswith(FOLDER) and len(name) > len(FOLDER):
        return
    names = dataset_names()
    if name not in names:
        raise ValueError(f'unknown data set "{name}"; allowed: {", ".join(names)}, folder:PATH{nearest(name, names)}')


def _prepared_before(name: str, data_dir: Path, force: bool) -> dict[str, Any]:
    """The manifest of a folder that is prepared; empty where there is none, or none that is whole and `force`."""
    try:
        manifest = read_manifest(name, data_dir, _folder(name))
        if "root" not in manifest or "size" not in manifest:
            raise ValueError(f"{data_dir / _folder(name)}: not prepared from a folder; --force makes it again")
        return manifest
    except NotPrepared:
        return {}
    except ValueError:
        if force:
            return {}
        raise


def folder_root(name: str) -> Path:
    """The path of a `folder:PATH`, `~` expanded. Raises ValueError where there is no such home."""
    return _expanded(Path(name[len(FOLDER) :]), f'data set "{name}"')


def _expanded(path: Path, what: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what}: {error}") from error


def _folder(name: str) -> str:
    """The folder of a prepared set below data_dir. A path is hashed, so that two folders of one name do not meet."""
    if not name.startswith(FOLDER):
        return name
    try:
        root = folder_root(name).resolve()
    except RuntimeError as error:  # links that lead in a circle
        raise ValueError(f'data set "{name}": {error}') from error
    return f"folder-{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
