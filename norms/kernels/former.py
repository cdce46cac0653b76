"""What layers still use that are not on the kernels yet. To be deleted with the last of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import memory_format


def group_normalize(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalization of x (N, C, *) in float32 or better, cast back, memory format kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # torch's kernel for channels_last takes the variance as a difference of squares, which is lost at large means
    given = x.to(wide).contiguous()
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.group_norm(given, groups, weight, bias, eps).to(x.dtype)
    return y.contiguous(memory_format=memory_format(x))


def flattened(x: Tensor) -> Tensor:
    """x (N, C, *) as (N, C, P), in float32 or better. A view for every dense memory format, which operations keep."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], math.prod(x.shape[2:]))


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift: x (N, C, P), scale and shift of any shape that broadcasts to it, or both None."""
    if scale is None or shift is None:
        return x
    return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


def row_moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C) of x, in float32 or better, without gradient."""
    x = x.detach()  # forward-mode derivatives do not heed no_grad
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _means(wide, rows)
        return mean, _means((wide - per_position(x, mean)).square(), rows)


def per_position(x: Tensor, per_row: Tensor) -> Tensor:
    """(K, C), to be broadcast over x (N, C, *)."""
    return per_row.reshape(*per_row.shape, *[1] * (x.dim() - 2))


def _over(x: Tensor, rows: int) -> tuple[int, ...]:
    return (*(() if rows == x.shape[0] else (0,)), *range(2, x.dim()))


def _means(x: Tensor, rows: int) -> Tensor:
    """x (N, C, *) -> (K, C)."""
    over = _over(x, rows)
    return (x.mean(over) if over else x).reshape(rows, -1)
