"""For layers with a backward of their own (online, mabn): what such a backward sums, and the gradient that it returns.

Both are of dy and x (N, C, *), with tables (K, C): sample n has row n % K. Inside a first backward the native library
serves; where derivatives are taken again, operations of torch that have them.

Axes: N sample, C channel, K row of a table, M = N / K samples of a row, P position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norms.channels import memory_format
from norms.kernels import native, plain


def lying(x: Tensor) -> Tensor:
    """x, copied where the native library would not know how it lies in memory."""
    given = native.ready(x)
    return x if given is None else given


def sums(dy: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (K, C) of dy * (x - centre) and of dy over positions and the samples of each row.

    Args:
        dy: as x.
        x: (N, C, *), as `lying` leaves it.
        centre: (K, C) in the type of tables; x around it is what is multiplied, so nothing is lost at large means.
    """
    if not torch.is_grad_enabled() and native.ready(x) is not None:
        product, total, _ = native.sums(dy, x, torch.ones_like(centre), -centre)
        return product - centre * total, total
    pull, away = plain.by_row(plain.wide(dy), centre.shape[0]), _away(x, centre)
    kind = plain.table_type(x)
    return (pull * away).sum((0, 3)).to(kind), pull.sum((0, 3)).to(kind)


def blend(dy: Tensor, x: Tensor, factor: Tensor, centre: Tensor, slope: Tensor, rest: Tensor) -> Tensor:
    """factor * dy + slope * (x - centre) + rest, as x, which is as for `sums`; tables (K, C) likewise, of one K."""
    rows = centre.shape[0]
    if not torch.is_grad_enabled() and native.ready(x) is not None:
        count = x.shape[0] // rows * math.prod(x.shape[2:])
        # the gradient of moments has this form, with these of the mean and the variance
        return native.blend(dy, x, factor, moments=(centre, rest * count, slope * (count / 2)))
    wide = plain.wide(x).dtype
    factor, slope, rest = (t.to(wide)[None, :, :, None] for t in (factor, slope, rest))
    y = plain.by_row(plain.wide(dy), rows) * factor + (_away(x, centre) * slope + rest)
    return y.reshape(x.shape).to(x.dtype).contiguous(memory_format=memory_format(x))


def _away(x: Tensor, centre: Tensor) -> Tensor:
    """x - centre, (M, K, C, P)."""
    values = plain.by_row(plain.wide(x), centre.shape[0])
    near = centre.to(values.dtype)
    return values - near[None, :, :, None] - (centre - near).to(values.dtype)[None, :, :, None]
