"""Norms that know which domain a sample is from: dsbn, dual_bn, bne, transnorm.

    dsbn       a whole BN per domain: statistics and affine        Chang et al. 2019, arXiv:1906.03950
    dual_bn    the same for clean and adversarial images           Xie et al. 2019, arXiv:1911.09665 (AdvProp)
    bne        statistics per domain, affine shared                Segu et al. 2020, arXiv:2011.12672
    transnorm  statistics per domain, affine shared, channels of   Wang et al. 2019, "Transferable Normalization",
               similar domains amplified                           NeurIPS

    y_n = (x_n - mean_d) / sqrt(var_d + eps) * weight + bias       d the domain of sample n, biased variance

The domain comes from `situation(net, domain=...)`: one number for the whole batch, or a tensor (N,) for a batch that
mixes domains. Training uses the statistics of the batch's samples of each domain and moves those domains' running ones
(unbiased variance, momentum 0.1); a domain that the batch does not hold is left alone. Evaluation uses the running
statistics of the domain that it is told. With `num_domains=1` no domain need be told, and dsbn and bne are bn.

Axes: N sample, C channel, P position, D domain, K slice, E = K * D pairs of slice and domain.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from norms.channels import PerChannel, check_arguments, transformed
from norms.grouping import evaluate, normalize
from norms.registry import register
from norms.running import DomainStatistics
from norms.situation import check_slices


@dataclass(frozen=True)
class _Moments:
    """Of every slice and domain, over the samples of that domain in that slice."""

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


class _PerDomain(PerChannel, DomainStatistics):
    """What the norms here share: running statistics (D, C), the domain that was told, normalization by domain."""

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
        domain = self._domain(x)
        if x.shape[0] == 0:
            return self.empty(x)
        if not self.training:
            return self._amplified(self._evaluate(x, domain), self.running_mean, self.running_var, None)
        if self._is_bn(x):
            return self._amplified(self._train_as_bn(x), self.running_mean, self.running_var, None)
        runs = self._runs(x, domain)
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
            where: (N,), the pair of slice and domain of each sample; None where all have one domain.
        """
        return y

    def _current(self, mean: Tensor, var: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's statistics (K, D, C), and for domains that it does not hold the running ones."""
        held = images[..., None] > 0
        return torch.where(held, mean, self.running_mean), torch.where(held, var, self.running_var)

    def _domain(self, x: Tensor) -> int | Tensor:
        """The domain of the batch, or (N,) of its samples."""
        domain = self.situation.domain
        if domain is None and self.num_domains == 1:
            return 0
        name = type(self).__name__
        if domain is None:
            doing = "training" if self.training else "evaluation"
            raise ValueError(
                f"{name}: {doing} needs the domain of the images (0 to {self.num_domains - 1}), none was told"
            )
        if isinstance(domain, bool) or not isinstance(domain, (int, Tensor)):
            raise ValueError(f"{name}: domain {domain!r}: an integer or a tensor of integers is needed")
        if isinstance(domain, int):
            if not 0 <= domain < self.num_domains:
                raise ValueError(f"{name}: domain {domain} is not in 0 to {self.num_domains - 1}")
            return domain
        if domain.is_floating_point() or domain.is_complex():
            raise ValueError(f"{name}: domains of {domain.dtype}: integers are needed")
        if domain.shape != x.shape[:1]:
            raise ValueError(f"{name}: domains of shape {tuple(domain.shape)} for a batch of {x.shape[0]}")
        if _readable(domain):
            low, high = (int(v) for v in domain.aminmax()) if len(domain) else (0, 0)
            if low < 0 or high >= self.num_domains:
                raise ValueError(f"{name}: domains {low} to {high} are not in 0 to {self.num_domains - 1}")
        return domain.to(x.device, torch.long)  # as a mask or in 8 bits it would index otherwise

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
        return _normalized(x, mean.to(wide), var.to(wide), weight, bias, self.eps)

    def _runs(self, x: Tensor, domain: int | Tensor) -> list[tuple[int, int]] | None:
        """(domain, length) of each domain's samples, in order, where they stand together and every slice cuts them
        alike; None where they do not, or where looking would have to wait for the device."""
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

    def _train_runs(self, x: Tensor, runs: list[tuple[int, int]]) -> tuple[Tensor, _Moments]:
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
        return y, _Moments(means, variances, images[..., 0], positions)

    def _is_bn(self, x: Tensor) -> bool:
        """Whether bn's own call serves, which also moves the running statistics: then a tie with bn is exact."""
        wide = torch.promote_types(x.dtype, torch.float32)
        plain = self.num_domains == 1 and self.situation.slices == 1 and not self.observed and not transformed()
        return plain and self.momentum is not None and self.running_mean.dtype == wide

    def _train_as_bn(self, x: Tensor) -> Tensor:
        if x.shape[0] * math.prod(x.shape[2:]) < 2:
            raise ValueError(self._too_few(x))
        weight, bias = self._affine(0, self.running_mean.dtype)
        return self.train_tracked(x, weight, bias, self.eps, row=0)

    def _pairs(self, x: Tensor, domain: Tensor) -> Tensor:
        """(N,): the pair of slice and domain of each sample, k * D + d."""
        slices = self.situation.slices
        check_slices(x, slices)
        return torch.arange(x.shape[0], device=x.device) % slices * self.num_domains + domain

    def _train_mixed(self, x: Tensor, domain: Tensor, where: Tensor) -> tuple[Tensor, _Moments]:
        """Domains in any order, without asking which samples belong to which: their sums are a matrix product.

        Moments of a domain follow from those of its samples by Chan's formula, so no large sums are subtracted.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        over = list(range(2, x.dim()))
        values = x.to(wide)  # once, so that gradients of a small type are added in the wide one
        within, means = torch.var_mean(values, over, correction=0) if over else (torch.zeros_like(values), values)
        pairs = self.situation.slices * self.num_domains
        member = (where[:, None] == torch.arange(pairs, device=x.device)).to(wide)  # (N, E)
        images, positions = member.sum(0), math.prod(x.shape[2:])
        if positions == 1 and not x.is_meta and not torch.compiler.is_compiling() and bool((images == 1).any()):
            raise ValueError(self._too_few(x))
        share = (member / images.clamp(min=1)).T  # (E, N): the mean over the samples of a pair
        # autocast would take products in 16 bits; the meta device has none
        exact = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with exact:
            mean = share @ means
            var = share @ (within + (means - mean[where]).square())
        weight, bias = self._affine(domain, wide)
        y = _normalized(values, mean[where], var[where], weight, bias, self.eps).to(x.dtype)
        shape = (self.situation.slices, self.num_domains, self.num_channels)
        return y, _Moments(mean.view(shape), var.view(shape), images.view(shape[:2]), positions)

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


def _readable(domain: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device, and are values at all."""
    return domain.device.type == "cpu" and type(domain) is Tensor and not torch.compiler.is_compiling()


def _normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (N, C, *) by mean and var (N, C), then weight and bias, (C,) or (N, C). Returns a tensor as x."""
    space = [1] * (x.dim() - 2)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    # centred first: the backward then sums no products with a large mean
    y = (x - mean.view(*mean.shape, *space)) * scale.view(*scale.shape, *space)
    if bias is not None:
        y = y + bias.view(*bias.shape, *space)
    return y.to(x.dtype)


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
class DomainSpecificBatchNorm(_PerDomain):
    """Domain-specific batch normalization: every domain has its own bn, statistics and affine.

        y_n = (x_n - mean_dc) / sqrt(var_dc + eps) * weight_dc + bias_dc        d the domain of sample n

    Args:
        num_channels: C.
        num_domains: D; a run fills it in. 1 is exactly bn.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias (D, C).

    Raises:
        ValueError: (forward) see `_PerDomain.forward`; evaluation needs a domain that was trained, so an unseen
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

    The layer is dsbn with two domains; what it is about is which images are told to be of which (see the task
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
class BatchNormEmbedding(_PerDomain):
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
        ValueError: (forward) see `_PerDomain.forward`.
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
class TransNorm(_PerDomain):
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
        ValueError: more than two domains; (forward) see `_PerDomain.forward`.
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
            raise ValueError(f"transnorm: num_domains={num_domains}; it has two, source and target")
        super().__init__(num_channels, num_domains, eps, momentum, affine, False, device, dtype)

    def _amplified(self, y: Tensor, mean: Tensor, var: Tensor, where: Tensor | None) -> Tensor:
        ratio = mean / torch.sqrt(var + self.eps)
        distance = (ratio[..., 0, :] - ratio[..., -1, :]).abs()  # (C,), in training (K, C)
        alike = 1 / (1 + distance)
        factor = 1 + self.num_channels * alike / alike.sum(-1, keepdim=True)
        if factor.dim() == 1:
            factor = factor[None]
        elif where is not None:
            factor = factor[torch.div(where, self.num_domains, rounding_mode="floor")]  # that of each sample's slice
        elif len(factor) > 1:
            factor = factor.repeat(y.shape[0] // len(factor), 1)  # slice k is x[k::K]
        return (y * factor.view(*factor.shape, *[1] * (y.dim() - 2))).to(y.dtype)
