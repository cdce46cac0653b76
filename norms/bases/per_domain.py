"""Base class of norms that know which domain a sample is from, and the domain that a layer was told.

    y_n = (x_n - mean_d) / sqrt(var_d + eps) * weight + bias       d the domain of sample n, biased variance

The domain comes from `situation(net, domain=...)`: one number for the whole batch, or a tensor (N,) for a batch that
mixes domains. Training uses the statistics of the batch's samples of each domain and moves those domains' running ones
(unbiased variance, momentum 0.1); a domain that the batch does not hold is left alone. Evaluation uses the running
statistics of the domain that it is told. With `num_domains=1` no domain need be told, and dsbn and bne are bn.

Axes: N sample, C channel, D domain, K norm batch, E = K * D pairs of norm batch and domain.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from norms.bases.running_statistics import DomainStatistics
from norms.channels import PerChannel, check_arguments
from norms.kernels import affine, by_moments, plain
from norms.kernels.grouping import evaluate, normalize
from norms.kernels.moments import moments_of_sets
from norms.protocol import Situation
from norms.situation import check_slices


class PerDomain(PerChannel, DomainStatistics):
    """A norm with running statistics (D, C) that normalizes each sample by the statistics of its domain."""

    syncs = True
    compares_domains = False
    """Whether the output of one domain depends on the statistics of the others, by `_factor`."""

    def __init__(
        self,
        num_channels: int,
        num_domains: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        affine_per_domain: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        check_arguments(eps=eps, num_channels=num_channels, num_domains=num_domains)
        super().__init__((num_domains, num_channels), momentum, device, dtype)
        self.num_domains = num_domains
        self.affine_per_domain = affine_per_domain
        per_domain = num_domains if affine_per_domain else None
        self.add_channels(num_channels, eps, affine, device, dtype, num_domains=per_domain)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype.

        Raises:
            ValueError: another number of channels; no domain was told, or an unknown one; a batch that the slices do
                not divide; one value per statistic in training.
        """
        self.check_channels(x)
        domain = told_domain(self, x)
        if self.num_domains == 1:
            domain = 0
        if x.shape[0] == 0 and self.merging is None:
            return self.empty(x)
        if not self.training:
            return self._evaluate(x, domain)
        # another worker's part may have another domain
        alone = self.num_domains == 1 or (self.merging is None and not self.compares_domains)
        if isinstance(domain, int) and alone:
            return self._train_one(x, domain)
        if isinstance(domain, int):
            domain = torch.full((x.shape[0],), domain, device=x.device)
        return self._train_mixed(x, domain)

    def _factor(self, mean: Tensor, var: Tensor) -> Tensor | None:
        """What the output is multiplied by, without gradient, (C,) or in training (K, C); None: nothing.

        Args:
            mean, var: of every domain, without gradient, unbiased: (D, C), or in training (K, D, C).
        """
        return None

    def _affine(self, domain: int) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias (C,) of a domain."""
        if self.weight is None or self.bias is None or not self.affine_per_domain:
            return self.weight, self.bias
        return self.weight[domain], self.bias[domain]

    def _evaluate(self, x: Tensor, domain: int | Tensor) -> Tensor:
        factor = self._factor(self.running_mean, self.running_var)
        if isinstance(domain, int):
            given = _multiplied(*self._affine(domain), factor)
            return evaluate(x, self.running_mean[domain], self.running_var[domain], *given, self.num_channels, self.eps)
        kind = plain.table_type(x)
        # copied: training may move the statistics before the backward of this forward, which is to be by these
        mean, var = (t.to(kind, copy=True) for t in (self.running_mean, self.running_var))
        scale, shift = self._coefficients(mean, var, *_multiplied(self.weight, self.bias, factor))
        return affine(x, scale[domain], shift[domain])

    def _coefficients(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """scale and shift of the shape of mean and var, (*, D, C)."""
        scale = torch.rsqrt(var + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias

    def _train_one(self, x: Tensor, domain: int) -> Tensor:
        """All samples are of one domain: bn, to the last bit."""
        slices = self.situation.slices
        count = check_slices(x, slices) * math.prod(x.shape[2:])
        if count < 2 and self.merging is None:
            raise ValueError(self._too_few(x))
        given = _multiplied(*self._affine(domain), self._factor(self.running_mean, self.running_var))
        y, mean, var = normalize(x, *given, self.num_channels, slices, self.eps, self.merging)
        held = (torch.arange(self.num_domains, device=x.device) == domain)[:, None]
        means, variances = (torch.where(held, t[:, None], 0) for t in (mean, var))
        # with workers this one's part may be empty
        self.track(means, variances, (held * max(count, 1)).expand(slices, -1, -1))
        return y

    def _train_mixed(self, x: Tensor, domain: Tensor) -> Tensor:
        """Domains in any order: each sample has the coefficients of its pair of norm batch and domain."""
        slices, positions = self.situation.slices, math.prod(x.shape[2:])
        check_slices(x, slices)
        where = torch.arange(x.shape[0], device=x.device) % slices * self.num_domains + domain
        shape = (slices, self.num_domains, self.num_channels)
        kept: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

        def rule(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            """mean, var: (N, C)."""
            pairs = moments_of_sets(mean, var, where, slices * self.num_domains, self.merging)
            mean, var = pairs[0].view(shape), pairs[1].view(shape)
            if not kept:
                count = pairs[2].view(*shape[:2], 1) * positions
                unbiased = var.detach() * (count / (count - 1).clamp(min=1))
                factor = self._factor(*self._current(mean.detach(), unbiased, count))
                kept.append((mean.detach(), unbiased, count, None if factor is None else factor[:, None]))
            scale, shift = self._coefficients(mean, var, *_multiplied(weight, bias, kept[0][3]))
            return scale.reshape(-1, shape[2])[where], shift.reshape(-1, shape[2])[where]

        y = by_moments(x, rule, self.weight, self.bias)[0]
        mean, var, count, _ = kept[0]
        if positions == 1 and not x.is_meta and not torch.compiler.is_compiling() and bool((count == 1).any()):
            raise ValueError(self._too_few(x))
        self.track(mean, var, count)
        return y

    def _current(self, mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's statistics (K, D, C), and for domains that it does not hold the running ones."""
        if not self.compares_domains:
            return mean, var
        return torch.where(count > 0, mean, self.running_mean), torch.where(count > 0, var, self.running_var)

    def _too_few(self, x: Tensor) -> str:
        return (
            f"Expected more than 1 value per channel and domain when training, given fewer in x of shape "
            f"{tuple(x.shape)} in {self.situation.slices} norm batch(es)"
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, num_domains={self.num_domains}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}"
        )


