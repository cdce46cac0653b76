"""Many RunSpecs: what is next, how long each may take, what becomes of it, what others make meanwhile, resume.

`execute(specs, run_one, out)` is the whole seam: `run_one(spec, folder, report) -> RunRecord` is called in a process of
its own, which a launcher starts (suite.launch). Whoever makes a run stores its record; the engine stores one only for a
run whose process died.

One module in spite of its length: the states of a run, and what moves it from one to the next, are read together.
"""

from __future__ import annotations

import math
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from results.claims import Waited
from results.escape import cut
from results.record import DONE, RunRecord, RunSpec
from results.store import RECORD, run_folder, run_lock, set_aside, write_record
from suite import checkpoints, live
from suite.checkpoints import found
from suite.environment import now
from suite.launch.launcher import LOST, Kind, Launcher
from suite.launch.local import LocalLauncher
from suite.launch.making import RunOne, Signature, look, signature, trouble
from suite.leaving import NOTICES, Requests
from suite.output import OUTPUT, printed, trim

_BUSY = "another process is making this run"
_LOOK = 1.0  # seconds between looks at how much runs have printed; no wait is longer, whatever the time limit
_LEAVE = 5.0  # seconds in which a process has to end once its record is stored
_SAVE = 10.0  # seconds in which runs that are told to leave have to
_AGAIN = 1.0  # seconds after which one that has not is told again
_TOLD = tuple(-number for number in NOTICES)  # exit codes of processes that had not come far enough to say so
_POLL = 0.25  # seconds between looks at runs that another invocation is making
_REST = 9  # times as long as the last of these looks took, none is made
_GRACE = 1.0  # seconds in which another invocation may record how its run's process died, before it is taken over
_START_LIMIT = 60.0  # seconds beyond the time limit for a process to come as far as its run
MOST_LOST = 3
"""Times that a run is begun again, or goes on, after it was lost with its machine; then it has failed."""


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
    launcher: Launcher[Any] | None = None,
    wait: bool = True,
) -> Counter[str]:
    """Make every run of `specs` in its own process; returns how many ended in each status, "stopped" among them: their
    processes were told to leave by somebody else, and they have no record; and "elsewhere" (see `wait`).

    A run that is done when its turn comes, because another invocation made it, is counted with its status and not
    repeated; so is a failed one, unless `retry` is given and it had failed before this call.

    Args:
        specs: what to run; the caller leaves out what is done.
        run_one: called in the run's process; picklable.
        out: the folder of results.
        jobs: runs at a time, on this machine.
        timeout: seconds a run may take, counted from its own start; a run past it is killed and recorded as failed, and
            so is one whose process does not come as far as its start in the same time and a minute. None: no limit; see
            `time_limit` for what else it may be.
        retry: make failed runs again.
        on_event: told about every start, progress and end, in this thread.
        launcher: starts the runs; None: on this machine, `jobs` at a time.
        wait: also for runs that other invocations make. False: leave when only such runs are left, all of whose makers
            are known to live (for the longest, a minute after it was found), and count them as "elsewhere".

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
    place = LocalLauncher(jobs) if launcher is None else launcher
    return _Execution(run_one, Path(out), place, time_limit(timeout), retry, on_event, wait).all(specs)


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


@dataclass(eq=False)
class _Going:
    """A run that was started."""

    spec: RunSpec
    run: Any  # the launcher's
    before: Signature | None
    deadline: float | None
    limit: str  # what it means to pass the deadline
    cause: str = ""
    busy: bool = False
    left: bool = False  # told to leave, it has
    started: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Waiting:
    """A run that another invocation was making when its turn came."""

    spec: RunSpec
    seen: Waited
    free: float | None = None  # since when, without a record


class _Execution:
    def __init__(
        self,
        run_one: RunOne,
        out: Path,
        launcher: Launcher[Any],
        timeout: float | None,
        retry: bool,
        on_event: Callable[[Event], None],
        wait: bool,
    ):
        self.run_one, self.out, self.launcher, self.timeout, self.tell = run_one, out, launcher, timeout, on_event
        self.retry, self.wait = retry, wait
        self.running: list[_Going] = []
        self.waiting: deque[_Waiting] = deque()
        self.replaceable: dict[str, Signature | None] = {}  # failed records that may be replaced
        self.counts: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()  # by key
        self.looked = time.monotonic()  # at what runs have printed
        self.look_next = 0.0  # at what others make

    def all(self, specs: Iterable[RunSpec]) -> Counter[str]:
        self.todo = deque(specs)
        if self.retry:
            self.replaceable = {spec.key: signature(self.out, spec) for spec in self.todo}
        if self.todo:
            self.launcher.open(self.run_one, self.out)
        with Requests() as self.requests:
            try:
                while (self.todo or self.running or self._waits()) and not self.requests.made:
                    self._look_at_waiting()
                    while self.todo and self.launcher.room(self.todo[0]) and not self.requests.made:
                        self._start(self.todo.popleft())
                    self._watch()
                if self.requests.made:
                    self._let_leave()
                    raise KeyboardInterrupt
            finally:
                self.launcher.close()
                self.running.clear()
        self.counts["elsewhere"] += len(self.waiting)
        return +self.counts

    def _waits(self) -> bool:
        """Whether runs that others make are waited for, when nothing else is left."""
        return bool(self.waiting) and (self.wait or not all(each.seen.lives() for each in self.waiting))

    def _let_leave(self) -> None:
        """Tell all runs to leave, and wait until they have saved what they go on from."""
        end, next_time = time.monotonic() + _SAVE, 0.0
        while self.running and time.monotonic() < end:
            if time.monotonic() >= next_time:  # again and again: a process that is just forked may miss the first
                next_time = time.monotonic() + _AGAIN
                for going in self.running:
                    self.launcher.leave(going.run)
            self._watch()

    def _start(self, spec: RunSpec) -> None:
        before = self.replaceable.get(spec.key)
        run = self.launcher.start(spec, before)
        limited = self.timeout is not None and self.launcher.at_once
        deadline = time.monotonic() + (self.timeout or 0) + _START_LIMIT if limited else None
        limit = "the process did not come as far as its run before the time limit"
        self.running.append(_Going(spec, run, before, deadline, limit))

    def _watch(self) -> None:
        """Wait for the next news of any run, and handle it."""
        deadlines = [going.deadline for going in self.running if going.deadline is not None]
        limit = min([_POLL if self.waiting else _LOOK, *(deadline - time.monotonic() for deadline in deadlines)])
        if not self.running:
            time.sleep(_POLL)
            return
        by_run = {id(going.run): going for going in self.running}
        wake = [] if self.requests.made else [self.requests.heard]
        ended = []
        for run, kind, value in self.launcher.news([going.run for going in self.running], limit, wake):
            if kind == "ended":
                ended.append((by_run[id(run)], value))
            else:
                self._heard(by_run[id(run)], kind, value)
        over = {id(going) for going, _ in ended}
        for going in self.running:
            late = going.deadline is not None and time.monotonic() > going.deadline
            if late and not going.cause and id(going) not in over:
                going.cause = going.limit
                self.launcher.kill(going.run)
        if time.monotonic() - self.looked >= _LOOK:
            self.looked = time.monotonic()
            for going in self.running:
                trim(run_folder(self.out, going.spec) / OUTPUT)
        for going, value in ended:
            if going in self.running:  # it may be said twice
                self._end(going, value)

    def _heard(self, going: _Going, kind: Kind, value: Any) -> None:
        if kind == "busy":
            going.busy = True
        elif kind == "started":
            if self.timeout is not None:
                going.deadline, going.limit = time.monotonic() + self.timeout, f"time limit of {self.timeout:g} s"
            self.tell(Event("started", going.spec))
        elif kind == "damaged":
            self.tell(Event("damaged", going.spec, text=value))
        elif kind == "trouble":
            going.cause = value
        elif kind == "note":
            self.tell(Event("note", going.spec, text=value))
        elif kind in ("stored", "left"):
            going.left = kind == "left"
            going.deadline = time.monotonic() + _LEAVE
            going.limit = "the process did not end after its run"
        else:
            self.tell(Event("progress", going.spec, **value))

    def _end(self, going: _Going, how: int | str) -> None:
        """A run has ended, with this exit code, or lost in this way."""
        trim(run_folder(self.out, going.spec) / OUTPUT)
        self.running.remove(going)
        if going.busy or (how == LOST and self._lost_again(going)):
            self._wait_for(going.spec)
        elif self._left(going, how) and self._own(going)[1] is None:
            note = found(run_folder(self.out, going.spec), going.spec.key)
            self.counts["stopped"] += 1
            nowhere = (
                "" if self.requests.made else "from the start"
            )  # of all runs that had hardly begun, nothing is said
            self.tell(Event("stopped", going.spec, text=nowhere if note is None else note.origin))
        elif isinstance(how, str) and not going.cause and self._own(going)[1] is None and self._goes_on(going, how):
            self.todo.append(going.spec)
        else:
            self._settle(going, how)

    def _left(self, going: _Going, how: int | str) -> bool:
        """Whether a run has left because it was told to, or was lost while all are: it goes on next time."""
        return going.left or how in _TOLD or (isinstance(how, str) and self.requests.made and not going.cause)

    def _goes_on(self, going: _Going, how: str) -> bool:
        """Whether a run that was lost is made again."""
        again = self._lost_again(going)
        if again:
            note = found(run_folder(self.out, going.spec), going.spec.key)
            where = "from the start" if note is None else note.origin
            self.tell(Event("note", going.spec, text=f"{how}; it goes on {where}"))
        return again

    def _lost_again(self, going: _Going) -> bool:
        """Whether a run that was lost may be so once more; a run's own code can end its process in any way."""
        self.lost[going.spec.key] += 1
        return self.lost[going.spec.key] <= MOST_LOST

    def _settle(self, going: _Going, how: int | str) -> None:
        """The run's own record, or one that says how it died; only counted where none can be stored."""
        spec = going.spec
        ended = how if isinstance(how, str) else _exit_reason(how, run_folder(self.out, spec))
        died = RunRecord(
            spec=spec,
            status="failed",
            reason=going.cause or ended,
            history=live.rows_of(run_folder(self.out, spec)),
            seconds=time.monotonic() - going.started,
            environment={"finished": now()},
        )
        try:
            # not at once: another invocation may be looking whether it is free
            with run_lock(self.out, spec).acquire(timeout=3, poll_interval=0.02):
                state, record = self._own(going)
                if state == "damaged":
                    moved = set_aside(run_folder(self.out, spec) / RECORD)
                    self.tell(Event("damaged", spec, text=str(moved)))
                if record is None:
                    record = died
                    write_record(self.out, record)
                    live.remove(run_folder(self.out, spec))
                elif record.status in DONE:  # a process that was killed as soon as it had stored its record
                    checkpoints.remove(run_folder(self.out, spec))
        except Timeout:  # another invocation has begun this run again: its result will count
            self._wait_for(spec)
            return
        except OSError as error:
            reason = going.cause or f"{trouble(error)} ({died.reason})"
            record = self._own(going)[1] or died.model_copy(update={"reason": reason})
        self._count(record)

    def _own(self, going: _Going) -> tuple[str, RunRecord | None]:
        """The state of a run, and the record that was stored since it was started."""
        state, record = look(self.out, going.spec)
        new = state == "done" or (state == "failed" and signature(self.out, going.spec) != going.before)
        return state, record if new else None

    def _count(self, record: RunRecord) -> None:
        self.counts[record.status] += 1
        self.tell(Event("finished", record.spec, record=record))

    def _wait_for(self, spec: RunSpec) -> None:
        try:
            self.waiting.append(_Waiting(spec, Waited(run_folder(self.out, spec))))
        except OSError as error:
            self._count(RunRecord(spec=spec, status="failed", reason=trouble(error)))
            return
        self.tell(Event("waiting", spec, text=_BUSY))

    def _look_at_waiting(self) -> None:
        """Runs that another invocation was making: take its record, or the run itself where it left none.

        A look costs a few requests to the file system for each, so that many of them are looked at less often.
        """
        begun = time.monotonic()
        if begun < self.look_next:
            return
        self._look_at_each()
        self.look_next = time.monotonic() + max(_POLL, _REST * (time.monotonic() - begun))

    def _look_at_each(self) -> None:
        for _ in range(len(self.waiting)):
            each = self.waiting.popleft()
            spec = each.spec
            try:
                with each.seen.claim.acquire(timeout=0):
                    state, record = look(self.out, spec)
                    fresh = record is not None and signature(self.out, spec) != self.replaceable.get(spec.key)
            except Timeout:
                each.free = None
                self.waiting.append(each)
                continue
            except OSError as error:
                self._count(RunRecord(spec=spec, status="failed", reason=trouble(error)))
                continue
            if state == "done" or (state == "failed" and fresh):
                assert record is not None
                self._count(record)
            elif each.free is None or time.monotonic() - each.free < _GRACE:
                each.free = each.free or time.monotonic()
                self.waiting.append(each)
            else:
                self.todo.append(spec)


def _exit_reason(code: int, folder: Path) -> str:
    see = f"; see {OUTPUT}" if printed(folder / OUTPUT) else ""
    if code == 255:  # multiprocessing says the same where it can not learn the code
        return f"the process ended with exit code 255, or the fork server was killed, before the run was finished{see}"
    if code >= 0:
        return f"the process ended with exit code {code} before the run was finished{see}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
    return f"killed by {name}{memory}{see}"
