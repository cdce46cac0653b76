"""Batch statistics over groups of a flattened sample, near the speed and memory of torch's batch normalization.

    x (N, C, *P) is K norm batches of M = N / K samples; slice k is x[k::K]
    D = C * P values of a sample, channel-major (c, p), are cut into G groups of S = D / G
    mean_kg, var_kg over the M samples and S values of group g in slice k
    y = (x - mean_kg) / sqrt(var_kg + eps) * weight_c + bias_c

Axes: N sample, M sample of a slice, K slice, C channel, P position, D = C * P, G group, S = D / G, R run, U unit.

How: memory is read in units, runs of gcd(P, S) positions that lie inside one group *and* one channel. Torch's kernels
give each unit's moments; those of a group follow from them by Chan's formula, which takes no difference of large sums;
scale and shift, group's and channel's together, are one more pass with one coefficient per unit. The backward is the
same: torch's sums per unit, combined per group, and two passes. Saved for the backward are x and 2 K G numbers.
Where a unit is a whole group, all of it is `F.batch_norm` on a view. Small operations count: at a million elements,
each runs with cold caches, and fifty of them take as long as two passes.

The same formula in differentiable operations (`_plain`) serves second derivatives, compilation (whose compiler fuses
and recomputes by itself), torch.func, dual numbers, meta and fake tensors. tests/norms/layers/test_batch.py holds the
two against each other.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.channels import memory_format, transformed

_CACHED = 2**18  # values of a piece that is gone over twice: 1 MB of float32
_LONG = 4096  # values that a call of a kernel must have to be worth its overhead: about 8 us, against 4 us of work
_SHORT = 16  # values of a unit from which on a kernel that goes along it is faster than one that goes across
_MANY = 64  # samples from which on some numbers per value of a sample take little memory: 9 % more at the peak


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, slices: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the statistics of the batch.

    Args:
        x: (N, C, *).
        weight: (C,) or None, and bias likewise, in float32 or better.
        groups: G, a divisor of D = C * positions.
        slices: K, a divisor of N.
        eps: added to the variance.

    Returns:
        y: as x.
        mean: (K, G) without gradient.
        var: (K, G) without gradient; unbiased, as running statistics want it.
    """
    layout = memory_format(x)
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
    if _ordinary(x):
        y, stats = _Normalize.apply(x, weight, bias, blocks, eps)
    else:
        y, stats = _plain(x, weight, bias, blocks, eps)
    mean, var = stats.detach().unbind()
    return y, mean, var * (blocks.count / (blocks.count - 1))


