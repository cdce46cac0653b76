"""Imported once by the fork server, before it forks the first run: what every run would otherwise import for itself."""

import atexit
import contextlib
import os
import signal
import warnings
from multiprocessing import forkserver
from pathlib import Path

from suite.environment import describe, set_allocator
from suite.leaving import note_for_workers
from suite.processes import adopt_orphans, kill_below

signal.signal(signal.SIGINT, signal.SIG_IGN)  # before the slow imports: Ctrl-C is the parent's business
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by suite.launch.server until here
note_for_workers()
adopt_orphans()
# which the server reaps, and must not take for a mistake
warnings.filterwarnings("ignore", "forkserver: waitpid returned unexpected pid")
set_allocator()  # before torch allocates anything


def _leave_nothing(server: int) -> None:
    """The server ends when its parent did; what runs had started goes with it, and the folder of its socket."""
    if os.getpid() != server:  # a process that was forked from it
        return
    kill_below(server)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # a parent that was not killed has done this
        place = Path(forkserver._forkserver._forkserver_address).parent  # type: ignore[attr-defined]
        if place.name.startswith("pymp-"):
            for listener in place.glob("listener-*"):
                listener.unlink()
            place.rmdir()


atexit.register(_leave_nothing, os.getpid())

import numpy  # noqa: E402, F401
import torch  # noqa: E402, F401
import torchvision  # noqa: E402, F401

import suite.cli  # noqa: E402 - a worker imports its parent's main module, which imports this
import suite.runner  # noqa: E402, F401
from norms.registry import norm_names  # noqa: E402
from tasks import get_task, task_names  # noqa: E402

norm_names()
for _name in task_names():
    get_task(_name)
describe("cpu", 1, "")  # looks up versions and hardware once; forked workers inherit the answers
