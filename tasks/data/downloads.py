"""torchvision's data sets: downloaded and decoded once by `prepare`, never at run time.

torchvision verifies an md5 of everything it downloads. Its CIFAR loader then unpickles the batches; this happens here,
in `prepare`, and nowhere else: what runs read are plain arrays (see tasks.data.prepared).

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

from tasks.data.images import stratified
from tasks.data.prepared import Parts, new_folder, write_set

VALIDATION_FRACTION = 0.1
OMNIGLOT_VAL_ALPHABETS = 6


@dataclass(frozen=True)
class Download:
    """What is known of a set before it is on this machine.

    Args:
        title: for tables.
        num_classes: over all parts.
        image_shape: (C, H, W) after preparation.
        sizes: images by part, as published; "train" includes what becomes val.
        licence: as its publishers state it.
        read: torchvision root folder -> (train and val) and test, or three parts where classes are disjoint.
    """

    title: str
    num_classes: int
    image_shape: tuple[int, int, int]
    sizes: dict[str, int]
    licence: str
    read: Callable[[Path], tuple[Parts, list[str]]]
    disjoint_classes: bool = False


def _source(kind: str, root: Path, **options: Any) -> Any:
    """A torchvision data set, downloaded if not in `root`. Imported here: what loads a cache does not need it."""
    import torchvision

    return getattr(torchvision.datasets, kind)(str(root), download=True, **options)


def prepare_download(name: str, data_dir: Path, *, replace: bool = False) -> None:
    """Download (into data_dir/downloads, kept, so that an interrupted one goes on) and write data_dir/name.

    replace: take the place of a set that is there already; otherwise that one stays.

    Raises:
        ValueError: the download failed; says why, and that nothing was left half done.
    """
    entry = DOWNLOADS[name]
    root = data_dir / "downloads" / name
    root.mkdir(parents=True, exist_ok=True)
    try:
        parts, class_names = entry.read(root)
    except (OSError, RuntimeError) as error:  # torchvision's own two ways to say so
        raise ValueError(
            f'data set "{name}" could not be downloaded or read: {type(error).__name__}: {error}. '
            f"Nothing of it was prepared; run the command again, or put the publisher's files into {root} yourself"
        ) from error
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


def _mnist_like(kind: str, **options: Any) -> Callable[[Path], tuple[Parts, list[str]]]:
    """A reader of MNIST and the sets that share its format. EMNIST stores its images transposed."""

    def read(root: Path) -> tuple[Parts, list[str]]:
        parts, names = {}, []
        for part in ("train", "test"):
            source = _source(kind, root, train=part == "train", **options)
            images = source.data.transpose(1, 2) if kind == "EMNIST" else source.data
            parts[part] = (F.pad(images[:, None], (2, 2, 2, 2)).numpy(), source.targets.numpy())
            names = [str(c) for c in source.classes]
        return parts, names

    return read


def _cifar(kind: str) -> Callable[[Path], tuple[Parts, list[str]]]:
    def read(root: Path) -> tuple[Parts, list[str]]:
        parts, names = {}, []
        for part in ("train", "test"):
            source = _source(kind, root, train=part == "train")
            parts[part] = (source.data.transpose(0, 3, 1, 2), np.array(source.targets))
            names = list(source.classes)
        return parts, names

    return read


def _labelled(kind: str) -> Callable[[Path], tuple[Parts, list[str]]]:
    """A reader of SVHN and STL-10: `split=`, images already (N, C, H, W), labels in `.labels`."""

    def read(root: Path) -> tuple[Parts, list[str]]:
        parts, names = {}, [str(digit) for digit in range(10)]
        for part in ("train", "test"):
            source = _source(kind, root, split=part)
            parts[part] = (source.data, np.asarray(source.labels))
            names = list(getattr(source, "classes", names))
        return parts, names

    return read


def _usps(root: Path) -> tuple[Parts, list[str]]:
    parts = {}
    for part in ("train", "test"):
        source = _source("USPS", root, train=part == "train")
        small = torch.from_numpy(np.asarray(source.data))[:, None].double()  # float64: exact, equal on every machine
        large = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        parts[part] = (large.round().to(torch.uint8).numpy(), np.asarray(source.targets))
    return parts, [str(digit) for digit in range(10)]


def _omniglot(root: Path) -> tuple[Parts, list[str]]:
    names: list[str] = []
    found: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "val": [], "test": []}
    for background in (True, False):
        source = _source("Omniglot", root, background=background)
        # torchvision numbers the characters alphabet by alphabet; its list of "alphabet/character" has no public name
        characters = [str(character) for character in source._characters]
        val = sorted({character.split("/")[0] for character in characters})[-OMNIGLOT_VAL_ALPHABETS:]
        for image, label in source:
            small = 255 - np.asarray(image.convert("L").resize((32, 32)), np.uint8)
            alphabet = characters[label].split("/")[0]
            part = "test" if not background else "val" if alphabet in val else "train"
            found[part].append((small[None], len(names) + label))
        names += characters
    parts = {part: (np.stack([i for i, _ in pairs]), np.array([y for _, y in pairs])) for part, pairs in found.items()}
    return parts, names


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
        _mnist_like("EMNIST", split="balanced"),
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