def _multiplied(
    weight: Tensor | None, bias: Tensor | None, factor: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The affine of an output that is multiplied by `factor`, which broadcasts to it."""
    if factor is None:
        return weight, bias
    if weight is None or bias is None:
        return factor, torch.zeros_like(factor)
    return weight * factor, bias * factor


class KnowsDomains(Protocol):
    """A norm that is told domains: `num_domains` of them, in `situation`."""

    situation: Situation
    num_domains: int
    training: bool


def told_domain(norm: KnowsDomains, x: Tensor) -> int | Tensor:
    """The domain that a norm was told for x (N, C, *): one for the batch, or (N,) of its samples.

    Raises:
        ValueError: no domain was told and there are several; it is no integer in range; there is not one per sample.
    """
    domain = norm.situation.domain
    if domain is None and norm.num_domains == 1:
        return 0
    name = type(norm).__name__
    if domain is None:
        doing = "training" if norm.training else "evaluation"
        raise ValueError(f"{name}: {doing} needs the domain of the images (0 to {norm.num_domains - 1}), none was told")
    if isinstance(domain, bool) or not isinstance(domain, (int, Tensor)):
        raise ValueError(f"{name}: domain {domain!r}: an integer or a tensor of integers is needed")
    if isinstance(domain, int):
        if not 0 <= domain < norm.num_domains:
            raise ValueError(f"{name}: domain {domain} is not in 0 to {norm.num_domains - 1}")
        return domain
    if domain.is_floating_point() or domain.is_complex():
        raise ValueError(f"{name}: domains of {domain.dtype}: integers are needed")
    if domain.shape != x.shape[:1]:
        raise ValueError(f"{name}: domains of shape {tuple(domain.shape)} for a batch of {x.shape[0]}")
    if _readable(domain):
        low, high = (int(v) for v in domain.aminmax()) if len(domain) else (0, 0)
        if low < 0 or high >= norm.num_domains:
            raise ValueError(f"{name}: domains {low} to {high} are not in 0 to {norm.num_domains - 1}")
    return domain.to(x.device, torch.long)  # as a mask or in 8 bits it would index otherwise


def _readable(domain: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device, and are values at all."""
    return domain.device.type == "cpu" and type(domain) is Tensor and not torch.compiler.is_compiling()
