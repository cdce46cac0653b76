"""The kernels as operators of torch, for exported and compiled graphs and what else works on torch.ops.

    torch.ops.normsuite.moments(x, rows) -> mean, var
    torch.ops.normsuite.affine(x, scale, shift, floor=None) -> y
    torch.ops.normsuite.sums(dy, x, scale, shift, floor=None) -> product, total, below
    torch.ops.normsuite.blend(dy, x, scale, shift, floor, mean, d_mean, d_var) -> dx
    torch.ops.normsuite.normalize(x, weight, bias, groups, sets, eps, mean=None, var=None, fixed=False) -> y, stats
    torch.ops.normsuite.normalize_backward(dy, x, weight, stats, eps, fixed=False) -> dx, d_weight, d_bias

What they compute stands at the functions of these names in norms.kernels.native. Tables are (K, C) and float64. Tensors
that an operator need not give (`below` without a floor, d_weight and d_bias without a weight) have the shape (0,). A
CPU takes the native library where it serves; everything else takes the operations of norms.kernels.plain.

They are there once this module is imported. `norms.kernels` itself does not go through them: a call of the public
functions on a small tensor would take 100 us longer. Each has a fake form, a gradient and one of that (of any order),
and torch.vmap: the mapped axis becomes one of samples, with a row for each of its copies. Autocast changes nothing.
Mean and variance that `normalize` is given are those of x, or with `fixed` others, and that decides its gradient.
torch.func.grad and forward-mode derivatives, which torch has not for operators with a gradient in Python, are those of
the public functions alone.

Axes: N sample, C channel, K row of a table or set of samples, G group, B copy under vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from norms.kernels import native, plain

_library = torch.library.Library("normsuite", "DEF")
_OPERATORS = {
    "moments": "(Tensor x, SymInt rows) -> (Tensor, Tensor)",
    "affine": "(Tensor x, Tensor scale, Tensor shift, Tensor? floor=None) -> Tensor",
    "sums": "(Tensor dy, Tensor x, Tensor scale, Tensor shift, Tensor? floor=None) -> (Tensor, Tensor, Tensor)",
    "blend": "(Tensor? dy, Tensor x, Tensor? scale, Tensor? shift=None, Tensor? floor=None, Tensor? mean=None, "
    "Tensor? d_mean=None, Tensor? d_var=None) -> Tensor",
    "normalize": "(Tensor x, Tensor? weight, Tensor? bias, SymInt groups, SymInt sets, float eps, Tensor? mean=None, "
    "Tensor? var=None, bool fixed=False) -> (Tensor, Tensor)",
    "normalize_backward": "(Tensor dy, Tensor x, Tensor? weight, Tensor stats, float eps, bool fixed=False) "
    "-> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _OPERATORS.items():
    _library.define(_name + _schema)


# What each computes.


def _moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    ready = native.ready(x)
    mean, var = plain.moments(x, rows) if ready is None else native.moments(ready, rows)
    return mean, var.clone() if var is mean else var  # no two results may be one


def _affine(x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None) -> Tensor:
    ready, tables = native.ready(x), _tables(x, scale, shift, floor)
    if ready is not None:
        return native.affine(ready, *tables)  # type: ignore[arg-type]
    return _lying_as(plain.affine(x, *tables), x)  # type: ignore[arg-type]


def _sums(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    ready, tables = native.ready(x), _tables(x, scale, shift, floor)
    if ready is None:
        product, total, below = plain.sums(dy, x, *tables)  # type: ignore[arg-type]
    else:
        product, total, below = native.sums(dy, ready, *tables)  # type: ignore[arg-type]
    return product, total, product.new_empty(0) if below is None else below


def _blend(
    dy: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None = None,
    floor: Tensor | None = None,
    mean: Tensor | None = None,
    d_mean: Tensor | None = None,
    d_var: Tensor | None = None,
) -> Tensor:
    ready = native.ready(x)
    scale, shift, floor, *own = _tables(x, scale, shift, floor, mean, d_mean, d_var)
    if ready is not None:
        moments = None if mean is None else tuple(own)
        return native.blend(dy, ready, scale, shift, floor, moments)  # type: ignore[arg-type]
    return _lying_as(plain.blend(dy, x, scale, shift, floor, *own), x)


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    sets: int,
    eps: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    ready = native.ready(x)
    given = None if mean is None or var is None else (mean, var)
    if ready is not None:
        return native.normalize(ready, _read(weight, x), _read(bias, x), groups, sets, eps, given)
    y, stats = plain.normalize(x, weight, bias, groups, sets, eps, given)
    return _lying_as(y, x), stats


def _normalize_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    ready = native.ready(x)
    if ready is not None:
        wanted = True, weight is not None
        dx, *parameters = native.normalize_backward(dy, ready, _read(weight, x), stats.contiguous(), wanted, fixed, 0)
    else:
        dx, *parameters = _plain_backward(dy, x, weight, stats, eps, fixed)
        dx = _lying_as(dx, x)
    kind = x.dtype if weight is None else weight.dtype
    d_weight, d_bias = (x.new_empty(0) if p is None else p.to(kind) for p in parameters)
    return dx, d_weight, d_bias  # type: ignore[return-value]


def _tables(x: Tensor, *tables: Tensor | None) -> list[Tensor | None]:
    kind = plain.table_type(x)
    return [None if t is None else t.to(kind).contiguous() for t in tables]


def _read(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """In the type in which the native library reads it."""
    return None if parameter is None else parameter.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _lying_as(y: Tensor, x: Tensor) -> Tensor:
    return y if y.stride() == (room := _like(x)).stride() else room.copy_(y)


# What each gives, in shape, type and layout, for tensors without memory.


def _like(x: Tensor) -> Tensor:
    if native.layout(x) is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x)


def _fake_moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    shape, kind = (rows, x.shape[1]), plain.table_type(x)
    return x.new_empty(shape, dtype=kind), x.new_empty(shape, dtype=kind)


def _fake_sums(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    kind = plain.table_type(x)
    shapes = scale.shape, scale.shape, (0,) if floor is None else scale.shape
    return tuple(x.new_empty(shape, dtype=kind) for shape in shapes)  # type: ignore[return-value]


def _fake_normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, sets: int, eps: float, *given: Any
) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(4, sets, groups, dtype=plain.table_type(x))


def _fake_normalize_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = (x.new_empty(0) if weight is None else x.new_empty(x.shape[1], dtype=weight.dtype) for _ in range(2))
    return (_like(x), *parameters)  # type: ignore[return-value]


# Gradients. Those of `moments`, `affine` and `normalize` are operators; those of the operators of their gradients are
# of the plain form, which has derivatives of every order. Where a floor begins to stop a value, which scale, shift and
# floor decide, there is no derivative; so these have none in `sums`, and shift and floor none in `blend`.


def _keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.numbers = [t for t in inputs if not (t is None or isinstance(t, Tensor))]
    ctx.tensors = [t is None or isinstance(t, Tensor) for t in inputs]
    ctx.save_for_backward(*(t for t in inputs if t is None or isinstance(t, Tensor)))


def _keep_moments(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _moments_gradient(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor | None, ...]:
    x, mean = ctx.saved_tensors
    return _ops().blend(None, x, None, None, None, mean, d_mean, d_var), None


def _affine_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, floor = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = _ops().blend(dy, x, scale, shift, floor) if needs[0] else None
    d_scale, d_shift, d_floor = _ops().sums(dy, x, scale, shift, floor) if any(needs[1:]) else (None, None, None)
    return dx, d_scale, d_shift, d_floor if floor is not None else None


def _keep_normalize(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.eps, ctx.fixed = inputs[5], inputs[8] if len(inputs) > 8 else False
    ctx.save_for_backward(*inputs[:2], output[1])


def _normalize_gradient(ctx: Any, dy: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, stats = ctx.saved_tensors
    dx, d_weight, d_bias = _ops().normalize_backward(dy, x, weight, stats, ctx.eps, ctx.fixed)
    return (dx, *((None, None) if weight is None else (d_weight, d_bias)), *[None] * 6)


def _gradient_of_plain(form: Callable[..., Any], inputs_of: set[int]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of an operator that computes what `form` does with the same arguments, of those at some places."""

    def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, numbers = iter(ctx.saved_tensors), iter(ctx.numbers)
        inputs = [next(saved) if tensor else next(numbers) for tensor in ctx.tensors]
        wanted = [i for i in inputs_of if isinstance(inputs[i], Tensor) and ctx.needs_input_grad[i]]

        def of(*tensors: Tensor) -> Any:
            given = dict(zip(wanted, tensors, strict=True))
            found = form(*(given.get(i, t) for i, t in enumerate(inputs)))
            return found if isinstance(found, Tensor) else tuple(t for t in found if t is not None)

        if not wanted:
            return (None,) * len(inputs)
        y, back, *_ = torch.func.vjp(of, *(inputs[i] for i in wanted))
        results = (y,) if isinstance(y, Tensor) else y
        casts = tuple(g.to(t.dtype) for g, t in zip(grads, results, strict=False))  # fewer, where one is not needed
        found = dict(zip(wanted, back(casts[0] if isinstance(y, Tensor) else casts), strict=True))
        return tuple(found.get(i) for i in range(len(inputs)))

    return gradient


