"""The input of a network: the facts of a data set that a network is built from, and the normalization of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.data.batches import normalize
from tasks.data.reading import Data

Prepare = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) on the scale 0 to 255 -> input of the network."""


def facts_of(data: Data) -> dict[str, Any]:
    """The facts that `Task.network` builds a classifier of these images from (tasks.base.Trained)."""
    channels = data.image_shape[0]
    return {"num_classes": data.num_classes, "in_channels": channels, "mean": data.mean, "std": data.std}


def preparation(
    mean: Sequence[float],
    std: Sequence[float],
    memory_format: torch.memory_format,
    device: torch.device | None = None,
) -> Prepare:
    """The function that normalizes images, per channel, and puts them into a memory format.

    Args:
        mean, std: of each channel, of values divided by 255.
        memory_format: of the network's input.
        device: where the input goes; None: it stays where the images are.
    """

    def prepare(images: Tensor) -> Tensor:
        images = images if device is None else images.to(device)
        return normalize(images, mean, std).contiguous(memory_format=memory_format)

    return prepare
