"""iebn: bn, scaled per sample and channel by a gate of the raw input's mean; Liang et al. 2020, arXiv:1908.04008."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from norms.bases.batch_statistics import BatchMoments
from norms.kernels import by_moments
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
        batch = BatchMoments(self, x)

        def line(
            mean: Tensor,
            var: Tensor,
            gate_weight: Tensor,
            gate_bias: Tensor,
            weight: Tensor | None,
            bias: Tensor | None,
        ) -> tuple[Tensor, Tensor]:
            """By the moments (N, C) of samples."""
            center, spread = batch(mean, var)
            scale = torch.rsqrt(spread + self.eps) if weight is None else torch.rsqrt(spread + self.eps) * weight
            scale = batch.per_sample(torch.sigmoid(mean * gate_weight + gate_bias)) * scale
            shift = -center * scale if bias is None else bias - center * scale
            return scale.flatten(0, 1), shift.flatten(0, 1)

        y = by_moments(x, line, self.gate_weight, self.gate_bias, self.weight, self.bias)[0]
        batch.track()
        return y
