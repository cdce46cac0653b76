"""The process of one run, from its lock to its record: what `suite.engine` starts.

A worker takes the run's lock, looks whether the run has been done meanwhile, runs, and stores the record itself. It
leaves when its parent is gone, whatever it is doing: the kernel kills its process group when the pipe to the parent
closes (Linux), and a thread watches the same pipe elsewhere.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from filelock import Timeout

from results.record import (
    DONE,
    RECORD,
    RecordError,
    RunRecord,
    RunSpec,
    find_record,
    run_folder,
    run_lock,
    set_aside,
    write_record,
)

RunOne = Callable[[RunSpec, Path, Callable[[float], None]], RunRecord]
State = Literal["done", "failed", "todo", "damaged"]
Signature = tuple[int, int]
OUTPUT = "output.txt"
"""What a run printed, in its folder; kept only if it printed something."""

_REPORT_EVERY = 0.2  # seconds; a task may report as often as it likes


def look(out: str | Path, spec: RunSpec) -> tuple[State, RunRecord | None]:
    """What is stored for a spec: "done" (ok or diverged), "failed", "damaged" (unreadable), else "todo"."""
    try:
        record = find_record(out, spec)
    except RecordError:
        return "damaged", None
    if record is None or record.status == "skipped":
        return "todo", record
    return ("done" if record.status in DONE else "failed"), record


def signature(out: Path, spec: RunSpec) -> Signature | None:
    """Tells one stored record from the next: (inode, nanoseconds), or None."""
    try:
        stat = (run_folder(out, spec) / RECORD).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def work(run_one: RunOne, spec: RunSpec, out: Path, before: Signature | None, messages: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, so that what the run starts can be stopped with it
    _leave_with_parent()
    lock = run_lock(out, spec)
    folder = run_folder(out, spec)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        messages.send(("busy", None))
        return
    try:
        state, _ = look(out, spec)
        if state == "damaged":
            messages.send(("damaged", str(set_aside(folder / RECORD))))
        elif state == "done" or (state == "failed" and signature(out, spec) != before):
            return  # made meanwhile by another invocation
        for rest in folder.glob(f".{RECORD}.*"):  # of a writer that was killed
            rest.unlink()
        messages.send(("started", None))
        output = folder / OUTPUT
        _print_to(output)
        write_record(out, run_one(spec, folder, _Reporter(messages)))
        sys.stdout.flush()
        sys.stderr.flush()
        if not output.stat().st_size:
            output.unlink()
    finally:
        lock.release()


class _Reporter:
    """Sends a running task's progress to the parent, a few times a second at most."""

    def __init__(self, messages: Connection):
        self.messages, self.last = messages, 0.0

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self.last >= _REPORT_EVERY:
            self.last = now
            self.messages.send(("progress", float(fraction)))


def _print_to(file: Path) -> None:
    """From here on all that this process prints goes to `file`: C libraries, Python's own tracebacks, and crashes."""
    with file.open("wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    faulthandler.enable(file=2)  # a crash in C leaves the Python line it came from


def _leave_with_parent() -> None:
    """End this process and its group as soon as the parent is gone, even if it was killed with -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel  # readable once the parent has closed its end, that is, when it ended
    try:
        import fcntl

        # The kernel itself sends the signal: a run that hangs in C and never gives Python a turn goes too.
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    except (ImportError, AttributeError, OSError):  # not Linux: the thread below does what can be done
        pass

    def watch() -> None:
        wait([sentinel])
        if hasattr(os, "killpg"):
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="leave with parent", daemon=True).start()
