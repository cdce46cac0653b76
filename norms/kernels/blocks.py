"""How the memory of an input is read in units, by torch's kernels; norms.kernels.grouping is built of it.

A unit is a run of gcd(P, S) positions that lies inside one group *and* one channel. Torch's kernels give each unit's
moments; those of a group follow from them by Chan's formula, which takes no difference of large sums.

Axes: N sample, K norm batch, M = N / K samples of one, C channel, P position, D = C * P, G group, S = D / G, R run of
units of one channel, U = C * R units of a sample, T quantities that are handled at once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import memory_format

_CACHED = 2**18  # values of a piece that is gone over twice: 1 MB of float32
_LONG = 4096  # values that a call of a kernel must have to be worth its overhead: about 8 us, against 4 us of work
_SHORT = 16  # values of a unit from which on a kernel that goes along it is faster than one that goes across
_MANY = 64  # samples from which on some numbers per value of a sample take little memory: 9 % more at the peak


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
        samples: M, of one norm batch.
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
        """No reading of the memory has each unit in one column: channels_last, cut in norm batches or runs."""
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
