"""A layer in tools that read a program instead of running it: torch.compile, torch.fx, torch.export."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from norms.conformance.subject import (
    BATCH,
    TIGHT,
    Finding,
    Subject,
    close,
    grad,
    line,
    mode_name,
    noise,
    same,
    state,
)

BATCHES = (64, 67)
"""At the second size torch.compile makes the batch a symbol; a prime number leaves a remainder for every cut."""
OTHER = 7
"""A second batch size of an exported program."""


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
                    except Exception as error:  # noqa: BLE001 - dynamo wraps every error of tracing
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
    """The network that a tool is given: a layer between a convolution and an activation.

    Nothing of `Subject.call` is in it, which no tracer could follow: facts are told around it.
    """

    def __init__(self, s: Subject, layer: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(noise((s.channels, s.channels, 1, 1), 31, torch.float64))
        self.norm, self.after = layer, nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(F.conv2d(x, self.weight)))


class _SmallOfWeight(_Small):
    """The same where the layer is called with the convolution's weight, which is an input here."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return self.after(self.norm(F.conv2d(x, weight), weight=weight))


def _small(s: Subject, layer: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network, and its inputs beside x."""
    if "conv_weight" not in s.info.needs:
        return _Small(s, layer), {}
    net = _SmallOfWeight(s, layer)
    return net, {"weight": net.weight}


def traced_by_fx(s: Subject) -> Finding:
    """torch.fx.symbolic_trace and torchvision's create_feature_extractor, with nothing said about the layer."""
    from torchvision.models.feature_extraction import create_feature_extractor

    def extracted(net: nn.Module) -> nn.Module:
        found: nn.Module = create_feature_extractor(net, ["after"])
        return found

    # a network of two inputs is not for the extractor, which makes them one
    tools: list[tuple[str, Callable[[nn.Module], nn.Module]]]
    tools = [("symbolic_trace", fx.symbolic_trace), ("create_feature_extractor", extracted)]
    for name, tool in tools[: 1 if "conv_weight" in s.info.needs else 2]:
        net, inputs = _small(s, s.trained())
        twin = copy.deepcopy(net)
        try:
            traced = tool(net)
        except Exception as error:  # noqa: BLE001 - a layer under test may raise anything
            return Finding("yes", "no", f"{name}: {line(error)}")
        for mode in (True, False):
            where, outputs, slopes = f"{name}, {mode_name(mode)}", [], []
            for each in (traced, twin):
                x = s.x().requires_grad_()
                torch.manual_seed(0)
                with s.told(each, x):
                    y = each.train(mode)(x, **inputs)
                y = y["after"] if isinstance(y, dict) else y
                outputs.append(y)
                slopes.append(grad(y, x, noise(y.shape, 7, y.dtype)))
            if not close(outputs[0], outputs[1]):
                return Finding("yes", "another output", where)
            if not close(slopes[0], slopes[1]):
                return Finding("yes", "another gradient", where)
            if not same(state(net), state(twin), TIGHT):
                return Finding("yes", "other statistics", where)
    return Finding("yes", "yes")


def exported(s: Subject) -> Finding:
    """torch.export in evaluation, inside the situation that the layer needs, of any batch size.

    But for a domain for each sample, which is a constant of the program: that has its number of samples.
    """
    net, inputs = _small(s, s.trained().eval())
    fixed = "domain" in s.info.needs and not s.one_domain
    x, other = s.x(), s.x(1, n=BATCH if fixed else OTHER)
    sizes: dict[str, Any] = {"x": None if fixed else {0: torch.export.Dim("n")}, **dict.fromkeys(inputs)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        try:
            with s.told(net, x):
                program = torch.export.export(net, (x,), inputs, dynamic_shapes=sizes)
            for given in (x, other):
                with s.told(net, given):
                    expected = net(given, **inputs)
                if not close(program.module()(given, **inputs), expected):
                    return Finding("yes", "another output", f"N={len(given)}")
        except Exception as error:  # noqa: BLE001 - the exporter wraps every error of tracing
            return Finding("yes", "no", line(error))
    return Finding("yes", "yes", "" if fixed else f"N={BATCH}, then {OTHER}")
