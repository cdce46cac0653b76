"""Batches of a part of a data set, by the same calls whether it is held in memory or decoded while it is read.

One augmentation is made while a file is read, if it is read: the random resized crop, which needs the whole image. A
task says its augmentation to `stream`, and makes of each batch what `left_to_augment` leaves.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from norms.workers import ALONE, Workers
from tasks import data as datasets
from tasks.base import RunContext
from tasks.data.batches import (
    augment,
    ordered_batches,
    shuffled_batches,
    single_class_batches,
    single_class_count,
    single_class_order,
)
from tasks.data.images import ImageData, Split, channel_moments
from tasks.data.lazy import FolderData, FolderImages, crop_seeds, loaded_batches, read_chunks
from tasks.data.stream import Stream

Part = Split | FolderImages
Data = ImageData | FolderData
DECODERS = 4
"""Processes, at most, that decode what is not in memory where nobody says how many; no batch depends on it."""
TOGETHER = 64
"""Images that are decoded at once where nobody asks for batches."""
UNLABELLED = -1


def opened(name: str, context: RunContext, *, domain: str | None = None, classes: int | None = None) -> Data:
    """A data set, or one of its domains: on the run's device where it fits into memory, else decoded while it is read.

    Args:
        name, domain, classes: as of tasks.data.load.
        context: of the run. Batches of what is decoded are on the CPU.

    Raises:
        NotPrepared, ValueError: as tasks.data.load.
    """
    chosen: dict[str, Any] = {"classes": classes} if domain is None else {"domain": domain, "classes": classes}
    if datasets.in_memory(name, context.data_dir):
        return datasets.load(name, context.data_dir, **chosen).to(context.device)
    return datasets.open_folder(name, context.data_dir, workers=context.loader_workers, **chosen)


def stream(
    part: Part, batch_size: int, order: torch.Generator, augmentation: str = "none", to: Workers = ALONE
) -> Stream[tuple[Tensor, Tensor]]:
    """Batches (images uint8 (B, C, H, W), labels (B,)) without end, every pass in a new order, without its last partial
    batch.

    Args:
        part: what to read.
        batch_size: B, in images.
        order: draws the order of every pass, and the crops that are made while files are read.
        augmentation: of training; `left_to_augment` is what of it the batches still lack.
        to: the worker that gets its part of each batch, and only that is read; all draw the same.

    Raises:
        ValueError: batch_size is below 1 or above the part's size.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1")
    if batch_size > len(part):
        raise ValueError(f"batch_size {batch_size} exceeds the {len(part)} images, so that there is no batch")

    def start(skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(part, FolderImages):
            crops = _crops_on_reading(part, augmentation)
            return loaded_batches(part, batch_size, order, crops=crops, workers=_workers(part), skip=skip, to=to)
        return shuffled_batches(part, batch_size, order, skip=skip, to=to)

    return Stream(start, order, len(part) // batch_size)


def by_class(
    part: Part,
    batch_size: int,
    groups: int,
    order: torch.Generator,
    augmentation: str = "none",
    to: Workers = ALONE,
) -> Stream[tuple[Tensor, Tensor]]:
    """The same in groups of one class each, see batches.single_class_batches.

    Raises:
        ValueError: as there.
    """

    def start(skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(part, FolderImages):
            chunks = single_class_order(part.labels, batch_size, groups, order)
            seeds = crop_seeds(len(chunks), order) if _crops_on_reading(part, augmentation) else None
            return read_chunks(part, list(chunks), seeds, workers=_workers(part), skip=skip, to=to)
        return single_class_batches(part, batch_size, groups, order, skip=skip, to=to)

    return Stream(start, order, single_class_count(part.labels, batch_size, groups))


def left_to_augment(part: Part, augmentation: str) -> str:
    """The augmentation that batches of `stream` still need: "none" if images were cropped while decoded."""
    return "none" if _crops_on_reading(part, augmentation) else augmentation


def in_order(part: Part, batch_size: int, to: Workers = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in stored order; the last batch may be smaller. Of several workers each reads whole batches: batch i
    is that of worker i % W, so that they hold the images that they hold in one process."""
    if isinstance(part, FolderImages):
        own = torch.arange(len(part)).split(batch_size)[to.rank :: to.size]
        return read_chunks(part, own, None, workers=_workers(part))
    return itertools.islice(ordered_batches(part, batch_size), to.rank, None, to.size)


def select(part: Part, index: Tensor) -> Split:
    """The images that `index` (int64 (M,)) names, in its order, held in memory."""
    if isinstance(part, FolderImages):
        batches = read_chunks(part, index.split(TOGETHER), None, workers=_workers(part))
        return Split(torch.cat([images for images, _ in batches]), part.labels[index])
    return part.select(index.to(part.labels.device))


def first(part: Part, count: int) -> Split:
    """The first `count` images, or all where there are fewer, held in memory."""
    return select(part, torch.arange(min(count, len(part))))


def augmented(
    part: Part, chunks: Sequence[Tensor], augmentation: str, draws: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """Training images as training sees them: for each of `chunks` (int64 (B,)) its images (B, C, H, W) on the device.

    Args:
        draws: the source of every draw, also of the crops that are made while files are read.
    """
    if isinstance(part, FolderImages):
        seeds = crop_seeds(len(chunks), draws) if _crops_on_reading(part, augmentation) else None
        batches = (images for images, _ in read_chunks(part, chunks, seeds, workers=_workers(part)))
    else:
        batches = (select(part, index).images for index in chunks)
    left = left_to_augment(part, augmentation)
    return (augment(images.to(device), draws, left) for images in batches)


def moments_of(domains: Sequence[Data]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over the train parts of several domains together.

    Those of sets that are decoded while they are read come from the domains' own, weighted by their images.
    """
    held = [data.train.images.cpu() for data in domains if isinstance(data, ImageData)]
    if len(held) == len(domains):
        return channel_moments(torch.cat(held))
    counts = torch.tensor([len(data.train) for data in domains], dtype=torch.float64)
    weights = (counts / counts.sum())[:, None]
    means, deviations = (torch.tensor([getattr(d, m) for d in domains], dtype=torch.float64) for m in ("mean", "std"))
    mean = (weights * means).sum(0)
    variance = (weights * (deviations**2 + (means - mean) ** 2)).sum(0)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def without_labels(part: Part) -> Part:
    """The same images with every label replaced by UNLABELLED, for code that must not see labels."""
    if isinstance(part, FolderImages):
        return part.labelled(UNLABELLED)
    return replace(part, labels=torch.full_like(part.labels, UNLABELLED))


def _crops_on_reading(part: Part, augmentation: str) -> bool:
    return isinstance(part, FolderImages) and augmentation == "resized_crop_flip"


def _workers(part: FolderImages) -> int:
    # a run's own process may not start others where its parent made it a daemon
    if multiprocessing.current_process().daemon:
        return 0
    if part.workers is not None:
        return part.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(DECODERS, cores)
