"""Batch statistics over groups of a flattened sample, near the speed and memory of torch's batch normalization.

    x (N, C, *P) is K norm batches of M = N / K samples; norm batch k is x[k::K]
    D = C * P values of a sample, channel-major (c, p), are cut into G groups of S = D / G
    mean_kg, var_kg over the M samples and S values of group g in norm batch k
    y = (x - mean_kg) / sqrt(var_kg + eps) * weight_c + bias_c

Axes: N sample, K norm batch (`slices` is their number), M sample of a norm batch, C channel, P position, D = C * P,
G group, S = D / G.

How: memory is read in units, each inside one group and one channel (norms.kernels.blocks), which give the moments of
groups; scale and shift, group's and channel's together, are one more pass with one coefficient per unit. The backward
is the same: torch's sums per unit, combined per group, and two passes. Saved for the backward are x and 2 K G numbers.
Where a unit is a whole group, all of it is `F.batch_norm` on a view. Small operations count: at a million elements,
each runs with cold caches, and fifty of them take as long as two passes.

The same formula in differentiable operations (`_plain`) serves second derivatives, compilation (whose compiler fuses
and recomputes by itself), torch.func, dual numbers, meta and fake tensors. tests/norms/kernels/test_grouping.py holds
the two against each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import memory_format, ordinary, transformed
from norms.kernels.blocks import Blocks
from norms.workers import Workers, enough


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    slices: int,
    eps: float,
    workers: Workers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the statistics of the batch.

    Args:
        x: (N, C, *).
        weight: (C,) or None, and bias likewise, in float32 or better.
        groups: G, a divisor of D = C * positions.
        slices: K, the number of norm batches, a divisor of N.
        eps: added to the variance.
        workers: whose values the statistics are of, and not only those of x, which may be empty; None: x alone. They
            all call this, and go backward through it, together.

    Returns:
        y: as x.
        mean: (K, G) without gradient.
        var: (K, G) without gradient; unbiased, as running statistics want it.

    Raises:
        ValueError: all workers together have fewer than two values per statistic.
    """
    layout = memory_format(x)
    if workers is not None:
        like = x.contiguous() if x.is_cuda else x
        blocks = Blocks.of(like, groups, slices)
        y, stats, total = _Merged.apply(like, weight, bias, blocks, eps, workers)
        enough(blocks.count, total, workers)
        mean, var = stats.unbind()
        return y.contiguous(memory_format=layout), mean, var * (total / (total - 1))
    if x.is_cuda and layout != torch.contiguous_format:
        if groups == x.shape[1] and slices == 1:
            return _as_it_lies(x, weight, bias, eps)
        # reading channels innermost in units is made for a CPU's caches; here a copy costs less
        y, mean, var = normalize(x.contiguous(), weight, bias, groups, slices, eps)
        return y.contiguous(memory_format=layout), mean, var
    blocks = Blocks.of(x, groups, slices)
    if blocks.whole and not transformed():  # there torch's kernels give wrong second derivatives, without a word
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var = (x.new_zeros(slices * groups, dtype=wide) for _ in range(2))
        scale, shift = (None if p is None else blocks.spread_channels(p, wide) for p in (weight, bias))
        v = blocks.parts(x)[0]
        # momentum 1 leaves the batch's own statistics in the buffers
        y = blocks.back(F.batch_norm(v, mean, var, scale, shift, True, 1.0, eps))
        return y, mean.view(slices, groups), var.view(slices, groups)
    if ordinary(x):
        y, stats = _Normalize.apply(x, weight, bias, blocks, eps)
    else:
        y, stats = _plain(x, weight, bias, blocks, eps)
    mean, var = stats.detach().unbind()
    return y, mean, var * (blocks.count / (blocks.count - 1))


