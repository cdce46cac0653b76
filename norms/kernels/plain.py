"""What norms.kernels computes, in differentiable operations of torch: for every device, type, layout and transform.

They serve where the native library does not (norms.kernels.native.ready), and for derivatives of derivatives; tests
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
    y = _line(x, scale, shift)[1]
    if floor is not None:
        low = _per_row(floor, y)
        y = torch.where(y <= low, low, y)
    return _as(y, x)


def sums(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums (K, C) of dy * x and of dy, and with a floor of the dy that it stopped, which are not in the others."""
    near, y = _line(x, scale, shift)
    kept, below = by_row(wide(dy), scale.shape[0]), None
    if floor is not None:
        stopped = y <= _per_row(floor, y)
        below = torch.where(stopped, kept, 0).sum((0, 3)).to(scale.dtype)
        kept = torch.where(stopped, 0, kept)
    total = kept.sum((0, 3)).to(scale.dtype)
    product = (kept * (by_row(wide(x), scale.shape[0]) - _per_row(near, y))).sum((0, 3))
    return product.to(scale.dtype) + near.to(scale.dtype) * total, total, below


def blend(
    dy: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None = None,
    floor: Tensor | None = None,
    mean: Tensor | None = None,
    d_mean: Tensor | None = None,
    d_var: Tensor | None = None,
) -> Tensor:
    """scale * dy, where the floor did not stop it, and the gradient of x that its moments have; see native.blend."""
    parts = []
    if dy is not None and scale is not None:
        g = by_row(wide(dy), scale.shape[0])
        part = g * _per_row(scale, g)
        if floor is not None and shift is not None:
            y = _line(x, scale, shift)[1]
            part = torch.where(y <= _per_row(floor, y), 0, part)
        parts.append(part)
    if mean is not None and d_mean is not None and d_var is not None:
        count = max(x.numel() // max(mean.numel(), 1), 1)
        slope = 2 * d_var / count
        near = mean.detach().to(wide(x).dtype)
        rest = d_mean / count + slope * (near.to(mean.dtype) - mean)
        values = by_row(wide(x), mean.shape[0])
        near, slope, rest = (_per_row(t, values) for t in (near, slope, rest))
        parts.append(torch.addcmul(rest, values - near, slope))
    return _as(sum(parts[1:], parts[0]), x)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    sets: int,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
    pooled: int = 0,
) -> tuple[Tensor, Tensor]:
    """y, and (4, K, G): mean, biased variance, 1 / sqrt(variance + eps), unbiased variance; see native.normalize."""
    values = wide(x).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    if given is None:
        mean = _over_sets(values, sets)
        centred = values - _of_sets(mean, x)
        var = _over_sets(centred.square(), sets)
    else:
        mean, var = (t.to(values.dtype) for t in given)
        centred = values - _of_sets(mean, x)
    spread = var.mean(1, keepdim=True) if pooled else var
    if pooled == 2:
        spread = spread + mean.var(1, correction=0, keepdim=True)
    rstd = torch.rsqrt(spread + eps).expand(var.shape)
    y = scaled((centred * _of_sets(rstd, x)).reshape(x.shape), weight, bias)
    images = (torch.arange(sets, 0, -1, device=x.device) + (x.shape[0] - 1)).div(sets, rounding_mode="floor")
    count = (images * values.shape[2]).to(table_type(x))[:, None]
    mean, var, rstd = (t.to(count.dtype) for t in (mean, var, rstd))
    return _as(y, x), torch.stack((mean, var, rstd, var * (count / (count - 1).clamp(min=1))))


def scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight_c + bias_c, of (N, C, *), or y without them."""
    if weight is None:
        return y if bias is None else y + _per_channel(bias, y)
    if bias is None:
        return y * _per_channel(weight, y)
    return torch.addcmul(_per_channel(bias, y), y, _per_channel(weight, y))


def normalize_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    groups: int,
    sets: int,
    eps: float,
    fixed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias of `normalize`. With h = (x - mean) * rstd, and moments that were those of x:

    dx = rstd * (weight * dy - mean(weight * dy) - h * mean(weight * dy * h))

    `fixed`: mean and rstd (K, G), where they were others; then dx = rstd * weight * dy.
    """
    values, g = wide(x).reshape(x.shape[0], groups, -1), wide(dy)
    mean = _over_sets(values, sets) if fixed is None else fixed[0].to(values.dtype)
    centred = values - _of_sets(mean, x)
    rstd = torch.rsqrt(_over_sets(centred.square(), sets) + eps) if fixed is None else fixed[1].to(values.dtype)
    rstd = _of_sets(rstd, x)
    h = centred * rstd
    along = (g if weight is None else g * _per_channel(weight, g)).reshape(h.shape)
    if fixed is None:
        level, slope = (_of_sets(_over_sets(t, sets), x) for t in (along, along * h))
        along = along - level - h * slope
    dx = _as((rstd * along).reshape(x.shape), x)
    if weight is None:
        return dx, None, None
    over = (0, *range(2, x.dim()))
    return dx, (g * h.reshape(x.shape)).sum(over).to(weight.dtype), g.sum(over).to(weight.dtype)


