"""Normalization by the moments of groups of a flattened sample, over sets of samples: in, ln, gn, bn, bgn, ghost.

    x (N, C, *P) is K sets of samples, set k being x[k::K]: the batch (K = 1), norm batches, or single samples (K = N)
    D = C * P values of a sample, channel-major (c, p), are cut into G groups of S = D / G
    mean_kg, var_kg over the samples of set k and the S values of group g
    y = (x - mean_kg) / sqrt(var_kg + eps) * weight_c + bias_c

One call of the native library forward and one backward: a set that fits the cache is read from memory once. Saved for
the backward are x and 4 K G numbers. Elsewhere torch's kernel for batch normalization does it on a view (K, G, M, S);
compilation, torch.func, dual numbers, meta and fake tensors take differentiable operations (plain.py).

Axes: N sample, K set, M = N / K samples of a set, C channel, P position, D = C * P, G group, S = D / G.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import memory_format, ordinary
from norms.kernels import native, plain
from norms.kernels.affine import by_moments
from norms.workers import Workers, enough


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    sets: int,
    eps: float,
    workers: Workers | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    pooled: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the moments of groups and sets.

    Args:
        x: (N, C, *), not empty but with `workers`.
        weight: (C,) or None, and bias likewise, in any floating-point type.
        groups: G, a divisor of D = C * positions.
        sets: K, at most N. Where it does not divide N, some sets have one sample more; then there is one group per
            channel.
        eps: added to the variance.
        workers: whose values the statistics are of, and not only those of x, which may be empty; None: x alone. They
            all call this, and go backward through it, together; then there is one set.
        given: mean and biased variance (K, G), where the caller has computed them from x already.
        pooled: 1 or 2: one deviation for all groups of a set, from the groups' means or from the mean of all, in the
            place of each group's own; not with `workers` or `given`.

    Returns:
        y: as x.
        mean: (K, G) without gradient.
        var: (K, G) without gradient; unbiased, as running statistics want it.

    Raises:
        ValueError: all workers together have fewer than two values per statistic.
    """
    if workers is not None:
        return _merged(x, weight, bias, groups, eps, workers)
    y, stats = _normalized(x, weight, bias, groups, sets, eps, given, pooled)
    return y, stats[0], stats[-1]


def normalize_samples(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """x, not empty, by the moments of groups of each sample; as `normalize`."""
    return _normalized(x, weight, bias, groups, x.shape[0], eps)[0]


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    sets: int,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
    pooled: int = 0,
) -> tuple[Tensor, Sequence[Tensor]]:
    """y, and statistics (K, G) without gradient: the mean first, the unbiased variance last."""
    ready = native.ready(x)
    if ready is not None:
        return _Normalize.apply(ready, *_parameters(ready, weight, bias), groups, sets, eps, given, False, pooled)
    if _torch_serves(x, sets, pooled):
        return _by_torch(x, weight, bias, groups, sets, eps)
    y, stats = plain.normalize(x, weight, bias, groups, sets, eps, pooled=pooled)
    return y, stats.detach().unbind()


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Normalize x (N, C, *) by given statistics of size G, which have no gradient. Returns y as x."""
    ready = native.ready(x)
    if ready is not None:
        # copied: training may move the statistics before the backward of this forward, which is to be by these
        given = (mean.detach(), var.detach())
        return _Normalize.apply(ready, *_parameters(ready, weight, bias), groups, 1, eps, given, True, 0)[0]
    kind = plain.table_type(x)
    mean, var = (t.to(kind, copy=True) for t in (mean, var))
    if x.shape[1] % groups == 0:
        return plain.affine(x, *_line(mean, torch.rsqrt(var + eps), weight, bias, x.shape[1] // groups))
    wide = torch.promote_types(x.dtype, torch.float32)
    each = (x.shape[1], *x.shape[2:])
    mean, scale = (
        t.to(wide).repeat_interleave(math.prod(each) // groups).view(each) for t in (mean, torch.rsqrt(var + eps))
    )
    y = plain.scaled((x - mean) * scale, weight, bias)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def scale_channels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x * weight_c + bias_c, as x (N, C, *)."""
    ready = native.ready(x)
    if ready is None:
        return plain.scaled(plain.wide(x), weight, bias).to(x.dtype).contiguous(memory_format=memory_format(x))
    return _Normalize.apply(ready, *_parameters(ready, weight, bias), x.shape[1], 1, 0.0, (0.0, 1.0), True, 0)[0]


