"""bcn: bn, then normalization of groups of channels (C/G, H, W) of each sample; Qiao et al. 2019, arXiv:1911.09738."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from norms.channels import memory_format
from norms.kernels.former import group_normalize
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
        if self.is_empty(x):
            return self.empty(x if self.merging is None else super().forward(x))
        size = self.num_channels // self.channel_groups
        if size * math.prod(x.shape[2:]) < 2:
            raise ValueError(f"bcn: more than one value per group is needed, given x of shape {tuple(x.shape)}")
        # contiguous for both parts: bn's kernel is slow where x and its gradient lie in memory in two ways
        z = super().forward(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous())
        weight, bias = (p[:, None].expand(-1, size).reshape(-1) for p in (self.group_weight, self.group_bias))
        y = group_normalize(z, self.channel_groups, weight, bias, self.eps).to(x.dtype)
        return y.contiguous(memory_format=memory_format(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.channel_groups}"
