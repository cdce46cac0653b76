"""iebn: bn, scaled per sample and channel by a gate of the raw input's mean; Liang et al. 2020, arXiv:1908.04008."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from norms.kernels.grouping import evaluate
from norms.layers.bn import BatchNorm
from norms.registry import register


@register(
    name="iebn",
    source="Liang et al. 2020, arXiv:1908.04008",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class InstanceEnhancementBatchNorm(BatchNorm):
    """Instance enhancement batch normalization: bn whose weight each sample scales.

        m_nc = mean over positions of x          a_nc = sigmoid(m_nc * gate_weight_c + gate_bias_c)
        y = (x - mean_c) / sqrt(var_c + eps) * (weight_c * a_nc) + bias_c

    m is of the input as it is, not normalized. The gate starts at weight 0 and bias -1, as in the official code, so
    that every a is 0.27; its parameters stay with affine=False.

    Args:
        num_channels: C.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.

    Raises:
        ValueError: (forward, training) one value per channel.
    """

    syncs = True
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        for name, start in (("gate_weight", 0.0), ("gate_bias", -1.0)):
            self.add_parameter(name, start, (num_channels,), device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if self.is_empty(x) and self.merging is None:
            return self.empty(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            standard = self.train_on(wide, None, None, self.situation.slices)
        else:
            mean, var = self.running_mean, self.running_var
            standard = evaluate(wide, mean, var, None, None, self.num_channels, self.eps)
        raw = wide.reshape(*x.shape[:2], math.prod(x.shape[2:])).mean(dim=2)
        scale = torch.sigmoid(raw * self.gate_weight.to(wide.dtype) + self.gate_bias.to(wide.dtype))
        positions = [1] * (x.dim() - 2)
        if self.weight is None or self.bias is None:
            return (standard * scale.view(*scale.shape, *positions)).to(x.dtype)
        scale = (scale * self.weight.to(wide.dtype)).view(*scale.shape, *positions)
        return torch.addcmul(self.bias.to(wide.dtype).view(-1, *positions), standard, scale).to(x.dtype)
