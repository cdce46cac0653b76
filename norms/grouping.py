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
Where a unit is a whole group, all of it is `F.batch_norm` on a view.

The same formula in differentiable operations (`_plain`) serves second derivatives, compilation (whose compiler fuses
and recomputes by itself), torch.func, meta and fake tensors. tests/test_norms_batch.py holds the two against each
other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.sample import memory_format

_CACHED = 2**18  # values of a piece that is gone over twice: 1 MB of float32
_LONG = 4096  # values that a call of a kernel must have to be worth its overhead: about 8 us, against 4 us of work


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
    blocks = Blocks.of(x, groups, slices)
    if blocks.whole:
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var = x.new_zeros((2, slices * groups), dtype=wide).unbind()
        scale, shift = blocks.spread_affine(weight, bias, wide)
        (v,) = blocks.parts(x)
        # momentum 1 leaves the batch's own statistics in the buffers
        y = blocks.back(F.batch_norm(v, mean, var, scale, shift, True, 1.0, eps))
        return y, mean.view(slices, groups), var.view(slices, groups)
    if _ordinary(x):
        y, stats = _Normalize.apply(x, weight, bias, blocks, eps)
    else:
        y, stats = _plain(x, weight, bias, blocks, eps)
    mean, var = stats.detach().unbind()
    return y, mean, var * (blocks.count / (blocks.count - 1))


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Normalize x (N, C, *) by given statistics of size G. Returns y as x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = mean.to(wide), var.to(wide)
    if groups == x.shape[1]:
        scale, shift = (None if p is None else p.to(wide) for p in (weight, bias))
        return F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps)
    blocks = Blocks.of(x, groups, 1)
    mean, var = blocks.spread(torch.stack((mean, var))[:, None])
    return blocks.affine(x, mean, var, *blocks.spread_affine(weight, bias, wide), eps)


