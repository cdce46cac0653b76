"""Names of data sets -> what they are, whether they are here, and how they are loaded.

Three kinds of names: built-in sets (files in this package), torchvision's sets (downloaded by `prepare`), and folders
of images (`folder:PATH`, and `imagenet`, whose folder is named when it is prepared).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norms.registry import nearest
from tasks.data import digits, fashion, folders, glyphs, lazy
from tasks.data.downloads import DOWNLOADS, prepare_download
from tasks.data.images import ImageData
from tasks.data.prepared import read_manifest, read_set
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
    return [*_BUILTIN, *DOWNLOADS, "imagenet"]


def dataset_info(name: str) -> DatasetInfo:
    """What is known of a data set without reading it. Raises ValueError with the nearest name for an unknown one."""
    _check_name(name)
    if name in _BUILTIN:
        return _BUILTIN[name].info
    how = f"python run_suite.py data prepare {name}"
    if name in DOWNLOADS:
        d = DOWNLOADS[name]
        return DatasetInfo(name, d.title, "real", d.num_classes, d.image_shape, d.sizes, (), False, how, d.licence)
    if name == "imagenet":
        how, licence = f"{how} --source FOLDER (with train/ and val/; not downloaded)", "non-commercial research only"
        return DatasetInfo(name, "ImageNet", "real", None, None, {}, (), False, how, licence)
    return DatasetInfo(name, Path(name[len(FOLDER) :]).name, "real", None, None, {}, (), False, how, "its owner's")


def is_prepared(name: str, data_dir: Path) -> bool:
    """Whether `load` would find the set: always for built-in ones; files are not verified here."""
    _check_name(name)
    return name in _BUILTIN or (data_dir / _folder(name) / "manifest.json").exists()


def prepare(name: str, data_dir: Path, *, source: Path | None = None, size: int | None = None) -> None:
    """Download or decode a data set into `data_dir`; nothing to do where that has been done. Nothing else downloads.

    Args:
        name: one of `dataset_names()` or `folder:PATH`.
        data_dir: made if missing.
        source: the folder of `imagenet`.
        size: side of a folder's images in pixels (default: 64, and 224 for imagenet).

    Raises:
        ValueError: unknown name, failed download, unsupported folder, damaged image, `source` or `size` where they do
            not apply, or a set that is prepared with another size already.
    """
    _check_name(name)
    if source is not None and name != "imagenet":
        raise ValueError(f'data set "{name}" takes no source; only imagenet does')
    if size is not None and (name in _BUILTIN or name in DOWNLOADS):
        raise ValueError(f'data set "{name}" takes no size; only folders and imagenet do')
    if is_prepared(name, data_dir):
        if size is not None and read_manifest(name, data_dir, _folder(name))["size"] != size:
            raise ValueError(
                f'data set "{name}" is prepared with another size; delete {data_dir / _folder(name)} first'
            )
        return
    if name in DOWNLOADS:
        prepare_download(name, data_dir)
        return
    if name == "imagenet" and source is None:
        raise ValueError("imagenet is not downloaded: give the folder that holds its train/ and val/ as source")
    root = source if source is not None else Path(name[len(FOLDER) :])
    if size is None:
        size = IMAGENET_SIZE if name == "imagenet" else FOLDER_SIZE
    folders.prepare_folder(name, root, data_dir, _folder(name), size)


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
    loader = _BUILTIN[name].load if name in _BUILTIN else _load_prepared
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
    """The domains of a data set, without reading its images. Raises as `load_domains`."""
    _check_name(name)
    if name in _BUILTIN:
        domains = _BUILTIN[name].info.domains
    else:
        domains = tuple(d for d in read_manifest(name, data_dir, _folder(name))["domains"] if d)
    if not domains:
        raise ValueError(f'data set "{name}" has no domains; digits has, and a folder of the form root/domain/class/*')
    return domains


def in_memory(name: str, data_dir: Path) -> bool:
    """Whether `load` holds this set; the others are read by `open_folder`. Raises NotPrepared, or ValueError."""
    _check_name(name)
    if name in _BUILTIN or name in DOWNLOADS:
        return True
    return "index.json" not in read_manifest(name, data_dir, _folder(name))["files"]


def open_folder(name: str, data_dir: Path) -> lazy.FolderData:
    """A folder too large for memory (ImageNet), decoded while it is read; batches by `loaded_batches`.

    Raises:
        NotPrepared, or ValueError: not a folder, damaged, or small enough for `load`.
    """
    _check_name(name)
    if name in _BUILTIN or name in DOWNLOADS:
        raise ValueError(f'data set "{name}" is not a folder of images: use load')
    return lazy.open_folder(name, data_dir, _folder(name))


def check_classifiable(name: str, data_dir: Path, classes: int | None = None) -> None:
    """ValueError where one classifier of the first `classes` classes can not be trained and tested on this set.

    That is: its parts share no class, it has domains to choose from, or `classes` is out of range. Raises
    NotPrepared as `load` does.
    """
    _check_name(name)
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
            raise ValueError(f'data set "{name}" has domains ({", ".join(manifest["domains"])}); one without is needed')
        if classes is not None and "index.json" in manifest["files"]:
            raise ValueError(f'data set "{name}" is too large for memory and has all its classes or none')
    if classes is not None and classes > count:
        raise ValueError(f'data set "{name}" has {count} classes; num_classes={classes} is not in 2..{count}')


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
    if name in _BUILTIN or name in DOWNLOADS or not read_manifest(name, data_dir, _folder(name))["disjoint_classes"]:
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
    return str(read_manifest(name, data_dir, _folder(name))["checksum"])


def _load_prepared(name: str, data_dir: Path, *, domain: str | None = None, classes: int | None = None) -> ImageData:
    return read_set(name, data_dir, _folder(name), domain=domain, classes=classes)


def _check_name(name: str) -> None:
    if name.startswith(FOLDER) and len(name) > len(FOLDER):
        return
    names = dataset_names()
    if name not in names:
        raise ValueError(f'unknown data set "{name}"; allowed: {", ".join(names)}, folder:PATH{nearest(name, names)}')


def _folder(name: str) -> str:
    """The folder of a prepared set below data_dir. A path is hashed, so that two folders of one name do not meet."""
    if not name.startswith(FOLDER):
        return name
    root = Path(name[len(FOLDER) :]).resolve()
    return f"folder-{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