def _line(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """scale and shift (1, C) from statistics (G,) of groups of `size` channels."""
    mean, scale = (t if size == 1 else t.repeat_interleave(size) for t in (mean, rstd))
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale[None], (shift if bias is None else shift + bias)[None]


def _parameters(x: Tensor, *parameters: Tensor | None) -> Iterator[Tensor | None]:
    """In a type that the native library reads."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (p if p is None or (p.dtype == kind and p.is_contiguous()) else p.to(kind).contiguous() for p in parameters)


class _Normalize(torch.autograd.Function):
    # One method, no setup_context: with it every call inspects a signature, 70 us.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        sets: int,
        eps: float,
        given: tuple[Tensor, Tensor] | tuple[float, float] | None,
        fixed: bool,
        pooled: int,
    ) -> tuple[Tensor, Tensor]:
        y, stats = native.normalize(x, weight, bias, groups, sets, eps, given, pooled)
        ctx.eps, ctx.fixed, ctx.pooled = eps, fixed, pooled
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        dy = grads[0]
        if dy is None:
            return (None,) * 9
        if plain.serves_gradient(dy):
            sets, groups = stats.shape[1:]
            if (sets, groups) == (1, x.shape[1]) and not (ctx.fixed or ctx.pooled) and ordinary(x) and ordinary(dy):
                return (*_backward_by_torch(dy, x, weight, stats, ctx.eps), *(None,) * 6)
            given = (x, weight, bias, groups, sets, ctx.eps)
            with torch.enable_grad():
                if ctx.fixed:
                    y = plain.normalize(*given, (stats[0], stats[1]))[0]
                elif _torch_serves(x, sets, ctx.pooled) and ordinary(dy):  # faster, differentiated again
                    y = _by_torch(*given)[0]
                else:
                    y = plain.normalize(*given, pooled=ctx.pooled)[0]
            found = plain.gradients((y,), (x, weight, bias), (dy,), again=torch.is_grad_enabled())
            return (*found, *(None,) * 6)
        wanted = (ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3]))
        return (*native.normalize_backward(dy, x, weight, stats, wanted, ctx.fixed, ctx.pooled), *(None,) * 6)


def _backward_by_torch(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of batch normalization that have gradients: torch's own backward, without another forward."""
    mean, rstd = (stats[i, 0].to(torch.promote_types(x.dtype, torch.float32)) for i in (0, 2))
    wanted = [True, weight is not None, weight is not None]
    return torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, eps, wanted)


def _torch_serves(x: Tensor, sets: int, pooled: int) -> bool:
    return ordinary(x) and not pooled and x.shape[0] % sets == 0


def _by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, sets: int, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """By torch's kernels for batch normalization, which keep x alone for the backward, on a view where that is one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = x.new_zeros(2, sets * groups, dtype=wide).unbind()
    if groups == x.shape[1] and sets == 1:
        scale, shift = (None if p is None else p.to(wide) for p in (weight, bias))
        y = F.batch_norm(x, mean, var, scale, shift, True, 1.0, eps)  # momentum 1 leaves the batch's own statistics
    else:
        values = x.to(wide).reshape(x.shape[0] // sets, sets * groups, x[0].numel() // groups)
        y = F.batch_norm(values, mean, var, None, None, True, 1.0, eps).reshape(x.shape)
        y = plain.scaled(y, weight, bias).to(x.dtype).contiguous(memory_format=memory_format(x))
    return y, (mean.view(sets, groups), var.view(sets, groups))


def _merged(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, workers: Workers
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` by the moments of all workers' values: one small message to all of them each way."""
    count = math.prod((x.shape[0], *x.shape[1:])) // groups
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def rule(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """mean, var (1, C) of this worker's samples."""
        grouped = (t.view(groups, -1) for t in (mean, var))
        means, variances = grouped
        union = means.mean(1)
        spread = variances.mean(1) + (means - union[:, None]).square().mean(1)
        merged, variance, total = workers.merge(union, spread, count)
        kept.append((merged.detach(), variance.detach(), total))
        return _line(merged, torch.rsqrt(variance + eps), weight, bias, x.shape[1] // groups)

    if x.shape[1] % groups == 0:
        y = by_moments(x, rule, weight, bias, rows=1)[0]
    else:
        y, stats = _plain_merged(x, weight, bias, groups, eps, workers)
        kept.append(stats)
    mean, var, total = kept[0]
    enough(count, total, workers)
    return y, mean[None], (var * (total / (total - 1)))[None]


def _plain_merged(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, workers: Workers
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The same where groups cut channels, in differentiable operations."""
    wide = plain.wide(x)
    grouped = wide.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    mean = grouped.mean(dim=(0, 2)) if len(x) else grouped.sum(dim=(0, 2))
    squares = (grouped - mean[:, None]).square()
    var = squares.mean(dim=(0, 2)) if len(x) else squares.sum(dim=(0, 2))
    mean, var, total = workers.merge(mean, var, math.prod(x.shape) // groups)
    y = plain.scaled(((grouped - mean[:, None]) * torch.rsqrt(var + eps)[:, None]).reshape(x.shape), weight, bias)
    y = y.to(x.dtype).contiguous(memory_format=memory_format(x))
    return y, (mean.detach(), var.detach(), total.detach())
