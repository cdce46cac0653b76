"""dual_bn: one bn for clean images, one for adversarial ones; Xie et al. 2019, arXiv:1911.09665 (AdvProp)."""

from __future__ import annotations

import torch

from norms.layers.dsbn import DomainSpecificBatchNorm
from norms.registry import register


@register(
    name="dual_bn",
    source="Xie et al. 2019, arXiv:1911.09665",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs="domain",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class DualBatchNorm(DomainSpecificBatchNorm):
    """The auxiliary batch normalization of AdvProp: domain 0 is clean images, domain 1 adversarial ones.

    The layer is dsbn with two domains; the method lies in which images are told to be of which domain (see the task
    `adversarial`). Arguments and errors as dsbn's, and a ValueError for more than two domains.
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
        if num_domains > 2:
            raise ValueError(f"dual_bn: num_domains={num_domains}; it has two, clean and adversarial images")
        super().__init__(
            num_channels,
            num_domains=num_domains,
            eps=eps,
            momentum=momentum,
            affine=affine,
            device=device,
            dtype=dtype,
        )

    @property
    def equivalent_to(self) -> str | None:
        """ "bn" with one domain, else "dsbn"."""
        return super().equivalent_to or "dsbn"
