"""Batches of a part of a data set, by the same calls whether it is held in memory or decoded while it is read."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from tasks.data.batches import ordered_batches, shuffled_batches, single_class_batches, single_class_count
from tasks.data.images import Split
from tasks.data.lazy import FolderImages, loaded_batches
from tasks.data.stream import Stream

Part = Split | FolderImages
DECODERS = 4
"""Processes, at most, that decode what is not in memory; batches do not depend on their number."""


def stream(part: Part, batch_size: int, order: torch.Generator) -> Stream[tuple[Tensor, Tensor]]:
    """Batches (images uint8 (B, C, H, W), labels (B,)) without end, every pass in a new order, without its last partial
    batch.

    Raises:
        ValueError: batch_size is below 1 or above the part's size.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1")
    if batch_size > len(part):
        raise ValueError(f"batch_size {batch_size} exceeds the {len(part)} images, so that there is no batch")

    def start(skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(part, FolderImages):
            return loaded_batches(part, batch_size, order, workers=_decoders(), skip=skip)
        return shuffled_batches(part, batch_size, order, skip=skip)

    return Stream(start, order, len(part) // batch_size)


def by_class(part: Part, batch_size: int, groups: int, order: torch.Generator) -> Stream[tuple[Tensor, Tensor]]:
    """The same in groups of one class each, see batches.single_class_batches.

    Raises:
        ValueError: as there, and for a part that is not held in memory.
    """
    if isinstance(part, FolderImages):
        raise ValueError("batches of single-class groups are drawn from data held in memory only")
    length = single_class_count(part.labels, batch_size, groups)
    return Stream(lambda skip: single_class_batches(part, batch_size, groups, order, skip=skip), order, length)


def in_order(part: Part, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in stored order; the last batch may be smaller."""
    if isinstance(part, FolderImages):
        return loaded_batches(part, batch_size, None, workers=_decoders(), drop_last=False)
    return ordered_batches(part, batch_size)


def select(part: Part, index: Tensor) -> Split:
    """The images that `index` (int64 (M,)) names, in its order, held in memory."""
    if isinstance(part, FolderImages):
        return Split(torch.stack([part[i][0] for i in index.tolist()]), part.labels[index])
    return part.select(index.to(part.labels.device))


def _decoders() -> int:
    # a run's own process may not start others where its parent made it a daemon
    if multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(DECODERS, cores)
