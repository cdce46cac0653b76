"""pn: mean and variance of the channels at each position; Li et al. 2019, arXiv:1907.04312, "Positional Normalization".

Deliberate differences: it has an affine, which the original has not by default; its moments go nowhere else (no moment
shortcut).
"""

from __future__ import annotations

import torch
from torch import Tensor

from norms.bases.per_sample import OverChannels
from norms.registry import register


@register(
    name="pn",
    source="Li et al. 2019, arXiv:1907.04312",
    version=2,  # torch's kernel in the place of single operations: other last bits
    mixes_samples=False,
    keeps_stats=False,
    axes="C",
    variance="unbiased",
)
class PositionalNorm(OverChannels):
    """Mean and variance over the channels at one position of one sample.

    The official PyTorch code takes the unbiased variance, eps inside the root; so does this by default.

    Args:
        num_channels: C, at least 2.
        eps: added to the variance.
        unbiased: the variance divides by C - 1, as in the official code; False: by C, as in the paper's equation.
        affine: weight and bias per channel (by choice: the original has none by default).

    Raises:
        ValueError: one channel.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        unbiased: bool = True,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps, affine, device, dtype)
        self.unbiased = unbiased

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        return self._over_channels(x, unbiased=self.unbiased)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, unbiased={self.unbiased}"