@dataclass(frozen=True)
class Blocks:
    """How the memory of one input is read in units; see the module's header.

    Units lie in the order (K, C, R) for contiguous memory, (K, R, C) for channels_last. Methods take and give several
    quantities at once, stacked along a first axis T.

    Attributes:
        shape: of x, (N, C, *).
        groups: G, a divisor of D.
        slices: K, a divisor of N.
        samples: M, of one slice.
        channels: C.
        positions: P.
        group_size: S.
        unit: positions of one sample in one unit, a common divisor of P and S.
        runs: R, units of one sample in one channel.
        channels_last: x has its channels innermost in memory.
        scattered: no one reading of the memory has a unit's values in one column: channels_last, cut in slices or runs.
        sample_by_sample: scattered units are read once per sample; else position by position, one column for each
            position and channel.
    """

    shape: tuple[int, ...]
    groups: int
    slices: int
    samples: int
    channels: int
    positions: int
    group_size: int
    unit: int
    runs: int
    channels_last: bool
    scattered: bool
    sample_by_sample: bool

    @classmethod
    def of(cls, x: Tensor, groups: int, slices: int) -> Blocks:
        shape, channels, positions = tuple(x.shape), x.shape[1], math.prod(x.shape[2:])
        group_size = channels * positions // groups
        unit = math.gcd(positions, group_size)
        channels_last = memory_format(x) != torch.contiguous_format
        scattered = channels_last and (slices > 1 or unit < positions)
        return cls(
            shape=shape,
            groups=groups,
            slices=slices,
            samples=shape[0] // slices,
            channels=channels,
            positions=positions,
            group_size=group_size,
            unit=unit,
            runs=positions // unit,
            channels_last=channels_last,
            scattered=scattered,
            sample_by_sample=scattered and slices > 1 and unit * channels >= _LONG,
        )

    @property
    def count(self) -> int:
        """Values that enter one statistic: M * S."""
        return self.samples * self.group_size

    @property
    def whole(self) -> bool:
        """A unit is a whole group."""
        return self.unit == self.group_size and not self.scattered

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """x as (rows, columns, values) for torch's kernels, in several tensors where one does not do.

        Views; a copy only where x lies otherwise in memory than `channels_last` says.
        """
        if not self.channels_last:
            return (x.reshape(self.samples, -1, self.unit),)
        memory = x.movedim(1, -1)
        if self.sample_by_sample:
            return memory.reshape(-1, self.unit, self.channels, 1, 1).unbind()
        columns = self.slices * self.positions * self.channels if self.scattered else self.channels
        return (memory.reshape(-1, columns, 1, 1),)

    def back(self, v: Tensor) -> Tensor:
        """Any tensor that has the memory order of x, in the shape of x; no copy."""
        if not self.channels_last:
            return v.reshape(self.shape)
        return v.reshape(self.shape[0], *self.shape[2:], self.channels).movedim(-1, 1)

    def scatter(self, x: Tensor) -> Tensor:
        """channels_last x as (M, K, R, unit, C)."""
        return x.movedim(1, -1).reshape(self.samples, self.slices, self.runs, self.unit, self.channels)

    def split(self, per_unit: Tensor, parts: int) -> Tensor:
        """(T, K * U) -> (T, K, parts, units of each) with parts = G groups or C channels."""
        if self.channels_last and self.runs > 1:
            per_unit = per_unit.reshape(-1, self.slices, self.runs, self.channels).transpose(2, 3)
        return per_unit.reshape(per_unit.shape[0], self.slices, parts, -1)

    def spread(self, per_part: Tensor) -> Tensor:
        """(T, K or 1, parts) -> (T, K * U): each unit gets its group's or its channel's value."""
        kinds, _, parts = per_part.shape
        each = per_part[..., None].expand(kinds, self.slices, parts, self.channels * self.runs // parts)
        if self.channels_last and self.runs > 1:
            each = each.reshape(kinds, self.slices, self.channels, self.runs).transpose(2, 3)
        return each.reshape(kinds, -1).contiguous()  # torch's kernels read coefficients of stride 0 wrongly

    def spread_affine(
        self, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """weight and bias (C,) per unit (K * U,)."""
        if weight is None or bias is None:
            return None, None
        weight, bias = weight.to(dtype), bias.to(dtype)
        if self.slices * self.runs == 1:
            return weight, bias
        scale, shift = self.spread(torch.stack((weight, bias))[:, None])
        return scale, shift

    def moments(self, x: Tensor) -> Tensor:
        """Mean and biased variance, (2, K, G), in float32 or better."""
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = self.parts(x)
        if x.device.type == "cpu" and not self.channels_last and self.unit >= 16:
            stats = _pooled(_moments_of_rows(parts[0], wide), 1)
            return _pooled(self.split(stats, self.groups), -1)
        found = []
        for v in parts:
            # given buffers of the wider type, torch computes moments in it; momentum 0 leaves them alone
            zero = None if wide == x.dtype else x.new_zeros(v.shape[1], dtype=wide)
            found.append(torch.stack(torch.batch_norm_update_stats(v, zero, zero, 0.0)))
        stats = found[0]
        if self.sample_by_sample:
            stats = _pooled(torch.stack(found, dim=1).view(2, self.samples, -1), 1)
        elif self.scattered:
            stats = _pooled(stats.view(2, -1, self.unit, self.channels), -2).view(2, -1)
        return _pooled(self.split(stats, self.groups), -1)

    def sums(self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """(2, K * U): sums of dy * (x - mean) * rstd and of dy. mean, rstd: (K * U,)."""
        columns = [(mean, rstd)]
        if self.sample_by_sample:
            columns = list(zip(*(s.view(-1, self.channels).unbind() for s in (mean, rstd)), strict=True))
        elif self.scattered:
            wide = (s.view(-1, 1, self.channels).expand(-1, self.unit, -1).reshape(-1) for s in (mean, rstd))
            columns = [(next(wide), next(wide))]
        kernel = torch.ops.aten.native_batch_norm_backward.default
        found = []
        for i, (v, dv) in enumerate(zip(self.parts(x), self.parts(dy), strict=True)):
            m, s = columns[i % len(columns)]
            found.append(torch.stack(kernel(dv, v, None, None, None, m, s, True, 0.0, [False, True, True])[1:]))
        if self.sample_by_sample:
            return torch.stack(found, dim=1).view(2, self.samples, -1).sum(1)
        if self.scattered:
            return found[0].view(2, -1, self.unit, self.channels).sum(2).view(2, -1)
        return found[0]

    def affine(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        plus: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(x - mean) / sqrt(var + eps) * scale + shift, plus another tensor times a factor. Returns a tensor as x.

        Args:
            x: in memory as `channels_last` says.
            mean: (K * U,), and var, scale, shift likewise.
            eps: added to the variance.
            plus: a tensor that lies in memory as x does, and its factor (K * U,); not differentiable.
        """
        if not self.scattered:
            (v,) = self.parts(x)
            y = F.batch_norm(v, mean, var, scale, shift, False, 0.0, eps)
            if plus is not None:
                y.addcmul_(self.parts(plus[0])[0], plus[1].view(1, -1, *[1] * (v.dim() - 2)))
            return self.back(y)
        factor = torch.rsqrt(var + eps)
        factor = factor if scale is None else factor * scale
        offset = -mean * factor if shift is None else torch.addcmul(shift, mean, factor, value=-1)
        shape = (1, self.slices, self.runs, 1, self.channels)
        y = torch.addcmul(offset.view(shape), self.scatter(x), factor.view(shape))
        if plus is not None:
            y.addcmul_(self.scatter(plus[0]), plus[1].view(shape))
        return self.back(y).to(x.dtype)


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


def _pooled(stats: Tensor, dim: int) -> Tensor:
    """Mean and biased variance (2, ...) of the union of equally large sets along a dimension, by Chan's formula."""
    if stats.shape[dim] == 1:
        return stats.squeeze(dim)
    union = stats.mean(dim, keepdim=True)
    union[1:] += (stats[:1] - union[:1]).square_().mean(dim, keepdim=True)
    return union.squeeze(dim)


def _ordinary(x: Tensor) -> bool:
    """A tensor with memory on a device whose kernels we know, outside compilation and torch.func's transforms."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and not torch._C._are_functorch_transforms_active()
    )


class _Normalize(torch.autograd.Function):
    """`_plain` in few passes over memory."""

    # One method, no setup_context: with it every call inspects a signature, 70 us.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: Blocks, eps: float
    ) -> tuple[Tensor, Tensor]:
        stats = blocks.moments(x)
        mean, var = blocks.spread(stats)
        y = blocks.affine(x, mean, var, *blocks.spread_affine(weight, bias, stats.dtype), eps)
        ctx.blocks, ctx.eps = blocks, eps
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, stats)
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
        rstd = torch.rsqrt(stats[1] + ctx.eps)
        mean, var, factor = blocks.spread(torch.cat((stats, rstd[None])))
        sums = blocks.sums(dy, x, mean, factor)
        d_weight, d_bias, dx = None, None, None
        if weight is not None:
            d_weight, d_bias = blocks.split(sums, blocks.channels).sum(dim=(1, 3))
            scale = blocks.spread(weight.to(stats.dtype)[None, None])[0]
            sums, factor = sums * scale, factor * scale
        if ctx.needs_input_grad[0]:
            # rstd * (weight * dy - mean(weight * dy) - standardized * mean(weight * dy * standardized))
            per_group = blocks.split(sums, blocks.groups).sum(dim=3) * (rstd / -blocks.count)
            slope, offset = blocks.spread(per_group)
            dx = blocks.affine(x, mean, var, slope, offset, ctx.eps, plus=(dy, factor))
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
