"""transnorm: statistics per domain, one affine, channels in which the domains are alike amplified.

Wang et al. 2019, "Transferable Normalization", NeurIPS.

Axes: N sample, C channel, D domain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norms.bases.per_domain import PerDomain
from norms.registry import register


@register(
    name="transnorm",
    source="Wang et al. 2019, NeurIPS, Transferable Normalization",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
    exact_gradient=False,
    needs="domain",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class TransNorm(PerDomain):
    """Transferable normalization: source and target (domains 0 and 1) each by their own statistics, one affine, and
    channels whose statistics the domains share amplified.

        z_n     = (x_n - mean_dc) / sqrt(var_dc + eps) * weight_c + bias_c      d the domain of sample n
        dist_c  = |mean_0c / sqrt(var_0c + eps) - mean_1c / sqrt(var_1c + eps)|
        alpha_c = C p_c / sum_c p_c,  p_c = 1 / (1 + dist_c)                    no gradient
        y_n     = z_n (1 + alpha_c)

    Training takes dist from the batch, evaluation from the running statistics. As in the published code the variances
    in dist are unbiased; unlike it, which tests the target only, evaluation uses the statistics of the domain it is
    told, and the published initial weights (uniform) are 1 here as for every norm. Beyond the paper: a batch without
    one of the domains (separate forwards, AdaBN) takes that domain's running statistics for dist. With one domain
    alpha is 1.

    Args:
        num_channels: C.
        num_domains: 2; a run fills it in.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias (C,).

    Raises:
        ValueError: more than two domains; (forward) see `PerDomain.forward`.
    """

    compares_domains = True

    def __init__(
        self,
        num_channels: int,
        *,
        num_domains: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_domains > 2:
            raise ValueError(f"transnorm: num_domains={num_domains}; it has two, source and target")
        super().__init__(num_channels, num_domains, eps, momentum, affine, False, device, dtype)

    def _factor(self, mean: Tensor, var: Tensor) -> Tensor:
        ratio = mean / torch.sqrt(var + self.eps)
        distance = (ratio[..., 0, :] - ratio[..., -1, :]).abs()
        alike = 1 / (1 + distance)
        return 1 + self.num_channels * alike / alike.sum(-1, keepdim=True)