def gated(x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * sigmoid(gate * x) * scale + shift; tables (K, C). In x's type and memory format."""
    values = by_row(wide(x), scale.shape[0])
    gate, scale, shift = (_per_row(t, values) for t in (gate, scale, shift))
    return _as(torch.addcmul(shift, values * torch.sigmoid(values * gate), scale), x)


def divided(x: Tensor, slope: Tensor, base: Tensor, least: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x / max(least, slope * x + base) * scale + shift; tables (K, C). In x's type and memory format."""
    values = by_row(wide(x), scale.shape[0])
    slope, base, least, scale, shift = (_per_row(t, values) for t in (slope, base, least, scale, shift))
    under = torch.addcmul(base, values, slope)
    under = torch.where(under <= least, least, under)
    return _as(torch.addcmul(shift, values / under, scale), x)


def _line(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """A centre (K, C) that is near the values of x or where the line is 0, and scale * x + shift as (M, K, C, P).

    (x - near) * scale + (shift + scale * near) is the same for every near; here without a difference of large numbers.
    Where the scale is next to nothing, the line is 0 far from everything, so `near` is kept between two values of x.
    """
    values = by_row(wide(x), scale.shape[0])
    near = (-shift / scale).detach()
    if values.numel():
        some, middle = values.detach(), values.shape[3] // 2
        one, other = some[0, :, :, middle].to(near.dtype), some[-1, :, :, max(middle - 1, 0)].to(near.dtype)
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        near = torch.where(near < low, low, torch.where(near > high, high, near))
        near = torch.where(near.abs() < 1e30, near, one)  # not at 0 / 0
    near = torch.where(near.abs() < 1e30, near, 0).to(values.dtype)
    rest = shift + scale * near.to(scale.dtype)
    return near, torch.addcmul(_per_row(rest, values), values - _per_row(near, values), _per_row(scale, values))


def _per_row(table: Tensor, values: Tensor) -> Tensor:
    return table.to(values.dtype)[None, :, :, None]


def _per_channel(parameter: Tensor, values: Tensor) -> Tensor:
    return parameter.to(values.dtype).view(-1, *[1] * (values.dim() - 2))


def _as(y: Tensor, x: Tensor) -> Tensor:
    return y.reshape(x.shape).to(x.dtype).contiguous(memory_format=memory_format(x))


def _over_sets(values: Tensor, sets: int) -> Tensor:
    """Means (K, G) of values (N, G, S) over the samples of each set; by tensors, so that a compiled layer serves every
    batch size."""
    samples = values.shape[0]
    if samples % sets == 0:
        return values.reshape(samples // sets, sets, *values.shape[1:]).mean((0, 3))
    where = torch.arange(samples, device=values.device) % sets
    images = torch.zeros_like(values[:sets, 0, 0]).index_add(0, where, torch.ones_like(values[:, 0, 0]))
    return torch.zeros_like(values[:sets, :, 0]).index_add(0, where, values.mean(2)) / images[:, None]


def _of_sets(table: Tensor, x: Tensor) -> Tensor:
    """(K, G) as (N, G, 1): that of each sample's set."""
    samples, sets = x.shape[0], table.shape[0]
    if samples % sets == 0:
        return table.expand(samples // sets, *table.shape).reshape(samples, table.shape[1], 1)
    return table[torch.arange(samples, device=x.device) % sets][:, :, None]


def serves_gradient(*grads: Tensor | None) -> bool:
    """Whether a backward is to be of these operations: it is differentiated, or its gradients are mapped.

    Gradients are mapped by torch.autograd.grad(..., is_grads_batched=True) and jacobian(..., vectorize=True), after a
    forward without vmap.
    """
    mapped = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or any(g is not None and mapped(g) for g in grads)


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
