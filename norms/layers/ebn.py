"""ebn: bn's mean per channel, one deviation for all channels; Luo et al. 2020, arXiv:2003.05569."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from norms.kernels import affine, by_moments
from norms.kernels.grouping import normalize
from norms.kernels.plain import table_type
from norms.layers.bn import BatchNorm
from norms.registry import register
from norms.workers import Workers, enough


@register(
    name="ebn",
    source="Luo et al. 2020, arXiv:2003.05569",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class ExtendedBatchNorm(BatchNorm):
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

    syncs = True

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
        if self.is_empty(x) and self.merging is None:
            return self.empty(x)
        if not self.training:
            # copied: training may move the statistics before this forward's backward
            mean, var = (t.to(table_type(x), copy=True) for t in (self.running_mean, self.running_var))
            return affine(x, *self._line(mean, var, self.weight, self.bias))
        slices = self.situation.slices
        count = self.values(x, slices)
        if self.merging is not None:
            return self._together(x, self.merging)
        pooled = 2 if self.deviation_from == "all" else 1
        y, mean, var = normalize(x, self.weight, self.bias, self.num_channels, slices, self.eps, pooled=pooled)
        self.track(mean, var, count)
        return y

    def _line(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """scale and shift (K, C) or (C,), by the channels' moments, likewise."""
        all_channels = var.mean(-1, keepdim=True)  # law of total variance
        if self.deviation_from == "all":
            all_channels = all_channels + mean.var(-1, correction=0, keepdim=True)
        scale = torch.rsqrt(all_channels + self.eps)
        scale = scale.expand_as(var) if weight is None else scale * weight
        return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)

    def _together(self, x: Tensor, workers: Workers) -> Tensor:
        """Training by the moments of all workers' values."""
        found: list[tuple[Tensor, ...]] = []

        def line(mean: Tensor, var: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor]:
            merged, spread, total = workers.merge(mean, var, count)
            found.append((merged.detach(), spread.detach(), total))
            return self._line(merged, spread, *affine)

        count = self.values(x)
        y = by_moments(x, line, self.weight, self.bias, rows=1)[0]
        mean, var, total = found[0]
        enough(count, total, workers)
        self.track(mean, var * (total / (total - 1)), count)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deviation_from={self.deviation_from}"
