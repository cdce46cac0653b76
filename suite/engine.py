"""Many RunSpecs, one process each: start, watch, limit, record what a process could not record itself, resume.

`execute(specs, run_one, out)` is the whole seam: `run_one(spec, folder, report) -> RunRecord` is called in a fresh
process (suite.worker), forked from a server that has imported torch once. The worker stores its run's record itself;
the parent stores one only for a worker that died.

Plain multiprocessing and not pebble's pool, which was the first choice: its pool waits forever for a worker that left
with exit code 0, breaks when an idle worker is killed, and its time limit needs the lock of a channel that the workers
share. One process and one pipe per run has none of these states.

One module in spite of its length: the states of a worker, and what moves it from one to the next, are read together.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from results.escape import cut
from results.record import DONE, RunRecord, RunSpec
from results.store import RECORD, run_folder, run_lock, set_aside, write_record
from suite import checkpoints, live
from suite.checkpoints import found
from suite.environment import now
from suite.leaving import NOTICES, Requests
from suite.output import OUTPUT, printed, trim
from suite.processes import below
from suite.server import kill_orphans, start, start_server
from suite.worker import RunOne, Signature, look, signature, trouble, work

_BUSY = "another process is making this run"
_LOOK = 1.0  # seconds between looks at how much runs have printed; no wait is longer, whatever the time limit
_LEAVE = 5.0  # seconds in which a process has to end once its record is stored
_SAVE = 10.0  # seconds in which runs that are told to leave have to
_AGAIN = 1.0  # seconds after which one that has not is told again
_TOLD = tuple(-number for number in NOTICES)  # exit codes of workers that had not come far enough to say so
_POLL = 0.25  # seconds between looks at runs that another invocation is making
_GRACE = 1.0  # seconds in which another invocation may record how its worker died, before its run is taken over
_START_LIMIT = 60.0  # seconds beyond the time limit for a process to come as far as its run


@dataclass(frozen=True)
class Event:
    """A message of `execute` to its caller.

    Args:
        kind: "started", "progress" (`fraction`, and the like), "finished" (`record`), "damaged" (`text`: where the
            record went), "waiting" (another invocation is making this run), "note" (`text`, for the user), "stopped"
            (its process was told to leave, and the run has no record; `text`: where it goes on, "" where it begins anew
            and the grid was told, too).
        text: of "progress", with the first news of a run that goes on: from where.
        position: where the run stands, a tasks.journal.Position as a mapping.
        row: of an epoch that it has finished now.
        clock: suite.live.Live.clock after it.
    """

    kind: Literal["started", "progress", "finished", "damaged", "waiting", "note", "stopped"]
    spec: RunSpec
    fraction: float = 0.0
    record: RunRecord | None = None
    text: str = ""
    position: Mapping[str, Any] | None = None
    row: Mapping[str, float | None] | None = None
    clock: tuple[int, float] | None = None


def execute(
    specs: Iterable[RunSpec],
    run_one: RunOne,
    out: str | Path,
    *,
    jobs: int = 1,
    timeout: float | str | None = None,
    retry: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Counter[str]:
    """Make every run of `specs` in its own process; returns how many ended in each status, "stopped" among them: their
    processes were told to leave by somebody else, and they have no record.

    A run that is done when its turn comes, because another invocation made it, is counted with its status and not
    repeated; so is a failed one, unless `retry` is given and it had failed before this call.

    Args:
        specs: what to run; the caller leaves out what is done.
        run_one: called in the run's process; picklable.
        out: the folder of results.
        jobs: processes at a time.
        timeout: seconds a run may take, counted from its own start; a run past it is killed and recorded as failed, and
            so is one whose process does not come as far as its start in the same time and a minute. None: no limit; see
            `time_limit` for what else it may be.
        retry: make failed runs again.
        on_event: told about every start, progress and end, in this thread.

    A run whose folder can not be used (another user's, a full disk, a file system without locks) is counted as failed,
    with path and reason in its event; it leaves a record only where one can be written.

    Raises:
        ValueError: jobs is below 1, or timeout is no time.
        ServerError: no process can be started (an OSError).
        KeyboardInterrupt: a signal asked for it (suite.leaving.Requests). No run was started any more, those that went
            on were told to save and to leave, and all are gone; finished runs are stored, stopped ones leave a
            checkpoint and no record.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: 1 or more is needed")
    return _Execution(run_one, Path(out), jobs, time_limit(timeout), retry, on_event).all(specs)


def time_limit(given: float | str | None, what: str = "timeout") -> float | None:
    """Seconds of 90, "90", "90s", "5m", "2h" or "1.5d"; None (no limit) of None, infinity and "inf".

    Raises:
        ValueError: anything else, 0 and below, nan.
    """
    if given is None:
        return None
    text = " ".join(str(given).split())
    match = re.fullmatch(r"(.*?) ?([smhd]?)", text)
    assert match is not None
    number, unit = match.groups()
    try:
        seconds = float(number) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600}[unit]
    except ValueError:
        seconds = math.nan
    if not seconds > 0:  # nan among them
        raise ValueError(
            f'{what} "{cut(text, 40)}": a time above 0 is needed, such as 90 or 90s, 5m, 2h, 1d, or inf (no limit)'
        )
    return None if seconds == math.inf else seconds


