"""Base class of norms that know which domain a sample is from, and the domain that a layer was told.

    y_n = (x_n - mean_d) / sqrt(var_d + eps) * weight + bias       d the domain of sample n, biased variance

The domain comes from `situation(net, domain=...)`: one number for the whole batch, or a tensor (N,) for a batch that
mixes domains. Training uses the statistics of the batch's samples of each domain and moves those domains' running ones
(unbiased variance, momentum 0.1); a domain that the batch does not hold is left alone. Evaluation uses the running
statistics of the domain that it is told. With `num_domains=1` no domain need be told, and dsbn and bne are bn.

Axes: N sample, C channel, P position, D domain, K norm batch, E = K * D pairs of norm batch and domain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from norms.bases.running_statistics import DomainStatistics
from norms.channels import PerChannel, check_arguments
from norms.kernels.former import normalize_by
from norms.kernels.grouping import evaluate, normalize
from norms.kernels.moments import moments, moments_of_sets
from norms.protocol import Situation
from norms.situation import check_slices


@dataclass(frozen=True)
class Moments:
    """Moments of every norm batch and domain, over the samples of that domain in that norm batch."""

    mean: Tensor  # (K, D, C), differentiable; 0 where there is no sample
    var: Tensor  # (K, D, C), biased
    images: Tensor  # (K, D)
    positions: int

    @property
    def count(self) -> Tensor:
        """Values that entered each statistic of a channel, (K, D, 1)."""
        return self.images[..., None] * self.positions

    @property
    def unbiased(self) -> Tensor:
        return self.var * (self.count / (self.count - 1).clamp(min=1))


class PerDomain(PerChannel, DomainStatistics):
    """A norm with running statistics (D, C) that normalizes each sample by the statistics of its domain."""

    syncs = True

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
        if x.shape[0] == 0 and self.merging is None:
            return self.empty(x)
        if not self.training:
            return self._amplified(self._evaluate(x, domain), self.running_mean, self.running_var, None)
        if self.merging is not None and isinstance(domain, int):  # another worker's part may have another domain
            domain = torch.full((x.shape[0],), domain, device=x.device)
        runs = self._runs(x, domain) if self.merging is None else None
        where = None if isinstance(domain, int) else self._pairs(x, domain)
        if runs is not None:
            y, moments = self._train_runs(x, runs)
        else:
            assert isinstance(domain, Tensor)
            assert where is not None
            y, moments = self._train_mixed(x, domain, where)
        mean, var = moments.mean.detach(), moments.unbiased.detach()
        y = self._amplified(y, *self._current(mean, var, moments.images), where)
        self.track(mean, var, moments.count)
        return y

    def _amplified(self, y: Tensor, mean: Tensor, var: Tensor, where: Tensor | None) -> Tensor:
        """y as this norm returns it.

        Args:
            y: normalized, with affine.
            mean, var: of every domain, without gradient, unbiased: (D, C), or in training (K, D, C).
            where: (N,), the pair of norm batch and domain of each sample; None where all have one domain.
        """
        return y

    def _current(self, mean: Tensor, var: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's statistics (K, D, C), and for domains that it does not hold the running ones."""
        held = images[..., None] > 0
        return torch.where(held, mean, self.running_mean), torch.where(held, var, self.running_var)

    def _affine(self, domain: int | Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, (C,) or one row per sample (N, C), in `dtype`."""
        if self.weight is None or self.bias is None:
            return None, None
        if not self.affine_per_domain:
            return self.weight.to(dtype), self.bias.to(dtype)
        return self.weight.to(dtype)[domain], self.bias.to(dtype)[domain]

    def _evaluate(self, x: Tensor, domain: int | Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self._affine(domain, wide)
        mean, var = self.running_mean[domain], self.running_var[domain]
        if isinstance(domain, int):
            return evaluate(x, mean, var, weight, bias, self.num_channels, self.eps)
        return normalize_by(x, mean.to(wide), var.to(wide), weight, bias, self.eps)

    def _runs(self, x: Tensor, domain: int | Tensor) -> list[tuple[int, int]] | None:
        """(domain, length) of each domain's samples, in order, where they stand together and every norm batch has
        as many of them; None where they do not, or where looking would have to wait for the device."""
        if isinstance(domain, int):
            return [(domain, x.shape[0])]
        told = self.situation.domain
        assert isinstance(told, Tensor)
        if not _readable(told):
            return None
        values, lengths = (t.tolist() for t in torch.unique_consecutive(told.long(), return_counts=True))
        if len(set(values)) < len(values) or any(length % self.situation.slices for length in lengths):
            return None
        return list(zip(values, lengths, strict=True))

    def _train_runs(self, x: Tensor, runs: list[tuple[int, int]]) -> tuple[Tensor, Moments]:
        """Each domain's samples by bn's own kernels."""
        slices, positions = self.situation.slices, math.prod(x.shape[2:])
        check_slices(x, slices)
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = (slices, self.num_domains, self.num_channels)
        means, variances, images = (x.new_zeros(shape, dtype=wide) for _ in range(3))  # of x, for vmap
        parts = []
        # split, not narrow: its backward is one concatenation
        for (domain, length), part in zip(runs, x.split([length for _, length in runs]), strict=True):
            count = length // slices * positions
            if count < 2:
                raise ValueError(self._too_few(x))
            weight, bias = self._affine(domain, wide)
            y, mean, var = normalize(part, weight, bias, self.num_channels, slices, self.eps)
            parts.append(y)
            means[:, domain], variances[:, domain] = mean, var * ((count - 1) / count)
            images[:, domain] = length // slices
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y, Moments(means, variances, images[..., 0], positions)

    def _pairs(self, x: Tensor, domain: Tensor) -> Tensor:
        """(N,): the pair of norm batch and domain of each sample, k * D + d."""
        slices = self.situation.slices
        check_slices(x, slices)
        return torch.arange(x.shape[0], device=x.device) % slices * self.num_domains + domain

    def _train_mixed(self, x: Tensor, domain: Tensor, where: Tensor) -> tuple[Tensor, Moments]:
        """Domains in any order; see `moments_of_sets`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.to(wide)  # once, so that gradients of a small type are added in the wide one
        pairs, positions = self.situation.slices * self.num_domains, math.prod(x.shape[2:])
        mean, var, images = moments_of_sets(*moments(values), where, pairs, self.merging)
        if positions == 1 and not x.is_meta and not torch.compiler.is_compiling() and bool((images == 1).any()):
            raise ValueError(self._too_few(x))
        weight, bias = self._affine(domain, wide)
        y = normalize_by(values, mean[where], var[where], weight, bias, self.eps).to(x.dtype)
        shape = (self.situation.slices, self.num_domains, self.num_channels)
        return y, Moments(mean.view(shape), var.view(shape), images.view(shape[:2]), positions)

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
