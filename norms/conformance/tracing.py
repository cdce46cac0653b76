"""What becomes of a layer in tools that read a program instead of running it: torch.compile, torch.fx, torch.export."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from norms.conformance.subject import (
    TIGHT,
    Finding,
    Subject,
    close,
    grad,
    identity,
    line,
    mode_name,
    noise,
    same,
    state,
)

BATCHES = (64, 67)
"""At the second size torch.compile makes the batch a symbol; a prime number leaves a remainder for every cut."""


def compiles(s: Subject) -> Finding:
    """fullgraph, both modes, two batch sizes, so that the second compilation is of every size."""
    if not s.info.compiles:
        return Finding("no", "not tried", "", True)
    layer = s.trained()
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            # dynamo itself looks at .grad of its inputs, and a convolution's output is not a leaf
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
            for mode in (True, False):
                for n in BATCHES:
                    where = f"{mode_name(mode)} with N={n}"
                    x, z = s.x(n=n).requires_grad_(), s.x(n=n).requires_grad_()
                    try:
                        y, expected = s.call(compiled.train(mode), x), s.call(eager.train(mode), z)
                        pull = noise(y.shape, 7, y.dtype)
                        got, wanted = grad(y, x, pull), grad(expected, z, pull)
                    except Exception as error:  # noqa: BLE001 - dynamo wraps whatever happens while tracing
                        return Finding("yes", "no", f"{where}: {line(error)}")
                    if not close(y, expected):
                        return Finding("yes", f"another output in {where}")
                    if not close(got, wanted):
                        return Finding("yes", f"another gradient in {where}")
                    if not same(state(layer), state(eager), TIGHT):
                        return Finding("yes", f"other statistics after {where}")
    finally:
        torch._dynamo.reset()
    return Finding("yes", "yes", f"N={BATCHES[0]}, then {BATCHES[1]}")


class _Small(nn.Module):
    """What a tool is given: a layer between a convolution and an activation; the weight of one that needs it is input.

    Nothing of `Subject.call` is in it, which no tracer could follow: facts are told around it.
    """

    def __init__(self, s: Subject, layer: nn.Module):
        super().__init__()
        self.before = nn.Conv2d(s.channels, s.channels, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.before.weight.copy_(noise(self.before.weight.shape, 31, torch.float64))
        self.norm, self.after = layer, nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x)))


class _SmallOfWeight(_Small):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return self.after(self.norm(self.before(x), weight=weight))


def _small(s: Subject, layer: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """The network, and its inputs beside x."""
    if "conv_weight" in s.info.needs:
        return _SmallOfWeight(s, layer), [identity(s.x()).detach()]
    return _Small(s, layer), []


def traced_by_fx(s: Subject) -> Finding:
    """torch.fx.symbolic_trace and torchvision's create_feature_extractor, with nothing said about the layer."""
    from torchvision.models.feature_extraction import create_feature_extractor

    def extractor(net: nn.Module) -> nn.Module:
        found: nn.Module = create_feature_extractor(net, ["norm"])
        return found

    tools = (("symbolic_trace", fx.symbolic_trace), ("create_feature_extractor", extractor))
    for name, tool in tools:
        if "conv_weight" in s.info.needs and name != "symbolic_trace":
            continue  # a network of two inputs, of which the extractor makes one
        net, inputs = _small(s, s.trained())
        twin = copy.deepcopy(net)
        try:
            traced = tool(net)
        except Exception as error:  # noqa: BLE001 - a layer under test may raise anything
            return Finding("yes", "no", f"{name}: {line(error)}")
        for mode in (True, False):
            x, z = s.x().requires_grad_(), s.x().requires_grad_()
            for each in (traced, twin):
                each.train(mode)
            if inputs:  # a weight that x does not depend on is not a convolution's, so these go without gradient
                x, z = x.detach(), z.detach()
            torch.manual_seed(0)
            with s.told(twin, z):
                hidden = twin.norm(twin.before(z), *inputs)  # type: ignore[operator]
            expected = hidden if name != "symbolic_trace" else twin.after(hidden)  # type: ignore[operator]
            torch.manual_seed(0)
            with s.told(traced, x):
                y = traced(x, *inputs)
            y = y["norm"] if isinstance(y, dict) else y
            where = f"{name}, {mode_name(mode)}"
            if not close(y, expected):
                return Finding("yes", "another output", where)
            if y.requires_grad and x.requires_grad:
                pull = noise(y.shape, 7, y.dtype)
                if not close(grad(y, x, pull), grad(expected, z, pull)):
                    return Finding("yes", "another gradient", where)
            if not same(state(net), state(twin), TIGHT):
                return Finding("yes", "other statistics", where)
    return Finding("yes", "yes")


def exported(s: Subject) -> Finding:
    """torch.export in evaluation, inside the situation that the layer needs."""
    net, inputs = _small(s, s.trained().eval())
    x = s.x()
    with torch.no_grad(), s.told(net, x), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        expected = net(x, *inputs)
        try:
            program = torch.export.export(net.eval(), (x, *inputs))
            y = program.module()(x, *inputs)
        except Exception as error:  # noqa: BLE001 - the exporter wraps whatever happens while tracing
            return Finding("yes", "no", line(error))
    return Finding("yes", "yes" if close(y, expected) else "another output")