def write_skipped(out: str | Path, skipped: Iterable[tuple[RunSpec, str]]) -> list[str]:
    """Store the reasons of skipped runs, for the tables. Finished runs stay, and an unchanged reason is not rewritten.

    Returns:
        One line, with path and reason, for each that can not be stored.
    """
    unstored = []
    for spec, reason in skipped:
        state, before = look(out, spec)
        if state == "done" or (before is not None and before.status == "skipped" and before.reason == reason):
            continue
        try:
            with run_lock(out, spec).acquire(timeout=0):
                if state == "damaged":
                    set_aside(run_folder(out, spec) / RECORD)
                write_record(out, RunRecord(spec=spec, status="skipped", reason=reason))
        except Timeout:  # another invocation is storing the same
            continue
        except OSError as error:
            unstored.append(trouble(error))
    return unstored


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
    left: bool = False  # told to leave, it has
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
        self.looked = time.monotonic()  # at what runs have printed

    def all(self, specs: Iterable[RunSpec]) -> Counter[str]:
        todo = deque(specs)
        if self.retry:
            self.replaceable = {spec.key: signature(self.out, spec) for spec in todo}
        if todo:
            start_server()  # so that what is wrong with it is said before anything else happens
        with Requests() as self.requests:
            try:
                while (todo or self.running or self.waiting) and not self.requests.made:
                    self._look_at_waiting(todo)
                    while todo and len(self.running) < self.jobs and not self.requests.made:
                        self._start(todo.popleft())
                    self._watch()
                if self.requests.made:
                    self._let_leave()
                    raise KeyboardInterrupt
            finally:
                self._stop_all()
        return self.counts

    def _let_leave(self) -> None:
        """Tell all workers to leave, and wait until they have saved what their runs go on from."""
        end, next_time = time.monotonic() + _SAVE, 0.0
        while self.running and time.monotonic() < end:
            if time.monotonic() >= next_time:  # again and again: a process that is just forked may miss the first
                next_time = time.monotonic() + _AGAIN
                for worker in self.running:
                    worker.process.terminate()
            self._watch()

    def _start(self, spec: RunSpec) -> None:
        before = self.replaceable.get(spec.key)
        pipes: list[Connection] = []

        def make() -> Any:
            for end in pipes:  # of a start that failed
                end.close()
            pipes[:] = self.context.Pipe(duplex=False)
            return self.context.Process(
                target=work, args=(self.run_one, spec, self.out.absolute(), before, pipes[1]), name=f"run {spec.key}"
            )

        process = start(make)
        pipes[1].close()
        deadline = None if self.timeout is None else time.monotonic() + self.timeout + _START_LIMIT
        limit = "the process did not come as far as its run before the time limit"
        self.running.append(_Worker(spec, process, pipes[0], before, deadline, limit))

    def _watch(self) -> None:
        """Wait for the next event of any worker, and handle it."""
        ends = {worker.process.sentinel: worker for worker in self.running}
        pipes = {worker.messages: worker for worker in self.running if worker.open}
        deadlines = [worker.deadline for worker in self.running if worker.deadline is not None]
        limit = min([_POLL if self.waiting else _LOOK, *(deadline - time.monotonic() for deadline in deadlines)])
        if not self.running:
            time.sleep(_POLL)
            return
        wake = [] if self.requests.made else [self.requests.heard]
        ready = wait([*ends, *pipes, *wake], max(0.0, limit))
        if self.requests.heard in ready:
            return
        for item in ready:
            if isinstance(item, Connection):
                self._receive(pipes[item])
        for worker in self.running:
            if worker.deadline is not None and time.monotonic() > worker.deadline and not worker.cause:
                worker.cause = worker.limit
                _kill(worker.process)
        if time.monotonic() - self.looked >= _LOOK:
            self.looked = time.monotonic()
            for worker in self.running:
                trim(run_folder(self.out, worker.spec) / OUTPUT)
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
        elif kind == "trouble":
            worker.cause = value
        elif kind == "note":
            self.tell(Event("note", worker.spec, text=value))
        elif kind in ("stored", "left"):
            worker.left = kind == "left"
            worker.deadline = time.monotonic() + _LEAVE
            worker.limit = "the process did not end after its run"
        else:
            self.tell(Event("progress", worker.spec, **value))

    def _end(self, worker: _Worker) -> None:
        while worker.open:  # what it said before it ended
            if not worker.messages.poll():
                break
            self._receive(worker)
        worker.process.join()
        _kill(worker.process)  # what it started and left behind
        kill_orphans()
        trim(run_folder(self.out, worker.spec) / OUTPUT)
        self.running.remove(worker)
        worker.messages.close()
        code = worker.process.exitcode
        worker.process.close()
        if worker.busy:
            self._wait_for(worker.spec)
        elif (worker.left or code in _TOLD) and self._own(worker)[1] is None:
            note = found(run_folder(self.out, worker.spec), worker.spec.key)
            self.counts["stopped"] += 1
            nowhere = (
                "" if self.requests.made else "from the start"
            )  # of all runs that had hardly begun, nothing is said
            self.tell(Event("stopped", worker.spec, text=nowhere if note is None else note.origin))
        else:
            self._settle(worker, code)

    def _settle(self, worker: _Worker, code: int) -> None:
        """The worker's own record, or one that says how it died; only counted where none can be stored."""
        spec = worker.spec
        died = RunRecord(
            spec=spec,
            status="failed",
            reason=worker.cause or _exit_reason(code, run_folder(self.out, spec)),
            history=live.rows_of(run_folder(self.out, spec)),
            seconds=time.monotonic() - worker.started,
            environment={"finished": now()},
        )
        try:
            # not at once: what the worker had started may still be dying, and shares its lock until then
            with run_lock(self.out, spec).acquire(timeout=2, poll_interval=0.02):
                state, record = self._own(worker)
                if state == "damaged":
                    moved = set_aside(run_folder(self.out, spec) / RECORD)
                    self.tell(Event("damaged", spec, text=str(moved)))
                if record is None:
                    record = died
                    write_record(self.out, record)
                    live.remove(run_folder(self.out, spec))
                elif record.status in DONE:  # a worker that was killed as soon as it had stored its record
                    checkpoints.remove(run_folder(self.out, spec))
        except Timeout:  # another invocation has begun this run again: its result will count
            self._wait_for(spec)
            return
        except OSError as error:
            reason = worker.cause or f"{trouble(error)} ({died.reason})"
            record = self._own(worker)[1] or died.model_copy(update={"reason": reason})
        self._count(record)

    def _own(self, worker: _Worker) -> tuple[str, RunRecord | None]:
        """The state of a run, and the record that its worker, or another invocation, has stored since it started."""
        state, record = look(self.out, worker.spec)
        new = state == "done" or (state == "failed" and signature(self.out, worker.spec) != worker.before)
        return state, record if new else None

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
            except OSError as error:
                self._count(RunRecord(spec=spec, status="failed", reason=trouble(error)))
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
        if self.running:
            kill_orphans()
        self.running.clear()


def _kill(process: Any) -> None:
    """SIGKILL to a worker, its group, and all below. A record is renamed into place, so there is never half of one."""
    pid = process.pid
    # 255: the fork server was killed, and the worker may live
    started = below(pid) if process.exitcode in (None, 255) else []
    if process.is_alive():
        process.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)


def _exit_reason(code: int, folder: Path) -> str:
    see = f"; see {OUTPUT}" if printed(folder / OUTPUT) else ""
    if code == 255:  # multiprocessing says the same where it can not learn the code
        return f"the process ended with exit code 255, or the fork server was killed, before the run was finished{see}"
    if code >= 0:
        return f"the process ended with exit code {code} before the run was finished{see}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
    return f"killed by {name}{memory}{see}"
