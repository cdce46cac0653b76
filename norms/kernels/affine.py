"""An affine map of each channel of each sample of x (N, C, *), and layers that are one whose coefficients follow from
the moments of x.

Axes: N sample, C channel, K row of a table: sample n has the coefficients of row n % K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norms.kernels import native, plain
from norms.kernels.moments import checked_rows, lying, moments

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
    given = lying(x)
    tables = in_rows(x, scale, shift, floor)
    if native.serves(given):
        return _Affine.apply(given, *tables)  # type: ignore[no-any-return]
    return plain.affine(x, *tables)  # type: ignore[arg-type]


def in_rows(x: Tensor, *tables: Tensor | None, rows: int | None = None) -> tuple[Tensor | None, ...]:
    """Tables (C,) or (K, C) as (K, C) of one K, in the type of tables; ValueError where their shape does not fit x.

    Args:
        rows: K; None: that of the tables.
    """
    given = [t if t is None or t.dim() != 1 else t[None] for t in tables]
    if rows is None:
        rows = max(t.shape[0] for t in given if t is not None)
    # shape[0] and not len(), which would fix the number of samples of a network that is exported
    divides = rows is x.shape[0] or not x.shape[0] or x.shape[0] % max(rows, 1) == 0
    for t in given:
        fits = t is None or (t.dim() == 2 and t.shape[1] == x.shape[1] and (t.shape[0] == 1 or t.shape[0] == rows))
        if not fits or not divides:
            shapes = ", ".join(str(tuple(t.shape)) for t in tables if t is not None)
            raise ValueError(
                f"coefficients of shape {shapes} for x of shape {tuple(x.shape)}: ({x.shape[1]},) or (K, {x.shape[1]}) "
                "with K a divisor of the samples is needed"
            )
    kind = plain.table_type(x)
    return tuple(None if t is None else t.to(kind).expand(rows, -1).contiguous() for t in given)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scale, shift, floor)
        return native.affine(x, scale, shift, floor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, floor = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = plain.affine(x, scale, shift, floor)
            return plain.gradients((y,), (x, scale, shift, floor), grads, again=True)
        d_scale, d_shift, d_floor, dx = None, None, None, None
        if any(ctx.needs_input_grad[1:]):
            d_scale, d_shift, d_floor = native.sums(grads[0], x, scale, shift, floor)
        if ctx.needs_input_grad[0]:
            dx = native.blend(grads[0], x, scale, shift, floor)
        return dx, d_scale, d_shift, d_floor


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
    given = lying(x)
    if native.serves(given):
        return _ByMoments.apply(given, by, rule, rows, *inputs)  # type: ignore[no-any-return]
    mean, var = plain.moments(x, rows)
    return by.plain(x, *in_rows(x, *rule(mean, var, *inputs), rows=rows)), mean.detach(), var.detach()


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
        with torch.set_grad_enabled(any(wanted)):
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
        if torch.is_grad_enabled():
            y = by.plain(x, *in_rows(x, *ctx.rule(*moments(x, ctx.rows), *inputs), rows=ctx.rows))
            dx, *found = plain.gradients((y,), (x, *inputs), (dy,), again=True)
            return dx, None, None, None, *found
        dy = native.like(dy, x)
        pairs = [(t, d) for t, d in zip(ctx.found, by.sums(dy, x, *tables), strict=False) if t is not None]
        sums = [d if t.shape == d.shape else d.sum(0, keepdim=t.dim() == 2) for t, d in pairs]  # type: ignore[union-attr]
        d_mean, d_var, *found = plain.gradients([t for t, _ in pairs], leaves, sums, again=False)
        dx = None
        if ctx.needs_input_grad[0]:
            own = None
            if d_mean is not None or d_var is not None:
                none = torch.zeros_like(leaves[0])
                own = (leaves[0].detach(), *(none if d is None else d.contiguous() for d in (d_mean, d_var)))
            dx = by.blend(dy, x, *tables, moments=own)
        return dx, None, None, None, *found
