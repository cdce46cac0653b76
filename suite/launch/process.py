"""The process of one run on this machine, from its claim to its record: what suite.launch.local starts.

It takes the run's claim, looks whether the run has been done meanwhile, runs, and stores the record itself. Told to
leave (suite.leaving), it saves a checkpoint and stores none. It leaves as soon as the record is stored, whatever the
run has left behind in it, and when its parent is gone, whatever it is doing: the kernel kills its process group when
the pipe to the parent closes (Linux), and a thread watches the same pipe elsewhere. What stands in the way of the run
itself (its folder, its claim) is told to the parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from results.record import DONE, RunRecord, RunSpec
from results.store import run_folder, write_record
from suite import checkpoints, leaving
from suite.launch.launcher import LOST
from suite.launch.making import RunOne, Signature, take, trouble
from suite.live import Live
from suite.output import OUTPUT, print_to, printed
from suite.processes import adopt_orphans


def work(
    run_one: RunOne,
    spec: RunSpec,
    out: Path,
    before: Signature | None,
    around: Mapping[str, str],
    messages: Connection,
) -> NoReturn:
    """The life of a run's process. It does not return: threads and finalizers of the run could keep it for ever.

    Args:
        around: environment variables, set before anything looks for accelerators.
    """
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        if hasattr(os, "setsid"):
            os.setsid()  # a group of its own, so that what the run starts can be stopped with it
        os.environ.update(around)
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

    def tell(kind: str, value: Any) -> None:
        messages.send((kind, value))

    claim = take(out, spec, before, tell, lost=lambda _: os._exit(LOST))
    if claim is None:
        return
    folder = run_folder(out, spec)
    record: RunRecord | None
    output = folder / OUTPUT
    print_to(output)

    def say(text: str) -> None:
        print(text)
        tell("note", text)

    live = Live(out, spec, lambda news: tell("progress", news), say)
    try:
        record = run_one(spec, folder, live)
    except Interrupted:
        record = None
    else:
        if not claim.is_lock_held_by_us:  # this process slept for so long that another one makes the run
            os._exit(LOST)
        write_record(out, record)
    with contextlib.suppress(OSError):  # the run may have closed what it did not open; the record is what counts
        tell("left" if record is None else "stored", None)
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
        claim.release()


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
