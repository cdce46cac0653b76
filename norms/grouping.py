"""Batch statistics over groups of a flattened sample, at the speed and memory of torch's batch normalization.

    x (N, C, *P) is K norm batches of M = N / K samples; slice k is x[k::K]
    D = C * P values of a sample, channel-major (c, p), are cut into G groups of S = D / G
    mean_kg, var_kg over the M samples and S values of group g in slice k
    y = (x - mean_kg) / sqrt(var_kg + eps) * weight_c + bias_c

Axes: N sample, M sample of a slice, K slice, C channel, P position, D = C * P, G group, S = D / G, U unit.

How: memory is read as (rows, U units, values), where a unit is a run of values that lies inside one group *and* one
channel: gcd(P, S) neighbours of a contiguous sample, one channel of a channels_last batch, or, where nothing larger
fits, single positions. Torch's kernels give each unit's moments; those of a group follow from them by Chan's formula,
which takes no difference of large sums; scale and shift, group's and channel's together, are one more pass with one
coefficient per unit. The backward is the same: torch's sums per unit, combined per group, and one fused pass.
Saved for the backward are x and 2 K G numbers. Where a unit is a whole group, all of it is `F.batch_norm` on a view.

The same formula in differentiable operations (`_plain`) serves second derivatives, compilation (whose compiler fuses
and recomputes by itself), meta and fake tensors. tests/test_norms_batch.py holds the two against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.sample import memory_format


@dataclass(frozen=True)
class Blocks:
    """How the memory of one input is read in units; see the module's header.

    Args:
        shape: of x, (N, C, *).
        groups: G, a divisor of D.
        slices: K, a divisor of N.
        channels_last: x has its channels innermost in memory.
    """

    shape: tuple[int, ...]
    groups: int
    slices: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor, groups: int, slices: int) -> Blocks:
        return cls(tuple(x.shape), groups, slices, memory_format(x) != torch.contiguous_format)

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def positions(self) -> int:
        return math.prod(self.shape[2:])

    @property
    def group_size(self) -> int:
        return self.channels * self.positions // self.groups

    @property
    def count(self) -> int:
        """Values that enter one statistic: M * S."""
        return self.shape[0] // self.slices * self.group_size

    @property
    def single(self) -> bool:
        """channels_last memory, in which only single positions lie inside one group and one slice."""
        return self.channels_last and (self.slices > 1 or self.channels % self.groups > 0)

    @property
    def unit(self) -> int:
        """Values of one sample in one unit: a common divisor of P and S."""
        return 1 if self.single else math.gcd(self.positions, self.group_size)

    @property
    def whole(self) -> bool:
        """A unit is a whole group."""
        return self.unit == self.group_size

    def view(self, x: Tensor) -> Tensor:
        """x -> (M, K * U, unit), or for channels_last (rows, K * U, 1, 1); a copy only where x lies otherwise."""
        if not self.channels_last:
            return x.reshape(self.shape[0] // self.slices, -1, self.unit)
        columns = self.slices * self.channels * (self.positions if self.single else 1)
        return x.movedim(1, -1).reshape(-1, columns, 1, 1)

    def back(self, v: Tensor) -> Tensor:
        """The inverse of `view`, again without a copy."""
        if not self.channels_last:
            return v.reshape(self.shape)
        return v.reshape(self.shape[0], *self.shape[2:], self.channels).movedim(-1, 1)

    def split(self, per_unit: Tensor, parts: int) -> Tensor:
        """(K * U,) -> (K, parts, U / parts) with parts = G groups or C channels."""
        if self.single:
            in_memory = per_unit.reshape(self.slices, self.positions, self.channels)
            return in_memory.transpose(1, 2).reshape(self.slices, parts, -1)
        return per_unit.reshape(self.slices, parts, -1)

    def spread(self, per_part: Tensor) -> Tensor:
        """(K or 1, parts) -> (K * U,): each unit gets its group's or its channel's value."""
        units = self.channels * self.positions // self.unit
        each = per_part[:, :, None].expand(self.slices, -1, units // per_part.shape[1])
        if self.single:
            each = each.reshape(self.slices, self.channels, self.positions).transpose(1, 2)
        return each.reshape(-1).contiguous()  # torch's kernels read coefficients of stride 0 wrongly


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
    wide = torch.promote_types(x.dtype, torch.float32)
    if blocks.whole:
        mean, var = x.new_zeros((2, slices * groups), dtype=wide).unbind()
        scale, shift = (None if p is None else blocks.spread(p.to(wide)[None]) for p in (weight, bias))
        # momentum 1 leaves the batch's own statistics in the buffers
        v = F.batch_norm(blocks.view(x), mean, var, scale, shift, True, 1.0, eps)
        return blocks.back(v), blocks.split(mean, groups)[:, :, 0], blocks.split(var, groups)[:, :, 0]
    if _ordinary(x):
        y, mean, var = _Normalize.apply(x, weight, bias, blocks, eps)
    else:
        y, mean, var = _plain(x, weight, bias, blocks, eps)
    return y, mean.detach(), var.detach() * (blocks.count / (blocks.count - 1))


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Normalize x (N, C, *) by given statistics of size G. Returns y as x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    blocks = Blocks.of(x, groups, 1)
    per_channel = groups == x.shape[1]

    def ready(p: Tensor) -> Tensor:
        return p.to(wide) if per_channel else blocks.spread(p.to(wide)[None])

    v = x if per_channel else blocks.view(x)
    scale, shift = (None if p is None else ready(p) for p in (weight, bias))
    y = F.batch_norm(v, ready(mean), ready(var), scale, shift, False, 0.0, eps)
    return y if per_channel else blocks.back(y)


def _ordinary(x: Tensor) -> bool:
    """A tensor with memory on a device whose kernels we know, outside compilation."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def _plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: Blocks, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the biased moments (K, G) in differentiable operations."""
    standard, mean, var = _standardize(x, blocks, eps)
    y = standard.reshape(blocks.shape)
    if weight is not None and bias is not None:
        shape = (-1, *[1] * (x.dim() - 2))
        y = y * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x)), mean, var


