"""torchvision's data sets: downloaded and decoded once by `prepare`, never at run time.

Archives are downloaded, or taken from a folder that already holds them (`data prepare NAME --source DIR`).
Every archive and every pickle is verified by its md5 before it is opened, by torchvision (CIFAR, SVHN, STL-10) or by
tasks.data.archives (the others). CIFAR's batches are unpickled here, in `prepare`, and nowhere else: what runs read are
plain arrays (see tasks.data.prepared). What was read is compared with what the set is known to hold before any of it
is written.

Sets of 28x28 images get two zero pixels on every side, USPS (16x16) is enlarged twice (bilinear), Omniglot (105x105,
dark on white) is reduced to 32x32 and inverted: 32x32 everywhere. STL-10 stays 96x96. The val part is a tenth of every
training class, fixed by name; Omniglot's parts have disjoint classes: train and val are the background set's alphabets
(the last six in alphabetical order are val), test is the evaluation set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from norms.values import cut
from tasks.data.archives import (
    Archives,
    Downloaded,
    Given,
    images_by_class,
    read_gzip,
    read_gzip_in_zip,
    read_libsvm,
)
from tasks.data.images import stratified
from tasks.data.prepared import PARTS, Parts, command, new_folder, write_set
from tasks.data.source import DatasetInfo, Preparation
from tasks.data.sources.stored import Stored

VALIDATION_FRACTION = 0.1
OMNIGLOT_VAL_ALPHABETS = 6


_Reader = Callable[[Archives], tuple[Parts, list[str]]]


@dataclass(frozen=True)
class Download:
    """Facts about a set that has not been downloaded.

    Args:
        title: for tables.
        num_classes: over all parts.
        image_shape: (C, H, W) after preparation.
        sizes: images by part, as published; "train" includes what becomes val.
        licence: as its publishers state it.
        read: archives -> (train and val) and test, or three parts where classes are disjoint.
    """

    title: str
    num_classes: int
    image_shape: tuple[int, int, int]
    sizes: dict[str, int]
    licence: str
    read: _Reader
    disjoint_classes: bool = False


def _kind(name: str) -> Any:
    """A torchvision class. Imported here: what loads a cache does not need it."""
    import torchvision

    return getattr(torchvision.datasets, name)


def prepare_download(name: str, data_dir: Path, *, source: Path | None = None, replace: bool = False) -> None:
    """Read the archives, compare with what is known of the set, write data_dir/name.

    Args:
        name, data_dir: as for `prepare`.
        source: a folder that holds the archives; None: they are downloaded into data_dir/downloads, and kept.
        replace: take the place of a set that is there already; otherwise that one stays.

    Raises:
        ValueError: the download failed, an archive is not in `source` or has another md5, or what was read is not the
            whole set; says why, and that nothing was left half done.
    """
    entry = DOWNLOADS[name]
    root = data_dir / "downloads" / name if source is None else source
    try:
        if source is None:
            root.mkdir(parents=True, exist_ok=True)
        elif not source.is_dir():
            raise ValueError("no such folder")
        parts, class_names = entry.read(Downloaded(root) if source is None else Given(source, name, data_dir))
    except Exception as error:  # a damaged file makes a reader raise whatever it likes, EOFError among them
        reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())
        if source is not None:
            raise ValueError(
                f'data set "{name}" could not be read from {source}: {cut(reason, 400)}. Nothing of it was prepared'
            ) from error
        raise ValueError(
            f'data set "{name}" could not be downloaded or read: {reason[:240]}. Nothing of it was prepared; '
            f"run the command again, or put the publisher's files into {root} yourself"
        ) from error
    if mistake := _incomplete(entry, parts, class_names):
        raise ValueError(
            f'data set "{name}" is not whole: {mistake}. Nothing of it was prepared; '
            + (f"delete {root} and prepare it again" if source is None else f"it was read from {root}")
        )
    if not entry.disjoint_classes:
        images, labels = parts["train"]
        where = stratified(labels, {"train": 1 - VALIDATION_FRACTION, "val": VALIDATION_FRACTION}, name)
        parts = {**{part: (images[i], labels[i]) for part, i in where.items()}, "test": parts["test"]}
    facts: dict[str, Any] = {
        "name": name,
        "title": entry.title,
        "kind": "real",
        "num_classes": entry.num_classes,
        "class_names": class_names,
        "disjoint_classes": entry.disjoint_classes,
        "made_with": f"torchvision {version('torchvision')}",
    }
    with new_folder(data_dir, name, replace=replace) as folder:
        write_set(folder, facts, {"": parts})


class TorchvisionSets(Stored):
    """The sets in DOWNLOADS."""

    accepts = ("source",)

    def info(self, name: str) -> DatasetInfo:
        entry = DOWNLOADS[name]
        return DatasetInfo(
            name,
            entry.title,
            "real",
            entry.num_classes,
            entry.image_shape,
            entry.sizes,
            (),
            False,
            command(name),
            entry.licence,
            entry.disjoint_classes,
        )

    def few_shot(self, name: str, data_dir: Path) -> bool:
        return DOWNLOADS[name].disjoint_classes and super().few_shot(name, data_dir)

    def prepare(
        self, name: str, data_dir: Path, *, source: Path | None = None, size: int | None = None, force: bool = False
    ) -> Preparation:
        if not force and self.is_prepared(name, data_dir):
            return Preparation(False)
        prepare_download(name, data_dir, source=source, replace=force)
        return Preparation(True)


def _incomplete(entry: Download, parts: Parts, class_names: list[str]) -> str | None:
    """What a set that was read lacks of what it is known to hold, or None."""
    if len(class_names) != entry.num_classes:
        return f"it has {len(class_names)} classes, published are {entry.num_classes}"
    found: dict[str, set[int]] = {}
    for part, (images, labels) in parts.items():
        if images.dtype != np.uint8 or images.shape[1:] != entry.image_shape:
            return f"images of the {part} part are {images.dtype} {images.shape[1:]}, not uint8 {entry.image_shape}"
        if labels.shape != (len(images),):
            return f"the {part} part has {len(images)} images and labels {labels.shape}"
        found[part] = set(np.unique(labels).tolist())
        if odd := found[part] - set(range(entry.num_classes)):
            return f"the {part} part has a label {min(odd)}; classes are 0 to {entry.num_classes - 1}"
    counts = {part: len(labels) for part, (_, labels) in parts.items()}
    if entry.disjoint_classes:
        counts = {"train": counts["train"] + counts["val"], "test": counts["test"]}
        if sum(map(len, found.values())) > len(set().union(*found.values())):
            return "a class is in two parts"
        found = {"whole": set().union(*found.values())}
    for part, published in entry.sizes.items():
        if counts[part] != published:
            return f"the {part} part has {counts[part]} images, published are {published}"
    for part, labels_found in found.items():
        if absent := set(range(entry.num_classes)) - labels_found:
            return f'the {part} part has no image of class "{class_names[min(absent)]}"'
    return None


def _padded(images: np.ndarray) -> np.ndarray:
    """(N, 28, 28) -> (N, 1, 32, 32)."""
    return np.pad(images[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))


def _mnist_like(name: str) -> _Reader:
    """A reader of MNIST and the sets of its format: four compressed IDX files."""

    def read(archives: Archives) -> tuple[Parts, list[str]]:
        kind = _kind(name)
        arrays = []
        for file, md5 in kind.resources:  # images and labels of the training part, then of the test part
            urls = [mirror + file for mirror in kind.mirrors]
            arrays.append(read_gzip(archives.file(f"{name}/raw/{file}", urls, md5)))
        parts = {"train": (_padded(arrays[0]), arrays[1]), "test": (_padded(arrays[2]), arrays[3])}
        return parts, [str(c) for c in kind.classes]

    return read


def _emnist(archives: Archives) -> tuple[Parts, list[str]]:
    """The split "balanced" of EMNIST, which stores its images transposed."""
    kind = _kind("EMNIST")
    archive = archives.file(f"EMNIST/raw/{kind.url.rpartition('/')[2]}", [kind.url], kind.md5)
    parts = {}
    for part in ("train", "test"):
        images, labels = (
            read_gzip_in_zip(archive, f"gzip/emnist-balanced-{part}-{field}-ubyte.gz")
            for field in ("images-idx3", "labels-idx1")
        )
        parts[part] = (_padded(images.transpose(0, 2, 1)), labels)
    return parts, list(kind.classes_split_dict["balanced"])


def _cifar(name: str) -> _Reader:
    def read(archives: Archives) -> tuple[Parts, list[str]]:
        parts, names = {}, []
        kind = _kind(name)
        with archives.roots(kind) as root:
            for part in ("train", "test"):
                source = kind(str(root(part)), train=part == "train", download=archives.downloads)
                parts[part] = (source.data.transpose(0, 3, 1, 2), np.array(source.targets))
                names = list(source.classes)
        return parts, names

    return read


def _labelled(name: str) -> _Reader:
    """A reader of SVHN and STL-10: `split=`, images already (N, C, H, W), labels in `.labels`."""

    def read(archives: Archives) -> tuple[Parts, list[str]]:
        parts, names = {}, [str(digit) for digit in range(10)]
        kind = _kind(name)
        with archives.roots(kind) as root:
            for part in ("train", "test"):
                source = kind(str(root(part)), split=part, download=archives.downloads)
                parts[part] = (source.data, np.asarray(source.labels))
                names = list(getattr(source, "classes", names))
        return parts, names

    return read


def _usps(archives: Archives) -> tuple[Parts, list[str]]:
    parts = {}
    for part in ("train", "test"):
        url, file, md5 = _kind("USPS").split_list[part]
        images, labels = read_libsvm(archives.file(file, [url], md5))
        small = torch.from_numpy(images)[:, None].double()  # float64: exact, equal on every machine
        large = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        parts[part] = (large.round().to(torch.uint8).numpy(), labels)
    return parts, [str(digit) for digit in range(10)]


def _omniglot(archives: Archives) -> tuple[Parts, list[str]]:
    kind = _kind("Omniglot")
    names: list[str] = []
    found: dict[str, list[tuple[np.ndarray, int]]] = {part: [] for part in PARTS}
    for folder in ("images_background", "images_evaluation"):
        file = f"{folder}.zip"
        url = f"{kind.download_url_prefix}/{file}"
        archive = archives.file(f"{kind.folder}/{file}", [url], kind.zips_md5[folder])
        pairs = [(character, _reduced(image)) for character, image in images_by_class(archive, folder)]
        characters = sorted({character for character, _ in pairs})
        val = sorted({character.split("/")[0] for character in characters})[-OMNIGLOT_VAL_ALPHABETS:]
        label = {character: len(names) + i for i, character in enumerate(characters)}
        for character, small in pairs:
            background = "val" if character.split("/")[0] in val else "train"
            found[background if folder == "images_background" else "test"].append((small, label[character]))
        names += characters
    parts = {part: (np.stack([i for i, _ in pairs]), np.array([y for _, y in pairs])) for part, pairs in found.items()}
    return parts, names


def _reduced(image: Image.Image) -> np.ndarray:
    """A character, dark on white, as uint8 (1, 32, 32), white on black."""
    return 255 - np.asarray(image.convert("L").resize((32, 32)), np.uint8)[None]


_GRAY, _RGB = (1, 32, 32), (3, 32, 32)
_RESEARCH = "no licence stated; published for research"
DOWNLOADS = {
    "mnist": Download("MNIST", 10, _GRAY, {"train": 60000, "test": 10000}, "CC BY-SA 3.0", _mnist_like("MNIST")),
    "fashion_mnist": Download(
        "Fashion-MNIST", 10, _GRAY, {"train": 60000, "test": 10000}, "MIT", _mnist_like("FashionMNIST")
    ),
    "kmnist": Download("KMNIST", 10, _GRAY, {"train": 60000, "test": 10000}, "CC BY-SA 4.0", _mnist_like("KMNIST")),
    "emnist": Download(
        "EMNIST balanced",
        47,
        _GRAY,
        {"train": 112800, "test": 18800},
        "public domain (NIST)",
        _emnist,
    ),
    "cifar10": Download("CIFAR-10", 10, _RGB, {"train": 50000, "test": 10000}, _RESEARCH, _cifar("CIFAR10")),
    "cifar100": Download("CIFAR-100", 100, _RGB, {"train": 50000, "test": 10000}, _RESEARCH, _cifar("CIFAR100")),
    "svhn": Download("SVHN", 10, _RGB, {"train": 73257, "test": 26032}, "non-commercial use only", _labelled("SVHN")),
    "usps": Download("USPS", 10, _GRAY, {"train": 7291, "test": 2007}, _RESEARCH, _usps),
    "stl10": Download("STL-10", 10, (3, 96, 96), {"train": 5000, "test": 8000}, _RESEARCH, _labelled("STL10")),
    "omniglot": Download(
        "Omniglot", 1623, _GRAY, {"train": 19280, "test": 13180}, "MIT", _omniglot, disjoint_classes=True
    ),
}
