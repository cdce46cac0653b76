"""The messages of runs on a Ray cluster, on their way to the command: an actor of Ray's, on the command's node."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from suite.launch.far import Answer

_FULL = 64 * 2**20  # bytes at which senders wait


class Mailbox:
    """The messages of all runs, on their way to the command. An actor of Ray's."""

    def __init__(self) -> None:
        self._words: dict[str, Answer] = {}  # by the name of a run that is waited for
        self._messages: deque[tuple[str, int, str, Any]] = deque()
        self._bytes = 0
        self._came, self._went = asyncio.Event(), asyncio.Event()

    async def expect(self, name: str) -> None:
        """Messages of this run are waited for."""
        self._words[name] = ""

    async def forget(self, name: str) -> None:
        """They are no more; those that still come are answered "gone"."""
        self._words.pop(name, None)

    async def tell(self, name: str) -> None:
        """This run shall leave."""
        if name in self._words:
            self._words[name] = "leave"

    async def put(self, name: str, number: int, kind: str, value: Any) -> Answer:
        """A message of a run; returns what it is to do."""
        while self._bytes > _FULL and name in self._words:
            self._went.clear()
            await self._went.wait()
        if name not in self._words:
            return "gone"
        self._messages.append((name, number, kind, value))
        self._bytes += _size(value)
        self._came.set()
        return self._words[name]

    async def take(self, seconds: float) -> list[tuple[str, int, str, Any]]:
        """All messages that came, or the first ones that come in so many seconds."""
        if not self._messages and seconds > 0:
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), seconds)
        taken, self._messages, self._bytes = list(self._messages), deque(), 0
        self._went.set()
        return taken


def _size(value: Any) -> int:
    return len(value["data"]) if isinstance(value, dict) and "data" in value else 0
