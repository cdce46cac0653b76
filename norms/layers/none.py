"""none: no statistics, the affine alone. The control of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from norms.bases.per_sample import PerSample
from norms.kernels.grouping import scale_channels
from norms.registry import register


@register(
    name="none", source="the control: no statistics, affine only", mixes_samples=False, keeps_stats=False, axes=""
)
class NoNorm(PerSample):
    """y = x * weight_c + bias_c: a norm without its statistics.

    Args:
        num_channels: C.
        affine: without it the output is a copy of x.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, 0.0, affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        self._check(x, 2)
        if self.weight is None:
            return x.clone()  # an activation in place after it must not reach the norm's input, as with any other norm
        assert self.bias is not None
        return scale_channels(x, self.weight, self.bias)
