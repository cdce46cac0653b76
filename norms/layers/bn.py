"""bn: mean and variance of each channel over samples and positions; Ioffe & Szegedy 2015, arXiv:1502.03167."""

from __future__ import annotations

import torch

from norms.bases.batch_statistics import BatchStatistics
from norms.registry import register


@register(
    name="bn",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class BatchNorm(BatchStatistics):
    """Batch normalization: mean and biased variance over samples and positions of each channel.

        y = (x - mean_c) / sqrt(var_c + eps) * weight_c + bias_c

    Equal to torch.nn.BatchNorm2d in outputs, gradients and buffers, for any number of spatial dimensions.

    Args:
        num_channels: C.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.

    Raises:
        ValueError: (forward, training) one value per channel.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, num_channels, eps, momentum, affine, device, dtype)
