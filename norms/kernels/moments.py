"""Mean and biased variance, per channel of the batch, per row of it, and of earlier batches together.

A row is what one statistic of a channel covers: a sample (K = N rows), or the whole batch (K = 1).

Axes: N sample, C channel, K row, B batch of the past.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from norms.channels import memory_format, ordinary
from norms.kernels.blocks import Blocks
from norms.workers import Workers


def batch_moments(x: Tensor, workers: Workers | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, *) over samples and positions, with gradient.

    With `workers` those of all their values, in float32 or better; x may then be empty.
    """
    if workers is not None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    over = (0, *range(2, x.dim()))
    if workers is not None and x.shape[0] == 0:
        mean = var = x.sum(over)
    else:
        var, mean = torch.var_mean(x, over, correction=0)
    if workers is not None:
        mean, var, _ = workers.merge(mean, var, x.numel() // max(1, x.shape[1]))
    return mean, var


def union_of_workers(mean: Tensor, var: Tensor, workers: Workers) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (1, *) of all samples of all workers, with gradient, and the number of samples ().

    Args:
        mean: (M, *) of each sample's equally many values, M from 0.
        var: (M, *) likewise, biased.
        workers: all of which call this.
    """
    if len(mean):
        union = mean.mean(0, keepdim=True)
        spread = var.mean(0, keepdim=True) + (mean - union).square().mean(0, keepdim=True)
    else:
        union, spread = mean.sum(0, keepdim=True), var.sum(0, keepdim=True)
    return workers.merge(union, spread, len(mean))


def moments_of_sets(
    values: Tensor, where: Tensor, sets: int, workers: Workers | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (E, C) of E sets of samples, with gradient, and the number of samples (E,) of each.

    Without asking which samples belong to which: sums are a matrix product. Moments of a set follow from those of its
    samples by Chan's formula, so no large sums are subtracted. A set of no sample has zeros.

    Args:
        values: (N, C, *), in float32 or better.
        where: (N,), the set of each sample.
        sets: E.
        workers: whose samples are in the sets, too.
    """
    over = list(range(2, values.dim()))
    if len(values) == 0:  # torch warns of a variance of nothing
        within = means = values.sum(over) if over else values
    else:
        within, means = torch.var_mean(values, over, correction=0) if over else (torch.zeros_like(values), values)
    member = (where[:, None] == torch.arange(sets, device=values.device)).to(values.dtype)  # (N, E)
    images = member.sum(0)
    share = (member / images.clamp(min=1)).T  # (E, N): the mean over the samples of a set
    # autocast would take products in 16 bits; the meta device has none
    exact = contextlib.nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)
    with exact:
        mean = share @ means
        var = share @ (within + (means - mean[where]).square())
    if workers is not None:
        mean, var, total = workers.merge(mean, var, images[:, None])
        images = total[:, 0]
    return mean, var, images


def row_moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C) of x, in float32 or better, without gradient."""
    x = x.detach()  # forward-mode derivatives do not heed no_grad
    with torch.no_grad():
        if fast(x):
            mean, var = Blocks.of(x, x.shape[1], rows).moments(x).unbind()
            return mean, var
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _means(wide, rows)
        return mean, _means((wide - per_position(x, mean)).square(), rows)


def row_products(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Means of dy * (x - mean) * rstd and of dy over each row's values; mean, rstd and results (K, C)."""
    rows, channels = mean.shape
    if fast(x):
        blocks = Blocks.of(x, channels, rows)
        dy = dy.contiguous(memory_format=memory_format(x))
        per_unit = blocks.sums(dy, x, *blocks.spread(torch.stack((mean, rstd))))
        product, total = (blocks.by_group(per_unit).sum(3) / blocks.count).unbind()
        return product, total
    dy = dy.to(mean.dtype)
    return _means(dy * ((x - per_position(x, mean)) * per_position(x, rstd)), rows), _means(dy, rows)


class Past(NamedTuple):
    """Earlier batches as one, without gradient."""

    total: Tensor  # (C,) or (1,), their weight, where the batch itself has 1
    mean: Tensor  # (C,)
    var: Tensor  # (C,)

    @classmethod
    def of(cls, means: Tensor, variances: Tensor, weights: Tensor) -> Past:
        """means, variances: (B, C); weights: (B, C) or (B, 1), all zero where there is nothing."""
        total = weights.sum(0)
        share = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
        mean = (share * means).sum(0)
        return cls(total, mean, (share * (variances + (means - mean).square())).sum(0))

    def joined_by(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """M - mean and V, both (C,), of these together with the batch's mean and var (C,)."""
        share = self.total / (1 + self.total)
        step = self.mean - mean
        return share * step, (1 - share) * var + share * (self.var + (1 - share) * step.square())


def fast(x: Tensor) -> bool:
    """Whether the kernels of norms.kernels.blocks serve: on a CPU, for an ordinary tensor, without gradient."""
    return x.device.type == "cpu" and ordinary(x) and not torch.is_grad_enabled()


def per_position(x: Tensor, per_row: Tensor) -> Tensor:
    """(K, C), to be broadcast over x (N, C, *)."""
    return per_row.reshape(*per_row.shape, *[1] * (x.dim() - 2))


def _over(x: Tensor, rows: int) -> tuple[int, ...]:
    return (*(() if rows == x.shape[0] else (0,)), *range(2, x.dim()))


def _means(x: Tensor, rows: int) -> Tensor:
    """x (N, C, *) -> (K, C)."""
    over = _over(x, rows)
    return (x.mean(over) if over else x).reshape(rows, -1)
