"""Sets of images too large for memory: an index of files, decoded while they are read by DataLoader workers.

`prepare` writes the index (paths, labels, file sizes) beside the set's manifest. A worker draws nothing: an item
depends on its file and, where training takes random resized crops, on the crop that was drawn for it in the run's own
process. All other augmentation is done in batches on the device, from the run's own generators.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from norms.workers import ALONE, Workers
from tasks.data.crops import Crop, draw_crops
from tasks.data.decoding import decode
from tasks.data.prepared import PARTS, check_domain, read_index

SHORTER = 256 / 224
"""The shorter side of an image in sides of the middle that is cut from it where no crop is drawn: how ImageNet's
classifiers are evaluated."""
MOST_WORKERS = 256
"""Processes that may be asked for: more than any machine has cores for one run."""


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Lazily decoded images: item i is (uint8 (3, size, size), label), the middle of an image whose shorter side was
    resized to SHORTER sides; item (i, crop) is a crop of the whole image.

    Args:
        root: the folder.
        entries: (path below root, label, file size in bytes) of each image.
        size: side of the decoded images, in pixels.
        workers: processes that decode what is read in batches (tasks.data.reading); None: as many as are usual there.
    """

    def __init__(self, root: Path, entries: list[tuple[str, int, int]], size: int, workers: int | None = None):
        self.root, self.size, self.workers = root, size, workers
        self.paths = [path for path, _, _ in entries]
        self.labels = torch.tensor([label for _, label, _ in entries], dtype=torch.long)
        self._bytes = [count for _, _, count in entries]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | tuple[int, Crop]) -> tuple[Tensor, int]:
        place, crop = (index, None) if isinstance(index, int) else index
        path = self.root / self.paths[place]
        if not path.is_file() or path.stat().st_size != self._bytes[place]:
            raise ValueError(f"{path}: missing or changed since the folder was prepared; prepare it again with --force")
        image = decode(path, self.size, crop, round(self.size * SHORTER))
        return torch.from_numpy(image), int(self.labels[place])

    def labelled(self, label: int) -> FolderImages:
        """The same images, all with this label."""
        entries = [(path, label, count) for path, count in zip(self.paths, self._bytes, strict=True)]
        return FolderImages(self.root, entries, self.size, self.workers)


@dataclass(frozen=True)
class FolderData:
    """A data set too large for memory; fields as in ImageData, the parts are FolderImages.

    mean and std were measured on a sample of the train part of all classes, whatever classes are kept.
    """

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


def open_folder(
    name: str,
    data_dir: Path,
    folder: str,
    *,
    domain: str | None = None,
    classes: int | None = None,
    workers: int | None = None,
) -> FolderData:
    """A prepared folder, or one domain of it, that is decoded while it is read.

    Args:
        name: of the set.
        data_dir, folder: where it is prepared.
        domain: one of its domains, where it has some.
        classes: keep the first K classes.
        workers: as of FolderImages.

    Raises:
        NotPrepared: it was not prepared. ValueError: its index is damaged, or it is one that `load` holds in memory;
            `domain` is missing, unknown or not applicable; `classes` is out of range or leaves a part without images.
    """
    manifest, index = read_index(name, data_dir, folder)
    domains = [] if manifest["domains"] == [""] else manifest["domains"]
    domain = check_domain(name, domain, domains) if domains or domain is not None else ""
    count = manifest["num_classes"]
    if classes is not None and not 2 <= classes <= count:
        raise ValueError(f'data set "{name}" has {count} classes; classes={classes} is not in 2..{count}')
    count = classes or count
    parts = {}
    for part in PARTS:
        entries = [entry for entry in index[domain][part] if entry[1] < count]
        if not entries:
            raise ValueError(f'data set "{name}": no image is left in the {part} part (classes={classes})')
        parts[part] = FolderImages(Path(manifest["root"]), entries, manifest["size"], workers)
    mean, std = manifest["moments"][domain]
    return FolderData(
        name=f"{name}/{domain}" if domain else name,
        title=manifest["title"],
        **parts,
        num_classes=count,
        image_shape=(3, manifest["size"], manifest["size"]),
        mean=tuple(mean),
        std=tuple(std),
        kind=manifest["kind"],
        checksum=manifest["checksum"],
        class_names=tuple(manifest["class_names"][:count]),
    )


def loaded_batches(
    images: FolderImages,
    batch_size: int,
    generator: torch.Generator | None,
    *,
    crops: bool = False,
    workers: int = 0,
    drop_last: bool = True,
    skip: int = 0,
    to: Workers = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images uint8 (B, 3, H, W), labels (B,)) on the CPU, decoded by `workers` processes.

    Args:
        generator: draws the order, and then a seed for the crops of each batch; None keeps the stored order.
        crops: random resized crops of the whole images, mirrored every second time (tasks.data.crops); needs a
            generator.
        workers: processes; 0 decodes in this one. The batches do not depend on it.
        drop_last: leave out the last images when they do not fill a batch.
        skip: batches to leave out at the start; they are not decoded.
        to: the worker of the run whose part of each batch is decoded.

    Raises:
        ValueError: as shuffled_batches.
    """
    if batch_size < 1 or (drop_last and batch_size > len(images)):
        raise ValueError(f"batch_size {batch_size}: at least 1, and with drop_last at most the {len(images)} images")
    order = torch.arange(len(images)) if generator is None else torch.randperm(len(images), generator=generator)
    stop = len(images) - len(images) % batch_size if drop_last else len(images)
    chunks = order[:stop].split(batch_size)
    seeds = crop_seeds(len(chunks), generator) if crops and generator is not None else None
    return read_chunks(images, chunks, seeds, workers=workers, skip=skip, to=to)


def crop_seeds(batches: int, generator: torch.Generator) -> list[int]:
    """One for the crops of each batch of a pass, so that a batch can be read without those before it."""
    seeds: list[int] = torch.randint(2**62, (batches,), generator=generator, device=generator.device).tolist()
    return seeds


def read_chunks(
    images: FolderImages,
    chunks: Sequence[Tensor],
    seeds: Sequence[int] | None,
    *,
    workers: int,
    skip: int = 0,
    to: Workers = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images that each of `chunks` (int64 (B,)) names: (images uint8 (B, 3, H, W), labels (B,)), on the CPU.

    Args:
        chunks: one for each batch.
        seeds: of the crops of each batch; None: no crops.
        workers: processes; 0 decodes in this one.
        skip: batches to leave out at the start.
        to: the worker of the run whose part of each batch is decoded; crops are drawn for all of it.
    """

    def parts() -> Iterator[list[Any]]:
        for number in range(skip, len(chunks)):
            places = chunks[number].tolist()
            asked = places if seeds is None else zip(places, draw_crops(len(places), seeds[number]), strict=True)
            yield list(asked)[to.rank :: to.size]

    def together(items: list[tuple[Tensor, int]]) -> Any:
        # a worker's part of a batch may be empty
        return default_collate(items) if items else (torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0).long())

    shape = (3, images.size, images.size)

    # A run's own process comes from a fork server, where each worker would import torch anew (20 s for a short epoch);
    # workers only decode, so a plain fork is safe where the platform's libraries bear it.
    workers = min(workers, len(chunks) - skip)
    start = "fork" if workers and sys.platform == "linux" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than cores: as was asked
        loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=parts(),
            collate_fn=together,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=start,
            generator=torch.Generator(),  # it draws when it starts; nobody's numbers may depend on that
        )
        return iter(loader)
