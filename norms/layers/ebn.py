"""ebn: bn's mean per channel, one deviation for all channels; Luo et al. 2020, arXiv:2003.05569."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from norms.kernels.grouping import evaluate
from norms.kernels.moments import batch_moments
from norms.layers.bn import BatchNorm
from norms.registry import register


@register(
    name="ebn",
    source="Luo et al. 2020, arXiv:2003.05569",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
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
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        if not self.training:
            mean, var = self.running_mean.to(wide), self.running_var.to(wide)
            # torch's kernels read coefficients of stride 0 wrongly
            var = self._pooled(mean, var).expand_as(var).contiguous()
            return evaluate(x, mean, var, weight, bias, self.num_channels, self.eps)
        self.values(x)  # before the moments, which warn of too few
        mean, var = batch_moments(x.to(wide), self.merging)
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
