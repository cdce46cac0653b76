"""A norm against a reference function that its author writes, in float64.

A formula is a Python file with a function `reference`, and perhaps a function `evaluation`:

    def reference(x, weight, bias, eps):                       # the training output
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + eps).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    def evaluation(x, running_mean, running_var, weight, bias, eps): ...

Arguments are passed by name, so that a function asks for what it reads: x (N, C, H, W), any parameter or buffer of the
layer (dots in names as underscores) as it was before the forward, any option of the norm with its value, `domain`
(N,) of a norm that needs one, `conv_weight` (C, C, 1, 1), `activation`. It returns a float64 tensor of the shape of x.
The file is executed, as any Python file that you run.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.conformance.statistics import unread_samples
from norms.conformance.subject import Finding, Subject, batch, close, identity, line, transformed_weight
from norms.source import read_file
from norms.values import nearest

Function = Callable[..., Any]


@dataclass(frozen=True)
class Formula:
    """The functions of a user's file.

    Attributes:
        file: its path, as given.
        reference: the training output.
        evaluation: the evaluation output; None: not given.
    """

    file: str
    reference: Function
    evaluation: Function | None


def load_formula(path: str | Path) -> Formula:
    """Execute a user's file and take its functions.

    Raises:
        ValueError: no such file, it fails, it has no function `reference`, or one that can not be called by name.
    """
    file = Path(path)
    text = read_file(file, f'formula "{path}"')
    module = types.ModuleType("normsuite_formula")
    sys.modules[module.__name__] = module  # dataclasses look there for what annotations name
    space = vars(module)
    space["__file__"] = str(file)
    try:
        exec(compile(text, str(file), "exec", dont_inherit=True), space)
    except (Exception, SystemExit) as error:
        raise ValueError(f'formula "{path}": {type(error).__name__}: {" ".join(str(error).split())}') from error
    own = [name for name, value in space.items() if inspect.isfunction(value) and value.__globals__ is space]
    functions: dict[str, Function | None] = {"reference": None, "evaluation": None}
    for name in functions:
        function = space.get(name)
        if function is None and name == "evaluation":
            continue
        if not callable(function):
            raise ValueError(
                f'formula "{path}": no function reference(x, weight, bias, ...); it has '
                f"{', '.join(own) or 'no function'}{nearest(name, own)}"
            )
        try:
            asked = inspect.signature(function).parameters.values()
        except ValueError as error:  # torch.relu and the like
            raise ValueError(
                f'formula "{path}": {name} is no Python function: the names it asks for are unknown'
            ) from error
        if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in asked):
            raise ValueError(
                f'formula "{path}": {name}{inspect.signature(function)}: arguments are passed by name, so each has one '
                "(no *args, **kwargs or positional-only arguments)"
            )
        if "x" not in {p.name for p in asked}:
            raise ValueError(f'formula "{path}": {name}{inspect.signature(function)}: it asks for no x, the input')
        functions[name] = function
    reference = functions["reference"]
    assert reference is not None
    return Formula(str(path), reference, functions["evaluation"])


def training_like_reference(s: Subject, formula: Formula) -> Finding:
    """The training output of a new layer against `reference`, on maps of several sizes, means and deviations."""
    layer = s.layer().train()
    return _compared(s, layer, formula, "reference", formula.reference)


def evaluation_like_reference(s: Subject, formula: Formula) -> Finding:
    """The evaluation output of a layer that was trained on three batches against `evaluation`."""
    if formula.evaluation is None:
        return Finding("-", "not tried", f"{formula.file} has no function evaluation(x, ...)", True)
    return _compared(s, s.trained().eval(), formula, "evaluation", formula.evaluation)


COMPARISONS = (training_like_reference, evaluation_like_reference)


def _inputs(s: Subject) -> Iterator[tuple[str, Tensor]]:
    for shape in ((4, 4, 4), (2, 3, 5), (8, 2, 2), (3, 4, 1), (1, 4, 4)):
        full = (shape[0], s.channels, *shape[1:])
        yield f"{full}", batch(full, sum(shape), torch.float64)
    yield "mean 100", s.x() + 100
    yield "deviations of 0.001", s.x() * 1e-3


def _compared(s: Subject, layer: nn.Module, formula: Formula, name: str, function: Function) -> Finding:
    worst, size, tried, differ, refused = 0.0, 0.0, 0, [], []
    infinite: dict[str, str] = {}  # who gives values that are not finite -> the first input
    for what, x in _inputs(s):
        try:
            y, expected = _pair(s, layer, formula, name, function, x)
        except _Refused as error:
            refused.append(f"{what} refused: {error}")
            continue
        tried += 1
        for who, made in (("layer", y), ("formula", expected)):
            if not made.isfinite().all():
                infinite.setdefault(who, what)
        difference = (y - expected).abs().nan_to_num(math.inf, math.inf)
        worst, size = max(worst, difference.max().item()), max(size, expected.abs().nan_to_num(0).max().item())
        if not close(y, expected):
            differ.append(what)
    detail = f"largest difference {worst:.2g} of values up to {size:.2g} on {tried} inputs"
    if differ and len(differ) < tried:
        detail += f"; differs on: {', '.join(differ)}"
    if infinite:
        detail = f"{'; '.join(f'{who}: not finite on {what}' for who, what in infinite.items())}; {detail}"
    elif differ:
        detail = f"{_cause(s, layer, formula, name, function)}; {detail}"
    elif refused:
        detail += f"; {'; '.join(refused)}"
    return Finding("same", "differs" if differ else "same" if tried else "refused", detail)


class _Refused(Exception):
    """The layer does not take this input."""


def _pair(
    s: Subject, layer: nn.Module, formula: Formula, name: str, function: Function, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs for x of a copy of the layer and of the formula."""
    one, seen = copy.deepcopy(layer), []
    handle = one.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    known = _known(s, one, x)
    try:
        y = s.call(one, x.clone()).detach()
    except ValueError as error:
        raise _Refused(line(error)) from error
    finally:
        handle.remove()
    return y, _applied(formula, name, function, {"x": seen[0], **known}, s.info.name)


