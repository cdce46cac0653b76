"""The workers of one run: W processes that train one network together, each on its part of every batch (norms.workers).

Rank 0 is the process that makes the run anyway: it alone reports, tracks, saves checkpoints, writes artifacts and
returns the record. On one machine it starts the others itself (multiprocessing's "spawn": a fork would take CUDA and
threads along); those of torchrun are there already and hear of the run (suite.torchrun). On an accelerator rank r takes
the r-th visible device.

How a run of several processes ends:

- Rank 0 ends, in whatever way: so do the others, as every process of a run does with its parent.
- Rank 0 is told to leave: the others are not (they take no such signal) until rank 0 has saved and left.
- One of the others fails: it says why in the store (suite.meeting) and ends. Its connections close, the others' next
  collective raises, and so rank 0 comes to `Crew.cause`, which finds the reason. Where rank 0 does not come to it in
  `_GRACE` seconds (NCCL waits for ever), a thread lets go of the group, and ends the process if even that is no help.

What the others print is dropped, since it is what rank 0 prints; what they say on the descriptor of standard error
(crashes, CUDA) is the run's output.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from results.escape import cut
from suite.environment import describe, set_allocator, set_threads
from suite.launch.devices import devices_of
from suite.leaving import REQUESTS
from suite.meeting import Failure, Meeting, first_cause, host_store, leave_group, pass_over, post, posted, share_state
from suite.processes import leave_with_parent
from suite.torchrun import Place, torchrun_place, workers_of

if TYPE_CHECKING:
    from torch import distributed as dist

    from norms.workers import Workers
    from results.record import RunSpec
    from suite.runner import Runner
    from tasks.journal import State

TIMEOUT = 1800.0
"""Seconds that one worker waits for another: the others wait while rank 0 writes a checkpoint."""

_POLL = 0.02  # seconds between two looks at workers that start
_LOOK = 0.25  # seconds between two looks at workers that compute
_SURE = 1.0  # seconds in which a process that was killed is seen to be, after others were heard to fail by it
_GRACE = 10.0  # seconds for rank 0 to come upon a failure by itself
_STAY = 15.0  # seconds in which rank 0 says that all is done, once torchrun has told its workers to leave


class WorkerLost(RuntimeError):
    """Another worker of this run has failed before all had met; `Crew.cause` knows how."""


@dataclass(frozen=True)
class Part:
    """The part of a run that one process has. A value that travels to it.

    Args:
        rank: of the worker, from 1.
        device: of networks and data.
        folder: for files that nobody reads.
    """

    spec: RunSpec
    runner: Runner
    meeting: Meeting
    rank: int
    device: str
    folder: Path

    def work(self, store: dist.Store) -> None:
        """Train with the others; the results are rank 0's."""
        from norms.workers import Workers
        from suite.runner import attempt
        from tasks.base import Diverged
        from tasks.journal import Journal, Unusable

        set_threads(self.runner.threads)
        _come(self.meeting, self.rank, self.device, store)
        workers = Workers(self.rank, self.meeting.size, _sync(self.spec))
        runner = replace(self.runner, device=self.device, keep_weights=False)
        while True:
            state = share_state(workers, self.device)
            try:
                journal = Journal(state, device=self.device, note=lambda text: None)
                attempt(self.spec, self.folder, lambda fraction: None, runner, journal, workers)
                return
            except Unusable as error:  # all go on to the next state
                if state is None:
                    raise
                pass_over(store, workers, error)
            except Diverged:
                return


class _Member:
    """The process of another worker, seen from the one that has started it."""

    def __init__(self, part: Part):
        self.part, self.seen = part, False
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_live, args=(part,), name=f"worker {part.rank} of {part.spec.key}")
        resource_tracker.ensure_running()  # first, since it unblocks signals
        with _signals_later():
            self.process.start()

    def look(self, store: dist.Store) -> None:
        """Leave word of a process that has ended before it could do so itself."""
        code = None if self.seen else self.process.exitcode
        if code is None:
            return
        self.seen = True
        if code and all(failure.rank != self.part.rank for failure in posted(store)):
            silent = code != -signal.SIGABRT  # which libraries raise when others have gone
            post(store, Failure(self.part.rank, _ending(code), silent=silent))

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()


