"""Maps of each value by numbers of its sample and channel that are no lines: those of the EvoNorms.

    gated    y = x * sigmoid(gate * x) * scale + shift
    divided  y = x / max(least, slope * x + base) * scale + shift

The numbers follow from the moments of x and from parameters, as those of `by_moments` do (norms.kernels.affine): two
passes over memory forward and two backward, and nothing of x's size is saved but x.

Axes: N sample, C channel, K row of a table: sample n has the numbers of row n % K.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from norms.kernels import native, plain
from norms.kernels.affine import Map, Rule, map_by_moments


def gated(x: Tensor, rule: Rule, *inputs: Tensor | None, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y = x * sigmoid(gate * x) * scale + shift. Differentiable, twice.

    Args:
        x: (N, C, *) floating-point, in any memory layout.
        rule: (mean, var, *inputs) -> gate, scale, shift, in differentiable operations; otherwise as `by_moments` says.
        inputs: tensors that have a gradient through the rule, or None.
        rows: K; see `moments`.

    Returns:
        y: as x.
        mean, var: (K, C), of x, without gradient.

    Raises:
        ValueError: see `moments` and `affine`.
    """
    return map_by_moments(_GATED, x, rule, inputs, rows)


def divided(x: Tensor, rule: Rule, *inputs: Tensor | None, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y = x / max(least, slope * x + base) * scale + shift. Differentiable, twice.

    Where the two under the line are equal, the gradient is all of `least`. The rule gives slope, base, least, scale,
    shift; all else is as of `gated`.
    """
    return map_by_moments(_DIVIDED, x, rule, inputs, rows)


_GATED, _DIVIDED = (
    Map(partial(native.curve, kind), partial(native.curve_sums, kind), partial(native.curve_blend, kind), in_torch)
    for kind, in_torch in ((native.GATE, plain.gated), (native.DIVIDE, plain.divided))
)
