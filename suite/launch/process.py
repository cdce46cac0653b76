"""The process of one run on this machine, from its claim to its record: what suite.launch.local starts.

It takes the run's claim, looks whether the run has been done meanwhile, runs, and stores the record itself. Told to
leave (suite.leaving), it saves a checkpoint and stores none. It leaves as soon as the record is stored, whatever the
run has left behind in it, and when its parent is gone, whatever it is doing: the kernel kills its process group when
the pipe to the parent closes (Linux), and a thread watches the same pipe elsewhere. What stands in the way of the run
itself (its folder, its claim) is told to the parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from results.record import DONE, RunRecord, RunSpec
from results.store import run_folder, write_record
from suite import checkpoints, leaving
from suite.launch.launcher import LOST
from suite.launch.making import RunOne, Signature, take, trouble
from suite.live import Live
from suite.output import OUTPUT, print_to, printed
from suite.processes import adopt_orphans, leave_with_parent


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
        leave_with_parent()
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

    live = Live(out, spec, lambda news: tell("progress", news), say, trouble=lambda reason: tell("trouble", reason))
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
