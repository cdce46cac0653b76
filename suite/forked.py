"""Work in a forked child, so that a user's code which ends its process, or crashes it, does not end ours.

Linux only: elsewhere (macOS, Windows) threads of system libraries may not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe

from suite.terminal import in_colours

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def watched(action: Callable[[], int]) -> tuple[int | None, str]:
    """The result of an action in a child that prints as this process does, or None and how the child ended.

    Elsewhere than on Linux the action is done here.
    """
    if sys.platform != "linux":
        return action(), ""
    ours, theirs = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    child = fork(lambda: _act(action, ours, theirs), quiet=False)
    theirs.close()
    try:
        while True:
            stream, said = ours.recv()
            if stream is None:
                return said, ""
            getattr(sys, stream).write(said)
            getattr(sys, stream).flush()
    except (EOFError, OSError):
        return None, ending(child)
    finally:
        stop(child)
        ours.close()


class _Stream:
    """A standard stream of a child, whose texts the parent prints."""

    def __init__(self, name: str, parent: Connection):
        self.name, self.parent, self.encoding = name, parent, getattr(sys, name).encoding
        self.colours = in_colours(getattr(sys, name))

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # as text streams do: click takes those that bear bytes for binary ones
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:
            self.parent.send((self.name, text))
        return len(text)

    def flush(self) -> None:
        """Nothing waits here."""

    def isatty(self) -> bool:
        return False


def _act(action: Callable[[], int], ours: Connection, theirs: Connection) -> None:
    ours.close()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # with a parent that is killed
    sys.stdout, sys.stderr = _Stream("stdout", theirs), _Stream("stderr", theirs)
    try:
        code = action()
    except Exception:  # noqa: BLE001 - as it would end the parent
        traceback.print_exc()
        code = 1
    theirs.send((None, code))


def fork(life: Callable[[], None], quiet: bool = True) -> int:
    """The number of a new process, in a group of its own, that lives this life; quiet: what it prints goes nowhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on threads; the time limit is for these, too
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        faulthandler.disable()  # the run's own process keeps the line of a crash
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2) if quiet else (0,):
            os.dup2(nothing, stream)
        life()
        code = 0
    finally:
        os._exit(code)  # nothing of the parent's is finished twice


def ending(process: int) -> str:
    """How a process that closed its pipe ended. It stays waitable, so that its number is nobody else's."""
    for _ in range(100):
        found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            time.sleep(0.01)
        elif found.si_code == os.CLD_EXITED:
            return f"the process ended with exit code {found.si_status}"
        else:
            known = found.si_status in set(signal.Signals)
            name = signal.Signals(found.si_status).name if known else f"signal {found.si_status}"
            return f"the process was killed by {name}"
    return "the process closed its files"


def stop(process: int) -> None:
    """Kill a process and its group, and wait for it."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # waited for by somebody else
        os.waitpid(process, 0)
