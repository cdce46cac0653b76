"""layer2d: layer normalization of the channels at each position; Liu et al. 2022, arXiv:2201.03545 (ConvNeXt)."""

from __future__ import annotations

import torch
from torch import Tensor

from norms.bases.per_sample import OverChannels
from norms.registry import register


@register(
    name="layer2d",
    source="Liu et al. 2022, arXiv:2201.03545",
    mixes_samples=False,
    keeps_stats=False,
    axes="C",
    variance="biased",
)
class LayerNorm2d(OverChannels):
    """Layer normalization over the channels alone, as ConvNeXt has it: mean and biased variance at each position.

    It is pn with the biased variance and another eps; torchvision.models.convnext.LayerNorm2d for any spatial rank.

    Args:
        num_channels: C, at least 2.
        eps: added to the variance.
        affine: weight and bias per channel.

    Raises:
        ValueError: one channel.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps, affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        return self._over_channels(x)
