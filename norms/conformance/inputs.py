"""Inputs that a layer meets outside the benchmark: of other types, empty, with an infinity in them."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from norms.conformance.subject import (
    Finding,
    Subject,
    close,
    gradients,
    line,
    mode_name,
    noise,
    same,
    short,
    state,
)
from norms.situation import after_update


def other_types_refused(s: Subject) -> Finding:
    """Integers, booleans and complex numbers: a ValueError in both modes, before anything is counted or kept."""
    wrong = []
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        x = (8 * s.x()).round().abs().to(dtype)
        for mode in (True, False):
            layer = s.trained().train(mode)
            before, where = state(layer), f"{short(dtype)} in {mode_name(mode)}"
            try:
                with s.told(layer, x):
                    y = s.bare(layer, x)
            except ValueError as error:
                # a refusal for another reason would let the same input pass elsewhere
                if "float" not in str(error):
                    wrong.append(f"{where}: does not say that a floating-point input is needed: {line(error)}")
            except Exception as error:  # noqa: BLE001 - a layer under test may raise anything
                wrong.append(f"{where}: {line(error)}")
            else:
                wrong.append(f"{where}: gives {short(y.dtype)}")
            if not same(before, state(layer)):
                wrong.append(f"{where}: state moved")
    return Finding("refused", "not refused" if wrong else "refused", "; ".join(wrong[:3]) + "; ..." * (len(wrong) > 3))


def empty_batch(s: Subject) -> Finding:
    """N = 0: an empty output, nothing moved, and a backward that works. A context set must not be empty."""
    wrong = []
    for mode in (True, False):
        layer = s.trained().train(mode)
        part = "query" if "context" in s.info.needs else "context"
        before, x = state(layer), s.x(n=0).requires_grad_()
        try:
            y = s.call(layer, x, part=part)
            if (y.shape, y.dtype) != (x.shape, x.dtype):
                wrong.append(f"{tuple(y.shape)} of {short(y.dtype)} in {mode_name(mode)}")
            grads = gradients(y.sum(), [x, *layer.parameters()])
            if not all(g.isfinite().all() for g in grads):
                wrong.append(f"a gradient that is not finite in {mode_name(mode)}")
        except Exception as error:  # noqa: BLE001 - a layer under test may raise anything
            wrong.append(f"in {mode_name(mode)}: {line(error)}")
        if not same(before, state(layer)):
            wrong.append(f"state moved in {mode_name(mode)}")
    return Finding("empty output", "not so" if wrong else "empty output", "; ".join(wrong))


def infinity_or_nan_in_a_batch(s: Subject) -> Finding:
    """One value of one sample of one training batch; afterwards all state is finite, and training goes on."""
    wrong = []
    for value in (math.inf, math.nan):
        layer = s.trained()
        bad = s.x(6)
        bad[1, 0, 0, 0] = value
        _step(s, layer, bad)
        kept = [name for name, t in state(layer).items() if isinstance(t, Tensor) and not t.isfinite().all()]
        if kept and s.info.keeps_stats:  # the moments of a context set are replaced by the next one's
            wrong.append(f"{value:g} stays in {', '.join(kept)}")
        for seed in (7, 8, 9):
            if not all(t.isfinite().all() for t in _step(s, layer, s.x(seed))):
                wrong.append(f"clean batches after {value:g} are not finite")
                break
        if not s.call(layer.eval(), s.x(3)).isfinite().all():
            wrong.append(f"evaluation after {value:g} is not finite")
    return Finding("forgotten", "kept" if wrong else "forgotten", "; ".join(wrong))


def _step(s: Subject, layer: nn.Module, x: Tensor) -> list[Tensor]:
    """A training step but for the optimizer: the output and all gradients."""
    x = x.clone().requires_grad_()
    y = s.call(layer.train(), x)
    grads = gradients((y * noise(y.shape, 7, y.dtype)).sum(), [x, *layer.parameters()])
    after_update(layer, lambda: s.call(layer, x), 1.0)
    return [y, *grads]


def float64_on_smaller_input(s: Subject) -> Finding:
    """A layer of float64 parameters trains on float32 and bfloat16; the output has the type of the input."""
    wrong = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        layer = s.trained()
        exact, x = copy.deepcopy(layer), s.x(dtype=dtype)
        try:
            got, expected = _step(s, layer, x), _step(s, exact, x.double())
        except Exception as error:  # noqa: BLE001 - a layer under test may raise anything
            wrong.append(f"{short(dtype)}: {line(error)}")
            continue
        if got[0].dtype != dtype:
            wrong.append(f"{short(dtype)} -> {short(got[0].dtype)}")
        elif not close(got[0].double(), expected[0], tolerance):
            wrong.append(f"another output for {short(dtype)}")
        elif not all(g.isfinite().all() for g in got):
            wrong.append(f"a gradient that is not finite for {short(dtype)}")
    return Finding("trains", "does not" if wrong else "trains", "; ".join(wrong))
