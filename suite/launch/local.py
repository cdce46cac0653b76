"""Runs on this machine: a process each, forked from a server that has imported torch once; accelerators are slots.

Plain multiprocessing and not pebble's pool, which was the first choice: its pool waits forever for a worker that left
with exit code 0, breaks when an idle worker is killed, and its time limit needs the lock of a channel that the workers
share. One process and one pipe per run has none of these states.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from results.record import RunSpec
from suite.launch.devices import VISIBLE, Devices
from suite.launch.launcher import Kind
from suite.launch.making import RunOne, Signature
from suite.launch.process import work
from suite.launch.server import kill_orphans, start, start_server
from suite.processes import below
from suite.torchrun import workers_of


@dataclass(eq=False)
class LocalRun:
    """A run's process."""

    spec: RunSpec
    process: Any
    messages: Connection
    devices: tuple[str, ...] = ()
    open: bool = True  # its pipe


class LocalLauncher:
    """See the module.

    Args:
        jobs: runs at a time.
        devices: accelerators, one for each worker of a run; None: none are given out.
    """

    at_once = True

    def __init__(self, jobs: int, devices: Devices | None = None):
        self.jobs, self.devices = jobs, devices
        self._context = multiprocessing.get_context("forkserver")
        self._going: list[LocalRun] = []
        self._run_one: RunOne
        self._out: Path

    def open(self, run_one: RunOne, out: Path) -> None:
        """See suite.launch.launcher.Launcher, as for all methods here."""
        self._run_one, self._out = run_one, out
        start_server()  # so that what is wrong with it is said before anything else happens

    def room(self, spec: RunSpec) -> bool:
        if len(self._going) >= self.jobs:
            return False
        return self.devices is None or len(self.devices.free()) >= workers_of(spec)

    def start(self, spec: RunSpec, before: Signature | None) -> LocalRun:
        devices = () if self.devices is None else self.devices.take(workers_of(spec))
        around = {VISIBLE: ",".join(devices)} if devices else {}
        pipes: list[Connection] = []

        def make() -> Any:
            for end in pipes:  # of a start that failed
                end.close()
            pipes[:] = self._context.Pipe(duplex=False)
            arguments = (self._run_one, spec, self._out.absolute(), before, around, pipes[1])
            return self._context.Process(target=work, args=arguments, name=f"run {spec.key}")

        process = start(make)
        pipes[1].close()
        run = LocalRun(spec, process, pipes[0], devices)
        self._going.append(run)
        return run

    def news(
        self, runs: Sequence[LocalRun], seconds: float, wake: Sequence[Connection]
    ) -> Iterator[tuple[LocalRun, Kind, Any]]:
        ends = {run.process.sentinel: run for run in runs}
        pipes = {run.messages: run for run in runs if run.open}
        ready = wait([*ends, *pipes, *wake], max(0.0, seconds))
        if any(item in wake for item in ready if isinstance(item, Connection)):
            return
        for item in ready:
            if isinstance(item, Connection):
                yield from self._heard(pipes[item])
        for item in ready:
            if not isinstance(item, Connection):
                yield from self._ended(ends[item])

    def _heard(self, run: LocalRun) -> Iterator[tuple[LocalRun, Kind, Any]]:
        try:
            kind, value = run.messages.recv()
        except (EOFError, OSError):
            run.open = False
        else:
            yield run, kind, value

    def _ended(self, run: LocalRun) -> Iterator[tuple[LocalRun, Kind, Any]]:
        while run.open and run.messages.poll():  # what it said before it ended
            yield from self._heard(run)
        run.process.join()
        _kill(run.process)  # what it started and left behind
        kill_orphans()
        code = run.process.exitcode
        self._drop(run)
        yield run, "ended", code

    def leave(self, run: LocalRun) -> None:
        run.process.terminate()

    def kill(self, run: LocalRun) -> None:
        _kill(run.process)

    def close(self) -> None:
        left = list(self._going)
        for run in left:
            _kill(run.process)
        for run in left:
            run.process.join()
            self._drop(run)
        if left:
            kill_orphans()

    def _drop(self, run: LocalRun) -> None:
        self._going.remove(run)
        run.messages.close()
        run.process.close()
        if self.devices is not None:
            self.devices.give_back(run.devices)


def _kill(process: Any) -> None:
    """SIGKILL to a run's process, its group, and all below. A record is renamed into place, so there is never half of
    one."""
    pid = process.pid
    # 255: the fork server was killed, and the process may live
    started = below(pid) if process.exitcode in (None, 255) else []
    if process.is_alive():
        process.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)
