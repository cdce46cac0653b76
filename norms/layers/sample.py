"""Norms whose statistics cover one sample only. Training and evaluation are the same.

    none     nothing                                  the control: affine only
    in       (H, W) per sample and channel            Ulyanov et al. 2016, arXiv:1607.08022
    ln       (C, H, W) per sample                     Ba et al. 2016, arXiv:1607.06450
    gn       (C/G, H, W) per sample, G groups         Wu & He 2018, arXiv:1803.08494
    pn       C per sample and position                Li et al. 2019, arXiv:1907.04312, "Positional Normalization"
    layer2d  C per sample and position                Liu et al. 2022, arXiv:2201.03545, "A ConvNet for the 2020s"
    rms      C per sample and position                Zhang & Sennrich 2019, arXiv:1910.07467

    y = (x - mean) / sqrt(var + eps) * weight_c + bias_c        biased variance (pn: unbiased by default)
    y = x / sqrt(mean_c x^2 + eps) * weight_c + bias_c          rms

Axes: N sample, C channel, H W (any number of) spatial positions, G group. All affine parameters have shape (C,).

Deliberate differences: ln's affine is per channel and not per element, as in the GN paper's comparison. pn has an
affine, which the original has not by default; its moments go nowhere else (no moment shortcut). rms has a bias, which
the original has not: affine means weight and bias for every norm here. Inputs smaller than float32 are computed in
float32 and cast back. Where one value alone would be normalized, which gives zero whatever the input (rms: its sign),
in, ln and gn raise a ValueError in training and in evaluation, and pn, layer2d and rms when built.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import PerChannel, check_arguments, memory_format, transformed
from norms.registry import register


class _PerSample(PerChannel):
    """The shared shape: num_channels, eps, per-channel weight and bias (None without affine)."""

    def __init__(
        self, num_channels: int, eps: float, affine: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ):
        super().__init__()
        check_arguments(num_channels=num_channels)
        if eps < 0:
            raise ValueError(f"eps={eps}: it must not be negative")
        self.add_channels(num_channels, eps, affine, device, dtype)

    def _check(self, x: Tensor, values: int) -> None:
        """`values`: how many enter one statistic."""
        self.check_channels(x)
        if values < 2:
            raise ValueError(
                f"{type(self).__name__}: more than one value per statistic is needed, given x of shape {tuple(x.shape)}"
            )

    def _scaled(self, y: Tensor) -> Tensor:
        """y * weight_c + bias_c, or y without affine."""
        if self.weight is None or self.bias is None:
            return y
        shape = (-1, *[1] * (y.dim() - 2))
        return torch.addcmul(self.bias.to(y.dtype).view(shape), y, self.weight.to(y.dtype).view(shape))

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.weight is not None}"


def _grouped(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalization of x (N, C, *) in float32 or better, cast back, memory format kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # torch's kernel for channels_last takes the variance as a difference of squares, which is lost at large means
    given = x.to(wide).contiguous()
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.group_norm(given, groups, weight, bias, eps).to(x.dtype)
    return y.contiguous(memory_format=memory_format(x))


@register(
    name="none", source="the control: no statistics, affine only", mixes_samples=False, keeps_stats=False, axes=""
)
class NoNorm(_PerSample):
    """y = x * weight_c + bias_c: what is left of a norm without its statistics.

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
        return self._scaled(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


@register(
    name="in",
    source="Ulyanov et al. 2016, arXiv:1607.08022",
    mixes_samples=False,
    keeps_stats=False,
    axes="HW",
    variance="biased",
)
class InstanceNorm(_PerSample):
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
        return _grouped(x, self.num_channels, self.weight, self.bias, self.eps)


@register(
    name="ln",
    source="Ba et al. 2016, arXiv:1607.06450",
    mixes_samples=False,
    keeps_stats=False,
    axes="CHW",
    variance="biased",
)
class LayerNorm(_PerSample):
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
        return _grouped(x, 1, self.weight, self.bias, self.eps)


@register(
    name="gn",
    source="Wu & He 2018, arXiv:1803.08494",
    mixes_samples=False,
    keeps_stats=False,
    axes="CHW",
    variance="biased",
)
class GroupNorm(_PerSample):
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
        return _grouped(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


class _OverChannels(_PerSample):
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


@register(
    name="pn",
    source="Li et al. 2019, arXiv:1907.04312",
    version=2,  # torch's kernel in the place of single operations: other last bits
    mixes_samples=False,
    keeps_stats=False,
    axes="C",
    variance="unbiased",
)
class PositionalNorm(_OverChannels):
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
        return self._standardized(x, self.unbiased)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, unbiased={self.unbiased}"


@register(
    name="layer2d",
    source="Liu et al. 2022, arXiv:2201.03545",
    mixes_samples=False,
    keeps_stats=False,
    axes="C",
    variance="biased",
)
class LayerNorm2d(_OverChannels):
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
        return self._standardized(x, unbiased=False)


@register(
    name="rms", source="Zhang & Sennrich 2019, arXiv:1910.07467", mixes_samples=False, keeps_stats=False, axes="C"
)
class RMSNorm(_OverChannels):
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
        self._check(x, self.num_channels)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().mean(dim=1, keepdim=True)
        return self._scaled(wide * torch.rsqrt(square + self.eps)).to(x.dtype)
