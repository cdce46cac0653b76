"""Base classes of norms whose statistics cover one sample (PerSample), or the channels of one position (OverChannels).

    y = (x - mean) / sqrt(var + eps) * weight_c + bias_c

Training and evaluation are the same. Inputs smaller than float32 are computed in float32 and cast back. Where one value
alone would be normalized, which gives zero for every input, a layer over positions raises a ValueError in its forward
and a layer over channels when it is built.

Axes: N sample, C channel, * any number of spatial positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import PerChannel, check_arguments, memory_format, transformed
from norms.kernels.grouping import normalize_samples


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

    def _scaled(self, y: Tensor) -> Tensor:
        """y * weight_c + bias_c, or y without affine."""
        if self.weight is None or self.bias is None:
            return y
        shape = (-1, *[1] * (y.dim() - 2))
        return torch.addcmul(self.bias.to(y.dtype).view(shape), y, self.weight.to(y.dtype).view(shape))

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

    def _standardized(self, x: Tensor, unbiased: bool) -> Tensor:
        """(x - mean) / sqrt(var + eps), with affine, in float32 or better and cast back."""
        self._check(x, self.num_channels)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        eps = self.eps
        if unbiased:  # torch's kernel, a third of the time of single operations, takes the biased variance
            biased = (self.num_channels - 1) / self.num_channels
            eps = eps * biased
            weight = (x.new_ones(self.num_channels, dtype=wide) if weight is None else weight) * math.sqrt(biased)
        values = x.to(wide).movedim(1, -1)
        if transformed():  # there the kernel gives wrong second derivatives, without a word
            centred = values - values.mean(-1, keepdim=True)
            y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
            y = y if weight is None else y * weight
            y = y if bias is None else y + bias
        else:
            y = F.layer_norm(values, (self.num_channels,), weight, bias, eps)
        return y.movedim(-1, 1).to(x.dtype).contiguous(memory_format=memory_format(x))