def _as_it_lies(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` with one group per channel and one norm batch, by the kernel for the layout that x has."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = (x.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    scale, shift = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.batch_norm(x, mean, var, scale, shift, True, 1.0, eps)  # momentum 1 leaves the batch's own statistics
    return y, mean[None], var[None]


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Normalize x (N, C, *) by given statistics of size G. Returns y as x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # copied: training may move the statistics before the backward of this forward, which is to be by these
    mean, var = (t.to(wide, copy=True) for t in (mean, var))
    if groups == x.shape[1]:
        scale, shift = (None if p is None else p.to(wide) for p in (weight, bias))
        return F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps)
    layout = memory_format(x)
    if x.is_cuda and layout != torch.contiguous_format:
        return evaluate(x.contiguous(), mean, var, weight, bias, groups, eps).contiguous(memory_format=layout)
    blocks = Blocks.of(x, groups, 1)
    mean, var = blocks.spread(torch.stack((mean, var))[:, None])
    if blocks.interleaved:
        return blocks.affine(x, *blocks.coefficients(mean, torch.rsqrt(var + eps), weight, bias))
    scale, shift = (None if p is None else blocks.spread_channels(p, wide) for p in (weight, bias))
    return blocks.back(F.batch_norm(blocks.parts(x)[0], mean, var, scale, shift, False, 0.0, eps))


class _Normalize(torch.autograd.Function):
    """`_plain` in few passes over memory."""

    # One method, no setup_context: with it every call inspects a signature, 70 us.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: Blocks, eps: float
    ) -> tuple[Tensor, Tensor]:
        stats = blocks.moments(x)
        mean, var = stats.unbind()
        saved = torch.stack((mean, torch.rsqrt(var + eps)))
        unit_mean, unit_rstd = blocks.spread(saved)
        # a view could not be changed in place by an activation after it
        y = blocks.affine(x, *blocks.coefficients(unit_mean, unit_rstd, weight, bias)).data
        ctx.blocks, ctx.eps = blocks, eps
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, saved)
        return y, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, stats = ctx.saved_tensors
        dy = grads[0]
        if dy is None:
            return None, None, None, None, None
        blocks: Blocks = ctx.blocks
        if torch.is_grad_enabled():  # create_graph=True: the result is itself differentiated
            return (*_plain_backward(dy, x, weight, blocks, ctx.eps), None, None)
        dy = dy.contiguous(memory_format=memory_format(x))
        mean, factor = blocks.spread(stats)
        sums = blocks.sums(dy, x, mean, factor)
        d_weight, d_bias, dx = None, None, None
        if weight is not None:
            d_weight, d_bias = blocks.by_channel(sums)
            scale = blocks.spread_channels(weight, stats.dtype)
            sums, factor = sums * scale, factor * scale
        if ctx.needs_input_grad[0]:
            # rstd * (weight * dy - mean(weight * dy) - standardized * mean(weight * dy * standardized))
            mean, rstd = stats.unbind()  # of groups
            slope, offset = (blocks.by_group(sums).sum(3) * (rstd / -blocks.count)).unbind()
            slope = slope * rstd
            slope, offset = blocks.spread(torch.stack((slope, torch.addcmul(offset, slope, mean, value=-1))))
            dx = blocks.affine(x, slope, offset, plus=(dy, factor))
        return dx, d_weight, d_bias, None, None


class _Merged(torch.autograd.Function):
    """As `_Normalize`, by the moments of all workers' values: one small message to all of them each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: Blocks, eps: float, workers: Workers
    ) -> tuple[Tensor, Tensor, Tensor]:
        if blocks.samples:
            stats = blocks.moments(x)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            stats = x.new_zeros(2, blocks.slices, blocks.groups, dtype=wide)
        mean, var, total = workers.merge(stats[0], stats[1], blocks.count)
        saved, stats = torch.stack((mean, torch.rsqrt(var + eps))), torch.stack((mean, var))
        if blocks.samples:
            unit_mean, unit_rstd = blocks.spread(saved)
            y = blocks.affine(x, *blocks.coefficients(unit_mean, unit_rstd, weight, bias)).data
        else:
            y = torch.empty_like(x)
        ctx.blocks, ctx.eps, ctx.workers = blocks, eps, workers
        ctx.mark_non_differentiable(stats, total)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, saved, total)
        return y, stats, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, total = ctx.saved_tensors
        blocks, workers = ctx.blocks, ctx.workers
        dy = grads[0]
        if dy is None:
            return None, None, None, None, None, None
        if torch.is_grad_enabled():  # create_graph=True: the result is itself differentiated
            given = [t for t, wanted in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True) if wanted]
            y = _plain_merged(x, weight, bias, blocks, ctx.eps, workers)
            found = iter(torch.autograd.grad(y, given, dy, create_graph=True))
            return (*(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None, None)
        if blocks.samples:
            dy = dy.contiguous(memory_format=memory_format(x))
            mean, factor = blocks.spread(stats)
            sums = blocks.sums(dy, x, mean, factor)
        else:
            units = blocks.slices * blocks.channels * blocks.runs
            sums, factor = stats.new_zeros(2, units), stats.new_zeros(units)
        d_weight, d_bias, dx = None, None, None
        if weight is not None:
            d_weight, d_bias = blocks.by_channel(sums)  # of this worker's samples
            scale = blocks.spread_channels(weight, stats.dtype)
            sums, factor = sums * scale, factor * scale
        if ctx.needs_input_grad[0]:
            mean, rstd = stats.unbind()
            sums = workers.total(blocks.by_group(sums).sum(3))
            slope, offset = (sums * (rstd / -total)).unbind()
            slope = slope * rstd
            if blocks.samples:
                slope, offset = blocks.spread(torch.stack((slope, torch.addcmul(offset, slope, mean, value=-1))))
                dx = blocks.affine(x, slope, offset, plus=(dy, factor))
            else:
                dx = torch.empty_like(x)
        return dx, d_weight, d_bias, None, None, None


def _plain_merged(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: Blocks, eps: float, workers: Workers
) -> Tensor:
    """y of `_Merged` in differentiable operations."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.reshape(blocks.samples, blocks.slices, blocks.groups, blocks.group_size)
    mean = grouped.mean(dim=(0, 3)) if blocks.samples else grouped.sum(dim=(0, 3))
    squares = (grouped - mean[..., None]).square()
    var = squares.mean(dim=(0, 3)) if blocks.samples else squares.sum(dim=(0, 3))
    mean, var, _ = workers.merge(mean, var, blocks.count)
    y = ((grouped - mean[..., None]) * torch.rsqrt(var + eps)[..., None]).reshape(blocks.shape)
    if weight is not None and bias is not None:
        shape = (-1, *[1] * (x.dim() - 2))
        y = y * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype)


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: Blocks, eps: float) -> tuple[Tensor, Tensor]:
    """y, and mean and biased variance (2, K, G), in differentiable operations."""
    standard, mean, var = _standardize(x, blocks, eps)
    y = standard.reshape(blocks.shape)
    if weight is not None and bias is not None:
        shape = (-1, *[1] * (x.dim() - 2))
        y = y * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x)), torch.stack((mean, var))[:, 0, :, :, 0]


def _standardize(x: Tensor, blocks: Blocks, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) as (M, K, G, S), and the biased moments (1, K, G, 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.reshape(blocks.samples, blocks.slices, blocks.groups, blocks.group_size)
    mean = grouped.mean(dim=(0, 3), keepdim=True)
    centred = grouped - mean
    var = centred.square().mean(dim=(0, 3), keepdim=True)
    return centred * torch.rsqrt(var + eps), mean, var


def _plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, blocks: Blocks, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias in differentiable operations of dy, x and weight."""
    standard, _, var = _standardize(x, blocks, eps)
    dy = dy.to(standard.dtype)
    d_weight, d_bias, d_standard = None, None, dy
    if weight is not None:
        over = (0, *range(2, dy.dim()))
        d_weight, d_bias = (dy * standard.reshape(blocks.shape)).sum(over), dy.sum(over)
        d_standard = dy * weight.view(-1, *[1] * (x.dim() - 2))
    d_standard = d_standard.reshape(standard.shape)
    mean_d = d_standard.mean(dim=(0, 3), keepdim=True)
    mean_product = (d_standard * standard).mean(dim=(0, 3), keepdim=True)
    dx = torch.rsqrt(var + eps) * (d_standard - mean_d - standard * mean_product)
    return dx.reshape(blocks.shape).to(x.dtype), d_weight, d_bias
