"""Mean and biased variance, per channel of the batch, per row of it, and of earlier batches together.

A row is what one statistic of a channel covers: a sample (K = N rows), or the whole batch (K = 1).

Axes: N sample, C channel, K row, B batch of the past.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from norms.channels import memory_format, ordinary
from norms.kernels.blocks import Blocks


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, *) over samples and positions, with gradient."""
    var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
    return mean, var


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
