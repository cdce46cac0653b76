"""proxy: activations, standardized by the moments of a Gaussian proxy; Labatie et al. 2021, arXiv:2106.03743.

    y = (phi(w z + b) - m_p) / sqrt(v_p + 0.03), z = gn(x)        gn(x) with its affine where no activation follows

`affine=False` removes weight and bias only: the two parameters of the proxy stay. No parameter of a norm is decayed in
this suite unless an option says so; the paper decays proxy_mean and proxy_scale.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

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
