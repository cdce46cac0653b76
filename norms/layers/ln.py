"""ln: mean and variance of all values (C, H, W) of each sample; Ba et al. 2016, arXiv:1607.06450.

Deliberate difference: the affine is per channel and not per element, as in the GN paper's comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norms.bases.per_sample import PerSample
from norms.registry import register


@register(
    name="ln",
    source="Ba et al. 2016, arXiv:1607.06450",
    mixes_samples=False,
    keeps_stats=False,
    axes="CHW",
    variance="biased",
)
class LayerNorm(PerSample):
    """Mean and biased variance over all channels and positions of one sample; affine per channel.

    Args:
        num_channels: C.
        eps: added to the variance.
        affine: weight and bias per channel.

    Raises:
        ValueError: (forward) one channel and one position.
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
        """x: (N, C, *) -> the same shape and dtype."""
        self._check(x, math.prod(x.shape[1:]))
        return self._by_groups(x, 1)
