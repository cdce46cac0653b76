"""Sets of images too large for memory: an index of files, decoded while they are read by DataLoader workers.

`prepare` writes the index (paths, labels, file sizes) beside the set's manifest. Decoding draws nothing: an item
depends on its file alone, and images are augmented in batches on the device, from the run's own generators.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tasks.data.decoding import decode
from tasks.data.prepared import read_index


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Lazily decoded images: item i is (uint8 (3, size, size), label).

    Args:
        root: the folder.
        entries: (path below root, label, file size in bytes) of each image.
        size: side of the decoded images, in pixels.
    """

    def __init__(self, root: Path, entries: list[tuple[str, int, int]], size: int):
        self.root, self.size = root, size
        self.paths = [path for path, _, _ in entries]
        self.labels = torch.tensor([label for _, label, _ in entries], dtype=torch.long)
        self._bytes = [count for _, _, count in entries]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / self.paths[index]
        if not path.is_file() or path.stat().st_size != self._bytes[index]:
            raise ValueError(f"{path}: missing or changed since the folder was prepared; prepare it again with --force")
        return torch.from_numpy(decode(path, self.size)), int(self.labels[index])


@dataclass(frozen=True)
class FolderData:
    """A data set too large for memory; fields as in ImageData, the parts are FolderImages."""

    name: str
    title: str
    train: FolderImages
    val: FolderImages
    test: FolderImages
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str
    checksum: str
    class_names: tuple[str, ...]


def open_folder(name: str, data_dir: Path, folder: str) -> FolderData:
    """A prepared folder that is decoded while it is read.

    Raises:
        NotPrepared: it was not prepared. ValueError: its index is damaged, or it is one that `load` holds in memory.
    """
    manifest, index = read_index(name, data_dir, folder)
    root, size = Path(manifest["root"]), manifest["size"]
    parts = {part: FolderImages(root, entries, size) for part, entries in index.items()}
    mean, std = manifest["moments"][""]
    return FolderData(
        name=name,
        title=manifest["title"],
        **parts,
        num_classes=manifest["num_classes"],
        image_shape=(3, size, size),
        mean=tuple(mean),
        std=tuple(std),
        kind=manifest["kind"],
        checksum=manifest["checksum"],
        class_names=tuple(manifest["class_names"]),
    )


def loaded_batches(
    images: FolderImages,
    batch_size: int,
    generator: torch.Generator | None,
    *,
    workers: int = 0,
    drop_last: bool = True,
    skip: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images uint8 (B, 3, H, W), labels (B,)) on the CPU, decoded by `workers` processes.

    Decoding draws nothing, so the batches do not depend on the number of workers: augment them on the device.

    Args:
        generator: draws the order; None keeps the stored order.
        workers: processes; 0 decodes in this one.
        drop_last: leave out the last images when they do not fill a batch.
        skip: batches to leave out at the start; they are not decoded.

    Raises:
        ValueError: as shuffled_batches.
    """
    if batch_size < 1 or (drop_last and batch_size > len(images)):
        raise ValueError(f"batch_size {batch_size}: at least 1, and with drop_last at most the {len(images)} images")
    order = torch.arange(len(images)) if generator is None else torch.randperm(len(images), generator=generator)
    stop = len(images) - len(images) % batch_size if drop_last else len(images)
    chunks = [chunk.tolist() for chunk in order[:stop].split(batch_size)[skip:]]
    # A run's own process comes from a fork server, where each worker would import torch anew (20 s for a short epoch);
    # workers only decode, so a plain fork is safe where the platform's libraries bear it.
    start = "fork" if workers and sys.platform == "linux" else None
    pin = torch.cuda.is_available()
    return iter(
        DataLoader(images, batch_sampler=chunks, num_workers=workers, pin_memory=pin, multiprocessing_context=start)
    )
