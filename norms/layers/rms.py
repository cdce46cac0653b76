"""rms: root mean square of the channels at each position; Zhang & Sennrich 2019, arXiv:1910.07467.

Deliberate difference: it has a bias, which the original has not: affine means weight and bias for every norm here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norms.bases.per_sample import OverChannels
from norms.registry import register


@register(
    name="rms", source="Zhang & Sennrich 2019, arXiv:1910.07467", mixes_samples=False, keeps_stats=False, axes="C"
)
class RMSNorm(OverChannels):
    """Root mean square over the channels at one position of one sample; no mean is subtracted.

        y = x / sqrt(mean_c x^2 + eps) * weight_c + bias_c

    The paper normalizes a vector of hidden units, which here are the channels at a position; its equation has neither
    eps nor bias.

    Args:
        num_channels: C, at least 2.
        eps: added to the mean square.
        affine: weight and bias per channel.

    Raises:
        ValueError: one channel.
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
        return self._over_channels(x, centred=False)
