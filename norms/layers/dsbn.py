"""dsbn: every domain has its own bn, statistics and affine; Chang et al. 2019, arXiv:1906.03950."""

from __future__ import annotations

import torch

from norms.bases.per_domain import PerDomain
from norms.registry import register


@register(
    name="dsbn",
    source="Chang et al. 2019, arXiv:1906.03950",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs="domain",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class DomainSpecificBatchNorm(PerDomain):
    """Domain-specific batch normalization: every domain has its own bn, statistics and affine.

        y_n = (x_n - mean_dc) / sqrt(var_dc + eps) * weight_dc + bias_dc        d the domain of sample n

    Args:
        num_channels: C.
        num_domains: D; a run fills it in. 1 is exactly bn.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias (D, C).

    Raises:
        ValueError: (forward) see `PerDomain.forward`; evaluation needs a domain that was trained, so an unseen
            domain can not be evaluated.
    """

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
        super().__init__(num_channels, num_domains, eps, momentum, affine, True, device, dtype)

    @property
    def equivalent_to(self) -> str | None:
        """ "bn" with one domain, else None."""
        return "bn" if self.num_domains == 1 else None
