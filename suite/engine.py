"""Many RunSpecs, one process each: start, watch, limit, record what a process could not record itself, resume.

`execute(specs, run_one, out)` is the whole seam: `run_one(spec, folder, report) -> RunRecord` is called in a fresh
process (suite.worker), forked from a server that has imported torch once. The worker stores its run's record itself;
the parent stores one only for a worker that died.

Plain multiprocessing and not pebble's pool, which was the first choice: its pool waits forever for a worker that left
with exit code 0, breaks when an idle worker is killed, and its time limit needs the lock of a channel that the workers
share. One process and one pipe per run has none of these states.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from results.record import (
    RECORD,
    RunRecord,
    RunSpec,
    run_folder,
    run_lock,
    set_aside,
    write_record,
)
from suite.environment import ROOT, now
from suite.worker import OUTPUT, RunOne, Signature, look, signature, work

_BUSY = "another process is making this run"
_POLL = 0.25  # seconds between looks at runs that another invocation is making
_GRACE = 1.0  # seconds in which another invocation may record how its worker died, before its run is taken over
_START_LIMIT = 60.0  # seconds beyond the time limit for a process to come as far as its run


@dataclass(frozen=True)
class Event:
    """What `execute` tells its caller.

    Args:
        kind: "started", "progress" (`fraction`), "finished" (`record`), "damaged" (`text`: where the record went),
            "waiting" (another invocation is making this run).
    """

    kind: Literal["started", "progress", "finished", "damaged", "waiting"]
    spec: RunSpec
    fraction: float = 0.0
    record: RunRecord | None = None
    text: str = ""


def execute(
    specs: Iterable[RunSpec],
    run_one: RunOne,
    out: str | Path,
    *,
    jobs: int = 1,
    timeout: float | None = None,
    retry: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Counter[str]:
    """Make every run of `specs` in its own process; returns how many ended in each status.

    A run that is done when its turn comes, because another invocation made it, is counted with its status and not
    repeated; so is a failed one, unless `retry` is given and it had failed before this call.

    Args:
        specs: what to run; the caller leaves out what is done.
        run_one: called in the run's process; picklable.
        out: the folder of results.
        jobs: processes at a time.
        timeout: seconds a run may take, counted from its own start; a run past it is killed and recorded as failed, and
            so is one whose process does not come as far as its start in the same time and a minute.
        retry: make failed runs again.
        on_event: told about every start, progress and end, in this thread.

    Raises:
        KeyboardInterrupt: after all workers are gone; finished runs are stored, stopped ones leave no record.
    """
    return _Execution(run_one, Path(out), jobs, timeout, retry, on_event).all(specs)


def write_skipped(out: str | Path, skipped: Iterable[tuple[RunSpec, str]]) -> None:
    """Store why specs are skipped, for the tables. What is done stays; a standing reason is not rewritten."""
    for spec, reason in skipped:
        state, before = look(out, spec)
        if state == "done" or (before is not None and before.status == "skipped" and before.reason == reason):
            continue
        with contextlib.suppress(Timeout), run_lock(out, spec).acquire(timeout=0):
            if state == "damaged":
                set_aside(run_folder(out, spec) / RECORD)
            write_record(out, RunRecord(spec=spec, status="skipped", reason=reason))


def start_server() -> None:
    """Start the fork server, which imports torch once (about two seconds) for all workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["suite.preload"])
    # The server is a fresh interpreter that does not inherit sys.path (Python 3.11), and a preload that it can not find
    # is silently left out: every run would import torch again.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@dataclass
class _Worker:
    spec: RunSpec
    process: Any
    messages: Connection
    before: Signature | None
    deadline: float | None
    limit: str  # what it means to pass the deadline
    cause: str = ""
    busy: bool = False
    open: bool = True
    started: float = field(default_factory=time.monotonic)


