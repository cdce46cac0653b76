"""Batches without end, which know where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Stream(Generic[T]):
    """Passes over a part of a data set, each in an order of its own, one after the other.

    Its state is that of the order's generator at the start of the pass and how many batches of it were taken, so the
    order of a pass is never stored.

    Args:
        start: draws the order of a pass from `order`, and nothing else from it, and gives its batches without the first
            so many, which are not read.
        order: a generator that serves nothing else.
        length: batches of a pass.
    """

    def __init__(self, start: Callable[[int], Iterator[T]], order: torch.Generator, length: int):
        self._start, self._order, self._length = start, order, length
        self._taken = 0
        self._at_start = order.get_state()
        self._batches: Iterator[T] | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        if self._taken >= self._length:
            self._batches, self._taken = None, 0
        if self._batches is None:
            if not self._taken:
                self._at_start = self._order.get_state()
            self._batches = self._start(self._taken)
        batch = next(self._batches)
        self._taken += 1
        if self._taken == self._length:
            self._batches = None  # processes that read ahead end with their pass
        return batch

    def state_dict(self) -> dict[str, Any]:
        fresh = self._batches is None and not self._taken
        return {"order": self._order.get_state() if fresh else self._at_start, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the other stream was; the order's generator goes to the start of that pass.

        Raises:
            ValueError: a pass here has other batches.
        """
        taken = state["taken"]
        if not 0 <= taken <= self._length:
            raise ValueError(f"{taken} batches of a pass were taken; here it has {self._length}")
        self._order.set_state(state["order"])
        self._at_start, self._taken, self._batches = state["order"], taken, None
        if taken == self._length:  # the next pass begins with what this one left of the generator
            self._start(taken)


class Drawn(Generic[T]):
    """An iterable that is drawn anew each time; its generators hold all of its state.

    Args:
        draw: gives the next one.
    """

    def __init__(self, draw: Callable[[], T]):
        self._draw = draw

    def __iter__(self) -> Drawn[T]:
        return self

    def __next__(self) -> T:
        return self._draw()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: generators are restored by the journal."""
