"""An affine map of each channel of each sample of x (N, C, *), and layers that are one whose coefficients follow from
the moments of x.

Axes: N sample, C channel, K row of a table: sample n has the coefficients of row n % K.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norms.kernels import native, plain
from norms.kernels.moments import checked_rows

Rule = Callable[..., tuple[Tensor | None, ...]]


def affine(x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None) -> Tensor:
    """scale * x + shift, and `floor` where that is not above it. Differentiable, twice.

    No large numbers are subtracted, as long as the coefficients are exact: take them from `moments` in its float64.

    Args:
        x: (N, C, *) floating-point, in any memory layout.
        scale: (C,), or (K, C) with K a divisor of N, and shift and floor likewise: sample n has row n % K.
        shift: see scale.
        floor: None: no floor. At the floor its own gradient is 1, and that of x 0, as of relu at 0.

    Returns:
        y: as x, in its type and memory layout (contiguous, where x is neither that nor has its channels innermost).

    Raises:
        ValueError: x or a table of another shape.
    """
    checked_rows(x, None)
    given = native.ready(x)
    if given is None:
        return plain.affine(x, *in_rows(x, scale, shift, floor))  # type: ignore[arg-type]
    return _Affine.apply(given, scale, shift, floor)


def in_rows(x: Tensor, *tables: Tensor | None, rows: int | None = None) -> tuple[Tensor | None, ...]:
    """Tables (C,) or (K, C) as (K, C) of one K, in the type of tables; ValueError where their shape does not fit x.

    Args:
        rows: K; None: that of the tables.
    """
    given = [t if t is None or t.dim() != 1 else t[None] for t in tables]
    if rows is None:
        rows = max(t.shape[0] for t in given if t is not None)
    samples, channels = x.shape[:2]
    kind = plain.table_type(x)
    found: list[Tensor | None] = []
    for t in given:
        if t is None:
            found.append(None)
            continue
        if t.dim() != 2 or t.shape[1] != channels or t.shape[0] not in (1, rows) or (samples and samples % rows):
            shapes = ", ".join(str(tuple(t.shape)) for t in tables if t is not None)
            raise ValueError(
                f"coefficients of shape {shapes} for x of shape {tuple(x.shape)}: ({channels},) or (K, {channels}) "
                "with K a divisor of the samples is needed"
            )
        t = t.to(kind)
        found.append((t if t.shape[0] == rows else t.expand(rows, channels)).contiguous())
    return tuple(found)


class _Affine(torch.autograd.Function):
    """Tables are brought into rows inside, so that no graph is kept of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tables: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *tables)
        return native.affine(x, *in_rows(x, *tables))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *tables = ctx.saved_tensors
        if plain.serves_gradient(*grads):
            with torch.enable_grad():
                y = plain.affine(x, *in_rows(x, *tables))  # type: ignore[arg-type]
            return plain.gradients((y,), (x, *tables), grads, again=torch.is_grad_enabled())
        rows = in_rows(x, *tables)
        dy = native.like(grads[0], x)
        found: list[Tensor | None] = [None, None, None]
        if any(ctx.needs_input_grad[1:]):
            sums = native.sums(dy, x, *rows)  # type: ignore[arg-type]
            found = [None if t is None else _as_table(d, t) for d, t in zip(sums, tables, strict=True)]
        dx = native.blend(dy, x, *rows) if ctx.needs_input_grad[0] else None  # type: ignore[arg-type]
        return dx, *found


def _as_table(gradient: Tensor | None, table: Tensor) -> Tensor | None:
    """A gradient (K, C) as that of a table (C,), (1, C) or (K, C)."""
    if gradient is None:
        return None
    if table.dim() == 1 or table.shape[0] < gradient.shape[0]:
        gradient = gradient.sum(0).view(table.shape)
    return gradient.to(table.dtype)