class _Execution:
    def __init__(
        self,
        run_one: RunOne,
        out: Path,
        jobs: int,
        timeout: float | None,
        retry: bool,
        on_event: Callable[[Event], None],
    ):
        self.run_one, self.out, self.jobs, self.timeout, self.tell = run_one, out, jobs, timeout, on_event
        self.retry = retry
        self.context = multiprocessing.get_context("forkserver")
        self.running: list[_Worker] = []
        # Locked by another invocation when their turn came; and since when each has been free, without a record.
        self.waiting: deque[tuple[RunSpec, float | None]] = deque()
        self.replaceable: dict[str, Signature | None] = {}  # failed records that may be replaced
        self.counts: Counter[str] = Counter()

    def all(self, specs: Iterable[RunSpec]) -> Counter[str]:
        todo = deque(specs)
        if self.retry:
            self.replaceable = {spec.key: signature(self.out, spec) for spec in todo}
        if todo:
            start_server()
        try:
            while todo or self.running or self.waiting:
                self._look_at_waiting(todo)
                while todo and len(self.running) < self.jobs:
                    self._start(todo.popleft())
                self._watch()
        finally:
            self._stop_all()
        return self.counts

    def _start(self, spec: RunSpec) -> None:
        reader, writer = self.context.Pipe(duplex=False)
        before = self.replaceable.get(spec.key)
        process = self.context.Process(
            target=work, args=(self.run_one, spec, self.out.absolute(), before, writer), name=f"run {spec.key}"
        )
        try:
            process.start()
        finally:
            writer.close()
        deadline = None if self.timeout is None else time.monotonic() + self.timeout + _START_LIMIT
        limit = "the process did not come as far as its run before the time limit"
        self.running.append(_Worker(spec, process, reader, before, deadline, limit))

    def _watch(self) -> None:
        """Wait for the next thing to happen to any worker, and deal with it."""
        ends = {worker.process.sentinel: worker for worker in self.running}
        pipes = {worker.messages: worker for worker in self.running if worker.open}
        deadlines = [worker.deadline for worker in self.running if worker.deadline is not None]
        limit = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        if self.waiting:
            limit = min(_POLL, limit) if limit is not None else _POLL
        if not self.running:
            time.sleep(_POLL)
            return
        ready = wait([*ends, *pipes], limit)
        for item in ready:
            if isinstance(item, Connection):
                self._receive(pipes[item])
        for worker in self.running:
            if worker.deadline is not None and time.monotonic() > worker.deadline and not worker.cause:
                worker.cause = worker.limit
                _kill(worker.process)
        for item in ready:
            if not isinstance(item, Connection):
                self._end(ends[item])

    def _receive(self, worker: _Worker) -> None:
        try:
            kind, value = worker.messages.recv()
        except (EOFError, OSError):
            worker.open = False
            return
        if kind == "busy":
            worker.busy = True
        elif kind == "started":
            if self.timeout is not None:
                worker.deadline, worker.limit = time.monotonic() + self.timeout, f"time limit of {self.timeout:g} s"
            self.tell(Event("started", worker.spec))
        elif kind == "damaged":
            self.tell(Event("damaged", worker.spec, text=value))
        else:
            self.tell(Event("progress", worker.spec, fraction=value))

    def _end(self, worker: _Worker) -> None:
        while worker.open:  # what it said before it ended
            if not worker.messages.poll():
                break
            self._receive(worker)
        worker.process.join()
        _kill(worker.process)  # what it started and left behind
        self.running.remove(worker)
        worker.messages.close()
        code = worker.process.exitcode
        worker.process.close()
        if not worker.busy:
            self._settle(worker, code)
        else:
            self._wait_for(worker.spec)

    def _settle(self, worker: _Worker, code: int) -> None:
        """The worker's own record, or one that says how it died."""
        spec = worker.spec
        try:
            # not at once: what the worker had started may still be dying, and shares its lock until then
            with run_lock(self.out, spec).acquire(timeout=2, poll_interval=0.02):
                state, record = look(self.out, spec)
                unchanged = state == "failed" and signature(self.out, spec) == worker.before
                if state in ("todo", "damaged") or unchanged:
                    if state == "damaged":
                        moved = set_aside(run_folder(self.out, spec) / RECORD)
                        self.tell(Event("damaged", spec, text=str(moved)))
                    record = RunRecord(
                        spec=spec,
                        status="failed",
                        reason=worker.cause or _exit_reason(code, run_folder(self.out, spec)),
                        seconds=time.monotonic() - worker.started,
                        environment={"finished": now()},
                    )
                    write_record(self.out, record)
        except Timeout:  # another invocation has begun this run again: its result will count
            self._wait_for(spec)
            return
        assert record is not None
        self._count(record)

    def _count(self, record: RunRecord) -> None:
        self.counts[record.status] += 1
        self.tell(Event("finished", record.spec, record=record))

    def _wait_for(self, spec: RunSpec) -> None:
        self.waiting.append((spec, None))
        self.tell(Event("waiting", spec, text=_BUSY))

    def _look_at_waiting(self, todo: deque[RunSpec]) -> None:
        """Runs that another invocation was making: take its record, or the run itself where it left none."""
        for _ in range(len(self.waiting)):
            spec, free = self.waiting.popleft()
            try:
                with run_lock(self.out, spec).acquire(timeout=0):
                    state, record = look(self.out, spec)
                    fresh = record is not None and signature(self.out, spec) != self.replaceable.get(spec.key)
            except Timeout:
                self.waiting.append((spec, None))
                continue
            if state == "done" or (state == "failed" and fresh):
                assert record is not None
                self._count(record)
            elif free is None or time.monotonic() - free < _GRACE:
                self.waiting.append((spec, free or time.monotonic()))
            else:
                todo.append(spec)

    def _stop_all(self) -> None:
        for worker in self.running:
            _kill(worker.process)
        for worker in self.running:
            worker.process.join()
            worker.messages.close()
            worker.process.close()
        self.running.clear()


def _kill(process: Any) -> None:
    """SIGKILL to a worker and its group. A record is renamed into place, so there is never half of one."""
    pid = process.pid
    if process.is_alive():
        process.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _exit_reason(code: int, folder: Path) -> str:
    output = folder / OUTPUT
    printed = f"; see {OUTPUT}" if output.exists() and output.stat().st_size else ""
    if code >= 0:
        return f"the process ended with exit code {code} before the run was finished{printed}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
    return f"killed by {name}{memory}{printed}"
