"""What several figures of one frame are made of, made once: within `remembering()`, of the same frame."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import pandas as pd

_P = ParamSpec("_P")
_R = TypeVar("_R")
_KEPT: ContextVar[dict[Any, tuple[pd.DataFrame, Any]] | None] = ContextVar("_KEPT", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Inside, functions with `@remembered` give the same result again for the same frame, which nothing may change."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def remembered(make: Callable[Concatenate[pd.DataFrame, _P], _R]) -> Callable[Concatenate[pd.DataFrame, _P], _R]:
    """A function of a frame and of what can be hashed; it is called anew for each call outside of `remembering`."""

    @functools.wraps(make)
    def found(df: pd.DataFrame, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        kept = _KEPT.get()
        if kept is None:
            return make(df, *args, **kwargs)
        place = (make, id(df), args, tuple(sorted(kwargs.items())))
        if place not in kept:
            kept[place] = (df, make(df, *args, **kwargs))  # with the frame: another one must not get its id
        result: _R = kept[place][1]
        return result

    return found
