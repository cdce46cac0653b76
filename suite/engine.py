"""Many RunSpecs, one process each: start, watch, limit, record what a process could not record itself, resume.

`execute(specs, run_one, out)` is the whole seam: `run_one(spec, folder, report) -> RunRecord` is called in a fresh
process, forked from a server that has imported torch once. A worker takes the run's lock, looks whether the run has
been done meanwhile, runs, and stores the record itself; the parent stores one only for a worker that died.

Plain multiprocessing and not pebble's pool, which was the first choice: its pool waits forever for a worker that left
with exit code 0, breaks when an idle worker is killed, and its time limit needs the lock of a channel that the workers
share. One process and one pipe per run has none of these states.

A worker leaves when its parent is gone, whatever it is doing: the kernel kills its process group when the pipe to the
parent closes (Linux), and a thread watches the same pipe elsewhere.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

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
from suite.environment import ROOT, now

RunOne = Callable[[RunSpec, Path, Callable[[float], None]], RunRecord]
State = Literal["done", "failed", "todo", "damaged"]
Signature = tuple[int, int]
OUTPUT = "output.txt"
"""What a run printed, in its folder; kept only if it printed something."""

_BUSY = "another process is making this run"
_POLL = 0.25  # seconds between looks at runs that another invocation is making
_REPORT_EVERY = 0.2  # seconds; a task may report as often as it likes


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


def look(out: str | Path, spec: RunSpec) -> tuple[State, RunRecord | None]:
    """What is stored for a spec: "done" (ok or diverged), "failed", "damaged" (unreadable), else "todo"."""
    try:
        record = find_record(out, spec)
    except RecordError:
        return "damaged", None
    if record is None or record.status == "skipped":
        return "todo", record
    return ("done" if record.status in DONE else "failed"), record


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
        timeout: seconds a run may take, counted from its own start; a run past it is killed and recorded as failed.
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
    """Start the fork server now (it imports torch, about two seconds, while the caller goes on planning)."""
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
    deadline: float | None = None
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
        self.waiting: deque[RunSpec] = deque()  # locked by another invocation when their turn came
        self.replaceable: dict[str, Signature | None] = {}  # failed records that may be replaced
        self.counts: Counter[str] = Counter()

    def all(self, specs: Iterable[RunSpec]) -> Counter[str]:
        todo = deque(specs)
        if self.retry:
            self.replaceable = {spec.key: _signature(self.out, spec) for spec in todo}
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
            target=_work, args=(self.run_one, spec, self.out, before, writer), name=f"run {spec.key}"
        )
        try:
            process.start()
        finally:
            writer.close()
        self.running.append(_Worker(spec, process, reader, before))

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
                worker.cause = f"time limit of {self.timeout:g} s"
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
            worker.deadline = None if self.timeout is None else time.monotonic() + self.timeout
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
                unchanged = state == "failed" and _signature(self.out, spec) == worker.before
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
        self.waiting.append(spec)
        self.tell(Event("waiting", spec, text=_BUSY))

    def _look_at_waiting(self, todo: deque[RunSpec]) -> None:
        """Runs that another invocation was making: take its record, or the run itself where it left none."""
        for _ in range(len(self.waiting)):
            spec = self.waiting.popleft()
            try:
                with run_lock(self.out, spec).acquire(timeout=0):
                    state, record = look(self.out, spec)
                    fresh = record is not None and _signature(self.out, spec) != self.replaceable.get(spec.key)
            except Timeout:
                self.waiting.append(spec)
                continue
            if state == "done" or (state == "failed" and fresh):
                assert record is not None
                self._count(record)
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


def _work(run_one: RunOne, spec: RunSpec, out: Path, before: Signature | None, messages: Connection) -> None:
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
        elif state == "done" or (state == "failed" and _signature(out, spec) != before):
            return  # made meanwhile by another invocation
        for rest in folder.glob(f".{RECORD}.*"):  # of a writer that was killed
            rest.unlink()
        messages.send(("started", None))
        with _output_to(folder / OUTPUT):
            record = run_one(spec, folder, _Reporter(messages))
        write_record(out, record)
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


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Everything this process prints, C libraries included, goes to `file`; nothing printed, no file."""
    with file.open("wb") as stream:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = {number: os.dup(number) for number in (1, 2)}
        for number in kept:
            os.dup2(stream.fileno(), number)
        faulthandler.enable(file=stream)  # a crash in C leaves the Python line it came from
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            faulthandler.disable()
            for number, before in kept.items():
                os.dup2(before, number)
                os.close(before)
    if not file.stat().st_size:
        file.unlink()


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


def _kill(process: Any) -> None:
    """SIGKILL to a worker and its group. A record is renamed into place, so there is never half of one."""
    pid = process.pid
    if process.is_alive():
        process.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _signature(out: Path, spec: RunSpec) -> Signature | None:
    """Tells one stored record from the next: (inode, nanoseconds), or None."""
    try:
        stat = (run_folder(out, spec) / RECORD).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _exit_reason(code: int, folder: Path) -> str:
    output = folder / OUTPUT
    printed = f"; see {OUTPUT}" if output.exists() and output.stat().st_size else ""
    if code >= 0:
        return f"the process ended with exit code {code} before the run was finished{printed}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
    return f"killed by {name}{memory}{printed}"
