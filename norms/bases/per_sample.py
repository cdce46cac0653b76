"""Base classes of norms whose statistics cover one sample (PerSample), or the channels of one position (OverChannels).

    y = (x - mean) / sqrt(var + eps) * weight_c + bias_c

Training and evaluation are the same. Inputs smaller than float32 are computed in float32 and cast back. Where one value
alone would be normalized, which gives zero for every input, a layer over positions raises a ValueError in its forward
and a layer over channels when it is built.

Axes: N sample, C channel, * any number of spatial positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norms.channels import PerChannel, check_arguments
from norms.kernels.grouping import normalize_samples
from norms.kernels.rows import normalize_rows


class PerSample(PerChannel):
    """A norm with num_channels, eps, and a weight and a bias per channel (None without affine)."""

    def __init__(
        self, num_channels: int, eps: float, affine: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ):
        super().__init__()
        check_arguments(num_channels=num_channels)
        if eps < 0:
            raise ValueError(f"eps={eps}: it must not be negative")
        self.add_channels(num_channels, eps, affine, device, dtype)

    def _check(self, x: Tensor, values: int) -> None:
        """ValueError for x of another shape, and where fewer than two `values` enter one statistic."""
        self.check_channels(x)
        if values < 2:
            raise ValueError(
                f"{type(self).__name__}: more than one value per statistic is needed, given x of shape {tuple(x.shape)}"
            )

    def _by_groups(self, x: Tensor, groups: int) -> Tensor:
        """x, checked, by the moments of groups of each sample's channels, with affine."""
        if x.shape[0] == 0:
            return self.empty(x)
        return normalize_samples(x, self.weight, self.bias, groups, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.weight is not None}"


class OverChannels(PerSample):
    """One statistic per sample and position, of all channels there."""

    def __init__(
        self, num_channels: int, eps: float, affine: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ):
        super().__init__(num_channels, eps, affine, device, dtype)
        if num_channels < 2:
            raise ValueError(
                f"{type(self).__name__}: statistics over channels need at least 2 of them, "
                f"given num_channels={num_channels}"
            )

    def _over_channels(self, x: Tensor, *, centred: bool = True, unbiased: bool = False) -> Tensor:
        """x, checked and normalized at each position, with affine, in float32 or better and cast back."""
        self._check(x, self.num_channels)
        return normalize_rows(x, self.weight, self.bias, self.eps, centred=centred, unbiased=unbiased)
