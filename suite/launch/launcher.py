"""What the engine asks of a launcher: start a run somewhere, tell what becomes of it, let it leave, kill it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from results.record import RunSpec
from suite.launch.making import RunOne, Signature

LOST = 75
"""The exit code of a process that found its claim taken over: it was suspended for longer than a claim lasts."""

Kind = Literal["busy", "started", "damaged", "note", "progress", "trouble", "stored", "left", "ended"]
"""Of news about a run, in this order:

busy        another invocation makes it
started     its claim is taken, and it is made
damaged     where a damaged record went
note        a line for the user
progress    a mapping: arguments of suite.engine.Event
trouble     why nothing can be made of it, or how it ended
stored      its record is
left        it was told to leave, and has no record
ended       last, and always: an exit code; or a text, how the run was lost through no fault of its own
"""

R = TypeVar("R")


class LaunchError(OSError):
    """No run can be started here; the message says why, and what to do."""


class Launcher(Protocol[R]):
    """A place where runs are made. R is what it knows a run by that goes on.

    Whoever makes a run holds its claim meanwhile (suite.launch.making.take) and stores its record: locally its process,
    else the launcher.

    Attributes:
        at_once: a run that was started begins without waiting for a place, so that one that does not is at fault.
    """

    at_once: bool

    def open(self, run_one: RunOne, out: Path) -> None:
        """Called once before the first start. Raises LaunchError."""
        ...

    def room(self, spec: RunSpec) -> bool:
        """Whether this run can be started now, beside those that go on."""
        ...

    def start(self, spec: RunSpec, before: Signature | None) -> R:
        """Start a run.

        Args:
            before: of the failed record that may be replaced.

        Raises:
            LaunchError: nothing can be started any more.
        """
        ...

    def news(self, runs: Sequence[R], seconds: float, wake: Sequence[Connection]) -> Iterator[tuple[R, Kind, Any]]:
        """What is new about these runs, after at most so many seconds; at once when one of `wake` can be read."""
        ...

    def leave(self, run: R) -> None:
        """Tell a run to save what it goes on from, and to leave. It may be told again."""
        ...

    def kill(self, run: R) -> None:
        """End a run; its "ended" follows."""
        ...

    def close(self) -> None:
        """End what is left; called once, also after errors."""
        ...