def by_moments(x: Tensor, rule: Rule, *inputs: Tensor | None, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y = scale * x + shift with coefficients that follow from the moments of x and from parameters.

    The same as `affine(x, *rule(*moments(x, rows), *inputs))`, with two passes over memory less in the backward.

    Args:
        x: (N, C, *) floating-point, in any memory layout.
        rule: (mean, var, *inputs) -> scale, shift or scale, shift, floor, in differentiable operations. mean and var
            are (K, C) in the type of tables; what is returned is (C,) or (K, C). It may be called again, for
            derivatives of derivatives, so it changes nothing.
        inputs: tensors that have a gradient through the rule, or None.
        rows: K; see `moments`.

    Returns:
        y: as x.
        mean, var: (K, C), of x, without gradient.

    Raises:
        ValueError: see `moments` and `affine`.
    """
    return map_by_moments(AFFINE, x, rule, inputs, rows)


class Map(NamedTuple):
    """A map of each value of x by tables of numbers of its row and channel: native, and in operations of torch."""

    forward: Callable[..., Tensor]  # (x, *tables) -> y
    sums: Callable[..., Sequence[Tensor | None]]  # (dy, x, *tables) -> the gradient of each table
    blend: Callable[..., Tensor]  # (dy, x, *tables, moments=...) -> dx, see native.blend
    plain: Callable[..., Tensor]  # as forward, differentiable


AFFINE = Map(native.affine, native.sums, native.blend, plain.affine)


def map_by_moments(
    by: Map, x: Tensor, rule: Rule, inputs: tuple[Tensor | None, ...], rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`by_moments` with another map than the affine one; the rule gives its tables."""
    rows = checked_rows(x, rows)
    given = native.ready(x)
    if given is not None:
        return _ByMoments.apply(given, by, rule, rows, *inputs)
    y, mean, var = _plain_by_moments(by, x, rule, rows, *inputs)
    return y, mean.detach(), var.detach()


def _plain_by_moments(
    by: Map, x: Tensor, rule: Rule, rows: int, *inputs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    values = plain.wide(x)  # once, so that gradients of a small type are added in the wide one
    mean, var = plain.moments(values, rows)
    y = by.plain(values, *in_rows(x, *rule(mean, var, *inputs), rows=rows))
    return y.to(x.dtype), mean, var


def _kept_here() -> AbstractContextManager[object]:
    """Within the block what a graph saves is kept as it is, whatever hooks there are: checkpointing would forward the
    layer anew for the rule's own graph, and once more for the layer's."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept)


class _ByMoments(torch.autograd.Function):
    """The rule's own graph is kept beside: it is of O(K C) numbers, and gives its gradients to the one pass over x.

    What the rule returns becomes tables outside of that graph: small operations are most of the time of a small layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, by: Map, rule: Rule, rows: int, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = native.moments(x, rows)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        leaves = [
            t if t is None else t.detach().requires_grad_(want)
            for t, want in zip((mean, var, *inputs), wanted, strict=True)
        ]
        with torch.set_grad_enabled(any(wanted)), _kept_here():
            found = rule(*leaves)
        tables = in_rows(x, *(None if t is None else t.detach() for t in found), rows=rows)
        ctx.by, ctx.rule, ctx.rows, ctx.leaves, ctx.found, ctx.tables = by, rule, rows, leaves, found, tables
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *inputs)
        return by.forward(x, *tables), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *inputs = ctx.saved_tensors
        dy, leaves, by, tables = grads[0], ctx.leaves, ctx.by, ctx.tables
        if dy is None:
            return (None,) * (4 + len(inputs))
        if plain.serves_gradient(dy):
            with torch.enable_grad():
                y = _plain_by_moments(by, x, ctx.rule, ctx.rows, *inputs)[0]
            dx, *found = plain.gradients((y,), (x, *inputs), (dy,), again=torch.is_grad_enabled())
            return dx, None, None, None, *found
        dy = native.like(dy, x)
        pairs = [(t, d) for t, d in zip(ctx.found, by.sums(dy, x, *tables), strict=False) if t is not None]
        sums = [d if t.shape == d.shape else d.sum(0, keepdim=t.dim() == 2) for t, d in pairs]
        d_mean, d_var, *found = plain.gradients([t for t, _ in pairs], leaves, sums, again=False)
        dx = None
        if ctx.needs_input_grad[0]:
            own = None
            if d_mean is not None or d_var is not None:
                none = torch.zeros_like(leaves[0])
                own = (leaves[0].detach(), *(none if d is None else d.contiguous() for d in (d_mean, d_var)))
            dx = by.blend(dy, x, *tables, moments=own)
        return dx, None, None, None, *found