class Crew:
    """All workers of a run, seen from rank 0; this one is a run that one process makes alone.

    Attributes:
        workers: with this process among them.
        device: of this process.
    """

    def __init__(self, workers: Workers, device: str):
        self.workers, self.device = workers, device

    def meet(self) -> dict[str, Any]:
        """Wait until all workers can compute; returns what the record's environment says of them: `workers`, and by
        rank `worker_hosts` and `worker_devices`; nothing of one process.

        Raises:
            WorkerLost: one has failed.
        """
        return {}

    def share(self, state: State | None) -> None:
        """Let every worker go on from a state of this process."""

    def pass_over(self, error: Exception) -> None:
        """The state that was shared last can not be used, by no worker. RuntimeError where one can."""

    def cause(self, seen: Failure) -> Failure:
        """Why a run has failed, of which this process has seen an error: its own, or what follows from another's."""
        return seen

    def close(self) -> None:
        """End all other workers."""


class _Several(Crew):
    def __init__(self, spec: RunSpec, runner: Runner, trouble: Callable[[Failure], None] | None):
        from norms.workers import Workers

        size, place = workers_of(spec), torchrun_place()
        devices = devices_of(runner.device, size if place is None else place.local_rank + 1)
        super().__init__(Workers(0, size, _sync(spec)), devices[0])
        self._trouble, self._turn, self._closing = trouble, threading.Lock(), threading.Event()
        self._members: list[_Member] = []
        self._host: Any = None  # the store itself, where it is this process's
        self._folder = Path(tempfile.mkdtemp(prefix="normsuite-workers-"))
        try:
            backend = backend_of(runner.device)
            if place is None:
                self._host, port = host_store()
                self._meeting = Meeting("127.0.0.1", port, spec.key, size, backend, TIMEOUT, local=True)
                for rank in range(1, size):
                    part = Part(spec, runner, self._meeting, rank, devices[rank], self._folder)
                    self._members.append(_Member(part))
            else:
                self._meeting = place.meeting(place.announce(spec.key), backend, TIMEOUT)
            self._store = self._meeting.store()
            self._watcher = threading.Thread(target=self._watch, name="watch workers", daemon=True)
            self._watcher.start()
        except BaseException:
            self.close()
            raise

    def meet(self) -> dict[str, Any]:
        names = [_name(rank) for rank in range(1, self.workers.size)]
        end = time.monotonic() + self._meeting.timeout
        while not self._store.check(names):
            if self._failures(self._store):
                raise WorkerLost("a worker has failed before all had met")
            if time.monotonic() > end:
                missing = [rank for rank, name in enumerate(names, 1) if not self._store.check([name])]
                raise RuntimeError(f"workers {missing} have not come in {self._meeting.timeout:g} s")
            time.sleep(_POLL)
        _come(self._meeting, 0, self.device, self._store)
        found = [self._store.get(_name(rank)).decode().split("\n") for rank in range(self.workers.size)]
        return {
            "workers": self.workers.size,
            "worker_hosts": [host for host, _ in found],
            "worker_devices": [device for _, device in found],
        }

    def share(self, state: State | None) -> None:
        share_state(self.workers, self.device, state)

    def pass_over(self, error: Exception) -> None:
        pass_over(self._store, self.workers, error)

    def cause(self, seen: Failure) -> Failure:
        post(self._store, seen)
        end = time.monotonic() + _SURE
        while True:
            found = self._failures(self._store)
            if found:
                first, sure = first_cause(found)
                if sure or time.monotonic() > end:
                    return first
            time.sleep(_POLL)

    def close(self) -> None:
        self._closing.set()
        while self._members:
            self._members.pop().end()
        leave_group()
        self._host = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _failures(self, store: dist.Store) -> list[Failure]:
        with self._turn:
            for member in self._members:
                member.look(store)
        return posted(store)

    def _watch(self) -> None:
        """End a run whose main thread does not come upon a failure by itself."""
        with contextlib.suppress(RuntimeError, ValueError):  # the run has ended, and the store or the processes with it
            store = self._meeting.store()
            while not self._failures(store):
                if self._closing.wait(_LOOK):
                    return
            if self._closing.wait(_GRACE):
                return
            # What waits in NCCL then goes on with an error.
            threading.Thread(target=leave_group, name="leave group", daemon=True).start()
            if self._closing.wait(_GRACE) or self._trouble is None:
                return
            self._trouble(first_cause(self._failures(store))[0])
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(1)


