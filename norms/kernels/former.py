"""What layers still use that are not on the kernels yet. To be deleted with the last of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import memory_format, transformed


def row_affine(
    x: Tensor, scale: Tensor, shift: Tensor, dy: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """scale * x + shift, plus factor * dy where these are given; coefficients (K, C). In x's type and memory format."""
    layout = memory_format(x)
    y = x * per_position(x, scale) + per_position(x, shift)
    if dy is not None and factor is not None:
        y = y + dy * per_position(x, factor)
    return y.to(x.dtype).contiguous(memory_format=layout)


def normalize_by(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """x (N, C, *) by mean and var (N, C), then weight and bias, (C,) or (N, C). Returns a tensor as x."""
    space = [1] * (x.dim() - 2)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    # centred first: the backward then sums no products with a large mean
    y = (x - mean.view(*mean.shape, *space)) * scale.view(*scale.shape, *space)
    if bias is not None:
        y = y + bias.view(*bias.shape, *space)
    return y.to(x.dtype)


def group_normalize(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalization of x (N, C, *) in float32 or better, cast back, memory format kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # torch's kernel for channels_last takes the variance as a difference of squares, which is lost at large means
    given = x.to(wide).contiguous()
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.group_norm(given, groups, weight, bias, eps).to(x.dtype)
    return y.contiguous(memory_format=memory_format(x))


def renormalize(
    values: Tensor,
    mean: Tensor,
    var: Tensor,
    shift: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """values (N, C, *) by other statistics than its own: (values - mean - shift) * rstd * weight + bias.

    With g = weight * rstd this is torch's kernel for batch normalization with other coefficients,

        y = (values - mean) / sqrt(var + eps) * (g sqrt(var + eps)) + (bias - g shift)

    so no difference of large numbers is taken, and second derivatives are torch's.

    Args:
        values: in float32 or better.
        mean: (C,), its mean.
        var: (C,), its biased variance.
        shift: (C,), the mean to normalize by, less its own.
        rstd: (C,), one over the deviation to normalize by.
        weight: (C,), and bias likewise; or both None.
        eps: added to its variance inside the kernel; it cancels.
    """
    scale, offset = rstd, -rstd * shift
    if weight is not None and bias is not None:
        scale = rstd * weight.to(values.dtype)
        offset = bias.to(values.dtype) - scale * shift
    if transformed():  # there torch's kernel gives wrong second derivatives, without a word
        shape = (-1, *[1] * (values.dim() - 2))
        return (values - mean.view(shape)) * scale.view(shape) + offset.view(shape)
    return F.batch_norm(values, None, None, scale * torch.sqrt(var + eps), offset, True, 0.0, eps)


def row_moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C) of x, in float32 or better, without gradient."""
    x = x.detach()  # forward-mode derivatives do not heed no_grad
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _means(wide, rows)
        return mean, _means((wide - per_position(x, mean)).square(), rows)


def row_products(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Means of dy * (x - mean) * rstd and of dy over each row's values; mean, rstd and results (K, C)."""
    rows = len(mean)
    dy = dy.to(mean.dtype)
    return _means(dy * ((x - per_position(x, mean)) * per_position(x, rstd)), rows), _means(dy, rows)


def per_position(x: Tensor, per_row: Tensor) -> Tensor:
    """(K, C), to be broadcast over x (N, C, *)."""
    return per_row.reshape(*per_row.shape, *[1] * (x.dim() - 2))


def _over(x: Tensor, rows: int) -> tuple[int, ...]:
    return (*(() if rows == x.shape[0] else (0,)), *range(2, x.dim()))


def _means(x: Tensor, rows: int) -> Tensor:
    """x (N, C, *) -> (K, C)."""
    over = _over(x, rows)
    return (x.mean(over) if over else x).reshape(rows, -1)
