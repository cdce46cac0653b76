"""sabn: bn with its affine, then an affine per condition; Gong et al. 2022, arXiv:2102.11382.

"Sandwich Batch Normalization". Axes: N sample, C channel, D condition, K norm batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from norms.bases.per_domain import told_domain
from norms.bases.running_statistics import RunningStatistics
from norms.channels import PerChannel, check_arguments
from norms.kernels import affine, by_moments, plain
from norms.kernels.grouping import evaluate, normalize
from norms.kernels.moments import pooled, union_of_workers
from norms.registry import register
from norms.situation import check_slices
from norms.workers import enough


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
        if self.num_domains == 1:
            domain = 0
        if x.shape[0] == 0 and self.merging is None:
            return self.empty(x)
        if isinstance(domain, int):
            return self._of_one(x, domain)
        return self._train_mixed(x, domain) if self.training else self._evaluate_mixed(x, domain)

    def _of_one(self, x: Tensor, domain: int) -> Tensor:
        """All samples are of one condition: two affines of the same channels are one."""
        weight, bias = self.domain_weight[domain], self.domain_bias[domain]
        if self.weight is not None and self.bias is not None:
            weight, bias = weight * self.weight, torch.addcmul(bias, weight, self.bias)
        if not self.training:
            return evaluate(x, self.running_mean, self.running_var, weight, bias, self.num_channels, self.eps)
        count = self._values(x)
        slices = self.situation.slices
        y, mean, var = normalize(x, weight, bias, self.num_channels, slices, self.eps, self.merging)
        self.track(mean, var, count)
        return y

    def _evaluate_mixed(self, x: Tensor, domain: Tensor) -> Tensor:
        kind = plain.table_type(x)
        # copied: training may move the statistics before the backward of this forward, which is to be by these
        mean, var = (t.to(kind, copy=True)[None] for t in (self.running_mean, self.running_var))
        parameters = self.weight, self.bias, self.domain_weight, self.domain_bias
        return affine(x, *self._coefficients(mean, var, domain, *parameters))

    def _train_mixed(self, x: Tensor, domain: Tensor) -> Tensor:
        """Both affines, and the normalization before them, as one map of each sample."""
        slices, workers = self.situation.slices, self.merging
        count = self._values(x)
        kept: list[tuple[Tensor, Tensor]] = []

        def rule(mean: Tensor, var: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
            """mean, var: (N, C)."""
            if workers is None:
                union, spread = pooled(mean, var, slices)
                unbiased = spread.detach() * (count / (count - 1))
            else:
                union, spread, images = union_of_workers(mean, var, workers)
                total = images.detach() * math.prod(x.shape[2:])
                enough(count, total, workers)
                unbiased = spread.detach() * (total / (total - 1))
            kept.append((union.detach(), unbiased))
            return self._coefficients(union, spread, domain, *parameters)

        y = by_moments(x, rule, self.weight, self.bias, self.domain_weight, self.domain_bias)[0]
        self.track(*kept[0], count)
        return y

    def _coefficients(
        self,
        mean: Tensor,
        var: Tensor,
        domain: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        domain_weight: Tensor,
        domain_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """scale and shift (N, C) from mean and var (K, C) and each sample's condition (N,)."""
        scale = torch.rsqrt(var + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        if bias is not None:
            shift = shift + bias
        if mean.shape[0] > 1:
            slot = torch.arange(domain.shape[0], device=mean.device) % mean.shape[0]
            scale, shift = scale[slot], shift[slot]
        own = domain_weight[domain]
        return scale * own, shift * own + domain_bias[domain]

    def _values(self, x: Tensor) -> int:
        """The number of values of x that enter one statistic in training; ValueError where there is one only."""
        slices = self.situation.slices
        count = check_slices(x, slices) * math.prod(x.shape[2:])
        if count < 2 and self.merging is None:
            raise ValueError(
                f"Expected more than 1 value per channel when training, given {count} from x of shape "
                f"{tuple(x.shape)} in {slices} norm batch(es)"
            )
        return count

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, num_domains={self.num_domains}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}"
        )