def crew_of(spec: RunSpec, runner: Runner, trouble: Callable[[Failure], None] | None = None) -> Crew:
    """Start, or call together, the workers of a run; this process is rank 0.

    Args:
        trouble: called, in a thread, with the reason before this process is ended because it hangs in a collective that
            nobody else takes part in; None: it is left hanging.

    Raises:
        ValueError: there are fewer devices than workers, or torchrun has started another number of them.
    """
    from norms.workers import ALONE

    place = torchrun_place()
    if place is not None:
        place.check([spec])
    return _Several(spec, runner, trouble) if workers_of(spec) > 1 else Crew(ALONE, runner.device)


def backend_of(device: str) -> str:
    """The backend of torch.distributed for a device."""
    return "nccl" if device.partition(":")[0] == "cuda" else "gloo"


def take_part(place: Place, runs: Sequence[RunSpec], runner: Runner) -> None:
    """What a copy of a command that torchrun has started does, of another rank than 0: its part of every run that rank
    0 begins, in a process of its own, until rank 0 has made all.

    Signals that ask to leave are rank 0's business, for `_STAY` seconds: its run saves first, and needs the others for
    as long as its step goes on.

    Args:
        runs: all of the plan, those that are done among them.

    Raises:
        ValueError: rank 0 makes a run that is not among them, or torchrun's store is gone.
        KeyboardInterrupt: a signal has told this process to leave, and rank 0 says nothing more.
    """
    known = {spec.key: spec for spec in runs}
    member: _Member | None = None
    told: list[float] = []
    before = {number: signal.signal(number, lambda *_: told.append(time.monotonic())) for number in REQUESTS}
    folder = Path(tempfile.mkdtemp(prefix="normsuite-workers-"))

    def meanwhile() -> None:
        if told and time.monotonic() - told[0] > _STAY:
            raise KeyboardInterrupt
        if member is not None and not member.seen:
            member.look(member.part.meeting.store())

    try:
        device = devices_of(runner.device, place.local_rank + 1)[place.local_rank]
        for number, key in place.announced(meanwhile):
            if member is not None:
                member.end()
            if key not in known:
                raise ValueError(
                    f"worker {place.rank} on {platform.node()}: rank 0 makes run {cut(key, 40)}, which is not planned "
                    "here; config, options, code and data must be the same on all machines"
                )
            meeting = place.meeting(number, backend_of(runner.device), TIMEOUT)
            member = _Member(Part(known[key], runner, meeting, place.rank, device, folder))
    finally:
        if member is not None:
            member.end()
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _live(part: Part) -> NoReturn:
    """The life of the process of another worker than rank 0. It does not return, as suite.worker does not."""
    code = 1
    store: dist.Store | None = None
    try:
        for number in REQUESTS:  # rank 0's business
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
        leave_with_parent()
        set_allocator()
        _be_quiet()
        store = part.meeting.store()
        part.work(store)
        code = 0
    except BaseException as error:  # noqa: BLE001 - told to rank 0
        from suite.runner import failure_of

        if store is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 has gone
                post(store, failure_of(error, part.rank))
    finally:
        os._exit(code)


def _come(meeting: Meeting, rank: int, device: str, store: dist.Store) -> None:
    """Say that a worker is here, and where; then join the others."""
    store.set(_name(rank), f"{platform.node()}\n{describe(device, 1, '')['device_name']}")
    meeting.join(rank, store, device)


def _name(rank: int) -> str:
    return f"worker {rank}"


def _sync(spec: RunSpec) -> bool:
    return bool(spec.task_options.get("sync_norms", False))


def _ending(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code} before the run was finished"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory, or killed by hand)" if name == "SIGKILL" else "")


def _be_quiet() -> None:
    """Drop what this process prints, but for crashes and what C libraries say of errors."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    sys.stdout = sys.stderr = open(nothing, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    faulthandler.enable(file=2)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """A process started inside has the signals that ask to leave blocked, until it ignores them; ours come after."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
