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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.channels import transformed
from norms.kernels.former import flattened, scaled
from norms.kernels.moments import union_of_workers
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
        flat = flattened(x)
        if self.v is None:
            return _affine_only(x, flat, self.weight, self.bias)
        mean, var = _moments(flat)  # (N, C)
        batch = self._batch_variance(x, mean, var) if self.training else self.running_var.to(flat.dtype)
        std, instance = torch.sqrt(batch + self.eps)[..., None], torch.sqrt(var + self.eps)[..., None]
        # max(std, vx + instance) as relu(vx + instance - std) + std, see frn
        denominator = F.relu(scaled(flat, _column(self.v), instance - std)) + std
        y = scaled(flat / denominator, _column(self.weight), _column(self.bias))
        return y.to(x.dtype).reshape(x.shape)

    def _batch_variance(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Biased variance (N, C) of the norm batch that each sample belongs to, which running statistics take in.

        Args:
            x: the input, for its shape.
            mean: (N, C) of each sample, and var likewise.
        """
        slices = self.situation.slices
        count = self.values(x, slices)
        each = (x.shape[0] // slices, slices, self.num_channels)  # norm batch k is x[k::K]
        if self.merging is not None:
            batch_mean, batch_var, images = union_of_workers(mean.view(each), var.view(each), self.merging)
            total = images * math.prod(x.shape[2:])
            enough(count, total, self.merging)
            self.track(batch_mean.detach()[0], batch_var.detach()[0] * (total / (total - 1)), count)
            return batch_var[0]
        batch_mean, batch_var = _pooled(mean.view(each), var.view(each), 0)  # (K, C)
        self.track(batch_mean.detach(), batch_var.detach() * (count / (count - 1)), count)
        return batch_var if slices == 1 else batch_var.expand(each).reshape(var.shape)


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
        flat = flattened(x)
        if self.v is None:
            return _affine_only(x, flat, self.weight, self.bias)
        each = (x.shape[0], self.num_groups, self.num_channels // self.num_groups)
        mean, var = _moments(flat)
        var = _pooled(mean.view(each), var.view(each), 2)[1]  # (N, G)
        scale = torch.rsqrt(var + self.eps)[..., None].expand(each).reshape(*x.shape[:2], 1)
        gated = flat * torch.sigmoid(flat * self.v.to(flat.dtype)[:, None])
        if self.weight is None or self.bias is None:
            y = gated * scale
        else:
            y = scaled(gated, scale * self.weight.to(scale.dtype)[:, None], _column(self.bias))
        return y.to(x.dtype).reshape(x.shape)


def _affine_only(x: Tensor, flat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x.clone()  # an activation in place after it must not reach the norm's input, as with any other norm
    return scaled(flat, _column(weight), _column(bias)).to(x.dtype).reshape(x.shape)


def _column(parameter: Tensor | None) -> Tensor | None:
    """(C,) -> (C, 1), which broadcasts to (N, C, P)."""
    return None if parameter is None else parameter[:, None]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of each channel of each sample of x (N, C, P)."""
    return _plain_moments(x) if transformed() else _Moments.apply(x)


def _plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=2)
    return mean, (x - mean[..., None]).square().mean(dim=2)


class _Moments(torch.autograd.Function):
    """`_plain_moments` with its derivative written down.

    The chain through differentiable operations goes over memory twice as often, which is a quarter of an evonorm's
    time. The derivative is itself differentiable.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _plain_moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        d_mean, d_var = grads
        x, mean = ctx.saved_tensors
        d_mean, d_var = d_mean[..., None] / x.shape[2], d_var[..., None] * (2 / x.shape[2])
        return torch.addcmul(d_mean, x - mean[..., None], d_var)


def _pooled(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the union of equally large sets along `dim`, by Chan's formula."""
    union = mean.mean(dim=dim, keepdim=True)
    return union.squeeze(dim), var.mean(dim=dim) + (mean - union).square().mean(dim=dim)