def _standardize(x: Tensor, blocks: Blocks, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) as (M, K, G, S), and the biased moments (K, G)."""
    n = blocks.shape[0] // blocks.slices
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.reshape(n, blocks.slices, blocks.groups, blocks.group_size)
    mean = grouped.mean(dim=(0, 3), keepdim=True)
    centred = grouped - mean
    var = centred.square().mean(dim=(0, 3), keepdim=True)
    return centred * torch.rsqrt(var + eps), mean[0, :, :, 0], var[0, :, :, 0]


class _Normalize(torch.autograd.Function):
    """`_plain` in few passes over memory."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: Blocks, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        v = blocks.view(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        # given buffers of the wider type, torch computes moments in it; momentum 0 leaves them alone
        zero = None if wide == x.dtype else x.new_zeros(v.shape[1], dtype=wide)
        moments = torch.batch_norm_update_stats(v, zero, zero, 0.0)
        means, variances = (blocks.split(m, blocks.groups) for m in moments)
        mean = means.mean(dim=2)
        var = (variances + (means - mean[:, :, None]).square()).mean(dim=2)
        del moments, means, variances  # may be as large as one sample of each slice
        scale, shift = (None if p is None else blocks.spread(p.to(wide)[None]) for p in (weight, bias))
        y = F.batch_norm(v, blocks.spread(mean), blocks.spread(var), scale, shift, False, 0.0, eps)
        return blocks.back(y), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.blocks, ctx.eps = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, var)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        dy = grads[0]
        if dy is None:
            return None, None, None, None, None
        blocks: Blocks = ctx.blocks
        if torch.is_grad_enabled():  # create_graph=True: the result is itself differentiated
            return (*_plain_backward(dy, x, weight, blocks, ctx.eps), None, None)
        v, dv = blocks.view(x), blocks.view(dy)
        means, variances, rstd = blocks.spread(mean), blocks.spread(var), torch.rsqrt(var + ctx.eps)
        # sums over each unit of dy * (x - mean) / sqrt(var + eps) and of dy
        _, sum_product, sum_dy = torch.ops.aten.native_batch_norm_backward(
            dv, v, None, means, variances, means, blocks.spread(rstd), False, ctx.eps, [False, True, True]
        )
        d_weight, d_bias = None, None
        scale = None if weight is None else blocks.spread(weight.to(mean.dtype)[None])
        if scale is not None:
            d_weight, d_bias = (blocks.split(s, blocks.channels).sum(dim=(0, 2)) for s in (sum_product, sum_dy))
            sum_product, sum_dy = sum_product * scale, sum_dy * scale
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = rstd * (weight * dy - mean(weight * dy) - standardized * mean(weight * dy * standardized))
            product, shift = (
                blocks.split(s, blocks.groups).sum(dim=2).mul_(-rstd / blocks.count) for s in (sum_product, sum_dy)
            )
            factor = blocks.spread(rstd) if scale is None else blocks.spread(rstd) * scale
            dx = F.batch_norm(v, means, variances, blocks.spread(product), blocks.spread(shift), False, 0.0, ctx.eps)
            dx = blocks.back(dx.addcmul_(dv, factor.view(1, -1, *[1] * (v.dim() - 2))))
        return dx, d_weight, d_bias, None, None


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
    dx = torch.rsqrt(var + eps)[:, :, None] * (d_standard - mean_d - standard * mean_product)
    return dx.reshape(blocks.shape).to(x.dtype), d_weight, d_bias
