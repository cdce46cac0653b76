"""proxy: activations, standardized by the moments of a Gaussian proxy; Labatie et al. 2021, arXiv:2106.03743.

    y = (phi(w z + b) - m_p) / sqrt(v_p + 0.03), z = gn(x)        gn(x) with its affine where no activation follows

`affine=False` removes weight and bias only: the two parameters of the proxy stay. No parameter of a norm is decayed in
this suite unless an option says so; the paper decays proxy_mean and proxy_scale.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.kernels import affine, by_moments, plain
from norms.kernels.moments import of_groups
from norms.layers.gn import GroupNorm
from norms.protocol import Activation
from norms.registry import register


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
        mean, var = self._proxy_moments(x, self.activation)
        scale = torch.rsqrt(var.flatten() + self.proxy_eps)
        if _is_relu(self.activation):
            return self._with_floor(x, mean.flatten(), scale)
        y = self.activation(super().forward(x.to(mean.dtype)))
        return affine(y, scale, -mean.flatten() * scale).to(x.dtype)

    def _with_floor(self, x: Tensor, proxy_mean: Tensor, proxy_scale: Tensor) -> Tensor:
        """(relu(z) - m) s as max((z - m) s, -m s), s > 0: gn, its affine, relu and the proxy's are one map.

        Args:
            proxy_mean: m (C,), and s in proxy_scale likewise.
        """
        self._check(x, math.prod(x.shape[1:]) // self.num_groups)

        def rule(
            mean: Tensor, var: Tensor, m: Tensor, s: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, ...]:
            """mean, var (N, C) of each channel of each sample."""
            shape, size = mean.shape, self.num_channels // self.num_groups
            mean, var = of_groups(mean, var, self.num_groups)
            scale = torch.rsqrt(var + self.eps)
            scale, shift = (t.expand(-1, -1, size).reshape(shape) for t in (scale, -mean * scale))
            factor = s if weight is None else s * weight
            floor = -m * s
            return scale * factor, torch.addcmul(floor if bias is None else bias * s + floor, shift, factor), floor

        tables = (t.to(plain.table_type(x)) for t in (proxy_mean, proxy_scale))
        return by_moments(x, rule, *tables, self.weight, self.bias)[0]

    def _proxy_moments(self, y: Tensor, phi: Activation) -> tuple[Tensor, Tensor]:
        """m_p and v_p (C, 1, ...), in float32 or better and with the dimensions of y (N, C, *)."""
        assert self.proxy_mean is not None
        assert self.proxy_scale is not None
        shape = (-1, *[1] * (y.dim() - 2))
        wide = torch.promote_types(y.dtype, torch.float32)

        def per_channel(p: Tensor) -> Tensor:
            return p.to(wide).view(shape)

        levels = torch.arange(1, 2 * self.num_samples, 2, device=y.device, dtype=torch.float64) / self.num_samples - 1
        normal = (math.sqrt(2) * torch.erfinv(levels)).to(wide).view(-1, 1, *shape[1:])  # (S, 1, ...)
        # weight * ((1 + proxy_scale) * normal + proxy_mean) + bias
        centre, spread = per_channel(self.proxy_mean), 1 + per_channel(self.proxy_scale)
        if self.weight is not None and self.bias is not None:
            weight = per_channel(self.weight)
            centre, spread = torch.addcmul(per_channel(self.bias), centre, weight), spread * weight
        proxy = torch.addcmul(centre, normal, spread)
        activated = phi(proxy)
        mean = activated.mean(dim=0)
        return mean, (activated - mean).square().mean(dim=0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, proxy_eps={self.proxy_eps}, num_samples={self.num_samples}"


def _is_relu(activation: Activation) -> bool:
    """Whether it is the max of x and 0 and nothing more: a module that has hooks wants to be called."""
    if activation in (F.relu, F.relu_, torch.relu, torch.relu_):
        return True
    if type(activation) is not nn.ReLU:
        return False
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(activation, kind) for kind in kinds)
