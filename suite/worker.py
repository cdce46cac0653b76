"""The process of one run, from its lock to its record: what `suite.engine` starts.

A worker takes the run's lock, looks whether the run has been done meanwhile, runs, and stores the record itself. Told
to leave (suite.leaving), it saves a checkpoint and stores none. It leaves as soon as the record is stored, whatever the
run has left behind in it, and when its parent is gone, whatever it is doing: the kernel kills its process group when
the pipe to the parent closes (Linux), and a thread watches the same pipe elsewhere. What stands in the way of the run
itself (its folder, its lock) is told to the parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NoReturn

from filelock import Timeout

from results.escape import cut
from results.record import DONE, RecordError, RunRecord, RunSpec
from results.store import RECORD, find_record, run_folder, run_lock, set_aside, write_record
from suite import checkpoints, leaving
from suite.live import Live
from suite.output import OUTPUT, print_to, printed
from suite.processes import adopt_orphans
from suite.runner import one_line

RunOne = Callable[[RunSpec, Path, Callable[[float], None]], RunRecord]
State = Literal["done", "failed", "todo", "damaged"]
Signature = tuple[int, int]


def look(out: str | Path, spec: RunSpec) -> tuple[State, RunRecord | None]:
    """The state of a stored run: "done" (ok or diverged), "failed", "damaged" (unreadable), else "todo"."""
    try:
        record = find_record(out, spec)
    except RecordError:
        return "damaged", None
    if record is None or record.status == "skipped":
        return "todo", record
    return ("done" if record.status in DONE else "failed"), record


def signature(out: Path, spec: RunSpec) -> Signature | None:
    """A mark that changes with every stored record: (inode, nanoseconds); None without a readable record."""
    try:
        stat = (run_folder(out, spec) / RECORD).lstat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def trouble(error: OSError) -> str:
    """The path and the reason of a disk's error, in one line."""
    file = error.filename2 or error.filename  # of a renaming the second is what people know
    path = cut(os.fsdecode(file), 200) if isinstance(file, str | bytes | os.PathLike) else ""
    return one_line(f"{path}: {error.strerror}" if path and error.strerror else error)


def work(run_one: RunOne, spec: RunSpec, out: Path, before: Signature | None, messages: Connection) -> NoReturn:
    """The life of a worker process. It does not return: threads and finalizers of the run could keep it for ever."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        if hasattr(os, "setsid"):
            os.setsid()  # a group of its own, so that what the run starts can be stopped with it
        leaving.obey()
        _leave_with_parent()
        adopt_orphans()
        _make(run_one, spec, out, before, messages)
        code = 0
    except OSError as error:
        with contextlib.suppress(OSError):
            messages.send(("trouble", trouble(error)))
    except SystemExit as left:
        code = left.code & 0xFF if isinstance(left.code, int) else int(left.code is not None)
        _print_error()
    except BaseException:  # noqa: BLE001 - told by the exit code
        _print_error()
    finally:
        os._exit(code)


def _make(run_one: RunOne, spec: RunSpec, out: Path, before: Signature | None, messages: Connection) -> None:
    from tasks.journal import Interrupted  # imports torch, as this process has done

    lock = run_lock(out, spec)
    folder = run_folder(out, spec)
    record: RunRecord | None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        messages.send(("busy", None))
        return
    state, _ = look(out, spec)
    if state == "damaged":
        messages.send(("damaged", str(set_aside(folder / RECORD))))
    elif state == "done" or (state == "failed" and signature(out, spec) != before):
        return  # made meanwhile by another invocation
    for entry in list(os.scandir(folder)):
        if entry.is_symlink():  # a run that writes its files must not write over what they point to
            os.unlink(entry.path)
            if entry.name in (checkpoints.NEWEST, checkpoints.BEFORE):
                messages.send(("note", f"{entry.path}: was a link, which is not followed, and is removed"))
    messages.send(("started", None))
    output = folder / OUTPUT
    print_to(output)

    def say(text: str) -> None:
        print(text)
        messages.send(("note", text))

    live = Live(out, spec, lambda news: messages.send(("progress", news)), say)
    try:
        record = run_one(spec, folder, live)
    except Interrupted:
        record = None
    else:
        write_record(out, record)
    with contextlib.suppress(OSError):  # the run may have closed what it did not open; the record is what counts
        messages.send(("left" if record is None else "stored", None))
    if record is not None:
        if record.status in DONE:
            checkpoints.remove(folder)
        live.end(record)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the run's own
            stream.flush()
    with contextlib.suppress(OSError):
        if not printed(output):
            output.unlink()
        lock.release()  # what the run has forked shares the lock, and may outlive this process for a moment


def _print_error() -> None:
    with contextlib.suppress(Exception):
        traceback.print_exc()
        sys.stderr.flush()


def _leave_with_parent() -> None:
    """End this process and its group as soon as the parent is gone, even if it was killed with -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel  # readable once the parent has closed its end, that is, when it ended
    # The fork server ends when nobody holds this pipe: what the run forks must not keep it (and its like) alive.
    server: Any = forkserver._forkserver
    if getattr(server, "_forkserver_alive_fd", None) is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
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
