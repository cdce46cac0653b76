"""Being told to leave: by SIGTERM, and by SIGUSR1, a scheduler's notice before its time limit.

A run's process saves what the run goes on from (tasks.journal) and leaves without a record, but only while it computes:
before that the signal is noted and counts at the start, and while the record is stored it changes nothing. The fork
server notes signals for the processes that it has just forked, and goes on itself: it learns how each of them ends,
and a scheduler may signal all processes of a job.

The command that makes a grid takes signals at its own time (`Requests`), since one that broke into its bookkeeping
would leave workers that nobody tells.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.journal import Journal


def _those(*names: str) -> list[signal.Signals]:
    return [signal.Signals[name] for name in names if name in signal.Signals.__members__]


NOTICES = _those("SIGTERM", "SIGUSR1")
"""What tells a run's process to leave."""
REQUESTS = _those("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""What asks the command of a grid to stop."""
_ONE = 0.5  # seconds in which signals are one request: `timeout` and schedulers send to a process and to its group

_told: set[int] = set()  # processes: a forked one has not been told what its parent was
_worker = 0  # this process, where it makes a run
_journal: Journal | None = None  # of the run that computes


def note_for_workers() -> None:
    """In the fork server, as early as it can be."""
    for number in NOTICES:
        signal.signal(number, lambda *_: _told.add(os.getpid()))
    for number in _those("SIGHUP"):  # of a terminal that closes: the parent sees to its workers
        signal.signal(number, signal.SIG_IGN)


def obey() -> None:
    """This process makes a run."""
    global _worker
    _worker = os.getpid()
    for number in NOTICES:
        signal.signal(number, _leave)


def told() -> bool:
    """Whether this process was told to leave."""
    return os.getpid() in _told


@contextlib.contextmanager
def computing(journal: Journal) -> Iterator[None]:
    """Within the block a signal lets the run leave. Nothing changes in a process that makes no run (`obey`).

    Raises:
        Interrupted: the process was told to leave, now or before.
    """
    global _journal
    if os.getpid() != _worker:
        yield
        return
    try:
        _journal = journal
        if told():
            journal.leave()
        yield
    finally:
        _journal = None


def _leave(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _worker:  # forked by the run: data loaders
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _told.add(_worker)
    if _journal is not None:
        _journal.leave()


class Requests:
    """A context in which the first signal that asks to stop is noted; a later one raises KeyboardInterrupt.

    Signals that are ignored (nohup) or have a handler of somebody else's stay as they are; so do all of them outside
    the main thread, to which Python gives signals.

    Attributes:
        made: whether one came.
        heard: becomes readable then.
    """

    def __init__(self) -> None:
        self.made = False
        self.heard: Connection
        self._say: Connection
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        self.heard, self._say = Pipe(duplex=False)
        if threading.current_thread() is threading.main_thread():
            ours = (signal.SIG_DFL, signal.default_int_handler)
            for number in REQUESTS:
                if signal.getsignal(number) in ours:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.heard.close()
        self._say.close()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.made:
            self.made, self._at = True, now
            self._say.send(None)
        elif now - self._at > _ONE:
            raise KeyboardInterrupt


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Within the block a scheduler's SIGTERM or SIGUSR1 and a closed terminal are as good as Ctrl-C: runs save and
    leave, and the terminal is put right. A signal that is ignored (nohup) stays so."""
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in REQUESTS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
