"""How many images per second a large folder gives: JPEGs of ImageNet's usual size, decoded while they are read."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from suite.environment import cpu_count
from tasks.data.lazy import FolderImages
from tasks.data.reading import in_order, stream

FILES, CLASSES = 256, 2
WIDTH, HEIGHT = 500, 375
"""Pixels: the most frequent size of ImageNet's images."""
QUALITY = 95
"""Of the JPEGs, which then have about 110 KB as ImageNet's do."""
SIZE, BATCH = 224, 32
MOST = 16
"""Workers, at most, that are tried."""


def data(rounds: int = 3, files: int = FILES) -> Iterator[str]:
    """Images per second with the random resized crop of training, by 0, 1, 2, 4, ... worker processes up to the cores
    and at most 16, and in stored order as they are evaluated. Nothing else is computed meanwhile.

    Starting the workers counts: it is part of every pass. Medians over rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        entries = [_draw(Path(folder), number) for number in range(files)]
        size = sum(count for _, _, count in entries) / files / 1000
        yield (
            f"data: {files} JPEGs of {WIDTH}x{HEIGHT} and {size:.0f} KB, from the file to {SIZE}x{SIZE}, batches of "
            f"{BATCH}, {cpu_count()} core(s): images per second"
        )
        alone = 0.0
        for workers in _numbers():
            images = FolderImages(Path(folder), entries, SIZE, workers)
            rates = [
                statistics.median(_rate(read) for _ in range(rounds))
                for read in (_training(images), _evaluated(images))
            ]
            alone = alone or rates[0]
            yield (
                f"  {workers:>2} worker(s)   random resized crop {rates[0]:7.0f} /s ({rates[0] / alone:.2f} x)   "
                f"in order {rates[1]:7.0f} /s"
            )


def _numbers() -> list[int]:
    """0, 1, 2, 4, ... and the number of cores."""
    most = min(MOST, cpu_count())
    return sorted({0, most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})


def _draw(folder: Path, number: int) -> tuple[str, int, int]:
    """A picture whose detail is a photograph's, about: noise at all scales; (name, label, bytes)."""
    draw = np.random.default_rng(number)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for side in (4, 16, 64, 256):
        coarse = Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        picture += np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), np.float32) / 4
    path = folder / f"{number}.jpg"
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=QUALITY)
    return path.name, number % CLASSES, path.stat().st_size


def _training(images: FolderImages) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    def read() -> Iterator[tuple[Tensor, Tensor]]:
        batches = stream(images, BATCH, torch.Generator().manual_seed(0), "resized_crop_flip")
        return (next(batches) for _ in range(len(batches)))

    return read


def _evaluated(images: FolderImages) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    return lambda: in_order(images, BATCH)


def _rate(read: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> float:
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in read())
    return count / (time.perf_counter() - start)