def _known(s: Subject, layer: nn.Module, x: Tensor) -> dict[str, Any]:
    """The arguments that a formula may ask for beside x, as they are before the forward."""
    known: dict[str, Any] = {}
    for option, value in s.factory.options.items():
        known[option] = getattr(layer, option, value)  # resolved, where the option says "auto"
    if "domain" in s.info.needs:
        known["domain"] = torch.arange(len(x)) % 2
    if "conv_weight" in s.info.needs:
        known["conv_weight"] = transformed_weight(layer, identity(x).detach())
    if "activation" in s.info.needs:
        known["activation"] = nn.functional.relu
    for path, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        known[path.replace(".", "_")] = tensor.detach().clone()
    return known


def _applied(formula: Formula, name: str, function: Function, known: dict[str, Any], norm: str) -> Tensor:
    where = f'formula "{formula.file}": {name}'
    given = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in known:
            given[parameter.name] = known[parameter.name]
        elif parameter.default is parameter.empty:
            raise ValueError(
                f'{where}{inspect.signature(function)}: "{parameter.name}" is nothing that {norm} has; it may ask for '
                f"{', '.join(known)}{nearest(parameter.name, known)}"
            )
    x = known["x"]
    try:
        with torch.no_grad():
            y = function(**given)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == formula.file]
        place = f" (line {lines[-1]})" if lines else ""
        text = " ".join(str(error).split())
        raise ValueError(
            f"{where} fails for x of shape {tuple(x.shape)}: {type(error).__name__}: {text}{place}"
        ) from error
    if not isinstance(y, Tensor):
        raise ValueError(f"{where} returns {type(y).__name__}; a torch tensor of the shape of x is needed")
    if y.shape != x.shape or y.dtype != torch.float64:
        raise ValueError(
            f"{where} returns {tuple(y.shape)} of {y.dtype} for x of shape {tuple(x.shape)}; the same shape, of "
            "torch.float64, is needed"
        )
    return y


# --- why they differ ----------------------------------------------------------------------------------------------


def _cause(s: Subject, layer: nn.Module, formula: Formula, name: str, function: Function) -> str:
    """The likely cause of the difference, of the causes that can be told apart by more inputs."""

    def pair(x: Tensor, layer: nn.Module = layer) -> tuple[Tensor, Tensor]:
        return _pair(s, layer, formula, name, function, x)

    def off(x: Tensor, layer: nn.Module = layer) -> float:
        y, expected = pair(x, layer)
        return ((y - expected).norm() / expected.norm().clamp(min=1e-30)).item()

    x = s.x()
    y, expected = pair(x)
    if name == "evaluation":
        trained = _applied(formula, "reference", formula.reference, {"x": x, **_known(s, layer, x)}, s.info.name)
        if close(y, trained):
            return "it is the training formula"
    wide = copy.deepcopy(layer)
    for path, buffer in wide.named_buffers():
        if "running_var" in path:
            buffer.mul_(1e8)
    if off(1e4 * x, wide) < 1e-3 * max(off(x), off(1e-3 * x)):
        return "eps: equal where deviations are large"
    wrong = (y - expected).abs() > 1e-9 * expected.abs().max()
    for what, axis in (("samples", 0), ("channels", 1)):
        which = wrong.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
        if len(which) < wrong.shape[axis]:
            return f"{what} {', '.join(map(str, which))} alone"
    if layer.training:
        ignored = unread_samples(s, lambda x: pair(x)[0]) - unread_samples(s, lambda x: pair(x)[1])
        if ignored:
            return f"samples {', '.join(map(str, sorted(ignored)))} of {len(x)} do not enter its statistics"
    d = 1e3 * (x - x.mean((2, 3), keepdim=True))
    ups, downs = pair(d), pair(-d)
    mine, theirs = ((up - down) / 2 for up, down in zip(ups, downs, strict=True))
    read = theirs.abs() > 1e-3 * theirs.abs().max()
    ratios = (mine[read] / theirs[read]).square()
    if read.any() and (ratios / ratios.mean() - 1).abs().max() < 1e-6:
        ratio = ratios.mean().item()
        for words, value in (("unbiased", 1 / (1 - ratio)), ("biased", 1 / (1 - 1 / ratio))) if ratio != 1 else ():
            if value > 1.5 and abs(value - round(value)) < 1e-3 * value:
                other = "biased" if words == "unbiased" else "unbiased"
                return f"variance: {words} in the layer, {other} in the formula, of {round(value)} values"
        if abs(ratio - 1) > 1e-6:
            return f"scale: {ratio**0.5:.6g} times the formula"
        return "shift: equal but for what is added"
    return "in all places"
