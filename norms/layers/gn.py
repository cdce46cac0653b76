"""gn: mean and variance of each group of channels (C/G, H, W) of each sample; Wu & He 2018, arXiv:1803.08494."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from norms.bases.per_sample import PerSample
from norms.registry import register


@register(
    name="gn",
    source="Wu & He 2018, arXiv:1803.08494",
    mixes_samples=False,
    keeps_stats=False,
    axes="CHW",
    variance="biased",
)
class GroupNorm(PerSample):
    """Mean and biased variance over the C/G channels of a group and all positions of one sample.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C; "auto": the largest one that is not above 32.
        eps: added to the variance.
        affine: weight and bias per channel.

    Raises:
        ValueError: G does not divide C; (forward) one value per group.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        num_groups: int | Literal["auto"] = 32,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps, affine, device, dtype)
        self.num_groups = self.divisor(num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        self._check(x, math.prod(x.shape[1:]) // self.num_groups)
        return self._by_groups(x, self.num_groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"
