"""The value every data set is loaded into: uint8 images with labels, cut into train, validation and test parts.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """One part of a data set, held whole in memory.

    Args:
        images: uint8 (N, C, H, W), 0 to 255.
        labels: int64 (N,).
        groups: int64 (N,) or None: what made each image besides its class (a glyph's face: an index into
            `ImageData.group_names`).
    """

    images: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same part with its tensors on `device`."""
        groups = None if self.groups is None else self.groups.to(device)
        return Split(self.images.to(device), self.labels.to(device), groups)

    def select(self, index: Tensor) -> Split:
        """The images that `index` (bool (N,) or int64 (M,)) names, in its order."""
        groups = None if self.groups is None else self.groups[index]
        return Split(self.images[index], self.labels[index], groups)


@dataclass(frozen=True)
class ImageData:
    """A data set with its three parts.

    Args:
        name: as given to `load`.
        title: for tables and captions.
        train, val, test: the parts. In built-in sets no image is in two of them; published sets are taken as they are.
        num_classes: labels are 0 to num_classes - 1.
        image_shape: (C, H, W).
        mean, std: per channel over the train part, of values divided by 255.
        kind: "real" or "synthetic": the evidence class printed under tables.
        checksum: identity of the files and of the rule that cuts them into parts.
        class_names: one per label; empty where the source has none.
        group_names: what `Split.groups` indexes; empty where there are no groups.
        group_families: the family of each group (a face's typeface).
        disjoint_classes: the parts share no class (few-shot), so a classifier of one says nothing on another.
    """

    name: str
    title: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str
    checksum: str
    class_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    group_families: tuple[str, ...] = ()
    disjoint_classes: bool = False

    def to(self, device: torch.device | str) -> ImageData:
        """The same data set with every tensor on `device`."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def make_data(
    name: str,
    title: str,
    parts: dict[str, Split],
    *,
    kind: str,
    checksum: str,
    num_classes: int,
    classes: int | None = None,
    class_names: Sequence[str] = (),
    group_names: Sequence[str] = (),
    group_families: Sequence[str] = (),
    disjoint_classes: bool = False,
    moments: Sequence[Sequence[float]] | None = None,
) -> ImageData:
    """An ImageData from its parts, cut to the first `classes` classes.

    Args:
        moments: (mean, std) of the whole train part where they are known; measured otherwise.
        Others as in ImageData.

    Raises:
        ValueError: `classes` is below 2 or above num_classes, or leaves a part without images.
    """
    if classes is not None:
        if not 2 <= classes <= num_classes:
            raise ValueError(
                f'data set "{name}" has {num_classes} classes; classes={classes} is not in 2..{num_classes}'
            )
        if classes < num_classes:
            parts = {part: split.select(split.labels < classes) for part, split in parts.items()}
            num_classes, class_names, moments = classes, class_names[:classes], None
    for part, split in parts.items():
        if not len(split):
            raise ValueError(f'data set "{name}": no image is left in the {part} part (classes={classes})')
    shape = parts["train"].images.shape
    mean, std = moments or channel_moments(parts["train"].images)
    return ImageData(
        name=name,
        title=title,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        num_classes=num_classes,
        image_shape=(int(shape[1]), int(shape[2]), int(shape[3])),
        mean=tuple(mean),
        std=tuple(std),
        kind=kind,
        checksum=checksum,
        class_names=tuple(class_names),
        group_names=tuple(group_names),
        group_families=tuple(group_families),
        disjoint_classes=disjoint_classes,
    )


def shrink(data: ImageData, size: int) -> ImageData:
    """The same data set with images averaged down to `size` x `size`, rounded to uint8; mean and std measured anew.

    Raises:
        ValueError: `size` is no integer fraction of the images' sides.
    """
    if data.image_shape[1:] == (size, size):
        return data

    def small(split: Split) -> Split:
        return replace(split, images=shrunk(split.images, size, f'data set "{data.name}": '))

    train = small(data.train)
    mean, std = channel_moments(train.images)
    shape = (data.image_shape[0], size, size)
    return replace(data, train=train, val=small(data.val), test=small(data.test), image_shape=shape, mean=mean, std=std)


def shrunk(images: Tensor, size: int, whose: str = "") -> Tensor:
    """Images (N, C, H, W), 0 to 255, averaged down to `size` x `size` and rounded to uint8.

    Raises:
        ValueError: `size` is no integer fraction of the images' sides; begins with `whose`.
    """
    height, width = images.shape[2:]
    if height != width or height % size:
        fractions = ", ".join(str(s) for s in range(4, height + 1) if height % s == 0) if height == width else "none"
        raise ValueError(f"{whose}image_size {size} of {height}x{width}; allowed: {fractions}")
    pieces = [F.avg_pool2d(piece.float(), height // size) for piece in images.split(4096)]
    return torch.cat(pieces).round_().to(torch.uint8)


def channel_moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), of values divided by 255.

    Exact: counted over the 256 values and divided once, so equal on every machine. A constant channel gets std 1.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        # in pieces: bincount widens to int64, eight times the memory of the images
        pieces = images[:, channel].split(4096)
        count = torch.stack([torch.bincount(piece.reshape(-1), minlength=256) for piece in pieces]).sum(0).double()
        mean = (count * levels).sum() / count.sum()
        variance = (count * (levels - mean) ** 2).sum() / count.sum()
        means.append(float(mean))
        stds.append(float(variance.sqrt()) or 1.0)
    return tuple(means), tuple(stds)


def take_per_class(
    labels: np.ndarray, start: int, stop: int, images: np.ndarray | None = None, seen: set[bytes] | None = None
) -> np.ndarray:
    """Positions, rising, of the start-th to (stop-1)-th image of every class, in file order.

    Args:
        labels: (N,).
        start, stop: positions within a class.
        images: (N, ...), given together with `seen`.
        seen: an image whose bytes are in here is passed over (the next one takes its place); what is taken is added.
    """
    taken: list[int] = []
    found = dict.fromkeys(np.unique(labels).tolist(), 0)
    for position, label in enumerate(labels.tolist()):
        if found[label] >= stop:
            continue
        if images is not None and seen is not None:
            content = images[position].tobytes()
            if content in seen:
                continue
            seen.add(content)
        if found[label] >= start:
            taken.append(position)
        found[label] += 1
    return np.array(taken, np.int64)


def stratified(labels: np.ndarray, fractions: dict[str, float], salt: str) -> dict[str, np.ndarray]:
    """Positions (each in rising order) of disjoint parts with the given fractions of every class.

    Which images of a class go where is a permutation fixed by `salt` alone, so it is the same on every machine and for
    every seed of a run. Fractions are rounded; the first part takes the rest. A class with at least as many images as
    there are parts is in all of them, a smaller one in the first only.

    Args:
        labels: (N,) integers.
        fractions: part -> fraction; they sum to 1, the first is the largest.
        salt: usually the data set's name.
    """
    first, *others = fractions
    found: dict[str, list[np.ndarray]] = {name: [] for name in fractions}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[shuffled_order(len(members), f"{salt}/{label}")]
        start = 0
        for name in others if len(members) > len(others) else ():
            size = max(1, round(fractions[name] * len(members)))
            found[name].append(members[start : start + size])
            start += size
        found[first].append(members[start:])
    return {name: np.sort(np.concatenate([np.zeros(0, np.int64), *found[name]])) for name in fractions}


def shuffled_order(length: int, salt: str) -> np.ndarray:
    """A permutation of range(length) that depends on nothing but (length, salt), in any version of any library."""
    return np.argsort(random_words(length, salt), kind="stable")


def random_words(count: int, salt: str) -> np.ndarray:
    """`count` uint64 words that depend on `salt` alone (sha256 in counter mode): numpy's own streams may change."""
    blocks = (hashlib.sha256(f"{salt}/{block}".encode()).digest() for block in range((count + 3) // 4))
    return np.frombuffer(b"".join(blocks), dtype=">u8")[:count].astype(np.uint64)
