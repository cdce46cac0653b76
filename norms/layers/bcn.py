"""bcn: bn, then normalization of groups of channels (C/G, H, W) of each sample; Qiao et al. 2019, arXiv:1911.09738."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from norms.bases.batch_statistics import BatchMoments
from norms.kernels import by_moments
from norms.layers.bn import BatchNorm
from norms.registry import register


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

    syncs = True
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
        if self.is_empty(x) and self.merging is None:
            return self.empty(x)
        size = self.num_channels // self.channel_groups
        if size * math.prod(x.shape[2:]) < 2:
            raise ValueError(f"bcn: more than one value per group is needed, given x of shape {tuple(x.shape)}")
        batch = BatchMoments(self, x)

        def line(
            mean: Tensor,
            var: Tensor,
            weight: Tensor | None,
            bias: Tensor | None,
            group_weight: Tensor,
            group_bias: Tensor,
        ) -> tuple[Tensor, Tensor]:
            """By the moments (N, C) of samples: those of z follow from them, and those of its groups."""
            center, spread = batch(mean, var)
            mean, var = batch.per_sample(mean), batch.per_sample(var)
            scale = torch.rsqrt(spread + self.eps)
            scale = scale if weight is None else scale * weight
            z_mean, z_var = (mean - center) * scale, var * scale.square()
            z_mean = z_mean if bias is None else z_mean + bias
            z_mean, z_var = (t.reshape(*t.shape[:2], self.channel_groups, size) for t in (z_mean, z_var))
            away = z_mean - z_mean.mean(3, keepdim=True)
            group_scale = torch.rsqrt((z_var + away.square()).mean(3, keepdim=True) + self.eps) * group_weight[:, None]
            level = torch.addcmul(group_bias[:, None], away, group_scale).flatten(2)  # of y, where x is its mean
            scale = (group_scale * scale.view(-1, self.channel_groups, size)).flatten(2)
            shift = torch.addcmul(level, mean, scale, value=-1)
            return scale.flatten(0, 1), shift.flatten(0, 1)

        y = by_moments(x, line, self.weight, self.bias, self.group_weight, self.group_bias)[0]
        batch.track()
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.channel_groups}"
