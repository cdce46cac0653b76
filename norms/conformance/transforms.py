"""Layers inside torch.func and autograd: ensembles by vmap, functional calls, forward-mode derivatives, late backwards.

Axes: M networks, N samples, C channels, then space.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, stack_module_state, vmap

from norms.conformance.subject import (
    TIGHT,
    Finding,
    Net,
    Subject,
    close,
    grad,
    gradients,
    line,
    mode_name,
    noise,
    same,
    state,
)

_STACKED = (
    # what, side of the convolution before the norm (0: none), one input for all networks, memory format
    ("alone", 0, False, torch.contiguous_format),
    ("alone, channels_last", 0, False, torch.channels_last),
    ("after a convolution", 3, False, torch.contiguous_format),
    ("after a convolution, one channels_last input for all", 3, True, torch.channels_last),
)


def stacked_under_vmap(s: Subject) -> Finding:
    """Two networks as one call (stack_module_state, vmap, functional_call on a meta-device copy), against a loop."""
    refuses = not s.info.functional
    expected = "refused in training" if refuses else "as a loop"
    for what, kernel, shared, layout in _STACKED:
        for mode in (True, False):
            try:
                wrong = _stacked(s, kernel, shared, layout, mode)
            except Exception as error:  # noqa: BLE001 - a layer under test may raise anything
                if refuses and mode and isinstance(error, RuntimeError):
                    continue
                return Finding(expected, f"raises in {mode_name(mode)}", f"{what}: {line(error)}")
            if refuses and mode:
                return Finding(expected, "not refused in training", f"{what}; functional=False promises a RuntimeError")
            if wrong:
                return Finding(expected, f"{wrong} in {mode_name(mode)}", what)
    return Finding(expected, expected)


def _stacked(s: Subject, kernel: int, shared: bool, layout: torch.memory_format, mode: bool) -> str:
    """The first difference between the two ways, or "". Training goes on for three batches."""
    other = s.train(s.layer(), 2 * s.x(4) + 1)
    nets = [Net(s, layer, kernel).train(mode) for layer in (s.trained(), other)]
    with torch.no_grad():
        for parameter in nets[1].parameters():
            parameter.mul_(1.25)
    base = copy.deepcopy(nets[0]).to("meta")
    parameters, buffers = stack_module_state(nets)

    def call(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (p, b), (x,))

    for step in range(3 if mode else 1):
        inputs = [s.x(10 + step).to(memory_format=layout)] * 2 if shared else _two(s, 10 + 2 * step, layout)
        x = inputs[0] if shared else torch.stack([t.movedim(1, -1) for t in inputs]).movedim(-1, 2)
        if layout == torch.contiguous_format:
            x = x.contiguous()
        x.requires_grad_()
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = vmap(call, in_dims=(0, 0, None if shared else 0), randomness="same")(parameters, buffers, x)
        expected = torch.stack([net(t) for net, t in zip(nets, inputs, strict=True)])
        if not close(y, expected):
            return "another output"
        if s.info.exact_gradient and not shared:
            pull = noise(y.shape, 7, y.dtype)
            if not close(grad(y, x, pull), torch.stack(torch.autograd.grad(expected, inputs, pull))):
                return "another gradient"
    kept = [dict(net.named_buffers()) for net in nets]
    for name, buffer in buffers.items():
        if not same(buffer, torch.stack([b[name] for b in kept]), TIGHT):
            return f"another {name.removeprefix('norm.')}"
    return ""


def _two(s: Subject, seed: int, layout: torch.memory_format) -> list[Tensor]:
    return [s.x(seed + i).to(memory_format=layout) for i in range(2)]


def functional_call_keeps_state(s: Subject) -> Finding:
    """The state of a layer between two calls is in the buffers that functional_call was given, or the layer refuses."""
    expected, refused = "kept or refused", (RuntimeError, ValueError)
    net, plain = Net(s, s.layer()), Net(s, s.layer())
    parameters, buffers = (
        {name: t.detach().clone() for name, t in named} for named in (net.named_parameters(), net.named_buffers())
    )
    steps = [(True, "context", 1), (True, "context", 2), (False, "context", 3), (False, "query", 4)]
    for mode, part, seed in steps[: 4 if "context" in s.info.needs else 3]:
        before = state(net)
        wanted = plain.train(mode)(s.x(seed), part)
        try:
            got = functional_call(net.train(mode), (parameters, buffers), (s.x(seed), part))
        except refused as error:
            return Finding(expected, expected, f"refused in {mode_name(mode)}: {line(error)}")
        what = "a query after its context" if part == "query" else mode_name(mode)
        if not close(got, wanted):
            return Finding(expected, "forgotten", f"another output in {what}")
        after = state(net)
        if not all(same(before[name], after[name]) for name in buffers):
            return Finding(expected, "in the layer", f"{what} moves the layer's own buffers")
    for name, buffer in plain.named_buffers():
        if not same(buffers[name].detach(), buffer.detach(), TIGHT):
            return Finding(expected, "forgotten", f"{name.removeprefix('norm.')} is not what the plain layer has")
    fresh = Net(s, s.layer()).eval()  # attributes of the first layer are not here
    part = "query" if "context" in s.info.needs else "context"
    try:
        got = functional_call(fresh, (parameters, buffers), (s.x(5), part))
    except refused as error:
        return Finding(expected, expected, f"refused by a fresh layer: {line(error)}")
    if not close(got, plain.eval()(s.x(5), part)):
        return Finding(expected, "forgotten", "a fresh layer with these buffers evaluates to something else")
    return Finding(expected, "kept or refused", "kept")


def backward_after_training(s: Subject) -> Finding:
    """An evaluation forward, then a training forward, then the backward of the first (two branches of one loss)."""
    layer = s.trained()
    pull = noise(s.x().shape, 7, torch.float64)

    def one(between: bool) -> list[Tensor]:
        net, x = copy.deepcopy(layer).eval(), s.x().requires_grad_()
        y = s.call(net, x)
        if between:
            s.call(net.train(), 5 * s.x(6) + 3)
        return gradients((y * pull).sum(), [x, *net.parameters()])

    alone = one(False)
    try:
        late = one(True)
    except RuntimeError as error:
        return Finding("of the statistics used", "raises", line(error))
    if not all(close(a, b) for a, b in zip(alone, late, strict=True)):
        off = max((a - b).norm().item() / max(a.norm().item(), 1e-30) for a, b in zip(alone, late, strict=True))
        return Finding("of the statistics used", "of moved statistics", f"off by {off:.2g} of its norm")
    return Finding("of the statistics used", "of the statistics used")


def forward_mode_derivatives(s: Subject) -> Finding:
    """torch.func.jvp and dual numbers against finite differences, for the input and every parameter at once."""
    if not s.info.exact_gradient:
        return Finding("not exact", "not tried", "", True)
    small = s.x(n=3)[..., :2, :1]
    inputs = {"4x4 maps": s.x(n=3), "channels_last": s.x(n=3).to(memory_format=torch.channels_last), "2x1 maps": small}
    wrong = []
    for mode in (True, False):
        layer = s.trained().train(mode)
        names = [name for name, _ in layer.named_parameters()]
        for what, x in inputs.items():
            point = (x, *(p.detach() for p in layer.parameters()))
            direction = tuple(torch.empty_like(t).copy_(noise(t.shape, 70 + i, t.dtype)) for i, t in enumerate(point))

            def output(*values: Tensor, one: nn.Module, brought: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
                # a transform lets nobody change a tensor from outside it, so the buffers are copies made inside
                buffers = {n: b.clone() for n, b in one.named_buffers()} if brought else {}
                y = s.call(one, values[0], parameters={**dict(zip(names, values[1:], strict=True)), **buffers})  # noqa: B023
                return y, buffers or dict(one.named_buffers())

            try:
                _, plain = output(*point, one=copy.deepcopy(layer))
            except ValueError:  # a map that this layer refuses
                continue
            measured = _difference(output, layer, point, direction)
            for way, derivative in (("jvp", _jvp), ("dual numbers", _dual)):
                where = f"{way} of {what} in {mode_name(mode)}"
                try:
                    got, kept = derivative(functools.partial(output, one=copy.deepcopy(layer)), point, direction)
                except Exception as error:  # noqa: BLE001 - a layer under test may raise anything
                    if not (mode and not s.info.functional and isinstance(error, RuntimeError)):
                        wrong.append(f"{where}: {line(error)}")
                    continue
                if not close(got, measured, 1e-6):
                    wrong.append(f"{where} is off by {(got - measured).norm() / measured.norm():.2g}")
                elif "context" not in s.info.needs and not same(plain, kept, TIGHT):
                    wrong.append(f"{where} leaves other buffers")  # moments of a context have derivatives of their own
    return Finding("exact", "not exact" if wrong else "exact", "; ".join(wrong[:3]) + "; ..." * (len(wrong) > 3))


_Function = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def _difference(f: _Function, layer: nn.Module, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Tensor:
    """Fourth order, with a step that crosses few of an activation's kinks; each call on a layer of the same state."""
    step = 1e-5
    near, back, far, far_back = (
        f(*(p + h * step * d for p, d in zip(point, direction, strict=True)), one=copy.deepcopy(layer))[0].detach()
        for h in (1, -1, 2, -2)
    )
    return (8 * (near - back) - (far - far_back)) / (12 * step)


def _jvp(f: _Function, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    found: tuple[Any, ...] = jvp(functools.partial(f, brought=True), point, direction, has_aux=True)
    return found[1], found[2]


def _dual(f: _Function, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    with forward_ad.dual_level():
        y, kept = f(*(forward_ad.make_dual(p, d) for p, d in zip(point, direction, strict=True)))
        tangent = forward_ad.unpack_dual(y).tangent
    return torch.zeros_like(y) if tangent is None else tangent, kept
