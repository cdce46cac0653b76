"""Affine maps of x (N, C, *): by statistics of rows, of samples, of groups, or of more than the batch.

Axes: N sample, C channel, K row (a sample, or the whole batch), G group of channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import memory_format, transformed
from norms.kernels.blocks import Blocks
from norms.kernels.moments import fast, per_position


def row_affine(
    x: Tensor, scale: Tensor, shift: Tensor, dy: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """scale * x + shift, plus factor * dy where these are given; coefficients (K, C). In x's type and memory format."""
    layout = memory_format(x)
    if fast(x):
        blocks = Blocks.of(x, x.shape[1], scale.shape[0])
        plus = None
        if dy is not None and factor is not None:
            plus = (dy.contiguous(memory_format=layout), blocks.spread(factor[None])[0])
        per_unit = blocks.spread(torch.stack((scale, shift)))
        # a view could not be changed in place by an activation after it
        y = blocks.affine(x, per_unit[0], per_unit[1], plus).data
    else:
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


def flattened(x: Tensor) -> Tensor:
    """x (N, C, *) as (N, C, P), in float32 or better. A view for every dense memory format, which operations keep."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], math.prod(x.shape[2:]))


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift: x (N, C, P), scale and shift of any shape that broadcasts to it, or both None."""
    if scale is None or shift is None:
        return x
    return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))
