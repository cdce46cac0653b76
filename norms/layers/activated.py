"""Norms that fuse the activation: frn, evonorm_b0, evonorm_s0, proxy. The backbone applies none of its own after them.

    frn         max(w x / sqrt(mean_hw x^2 + eps) + b, tau)           Singh & Krishnan 2020, arXiv:1911.09737
    evonorm_b0  x / max(std_batch, v x + std_instance) * w + b        Liu et al. 2020, arXiv:2004.02967
    evonorm_s0  x sigmoid(v x) / std_group * w + b                    Liu et al. 2020, arXiv:2004.02967
    proxy       (phi(w z + b) - m_p) / sqrt(v_p + 0.03), z = gn(x)    Labatie et al. 2021, arXiv:2106.03743
                gn(x) with its affine where no activation follows

    std = sqrt(var + eps), biased variance, eps 1e-5: std_batch over (N, H, W) of a channel, std_instance over (H, W),
    std_group over (C/G, H, W)

Axes: N sample, C channel, H W (any number of) spatial positions, P = H*W, G group, K slice. All learned parameters are
per channel, (C,). `activation` is what would follow, None where nothing directly does (the last norm of a residual
block). frn and both evonorms put their own in its place, whichever it is; proxy applies the given one.

`affine=False` removes weight and bias only: tau, v and proxy's two parameters stay. No parameter of a norm is decayed
in this suite unless an option says so; of proxy's, the paper decays proxy_mean and proxy_scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.channels import transformed
from norms.layers.batch import BatchNorm
from norms.layers.sample import GroupNorm, InstanceNorm
from norms.registry import register

Activation = nn.Module | Callable[[Tensor], Tensor]


def _flat(x: Tensor) -> Tensor:
    """x (N, C, *) as (N, C, P), in float32 or better. A view for every dense memory format, which operations keep."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], math.prod(x.shape[2:]))


