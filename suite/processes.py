"""Processes that runs leave behind: found in /proc below another process, and killed (Linux).

A process whose parent ended is given to the nearest living ancestor that asked for it (a child subreaper, prctl(2)),
also where it left its process group by setsid. The fork server asks, and so does every worker: what a living run has
started stays below its worker, and what a dead one left stands directly below the fork server. Elsewhere than on Linux
only the process group of a run is killed with it, and a child that called setsid stays.

In the other direction a process leaves with its parent, however that one ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PATIENCE = 2.0  # seconds in which processes that fork as they are killed have to end


def adopt_orphans() -> None:
    """What is started below this process stays below it when its own parent ends. Nothing elsewhere than on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def leave_with_parent() -> None:
    """End this process, and its group where it leads one, as soon as its parent is gone, even if it was killed with -9.

    For a process of multiprocessing. The kernel kills when the pipe to the parent closes (Linux); a thread watches the
    same pipe elsewhere.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel  # readable once the parent has closed its end, that is, when it ended
    whole = hasattr(os, "getpgrp") and os.getpgrp() == os.getpid()
    # The fork server ends when nobody holds this pipe: what the run forks must not keep it (and its like) alive.
    server: Any = forkserver._forkserver
    if getattr(server, "_forkserver_alive_fd", None) is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    try:
        import fcntl

        # The kernel itself sends the signal: a run that hangs in C and never gives Python a turn goes too.
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpid() if whole else os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    except (ImportError, AttributeError, OSError):  # not Linux: the thread below does what can be done
        pass

    def watch() -> None:
        wait([sentinel])
        if whole:
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="leave with parent", daemon=True).start()


def kill_below(process: int, spare: Collection[int] = ()) -> None:
    """Kill every process below another one. A spared process keeps every process below itself."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        found = below(process, spare)
        if not found:
            return
        for one in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.005)  # what they had started comes to this process, and is looked for again


def below(process: int, spare: Collection[int] = ()) -> list[int]:
    """The living processes below a process, parents first."""
    children: dict[int, list[int]] = defaultdict(list)
    for one, parent in _parents():
        children[parent].append(one)
    found: list[int] = []
    left = [process]
    while left:
        for child in children.pop(left.pop(), ()):
            if child not in spare:
                found.append(child)
                left.append(child)
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all that live here."""
    if sys.platform != "linux":
        return
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                state, parent = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    yield int(entry.name), int(parent)
