"""What norms.kernels computes, in differentiable operations of torch: for every device, type, layout and transform.

They serve where the native library does not (norms.kernels.native.serves), and for derivatives of derivatives; tests
hold the two against each other. Like there, nothing is lost at large means: sums are of values that are near zero.

Axes: N sample, K row of a table, M = N / K samples of a row, C channel, P position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from norms.channels import memory_format


def table_type(x: Tensor) -> torch.dtype:
    """The type of tables of numbers per row and channel: float64, float32 where the device has no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def by_row(x: Tensor, rows: int) -> Tensor:
    """x (N, C, *) as (M, K, C, P); sample n is in row n % K."""
    return x.reshape(-1 if x.numel() else x.shape[0] // max(rows, 1), rows, x.shape[1], math.prod(x.shape[2:]))


def moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C) of x (N, C, *), over positions and the samples of each row."""
    values = by_row(wide(x), rows)
    if not values.numel():
        nothing = values.sum((0, 3)).to(table_type(x))
        return nothing, nothing
    near = values.detach().mean((0, 3), keepdim=True)
    away = values - near
    rest = away.mean((0, 3))  # what rounding left of the mean
    var = away.square().mean((0, 3)) - rest.square()
    mean = near[0, :, :, 0].to(table_type(x)) + rest.to(table_type(x))
    return mean, var.to(table_type(x))


def affine(x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None) -> Tensor:
    """scale * x + shift, at least `floor`; tables (K, C), in float32 or better. In x's type and memory format."""
    values = by_row(wide(x), scale.shape[0])
    # (x - near) * scale + (shift + scale * near) is the same for every near; here without a difference of large numbers
    near = (-shift / scale).detach()
    near = torch.where(near.abs() < 1e30, near, 0).to(values.dtype)  # not at a scale of 0
    rest = shift + scale * near.to(scale.dtype)
    near, scale, rest = _per_row(values, near, scale, rest)
    y = torch.addcmul(rest, values - near, scale)
    if floor is not None:
        low = _per_row(values, floor)[0]
        y = torch.where(y <= low, low, y)
    return _as(x, y)


def gated(x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * sigmoid(gate * x) * scale + shift; tables (K, C). In x's type and memory format."""
    values = by_row(wide(x), scale.shape[0])
    gate, scale, shift = _per_row(values, gate, scale, shift)
    return _as(x, torch.addcmul(shift, values * torch.sigmoid(values * gate), scale))


def divided(x: Tensor, slope: Tensor, base: Tensor, least: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x / max(least, slope * x + base) * scale + shift; tables (K, C). In x's type and memory format."""
    values = by_row(wide(x), scale.shape[0])
    slope, base, least, scale, shift = _per_row(values, slope, base, least, scale, shift)
    under = torch.addcmul(base, values, slope)
    under = torch.where(under <= least, least, under)
    return _as(x, torch.addcmul(shift, values / under, scale))


def _per_row(values: Tensor, *tables: Tensor) -> list[Tensor]:
    """Tables (K, C) in the type of values (M, K, C, P), to be broadcast over them."""
    return [t.to(values.dtype)[None, :, :, None] for t in tables]


def _as(x: Tensor, y: Tensor) -> Tensor:
    """y (M, K, C, P) in the shape, type and memory format of x."""
    return y.reshape(x.shape).to(x.dtype).contiguous(memory_format=memory_format(x))


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], *, again: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of all `inputs` that want one, from those of the outputs; None for the others.

    Args:
        again: they are to have a gradient themselves.
    """
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    ys, gs = zip(*((y, g.to(y.dtype)) for y, g in pairs), strict=True)
    found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=again, retain_graph=True, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)