def _scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift: x (N, C, P), scale and shift of any shape that broadcasts to it, or both None."""
    if scale is None or shift is None:
        return x
    return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


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
        flat = _flat(x)
        scale = torch.rsqrt(flat.square().mean(dim=2, keepdim=True) + self.eps)
        shift = scale.new_zeros(())
        if self.weight is not None and self.bias is not None:
            scale = scale * self.weight.to(scale.dtype)[:, None]
            shift = self.bias.to(scale.dtype)[:, None]
        if self.tau is None:
            y = _scaled(flat, scale, shift)
        else:
            # max(y, tau) as relu(y - tau) + tau: torch.maximum's backward takes four times as long
            tau = self.tau.to(scale.dtype)[:, None]
            y = F.relu(_scaled(flat, scale, shift - tau)) + tau
        return y.to(x.dtype).reshape(x.shape)


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
        if self.is_empty(x):
            return self.empty(x)
        flat = _flat(x)
        if self.v is None:
            return _affine_only(x, flat, self.weight, self.bias)
        mean, var = _moments(flat)  # (N, C)
        batch = self._batch_variance(x, mean, var) if self.training else self.running_var.to(flat.dtype)
        std, instance = torch.sqrt(batch + self.eps)[..., None], torch.sqrt(var + self.eps)[..., None]
        # max(std, vx + instance) as relu(vx + instance - std) + std, see frn
        denominator = F.relu(_scaled(flat, _column(self.v), instance - std)) + std
        y = _scaled(flat / denominator, _column(self.weight), _column(self.bias))
        return y.to(x.dtype).reshape(x.shape)

    def _batch_variance(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Biased variance (N, C) of the norm batch that each sample belongs to, which running statistics take in.

        Args:
            x: the input, for its shape.
            mean: (N, C) of each sample, and var likewise.
        """
        slices = self.situation.slices
        count = self.values(x, slices)
        each = (x.shape[0] // slices, slices, self.num_channels)  # slice k is x[k::K]
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
        flat = _flat(x)
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
            y = _scaled(gated, scale * self.weight.to(scale.dtype)[:, None], _column(self.bias))
        return y.to(x.dtype).reshape(x.shape)


def _affine_only(x: Tensor, flat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x.clone()  # an activation in place after it must not reach the norm's input, as with any other norm
    return _scaled(flat, _column(weight), _column(bias)).to(x.dtype).reshape(x.shape)


@register(
    name="proxy",
    source="Labatie et al. 2021, arXiv:2106.03743",
    mixes_samples=False,
    keeps_stats=False,
    axes="CHW",
    version=2,  # gn where no activation follows, where the identity was taken for phi
    needs={"activation"},
    variance="biased",
)
class ProxyNorm(GroupNorm):
    """Proxy-normalized activations: what gn and the activation give, standardized by the moments of a Gaussian proxy.

        z = gn(x) without affine            phi: the activation          r_i = sqrt(2) erfinv(2 (i + 0.5) / S - 1)
        Y_i = (1 + proxy_scale_c) r_i + proxy_mean_c                     i = 0 ... S - 1, quantiles of a normal variable
        m_p, v_p = mean and biased variance of phi(weight_c Y_i + bias_c) over i
        y = (phi(weight_c z + bias_c) - m_p) / sqrt(v_p + proxy_eps)

    Gradients flow through m_p and v_p, into weight, bias, proxy_mean and proxy_scale (the last two 0 at the start).
    The batch plays no part in them. The quantiles are computed anew in each forward, which takes no state that a cast
    of the module could round.

    Without an activation after it the layer is gn with its affine, as in the published networks: no proxy, and no
    proxy_mean and proxy_scale.

    Args:
        num_channels: C.
        base: "gn", or "ln": gn of one group.
        num_groups: G of gn, a divisor of C; "auto": the largest one that is not above 32; unused by ln.
        eps: added to the variance of the base.
        proxy_eps: added to the variance of the proxy.
        num_samples: S, quantiles of the proxy.
        affine: weight and bias per channel, inside phi.
        activation: phi, elementwise; it sees x's shape and (S, C, 1, ...). A module is part of the layer. None: gn.

    Raises:
        ValueError: an unknown base, G does not divide C, proxy_eps is not positive, fewer than two samples; (forward)
            one value per group.
    """

    proxy_mean: nn.Parameter | None
    proxy_scale: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        *,
        base: Literal["gn", "ln"] = "gn",
        num_groups: int | Literal["auto"] = 32,
        eps: float = 1e-5,
        proxy_eps: float = 0.03,
        num_samples: int = 200,
        affine: bool = True,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if base not in ("gn", "ln"):
            raise ValueError(f'proxy: base="{base}" is unknown; allowed: gn, ln')
        groups = num_groups if base == "gn" else 1
        super().__init__(num_channels, num_groups=groups, eps=eps, affine=affine, device=device, dtype=dtype)
        if proxy_eps <= 0:
            raise ValueError(f"proxy_eps={proxy_eps}: it must be positive")
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples}: the proxy's variance needs at least 2")
        self.proxy_eps, self.num_samples, self.activation = proxy_eps, num_samples, activation
        for name in ("proxy_mean", "proxy_scale"):
            self.register_parameter(name, None)
            if activation is not None:
                self.add_parameter(name, 0.0, (num_channels,), device, dtype)

    @property
    def equivalent_to(self) -> str | None:
        """The registered norm that this layer equals: "gn" or "ln" where no activation follows, else None."""
        return None if self.activation is not None else "ln" if self.num_groups == 1 else "gn"

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if self.activation is None:
            return super().forward(x)
        if self.is_empty(x):
            return self.empty(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = self.activation(super().forward(x.to(wide)))
        mean, var = self._proxy_moments(y, self.activation)
        return ((y - mean) * torch.rsqrt(var + self.proxy_eps)).to(x.dtype)

    def _proxy_moments(self, y: Tensor, phi: Activation) -> tuple[Tensor, Tensor]:
        """m_p and v_p (C, 1, ...) in the type and with the dimensions of y (N, C, *)."""
        assert self.proxy_mean is not None
        assert self.proxy_scale is not None
        shape = (-1, *[1] * (y.dim() - 2))

        def per_channel(p: Tensor) -> Tensor:
            return p.to(y.dtype).view(shape)

        steps = torch.arange(self.num_samples, device=y.device, dtype=torch.float64)
        normal = math.sqrt(2) * torch.erfinv(2 * (steps + 0.5) / self.num_samples - 1)
        normal = normal.to(y.dtype).view(-1, 1, *shape[1:])  # (S, 1, ...)
        proxy = torch.addcmul(per_channel(self.proxy_mean), normal, 1 + per_channel(self.proxy_scale))
        if self.weight is not None and self.bias is not None:
            proxy = torch.addcmul(per_channel(self.bias), proxy, per_channel(self.weight))
        activated = phi(proxy)
        mean = activated.mean(dim=0)
        return mean, (activated - mean).square().mean(dim=0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, proxy_eps={self.proxy_eps}, num_samples={self.num_samples}"