def _plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, fixed: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Statistics that are x's own are computed again, to have a gradient."""
    given = (stats[0], stats[2]) if fixed else None
    return plain.normalize_backward(dy, x, weight, stats.shape[2], stats.shape[1], eps, given)


# vmap: B copies of samples are N * B samples, that of copy b of sample n number n * B + b; row k of copy b of a table
# is row k * B + b, so that (n * B + b) % (K * B) is the row of n % K and b.


def _fold(copies: int, dims: Sequence[int | None], *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors (N, ...) and tables (K, C), all with copies, which some of them have at an axis of theirs."""
    found: list[Tensor | None] = []
    for t, dim in zip(tensors, dims, strict=True):
        if t is not None:
            t = t.unsqueeze(1).expand(-1, copies, *t.shape[1:]) if dim is None else t.movedim(dim, 1)
            t = t.flatten(0, 1)
        found.append(t)
    return found


def _unfold(t: Tensor, copies: int) -> Tensor:
    return t.unflatten(0, (t.shape[0] // copies, copies))


def _vmap_moments(info: Any, dims: Sequence[Any], x: Tensor, rows: int) -> tuple[Any, Any]:
    folded = _fold(info.batch_size, dims[:1], x)
    return tuple(_unfold(t, info.batch_size) for t in _ops().moments(*folded, rows * info.batch_size)), (1, 1)


def _vmap_affine(info: Any, dims: Sequence[Any], *tensors: Tensor | None) -> tuple[Any, Any]:
    return _unfold(_ops().affine(*_fold(info.batch_size, dims, *tensors)), info.batch_size), 1


def _vmap_blend(info: Any, dims: Sequence[Any], *tensors: Tensor | None) -> tuple[Any, Any]:
    return _unfold(_ops().blend(*_fold(info.batch_size, dims, *tensors)), info.batch_size), 1


def _vmap_sums(info: Any, dims: Sequence[Any], *tensors: Tensor | None) -> tuple[Any, Any]:
    product, total, below = _ops().sums(*_fold(info.batch_size, dims, *tensors))
    stopped = len(tensors) > 4 and tensors[4] is not None
    tables = (product, total, below) if stopped else (product, total)
    found = tuple(_unfold(t, info.batch_size) for t in tables)
    return (found, (1, 1, 1)) if stopped else ((*found, below), (1, 1, None))


def _vmap_normalize(
    info: Any,
    dims: Sequence[Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    sets: int,
    eps: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    fixed: bool = False,
) -> tuple[Any, Any]:
    copies = info.batch_size
    own = dims[1] is not None or dims[2] is not None  # each copy has its parameters, which follow as a map of their own
    (folded,) = _fold(copies, dims[:1], x)
    inside = (None, None) if own else (weight, bias)
    given = _fold(copies, (*dims[6:8], None, None)[:2], mean, var)
    y, stats = _ops().normalize(folded, *inside, groups, sets * copies, eps, *given, fixed)
    if own and weight is not None:
        scale, shift = (_of_copies(p, dim, copies, x) for p, dim in ((weight, dims[1]), (bias, dims[2])))
        y = _ops().affine(y, scale, torch.zeros_like(scale) if bias is None else shift)
    return (_unfold(y, copies), stats.unflatten(1, (sets, copies))), (1, 2)


def _of_copies(parameter: Tensor | None, dim: int | None, copies: int, x: Tensor) -> Any:
    if parameter is None:
        return None
    table = parameter.expand(copies, -1) if dim is None else parameter.movedim(dim, 0)
    return table.to(plain.table_type(x))


def _vmap_normalize_backward(info: Any, dims: Sequence[Any], *inputs: Any) -> tuple[Any, Any]:
    """Copy by copy, as every copy has a gradient of the parameters."""
    found = []
    for b in range(info.batch_size):
        of_copy = [t if dim is None else t.select(dim, b) for t, dim in zip(inputs, dims, strict=True)]
        found.append(_ops().normalize_backward(*of_copy))
    return tuple(torch.stack(t) for t in zip(*found, strict=True)), (0, 0, 0)


def _ops() -> Any:
    return torch.ops.normsuite


_FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any], Any]] = {
    "moments": (_moments, _fake_moments, _moments_gradient, _keep_moments, _vmap_moments),
    "affine": (_affine, lambda x, *_: _like(x), _affine_gradient, _keep, _vmap_affine),
    "sums": (_sums, _fake_sums, _gradient_of_plain(plain.sums, {0, 1}), _keep, _vmap_sums),
    "blend": (
        _blend,
        lambda dy, x, *_: _like(x),
        _gradient_of_plain(plain.blend, {0, 1, 2, 5, 6, 7}),
        _keep,
        _vmap_blend,
    ),
    "normalize": (_normalize, _fake_normalize, _normalize_gradient, _keep_normalize, _vmap_normalize),
    "normalize_backward": (
        _normalize_backward,
        _fake_normalize_backward,
        _gradient_of_plain(_plain_backward, {0, 1, 2}),
        _keep,
        _vmap_normalize_backward,
    ),
}
for _name, (_computed, _fake, _gradient, _kept, _mapped) in _FORMS.items():
    _full = f"normsuite::{_name}"
    _library.impl(_name, _computed, "CompositeExplicitAutograd")
    torch.library.register_fake(_full, _fake, lib=_library)
    torch.library.register_autograd(_full, _gradient, setup_context=_kept, lib=_library)
    torch.library.register_vmap(_full, _mapped, lib=_library)
