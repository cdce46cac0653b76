"""Nested dicts, lists and tuples, as modules take and return them: copied, read, and taken from a node's result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx


def structured(structure: Any, call: Any) -> Any:
    """The result of `call` as the containers that it consists of; `call` itself where it is none."""
    if structure is None or isinstance(structure, str):
        return structure
    if not isinstance(structure, dict | list | tuple):
        return call
    parts = list(structure.items() if isinstance(structure, dict) else enumerate(structure))
    if any(isinstance(key, fx.Proxy) for key, _ in parts):
        return call
    keyed = {key: structured(part, call[key]) for key, part in parts}
    return _mapped_container(structure, keyed)


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy of nested dicts, lists and tuples, with `leaf` of everything else that they hold."""
    if not isinstance(value, dict | list | tuple):
        return leaf(value)
    parts: Any = value.items() if isinstance(value, dict) else enumerate(value)
    return _mapped_container(value, {key: mapped(part, leaf) for key, part in parts})


def _mapped_container(like: Any, parts: dict[Any, Any]) -> Any:
    """A container of the same kind as `like` with these parts under the same keys, or at the same positions."""
    if isinstance(like, dict):
        new = copy.copy(like)
        new.update(parts)
        return new
    if isinstance(like, list):
        return list(parts.values())
    return type(like)(*parts.values()) if hasattr(like, "_fields") else tuple(parts.values())


def containers(value: Any) -> Iterator[Any]:
    """The dicts and lists in nested containers."""
    if isinstance(value, dict | list | tuple):
        if not isinstance(value, tuple):
            yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


def leaves(value: Any) -> Iterator[Any]:
    """The members of nested containers that are no containers."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value
