"""bne: statistics per domain, one affine, unseen domains between the known; Segu et al. 2020, arXiv:2011.12672."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norms.bases.per_domain import PerDomain
from norms.registry import register


@register(
    name="bne",
    source="Segu et al. 2020, arXiv:2011.12672",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs="domain",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class BatchNormEmbedding(PerDomain):
    """Batch normalization embeddings: statistics per domain, affine shared, unseen domains placed between the known.

        y_n = (x_n - mean_dc) / sqrt(var_dc + eps) * weight_c + bias_c          d the domain of sample n

    A sample of no known domain is forwarded in every domain's branch by `norms.situation.predict`, which weights the
    branches' softmax outputs by 1 / W_d, normalized, with W_d the sum of `branch_distance` over all layers.

    From memory of the paper, not confirmed: that a branch's distance is taken between its own activations of the
    sample and its own statistics (and not from one pass without a domain). Left out: the same combination of branches
    in the training loss; training is that of each sample's own branch.

    Args:
        num_channels: C.
        num_domains: D; a run fills it in. 1 is exactly bn.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias (C,).

    Raises:
        ValueError: (forward) see `PerDomain.forward`.
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
        super().__init__(num_channels, num_domains, eps, momentum, affine, False, device, dtype)

    @property
    def equivalent_to(self) -> str | None:
        """ "bn" with one domain, else None."""
        return "bn" if self.num_domains == 1 else None

    def branch_distance(self, x: Tensor, domain: int) -> Tensor:
        """How far each sample of x (N, C, *), this layer's input, is from a domain: (N,).

        The squared 2-Wasserstein distance of two diagonal Gaussians, that of the sample's positions and that of the
        domain's running statistics:

            W = sum_c (mean_dc - mean_nc)^2 + (std_dc - std_nc)^2
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        flat = x.to(wide).reshape(*x.shape[:2], -1)
        mean = flat.mean(2, keepdim=True)
        # a norm over the centred values: several times as fast on a CPU as torch's variance, and as exact
        std = torch.linalg.vector_norm(flat - mean, dim=2) / math.sqrt(flat.shape[2])
        mean_d, std_d = self.running_mean[domain].to(wide), self.running_var[domain].to(wide).sqrt()
        return ((mean_d - mean[..., 0]).square() + (std_d - std).square()).sum(1)
