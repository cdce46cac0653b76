"""frn: the mean square of each channel of a sample, and a learned threshold; Singh & Krishnan 2020, arXiv:1911.09737.

    y = max(w x / sqrt(mean_hw x^2 + eps) + b, tau)

It fuses the activation: its threshold takes the place of any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from norms.kernels import by_moments
from norms.layers.instance_norm import InstanceNorm
from norms.protocol import Activation
from norms.registry import register


@register(
    name="frn",
    source="Singh & Krishnan 2020, arXiv:1911.09737",
    mixes_samples=False,
    keeps_stats=False,
    axes="HW",
    needs={"activation"},
)
class FilterResponseNorm(InstanceNorm):
    """Filter response normalization with its thresholded linear unit: no mean is subtracted.

        y = max(x / sqrt(mean_hw x^2 + eps) * weight_c + bias_c, tau_c)

    Difference to the paper: it learns eps (then |eps|) for maps of one position, where x / sqrt(x^2 + eps) is a sign;
    here eps is fixed and such maps are refused.

    Args:
        num_channels: C.
        eps: added to the mean square.
        affine: weight and bias per channel.
        activation: any: the threshold tau (0 at the start, learned) takes its place; None: no threshold and no tau.

    Raises:
        ValueError: eps is not positive; (forward) fewer than two positions, in training and in evaluation.
    """

    tau: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, affine=affine, device=device, dtype=dtype)
        if eps <= 0:
            raise ValueError(f"eps={eps}: it must be positive")
        self.register_parameter("tau", None)
        if activation is not None:
            self.add_parameter("tau", 0.0, (num_channels,), device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *), at least two positions -> the same shape and dtype."""
        self._check(x, math.prod(x.shape[2:]))
        if x.shape[0] == 0:
            return self.empty(x)

        def rule(
            mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, tau: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            """mean, var (N, C) of each channel of each sample."""
            scale = torch.rsqrt(var + mean.square() + self.eps)
            if weight is None or bias is None:
                return scale, scale.new_zeros(self.num_channels), tau
            return scale * weight, bias, tau

        return by_moments(x, rule, self.weight, self.bias, self.tau)[0]
