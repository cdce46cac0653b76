"""evonorm_b0, evonorm_s0: EvoNorms, which take the place of norm and activation; Liu et al. 2020, arXiv:2004.02967.

    evonorm_b0  x / max(std_batch, v x + std_instance) * w + b
    evonorm_s0  x sigmoid(v x) / std_group * w + b

    std = sqrt(var + eps), biased variance, eps 1e-5: std_batch over (N, H, W) of a channel, std_instance over (H, W),
    std_group over (C/G, H, W)

Axes: N sample, C channel, H W (any number of) spatial positions, P = H*W, G group, K norm batch. All learned parameters
are per channel, (C,). `activation` is the activation that would follow, of any kind, whose place the layer takes; None
where none follows directly (the last norm of a residual block).

`affine=False` removes weight and bias only: v stays.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from norms.kernels import plain
from norms.kernels.curves import divided, gated
from norms.kernels.grouping import scale_channels
from norms.kernels.moments import of_groups, pooled, union_of_workers
from norms.layers.bn import BatchNorm
from norms.layers.gn import GroupNorm
from norms.protocol import Activation
from norms.registry import register
from norms.workers import enough


@register(
    name="evonorm_b0",
    source="Liu et al. 2020, arXiv:2004.02967",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs={"activation"},
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class EvoNormB0(BatchNorm):
    """EvoNorm-B0: the standard deviation of the batch, or of the sample plus v x where that is larger.

        y = x / max(sqrt(var_nhw + eps), v_c x + sqrt(var_hw + eps)) * weight_c + bias_c

    Evaluation takes the running variance in the place of var_nhw; var_hw is the sample's in both modes. Maps of one
    position work (var_hw = 0). Without an activation after it the layer is what the official code does there: x *
    weight_c + bias_c, no v, no statistics and no buffers.

    Differences to the official code: the running variance is the unbiased one, as bn's, and a running mean, which the
    formula does not need, is kept beside it, so that recalibration pools the variance between norm batches.

    Args:
        num_channels: C.
        eps: added to both variances.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.
        activation: any: the layer takes its place; None: affine only.

    Raises:
        ValueError: (forward) another number of channels; (training) one value per channel, a batch that the slices do
            not divide.
    """

    syncs = True
    v: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        self.register_parameter("v", None)
        if activation is not None:
            self.add_parameter("v", 1.0, (num_channels,), device, dtype)
        else:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, None)

    @property
    def equivalent_to(self) -> str | None:
        """The registered norm that this layer equals: "none" where no activation follows, else None."""
        return "none" if self.v is None else None

    def reset_running_stats(self) -> None:
        """As after construction; nothing where no activation follows."""
        if self.v is not None:
            super().reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if self.is_empty(x) and self.merging is None:
            return self.empty(x)
        if self.v is None:
            return _affine_only(x, self.weight, self.bias)
        slices = self.situation.slices
        count = self.values(x, slices) if self.training else 0
        # copied: training may move it before the backward of this forward
        kept = None if self.training else self.running_var.to(plain.table_type(x), copy=True)
        found: list[tuple[Tensor, Tensor, Tensor | int]] = []

        def rule(
            mean: Tensor, var: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, ...]:
            """mean, var (N, C) of each sample."""
            instance = torch.sqrt(var + self.eps)
            if kept is not None:
                least = torch.sqrt(kept + self.eps)
            else:
                batch_mean, batch_var, total = self._of_batch(mean, var, x, slices)
                found.append((batch_mean.detach(), batch_var.detach(), total))
                least = torch.sqrt(batch_var + self.eps)
                if slices > 1:  # norm batch k is x[k::K]
                    least = least.repeat(len(var) // slices, 1)
            return v, instance, least, _or(weight, 1, v), _or(bias, 0, v)

        y = divided(x, rule, self.v, self.weight, self.bias)[0]
        if self.training:
            batch_mean, batch_var, total = found[0]
            if self.merging is not None:
                assert isinstance(total, Tensor)
                enough(count, total, self.merging)
            self.track(batch_mean, batch_var * (total / (total - 1)), count)
        return y

    def _of_batch(self, mean: Tensor, var: Tensor, x: Tensor, slices: int) -> tuple[Tensor, Tensor, Tensor | int]:
        """Mean and biased variance (K, C) of each norm batch, and the number of values of a channel in one.

        Args:
            mean: (N, C) of each sample, and var likewise.
            x: the input, for its shape.
            slices: K; 1 where workers merge their statistics.
        """
        if self.merging is None:
            return *pooled(mean, var, slices), x.numel() // (slices * self.num_channels)
        batch_mean, batch_var, images = union_of_workers(mean, var, self.merging)
        return batch_mean, batch_var, images * math.prod(x.shape[2:])


@register(
    name="evonorm_s0",
    source="Liu et al. 2020, arXiv:2004.02967",
    mixes_samples=False,
    keeps_stats=False,
    axes="CHW",
    needs={"activation"},
    variance="biased",
)
class EvoNormS0(GroupNorm):
    """EvoNorm-S0: a sigmoid-gated input over the standard deviation of its group of channels; no mean is subtracted.

        y = x sigmoid(v_c x) / sqrt(var_group + eps) * weight_c + bias_c

    Without an activation after it the layer is what the official code does there: x * weight_c + bias_c, no v and no
    statistics. Difference to the official code: a number of groups that does not divide C is refused, not lowered.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C; "auto": the largest one that is not above 32.
        eps: added to the variance.
        affine: weight and bias per channel.
        activation: any: the layer takes its place; None: affine only.

    Raises:
        ValueError: G does not divide C, eps is not positive; (forward) one value per group.
    """

    v: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        *,
        num_groups: int | Literal["auto"] = 32,
        eps: float = 1e-5,
        affine: bool = True,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, num_groups=num_groups, eps=eps, affine=affine, device=device, dtype=dtype)
        if eps <= 0:
            raise ValueError(f"eps={eps}: it must be positive")
        self.register_parameter("v", None)
        if activation is not None:
            self.add_parameter("v", 1.0, (num_channels,), device, dtype)

    @property
    def equivalent_to(self) -> str | None:
        """The registered norm that this layer equals: "none" where no activation follows, else None."""
        return "none" if self.v is None else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        self._check(x, 2 if self.v is None else math.prod(x.shape[1:]) // self.num_groups)
        if self.v is None:
            return _affine_only(x, self.weight, self.bias)
        if x.shape[0] == 0:
            return self.empty(x)

        def rule(
            mean: Tensor, var: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, ...]:
            """mean, var (N, C) of each channel of each sample."""
            scale = torch.rsqrt(of_groups(mean, var, self.num_groups)[1] + self.eps)
            scale = scale.expand(-1, -1, self.num_channels // self.num_groups).reshape(mean.shape)
            return v, scale if weight is None else scale * weight, _or(bias, 0, v)

        return gated(x, rule, self.v, self.weight, self.bias)[0]


def _affine_only(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x.clone()  # an activation in place after it must not reach the norm's input, as with any other norm
    assert bias is not None
    return scale_channels(x, weight, bias)


def _or(parameter: Tensor | None, default: float, like: Tensor) -> Tensor:
    return torch.full_like(like, default) if parameter is None else parameter
