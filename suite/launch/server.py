"""The fork server: a process that has imported torch once (about two seconds) and forks every run's process.

Python's own (multiprocessing), with what a grid needs around it: a place for its socket, Ctrl-C that it never sees, a
start that is repeated when the server was killed, and orphans that are killed with the run that left them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

from results.escape import cut
from suite.environment import ROOT
from suite.launch.launcher import LaunchError
from suite.processes import kill_below

_STARTS = 5  # of one process, each with a new server, before the server is given up
_PAUSE = 0.2  # seconds before the second start, twice as long before the third, and so on
_LONGEST = 75  # bytes of a folder below which multiprocessing's names fit into a socket's address on every system
_turn = threading.Lock()  # several grids in one process share the server: one must know the other's processes
_place = ""  # the folder that has been found to hold sockets


class ServerError(LaunchError):
    """No process can be started here."""


def start_server() -> None:
    """Start the fork server where none is running.

    Raises:
        ServerError: there is no folder for its socket.
    """
    # First, since it unblocks the signals that are blocked below.
    resource_tracker.ensure_running()
    _find_place()
    forkserver.set_forkserver_preload(["suite.preload"])
    # The server is a fresh interpreter that does not inherit sys.path (Python 3.11), and a preload that it can not find
    # is silently left out: every run would import torch again.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        with _interrupts_later():
            forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(make: Callable[[], Any]) -> Any:
    """Make a process of the forkserver context, and start it; returns it.

    The server may have been killed, now or long ago. A process that it had forked without our knowing ends by itself,
    since we let go of the pipe that it watches.

    Raises:
        ServerError: it died at every try.
    """
    reason = ""
    for attempt in range(_STARTS):
        time.sleep(_PAUSE * attempt)
        with _turn:
            start_server()
            process = make()
            try:
                process.start()
                return process
            except (EOFError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"  # the error itself would hold on to the pipe
    raise ServerError(f"no process could be started, at {_STARTS} tries; the last one: {reason}")


def kill_orphans() -> None:
    """Kill what runs that have ended left below the server: all that this process has not started."""
    with _turn:
        server = getattr(forkserver._forkserver, "_forkserver_pid", None)
        if server is not None:
            kill_below(server, {child.pid for child in multiprocessing.active_children() if child.pid})


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """A process started inside has SIGINT blocked, until suite.preload ignores it; ours comes afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _find_place() -> None:
    """Give multiprocessing a folder whose path leaves room for a socket's name; workers inherit it.

    A socket's address has about 100 bytes, and on clusters TMPDIR alone may have more. TMPDIR itself stays as it is for
    all that is no socket.
    """
    global _place
    shared: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if _place and shared.get("tempdir") == _place:
        return
    if shared.get("tempdir") and _holds_sockets(shared["tempdir"]):  # of a program that uses multiprocessing, too
        _place = shared["tempdir"]
        return
    for folder in _places():
        with contextlib.suppress(OSError):
            made = tempfile.mkdtemp(prefix="pymp-", dir=folder)
            if _holds_sockets(made):
                util.Finalize(None, shutil.rmtree, args=(made,), kwargs={"ignore_errors": True}, exitpriority=-100)
                shared["tempdir"] = _place = made
                return
            os.rmdir(made)
    given = os.environ.get("TMPDIR", "")
    shown = f'TMPDIR is "{cut(given, 60)}" ({len(given)} characters)'
    raise ServerError(
        f"no folder for a socket, which the processes of runs need; {shown if given else 'TMPDIR is not set'}\n"
        f"TMPDIR must be a folder that can be written to, with at most {_LONGEST} characters"
    )


def _places() -> Iterator[str]:
    with contextlib.suppress(OSError):  # there is no folder for temporary files at all
        yield tempfile.gettempdir()
    yield from filter(None, (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm"))


def _holds_sockets(folder: str) -> bool:
    name = Path(folder, "listener-" + 8 * "x")  # as long as multiprocessing's
    try:
        with socket.socket(socket.AF_UNIX) as tried:
            tried.bind(str(name))
        name.unlink()
    except OSError:
        return False
    return True