def _as_it_lies(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` with one group per channel and one slice, by the kernel for the layout that x has."""
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


@dataclass(frozen=True)
class Blocks:
    """How the memory of one input is read in units; see the module's header.

    Units lie in the order (K, C, R) for contiguous memory, (K, R, C) for channels_last. Methods take and give several
    quantities at once, stacked along a first axis T.

    Attributes:
        shape: of x, (N, C, *).
        groups: G, a divisor of D.
        slices: K, a divisor of N.
        channels_last: x has its channels innermost in memory.
        samples: M, of one slice.
        channels: C.
        group_size: S.
        unit: positions of one sample in one unit, gcd(P, S), or 1 where that is short.
        runs: R, units of one sample in one channel.
    """

    shape: tuple[int, ...]
    groups: int
    slices: int
    channels_last: bool
    samples: int
    channels: int
    group_size: int
    unit: int
    runs: int

    @classmethod
    def of(cls, x: Tensor, groups: int, slices: int) -> Blocks:
        shape, channels, positions = tuple(x.shape), x.shape[1], math.prod(x.shape[2:])
        group_size = channels * positions // groups
        unit = _common(positions, group_size)
        last = memory_format(x) != torch.contiguous_format
        some = torch.compiler.is_compiling() or shape[0] // slices < _MANY  # a graph is of any number of samples
        if unit < _SHORT and not last and not some:
            unit = 1  # values of a sample are columns, which torch's kernels vectorize
        return cls(shape, groups, slices, last, shape[0] // slices, channels, group_size, unit, positions // unit)

    @property
    def count(self) -> int:
        """Values that enter one statistic: M * S."""
        return self.samples * self.group_size

    @property
    def interleaved(self) -> bool:
        """No reading of the memory has each unit in one column: channels_last, cut in slices or runs."""
        return self.channels_last and self.slices * self.runs > 1

    @property
    def whole(self) -> bool:
        """A unit is a whole group."""
        return self.unit == self.group_size and not self.interleaved

    @property
    def sample_by_sample(self) -> bool:
        """Interleaved units are read once per sample; else every position of every channel is a column."""
        long = self.unit * self.channels >= _LONG and (self.runs == 1 or self.samples < 8)
        return self.interleaved and self.slices > 1 and long

    def grid(self, x: Tensor) -> Tensor:
        """x as (M, K * U, unit), for channels_last as (M, K * R, unit, C).

        A view; a copy only where x lies otherwise in memory than `channels_last` says.
        """
        if not self.channels_last:
            return x.reshape(self.samples, self.slices * self.channels * self.runs, self.unit)
        return x.movedim(1, -1).reshape(self.samples, self.slices * self.runs, self.unit, self.channels)

    def on_grid(self, per_unit: Tensor) -> Tensor:
        """(K * U,), to be broadcast over `grid`."""
        return per_unit.view(-1, 1, self.channels) if self.channels_last else per_unit.view(-1, 1)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """x as (rows, columns, values) for torch's kernels, in several tensors where one does not do; as grid."""
        v = self.grid(x)
        if not self.channels_last:
            return (v,)
        if not self.interleaved:
            return (v.reshape(-1, self.channels, 1, 1),)
        if self.sample_by_sample:
            return v.reshape(-1, self.unit, self.channels, 1, 1).unbind()
        return (v.reshape(self.samples, -1, 1, 1),)

    def back(self, v: Tensor) -> Tensor:
        """Any tensor that has the memory order of x, in the shape of x; no copy."""
        if not self.channels_last:
            return v.reshape(self.shape)
        return v.reshape(self.shape[0], *self.shape[2:], self.channels).movedim(-1, 1)

    def by_group(self, per_unit: Tensor) -> Tensor:
        """(T, K * U) -> (T, K, G, units of each)."""
        if self.channels_last and self.runs > 1:
            per_unit = per_unit.view(-1, self.slices, self.runs, self.channels).transpose(2, 3)
        return per_unit.reshape(-1, self.slices, self.groups, self.channels * self.runs // self.groups)

    def by_channel(self, per_unit: Tensor) -> tuple[Tensor, ...]:
        """(T, K * U) -> T tensors (C,), the sums."""
        if self.slices * self.runs == 1:
            return per_unit.unbind()
        shape = (self.runs, self.channels, 1) if self.channels_last else (1, self.channels, self.runs)
        return per_unit.view(-1, self.slices, *shape).sum((1, 2, 4)).unbind()

    def spread(self, per_group: Tensor) -> tuple[Tensor, ...]:
        """(T, K, G) -> T tensors (K * U,): each unit gets its group's value."""
        each = per_group[..., None].expand(-1, -1, -1, self.channels * self.runs // self.groups)
        if self.channels_last and self.runs > 1:
            each = each.reshape(-1, self.slices, self.channels, self.runs).transpose(2, 3)
        # torch's kernels read coefficients of stride 0 wrongly
        return each.reshape(per_group.shape[0], -1).contiguous().unbind()

    def spread_channels(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """(C,) -> (K * U,): each unit gets its channel's value."""
        parameter = parameter.to(dtype)
        if self.slices * self.runs == 1:
            return parameter
        if self.channels_last:
            return parameter.repeat(self.slices * self.runs)
        each = parameter[:, None].expand(self.slices, self.channels, self.runs)
        return each.reshape(-1).contiguous()

    def coefficients(
        self, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """a, b (K * U,) with a * x + b = (x - mean) * rstd * weight + bias; mean, rstd: (K * U,)."""
        if weight is None or bias is None:
            return rstd, -mean * rstd
        scale = rstd * self.spread_channels(weight, rstd.dtype)
        return scale, torch.addcmul(self.spread_channels(bias, rstd.dtype), mean, scale, value=-1)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and biased variance, (2, K, G), in float32 or better."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.device.type == "cpu" and not self.channels_last and self.unit >= _SHORT:
            stats = _pooled(_moments_of_rows(self.grid(x), wide), 1)
        else:
            parts = self.parts(x)
            # given buffers of the wider type, torch computes moments in it; momentum 0 leaves them alone
            zero = None if wide == x.dtype else x.new_zeros(parts[0].shape[1], dtype=wide)
            stats = _stacked([torch.batch_norm_update_stats(v, zero, zero, 0.0) for v in parts])
            if self.sample_by_sample:
                stats = _pooled(stats.view(2, self.samples, -1), 1)
            elif self.interleaved:
                stats = _pooled(stats.view(2, -1, self.unit, self.channels), 2)
        stats = self.by_group(stats)
        if stats.shape[3] == 1:
            return stats.squeeze(3)
        means, variances = stats.unbind()
        between, mean = torch.var_mean(means, 2, correction=0)  # Chan's formula in the fewest operations
        return torch.stack((mean, between.add_(variances.mean(2))))

    def sums(self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """(2, K * U): sums of dy * (x - mean) * rstd and of dy. mean, rstd: (K * U,)."""
        columns = [(mean, rstd)]
        if self.sample_by_sample:
            columns = list(zip(*(s.view(-1, self.channels).unbind() for s in (mean, rstd)), strict=True))
        elif self.interleaved:
            wide = (s.view(-1, 1, self.channels).expand(-1, self.unit, -1).reshape(-1) for s in (mean, rstd))
            columns = [(next(wide), next(wide))]
        pairs = zip(self.parts(dy), self.parts(x), itertools.cycle(columns), strict=False)
        sums = _stacked([_sums_of_columns(dv, v, m, s) for dv, v, (m, s) in pairs])
        if self.sample_by_sample:
            return sums.view(2, self.samples, -1).sum(1)
        if self.interleaved:
            return sums.view(2, -1, self.unit, self.channels).sum(2).view(2, -1)
        return sums

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor, plus: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """scale * x + shift, plus another tensor times a factor. Returns a tensor as x.

        Args:
            x: in memory as `channels_last` says.
            scale: (K * U,), and shift likewise.
            plus: a tensor that lies in memory as x does, and its factor (K * U,); not differentiable.
        """
        if self.interleaved or (self.channels_last and x.dtype == scale.dtype):
            y = torch.addcmul(self.on_grid(shift), self.grid(x), self.on_grid(scale))
        else:
            v, one = self.parts(x)[0], torch.ones_like(scale)
            y = F.batch_norm(v, torch.zeros_like(scale), one, scale, shift, False, 0.0, 1e-30)  # mean 0, variance 1
            y = y.reshape(self.grid(x).shape)
        if plus is not None:
            y.addcmul_(self.grid(plus[0]), self.on_grid(plus[1]))
        return self.back(y).to(x.dtype)


def _common(positions: int, group_size: int) -> int:
    """The greatest common divisor; in a compiled graph, which may not know the sizes, a common divisor."""
    if not torch.compiler.is_compiling():
        return math.gcd(positions, group_size)
    if group_size % positions == 0:
        return positions
    return group_size if positions % group_size == 0 else 1


def _moments_of_rows(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean and biased variance (2, rows, columns) of contiguous v (rows, columns, values).

    Two passes over pieces that stay in the cache, vectorized: on a CPU three to four times as fast as torch's kernel,
    which adds one value after the other in float64, and as exact.
    """
    rows = max(1, _CACHED // max(1, v.shape[1] * v.shape[2]))
    means, norms = [], []
    for piece in v.split(rows):
        piece = piece.to(dtype)
        mean = piece.mean(dim=2, keepdim=True)
        means.append(mean)
        norms.append(torch.linalg.vector_norm(piece - mean, dim=2))
    return torch.stack((torch.cat(means).squeeze(2), torch.cat(norms).square_().div_(v.shape[2])))


def _sums_of_columns(dv: Tensor, v: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Per column of dv and v (rows, columns, values): sums of dv * (v - mean) * rstd and of dv."""
    if v.is_cuda:  # where the kernel below wants a weight, and the half of it that synchronized BN uses is open
        sums, products, _, _ = torch.batch_norm_backward_reduce(dv, v, mean, rstd, None, True, False, False)
        return products * rstd, sums
    kernel = torch.ops.aten.native_batch_norm_backward.default
    return kernel(dv, v, None, None, None, mean, rstd, True, 0.0, [False, True, True])[1:]


def _stacked(pairs: list[tuple[Tensor, ...]]) -> Tensor:
    """Pairs of (columns,) of several parts -> (2, parts * columns)."""
    first, second = zip(*pairs, strict=True)
    return torch.cat(first + second).view(2, -1)


def _pooled(stats: Tensor, dim: int) -> Tensor:
    """Mean and biased variance (2, ...) of the union of equally large sets along a dimension, by Chan's formula."""
    if stats.shape[dim] == 1:
        return stats.squeeze(dim)
    union = stats.mean(dim, keepdim=True)
    union[1].add_((stats[0] - union[0]).square_().mean(dim - 1, keepdim=True))
    return union.squeeze(dim)


def _ordinary(x: Tensor) -> bool:
    """A tensor with memory on a device whose kernels we know, outside compilation and torch.func's transforms."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and not transformed()
    )


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
