"""in: mean and variance of the positions of each channel of each sample; Ulyanov et al. 2016, arXiv:1607.08022.

The file has a longer name than the norm, since `in` is a word of Python.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norms.bases.per_sample import PerSample
from norms.registry import register


@register(
    name="in",
    source="Ulyanov et al. 2016, arXiv:1607.08022",
    mixes_samples=False,
    keeps_stats=False,
    axes="HW",
    variance="biased",
)
class InstanceNorm(PerSample):
    """Mean and biased variance over the positions of one channel of one sample.

    Args:
        num_channels: C.
        eps: added to the variance.
        affine: weight and bias per channel.

    Raises:
        ValueError: (forward) fewer than two positions, in training and in evaluation.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps, affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *), at least two positions -> the same shape and dtype."""
        self._check(x, math.prod(x.shape[2:]))
        return self._by_groups(x, self.num_channels)
