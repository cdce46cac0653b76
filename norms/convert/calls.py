"""Functions that the graph of a rewritten network calls beside those of its forward.

A module of its own: while torch.fx traces, it replaces a wrapped function in the module that defines it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, fx


def fixed(value: Any, name: str, default: bool | int | float | str | None) -> None:
    """ValueError where an argument has another value than the one that it had when the graph was made."""
    if value is not default and not (isinstance(value, bool | int | float | str) and value == default):
        what = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name} is given {what}, where this network was converted with its default, {name}={default!r}; "
            f'inputs=["{name}"] keeps it an argument'
        )


def given(value: Any, name: str) -> Any:
    """`value`; ValueError where it is None, since the graph is that of a forward to which it was given."""
    if value is None:
        raise ValueError(
            f"{name}=None: this network was converted with {name} among its inputs, so that it has to be given"
        )
    return value


def ordered_dict(items: list[tuple[Any, Any]]) -> OrderedDict[Any, Any]:
    """An OrderedDict, which torch.fx would make a dict."""
    return OrderedDict(items)


# one node each where a pickled network is traced again, and told so by the node's meta where it is traced first
fx.wrap("fixed")
fx.wrap("given")
fx.wrap("ordered_dict")
