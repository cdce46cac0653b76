"""The arguments of a network's forward, and the choices of a caller among them and among its modules, by name."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from norms.values import nearest


def arguments(net: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of the forward that can be named in a call, in order."""
    (_, *parameters) = inspect.signature(type(net).forward).parameters.values()
    return {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def optional_arguments(net: nn.Module) -> dict[str, Any]:
    """Arguments with a default on which a forward may decide, such as `if mask is not None`, and that default."""
    return {
        name: parameter.default
        for name, parameter in arguments(net).items()
        if isinstance(parameter.default, bool | int | float | str | None)
    }


def check_inputs(net: nn.Module, inputs: Any) -> None:
    """ValueError where `inputs` are not names of arguments of the forward, one line each."""
    names = check_names("inputs", inputs, "names of arguments")
    known = arguments(net) if names else {}
    mistakes = [
        f'inputs: the forward of {type(net).__name__} has no argument "{name}"; it has {", ".join(known) or "none"}'
        f"{nearest(name, known)}"
        for name in names
        if name not in known
    ]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def check_names(option: str, value: Any, what: str) -> list[str]:
    """The strings in a list, tuple or set; ValueError for anything else, a single string included."""
    names = list(value) if isinstance(value, Collection) and not isinstance(value, str | Mapping) else None
    if names is None or not all(isinstance(name, str) for name in names):
        one = f", such as [{value!r}]" if isinstance(value, str) else ""
        raise ValueError(f"{option}={value!r}: it takes a list of {what}{one}")
    return names
