"""fashion_mnist_mini: 9,000 images of Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), class-balanced, 32x32.

Parts, each in file order and equally many of every class: train = the first 600 of each class in the training file,
val = the next 100 of each, test = the first 200 of each class in the test file. Images that equal an earlier one byte
for byte are passed over, so no image is in two parts. Stored 28x28; two zero pixels are added on every side at load.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from norms.values import nearest
from tasks.data.images import ImageData, Split, make_data, take_per_class
from tasks.data.sources.builtin import Builtin, described
from tasks.data.store import read_builtin

FILE = "fashion_mnist_mini.npz"
TITLE = "Fashion-MNIST mini"
SHIFTED_TITLE = "Fashion-MNIST mini, shifted"
SHIFT_DOMAINS = ("original", "shifted")
SHIFT = (0.5, 96)
"""a, b of the shifted domain's a * x + b on the scale 0 to 255; nothing is cut off."""
SIZES = {"train": 6000, "val": 1000, "test": 2000}
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load_fashion_mnist_mini(checksum: str, *, classes: int | None = None) -> ImageData:
    """The three parts, (1, 32, 32).

    Args:
        checksum: recorded in the result.
        classes: keep the first `classes` classes only (default: all ten).
    """
    arrays = read_builtin(FILE)
    images = F.pad(torch.from_numpy(arrays["images"])[:, None], (2, 2, 2, 2))
    labels = torch.from_numpy(arrays["labels"]).long()
    parts, start = {}, 0
    for part, size in SIZES.items():
        parts[part] = Split(images[start : start + size], labels[start : start + size])
        start += size
    return make_data(
        "fashion_mnist_mini",
        TITLE,
        parts,
        kind="real",
        checksum=checksum,
        num_classes=10,
        classes=classes,
        class_names=CLASSES,
    )


def load_fashion_shifted(checksum: str, *, domain: str = "original", classes: int | None = None) -> ImageData:
    """fashion_mnist_mini as two domains of the same images, the second of which is a * x + b of the first (SHIFT): a
    planted shift, which statistics of the right domain undo but for the padding of convolutions.

    Args and errors as load_fashion_mnist_mini, and

    Args:
        domain: one of SHIFT_DOMAINS.

    Raises:
        ValueError: unknown domain.
    """
    if domain not in SHIFT_DOMAINS:
        raise ValueError(
            f'fashion_shifted: unknown domain "{domain}"; allowed: {", ".join(SHIFT_DOMAINS)}'
            f"{nearest(domain, SHIFT_DOMAINS)}"
        )
    data = load_fashion_mnist_mini(checksum, classes=classes)
    parts = {part: getattr(data, part) for part in SIZES}
    if domain == "shifted":
        scale, offset = SHIFT
        parts = {
            part: Split((split.images * scale + offset).round().to(torch.uint8), split.labels)
            for part, split in parts.items()
        }
    return make_data(
        f"fashion_shifted/{domain}",
        SHIFTED_TITLE,
        parts,
        kind="real" if domain == "original" else "synthetic",
        checksum=checksum,
        num_classes=data.num_classes,
        class_names=data.class_names,
    )


def rebuild_fashion_mnist_mini(folder: Path = DEBIAN_FOLDER) -> dict[str, np.ndarray]:
    """The arrays of FILE, from the four idx files of Debian's package dataset-fashion-mnist."""
    images, labels = _read_part(folder, "train")
    test_images, test_labels = _read_part(folder, "t10k")
    seen: set[bytes] = set()
    train = take_per_class(labels, 0, 600, images, seen)
    rest = np.setdiff1d(np.arange(len(labels)), train)
    val = rest[take_per_class(labels[rest], 0, 100, images[rest], seen)]
    test = take_per_class(test_labels, 0, 200, test_images, seen)
    return {
        "images": np.concatenate([images[train], images[val], test_images[test]]),
        "labels": np.concatenate([labels[train], labels[val], test_labels[test]]),
    }


def _read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 28, 28) and labels uint8 (N,) of one part of an MNIST-like folder."""
    return read_idx(folder / f"{part}-images-idx3-ubyte.gz"), read_idx(folder / f"{part}-labels-idx1-ubyte.gz")


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an idx file (the format of the MNIST distribution), gzipped.

    Raises:
        ValueError: the file is missing, is not idx, or its length does not match its header.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; Debian's package dataset-fashion-mnist installs it") from None
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path}: {values.size} values, its header says {shape}")
    return values.reshape(shape)


MINI = Builtin(
    described("fashion_mnist_mini", TITLE, "real", 10, 1, SIZES, "MIT"),
    FILE,
    load_fashion_mnist_mini,
)
SHIFTED = Builtin(
    described("fashion_shifted", SHIFTED_TITLE, "real and synthetic", 10, 1, SIZES, "MIT", domains=SHIFT_DOMAINS),
    FILE,
    load_fashion_shifted,
)
