"""sabn: bn with its affine, then an affine per condition; Gong et al. 2022, arXiv:2102.11382.

"Sandwich Batch Normalization". Axes: N sample, C channel, D condition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from norms.bases.per_domain import told_domain
from norms.bases.running_statistics import RunningStatistics
from norms.channels import PerChannel, check_arguments
from norms.kernels.grouping import evaluate, normalize
from norms.registry import register
from norms.situation import check_slices


@register(
    name="sabn",
    source="Gong et al. 2022, arXiv:2102.11382",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs="domain",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class SandwichBatchNorm(PerChannel, RunningStatistics):
    """Sandwich batch normalization: one bn for all samples, then an affine of each sample's condition.

        y_n = bn(x)_n * domain_weight_dc + domain_bias_dc       d the condition of sample n
        bn(x) = (x - mean_c) / sqrt(var_c + eps) * weight_c + bias_c        mean, var over all samples

    The condition is the domain that `situation(net, domain=...)` tells: clean or adversarial images in adversarial
    training, source or target, and so on. The paper's other condition, the choice of operations in architecture
    search, is not told by any task here. As in the official code `domain_weight` starts as Normal(1, 0.02) and
    `domain_bias` as 0; with `domain_weight` 1 it is bn.

    Differences from the official code, whose general layer this is: its layers for adversarial training (SaAuxBN) and
    for architecture search have the two affines, too, but statistics per condition, a branch for clean and one for
    adversarial images. Here a forward of either kind has its own batch's statistics in training, and both move the same
    running ones, by which either kind is evaluated. The paper's robust accuracies are of the layer with branches.

    Args:
        num_channels: C.
        num_domains: D; a run fills it in. With 1 no domain need be told.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: the shared weight and bias (C,); `domain_weight` and `domain_bias` (D, C) stay without it.
    """

    syncs = True
    domain_bias: nn.Parameter

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
        check_arguments(eps=eps, num_channels=num_channels, num_domains=num_domains)
        super().__init__(num_channels, momentum, device, dtype)
        self.num_domains = num_domains
        self.add_channels(num_channels, eps, affine, device, dtype)
        shape = (num_domains, num_channels)
        self.domain_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(1.0, 0.02))
        self.add_parameter("domain_bias", 0.0, shape, device, dtype)

    def reset_parameters(self) -> None:
        """As after construction; `domain_weight` is drawn anew."""
        super().reset_parameters()
        with torch.no_grad():
            self.domain_weight.normal_(1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype.

        Raises:
            ValueError: another number of channels; no domain was told, or an unknown one (so a domain that was not
                trained can not be evaluated); a batch that the slices do not divide; one value per channel in training.
        """
        self.check_channels(x)
        domain = told_domain(self, x)
        if x.shape[0] == 0 and self.merging is None:
            return self.empty(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        scale, shift = self.domain_weight.to(wide)[domain], self.domain_bias.to(wide)[domain]
        if isinstance(domain, int):  # two affines of the same channels are one
            if weight is not None and bias is not None:
                scale, shift = scale * weight, torch.addcmul(shift, scale, bias)
            return self._normalized(x, scale, shift)
        y = self._normalized(x.to(wide), weight, bias)
        shape = (*scale.shape, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), y, scale.view(shape)).to(x.dtype)

    def _normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """bn of x with the given affine (C,)."""
        if not self.training:
            return evaluate(x, self.running_mean, self.running_var, weight, bias, self.num_channels, self.eps)
        slices = self.situation.slices
        count = check_slices(x, slices) * math.prod(x.shape[2:])
        if count < 2 and self.merging is None:
            raise ValueError(
                f"Expected more than 1 value per channel when training, given {count} from x of shape "
                f"{tuple(x.shape)} in {slices} norm batch(es)"
            )
        y, mean, var = normalize(x, weight, bias, self.num_channels, slices, self.eps, self.merging)
        self.track(mean, var, count)
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, num_domains={self.num_domains}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}"
        )
