"""Batch statistics pooled over other sets of values than bn's: ghost, ebn, bcn.

    ghost  (N, H, W) of a sub-batch, per channel                     Hoffer et al. 2017, arXiv:1705.08741
    ebn    mean (N, H, W) per channel, deviation (N, C, H, W)        Luo et al. 2020, arXiv:2003.05569
    bcn    bn, then (C/G, H, W) per sample and group of channels     Qiao et al. 2019, arXiv:1911.09738

All keep bn's running statistics: mean and unbiased variance per channel, momentum 0.1; evaluation uses them.

Axes: N sample, C channel, H W (any number of) spatial positions, G group of channels, K slice.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from norms.channels import memory_format
from norms.grouping import evaluate, normalize
from norms.layers.batch import BatchNorm
from norms.layers.sample import _grouped
from norms.registry import register


class ChannelStatistics(BatchNorm):
    """What norms share that have bn's statistics, parameters and buffers, and make another output of them."""

    def train_on(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, slices: int = 1) -> Tensor:
        """bn with the given affine (C,), in float32 or better, in training; running statistics move."""
        count = self.values(x, slices)
        y, mean, var = normalize(x, weight, bias, self.num_channels, slices, self.eps)
        self.track(mean, var, count)
        return y


@register(
    name="ghost",
    source="Hoffer et al. 2017, arXiv:1705.08741",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    variance="biased",
    running_variance="unbiased",
)
class GhostBatchNorm(ChannelStatistics):
    """Ghost batch normalization: bn on virtual sub-batches, with one set of running statistics.

        y = (x - mean_bc) / sqrt(var_bc + eps) * weight_c + bias_c        mean, var of channel c over sub-batch b

    A batch of N images is cut into B = N // ghost_batch_size sub-batches (at least 1), of which number b is x[b::B]:
    none is smaller than asked for, and where there is a remainder, their sizes differ by one at most. Running
    statistics move as if they had come one after the other, which is the paper's weighted update. A batch of less than
    two sub-batches is one whole, and the layer is then bn.

    The official code takes chunks of consecutive images of a shuffled batch. There it makes no difference; but a batch
    that is sorted, by class or by domain, would be normalized class by class or domain by domain.

    A sub-batch is a part of a norm batch: of slice k, x[k::K], where `situation` says K slices.

    Args:
        num_channels: C.
        ghost_batch_size: images in a sub-batch.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all sub-batches.
        affine: weight and bias per channel.

    Raises:
        ValueError: a sub-batch of less than one image; (forward, training) one value per channel of a sub-batch.
    """

    tracks_parts = True

    def __init__(
        self,
        num_channels: int,
        *,
        ghost_batch_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        if ghost_batch_size < 1:
            raise ValueError(f"ghost: ghost_batch_size={ghost_batch_size}: a sub-batch has at least 1 image")
        self.ghost_batch_size = ghost_batch_size

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        if self.is_empty(x):
            return self.empty(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        images = x.shape[0]
        parts = max(1, images // self.ghost_batch_size)
        longer = images % parts  # the first sub-batches have one image more
        if not longer:
            return self.train_on(x, weight, bias, parts)
        # Two calls, one per size. Sorting is stable, so that among the images of `longer` sub-batches, too, those of
        # number b are every `longer`-th one from b. By tensors, so that a compiled layer serves every batch size.
        shorter = torch.arange(images, device=x.device) % parts >= longer
        order = torch.argsort(shorter.long(), stable=True)  # not every device sorts booleans
        one, other = x[order].split([longer * (images // parts + 1), (parts - longer) * (images // parts)])
        y = torch.cat((self.train_on(one, weight, bias, longer), self.train_on(other, weight, bias, parts - longer)))
        return y[torch.argsort(order)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"


@register(
    name="ebn",
    source="Luo et al. 2020, arXiv:2003.05569",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
    variance="biased",
    running_variance="unbiased",
)
class ExtendedBatchNorm(ChannelStatistics):
    """Extended batch normalization: bn's mean per channel, one standard deviation for all channels.

        mean_c over (N, H, W)        y = (x - mean_c) / sqrt(var + eps) * weight_c + bias_c
        var = mean over (N, C, H, W) of (x - mean_c)^2                            deviation_from="channel"
        var = the same + mean over C of (mean_c - mean_all)^2                     deviation_from="all"

    Of the paper only the abstract could be read: mean over (N, H, W), standard deviation over (N, C, H, W), biased
    here as bn's. Whether the deviations are from the channels' means or from the mean of all values is *not
    confirmed*, so both are offered. By default they are from the channels' means: then the standardized values have
    variance 1, and as in bn a shift of one channel changes no output.

    The one number is not kept but composed when evaluated, by the equations above, from bn's buffers: by linearity its
    running average is the average of the running variances ("all": but for the spread of the batches' means). So
    recalibration pools it with the variance between norm batches, exactly.

    Args:
        num_channels: C.
        deviation_from: "channel" or "all", see above.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.

    Raises:
        ValueError: (forward, training) one value per channel.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        deviation_from: Literal["channel", "all"] = "channel",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        if deviation_from not in ("channel", "all"):
            raise ValueError(f'ebn: deviation_from="{deviation_from}": "channel" or "all"')
        self.deviation_from = deviation_from

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if self.is_empty(x):
            return self.empty(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        if not self.training:
            mean, var = self.running_mean.to(wide), self.running_var.to(wide)
            # torch's kernels read coefficients of stride 0 wrongly
            var = self._pooled(mean, var).expand_as(var).contiguous()
            return evaluate(x, mean, var, weight, bias, self.num_channels, self.eps)
        self.values(x)  # before the moments, which warn of too few
        var, mean = torch.var_mean(x.to(wide), (0, *range(2, x.dim())), correction=0)
        # bn with another weight: each channel's deviation is exchanged for that of all
        scale = torch.sqrt((var + self.eps) / (self._pooled(mean, var) + self.eps))
        if weight is None or bias is None:
            return self.train_on(x, scale, torch.zeros_like(scale))
        return self.train_on(x, scale * weight, bias)

    def _pooled(self, mean: Tensor, var: Tensor) -> Tensor:
        """The variance of all values from the channels' moments (C,): law of total variance."""
        within = var.mean()
        return within + mean.var(correction=0) if self.deviation_from == "all" else within

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deviation_from={self.deviation_from}"


@register(
    name="bcn",
    source="Qiao et al. 2019, arXiv:1911.09738",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class BatchChannelNorm(BatchNorm):
    """Batch-channel normalization: bn, then normalization of groups of channels within each sample.

        z = (x - mean_c) / sqrt(var_c + eps) * weight_c + bias_c                         bn, over (N, H, W)
        y = (z - mean_ng) / sqrt(var_ng + eps) * group_weight_g + group_bias_g           over (C/G, H, W)

    The channel part's affine is per group, as in the official code, and stays with affine=False. That code's other
    form, for micro-batches, normalizes by running estimates in the place of the batch's statistics; it is left out.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C; "auto": the largest one that is not above 32.
        eps: added to both variances.
        momentum: weight of the new value in bn's running statistics; None: average of all batches.
        affine: weight and bias per channel, of the bn part.

    Raises:
        ValueError: G does not divide C; (forward) one value per group, or in training per channel.
    """

    group_weight: nn.Parameter
    group_bias: nn.Parameter

    def __init__(
        self,
        num_channels: int,
        *,
        num_groups: int | Literal["auto"] = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        self.channel_groups = self.divisor(num_groups)  # `num_groups` is the bn part's, one per channel
        for name, start in (("group_weight", 1.0), ("group_bias", 0.0)):
            self.add_parameter(name, start, (self.channel_groups,), device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if self.is_empty(x):
            return self.empty(x)
        size = self.num_channels // self.channel_groups
        if size * math.prod(x.shape[2:]) < 2:
            raise ValueError(f"bcn: more than one value per group is needed, given x of shape {tuple(x.shape)}")
        # contiguous for both parts: bn's kernel is slow where x and its gradient lie in memory in two ways
        z = super().forward(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous())
        weight, bias = (p[:, None].expand(-1, size).reshape(-1) for p in (self.group_weight, self.group_bias))
        y = _grouped(z, self.channel_groups, weight, bias, self.eps).to(x.dtype)
        return y.contiguous(memory_format=memory_format(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.channel_groups}"
