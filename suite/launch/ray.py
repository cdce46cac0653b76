"""Runs on a Ray cluster: a task each. Nothing is shared between its nodes and this command: the spec goes out, and
what comes back is written here, under the run's claim (suite.launch.incoming).

A task makes its run in a process of its own below it, as on any machine (suite.launch.far): a fork of a server that has
imported torch once on each node. So `max_calls=1`, a fresh process of Ray's for every task, is not needed, and would
cost a second and the import of torch each time; and a run that kills its process is told from one that is lost with
its node: the first is the run's own failure, the second goes on elsewhere from its last checkpoint. `max_retries=0`:
the engine counts how often.

Messages go through one actor, the mailbox, on the node of this command. A message is answered once it has arrived, so
a node that dies takes none with it that was, and the answer says whether the run shall leave.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from results.escape import one_line
from results.record import RunSpec
from results.store import run_folder
from suite.launch import far
from suite.launch.cluster import Cluster, check_installed, on_node, why
from suite.launch.incoming import Incoming, News, newest
from suite.launch.launcher import Kind, LaunchError
from suite.launch.mailbox import Mailbox
from suite.launch.making import RunOne, Signature, take, trouble
from suite.launch.sets import Sets
from suite.launch.travelling import plain
from suite.runner import Runner
from suite.torchrun import workers_of

_LOOK = 0.2  # seconds in the mailbox at a time: so long a request to stop waits
_QUEUED = 8
"""Runs beyond those that the cluster has room for: they wait in Ray's queue, where an autoscaler sees them."""
_WAIT = 60.0  # seconds that a message may wait there


def run_there(job: dict[str, Any], mailbox: Any) -> None:
    """The task of a run: executed on a node."""
    import ray

    def post(number: int, kind: str, value: Any) -> far.Answer:
        answer: far.Answer = ray.get(mailbox.put.remote(job["name"], number, kind, value), timeout=_WAIT)
        return answer

    def fetch(part: Any) -> bytes:
        content: bytes = ray.get(part)
        return content

    far.make(job, post, fetch)


@dataclass(eq=False)
class RayRun:
    """A run's task.

    Args:
        name: of this try, in messages.
        task: its reference.
        incoming: what came back so far; None: the run is not made.
        news: not told yet.
    """

    spec: RunSpec
    name: str
    task: Any = None
    incoming: Incoming | None = None
    news: deque[News] = field(default_factory=deque)
    told: bool = False


class RayLauncher:
    """See the module.

    Args:
        address: of the cluster, as ray.init has it; None: the one that RAY_ADDRESS or this machine names, else a new
            one on this machine.
        cpus, gpus: of each worker of a run; parts are allowed.
        memory: bytes of each worker; None: not counted.
        jobs: runs at a time; None: as many as the cluster has room for, and a few in its queue.
        data_dir: of prepared data sets on the nodes; None: as here.
        ship: send the code to the nodes, in the place of comparing what is there.
    """

    at_once = False  # a task may wait for its node

    def __init__(
        self,
        address: str | None = None,
        *,
        cpus: float = 1,
        gpus: float = 0,
        memory: int | None = None,
        jobs: int | None = None,
        data_dir: str | None = None,
        ship: bool = False,
    ):
        self.address, self.cpus, self.gpus, self.memory, self.jobs = address, cpus, gpus, memory, jobs
        self.data_dir, self.ship = data_dir, ship
        self._going: dict[str, RayRun] = {}
        self._cluster: Cluster | None = None
        self._mailbox: Any = None
        self._task: Any = None
        self._sets: Sets | None = None
        self._said: set[str] = set()

    def open(self, run_one: RunOne, out: Path) -> None:
        """See suite.launch.launcher.Launcher, as for all methods here."""
        check_installed()
        try:
            self._run_one, self._out = plain(run_one), out.absolute()
        except ValueError as error:
            raise LaunchError(str(error)) from error
        import ray

        self._cluster = Cluster(self.address, self.ship)
        try:
            here = on_node(ray.get_runtime_context().get_node_id())
            actor = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=100_000, scheduling_strategy=here)
            self._mailbox = actor.remote()
            ray.get(self._mailbox.take.remote(0), timeout=_WAIT)
            self._task = ray.remote(max_retries=0, max_calls=0)(run_there)
        except ray.exceptions.RayError as error:
            self.close()
            raise LaunchError(f"Ray: {why(error)}") from error
        if isinstance(run_one, Runner):
            self._sets = Sets(run_one, self.data_dir, ray.put)

    def close(self) -> None:
        if self._cluster is None:
            return
        import ray

        for run in list(self._going.values()):
            self._cancel(run)
            if run.incoming is not None:
                list(run.incoming.lost(-signal.SIGKILL))
        self._going.clear()
        self._sets = None
        if self._mailbox is not None:
            with contextlib.suppress(Exception):
                ray.kill(self._mailbox)
            self._mailbox = None
        self._cluster.close()
        self._cluster = None

    def room(self, spec: RunSpec) -> bool:
        if self.jobs is not None:
            return len(self._going) < self.jobs
        needs = self._needs(spec)
        return len(self._going) < self._at_once(needs) + _QUEUED

    def start(self, spec: RunSpec, before: Signature | None) -> RayRun:
        import ray

        run = RayRun(spec, f"{spec.key}-{secrets.token_hex(4)}")
        self._going[run.name] = run
        began: list[News] = []
        try:
            claim = take(self._out, spec, before, lambda kind, value: began.append((kind, value)))
        except OSError as error:
            run.news.extend([("trouble", trouble(error)), ("ended", 1)])
            return run
        run.news.extend(each for each in began if each[0] != "started")  # that is said where it is made
        if claim is None:
            run.news.append(("ended", 0))
            return run
        run.incoming = Incoming(self._out, spec, claim)
        try:
            run.news.extend(self._short_of(spec))
            job = self._job(run, spec)
            ray.get(self._mailbox.expect.remote(run.name), timeout=_WAIT)
            needs = self._needs(spec)
            options: dict[str, Any] = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "name": f"run {spec.key}"}
            if needs["memory"]:
                options["memory"] = int(needs["memory"])
            run.task = self._task.options(**options).remote(job, self._mailbox)
        except (OSError, ValueError) as error:  # of the data, of the checkpoint
            run.news.append(("trouble", trouble(error) if isinstance(error, OSError) else one_line(str(error))))
            run.news.extend(run.incoming.lost(1))
        except ray.exceptions.RayError as error:
            run.news.extend(run.incoming.lost(1))
            raise LaunchError(f"Ray: {why(error)}") from error
        return run

    def _job(self, run: RayRun, spec: RunSpec) -> dict[str, Any]:
        """What a node is told: plain values, and references to the parts of data sets.

        Keys:
            name: of this try.
            spec: as JSON has it.
            run_one: suite.launch.travelling.plain.
            code: suite.launch.code.here.
            gpus: given to the task.
            checkpoint: bytes to go on from, or None.
            data: suite.launch.far.placed.
        """
        assert self._cluster is not None
        checkpoint = newest(run_folder(self._out, spec), spec.key)
        return {
            "name": run.name,
            "spec": spec.model_dump(mode="json"),
            "run_one": self._run_one,
            "code": self._cluster.code,
            "gpus": self._needs(spec)["GPU"],
            "checkpoint": None if checkpoint is None else checkpoint.read_bytes(),
            "data": {"data_dir": "", "sets": {}} if self._sets is None else self._sets.of(spec),
        }

    def news(
        self, runs: Sequence[RayRun], seconds: float, wake: Sequence[Connection]
    ) -> Iterator[tuple[RayRun, Kind, Any]]:
        import ray

        end, said = time.monotonic() + seconds, False
        while True:
            for run in list(self._going.values()):
                for kind, value in self._told(run):
                    said = True
                    yield run, kind, value
            if said or any(each.poll() for each in wake) or not self._going:
                return
            left = end - time.monotonic()
            try:
                self._take(min(_LOOK, max(0.0, left)))
                tasks = {run.task: run for run in self._going.values() if run.task is not None}
                done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0) if tasks else ([], [])
                if done:
                    self._take(0)  # what a task said before it ended has arrived by now
            except ray.exceptions.RayError as error:
                raise LaunchError(f"the connection to Ray was lost: {why(error)}") from error
            for task in done:
                run = tasks[task]
                run.task = None
                if run.incoming is not None:
                    run.news.extend(run.incoming.lost(_end_of(task)))
            if left <= 0 and not any(run.news for run in self._going.values()):
                return

    def _take(self, seconds: float) -> None:
        """Hand the messages that came to their runs."""
        import ray

        for name, number, kind, value in ray.get(self._mailbox.take.remote(seconds), timeout=_WAIT):
            run = self._going.get(name)
            if run is not None and run.incoming is not None:
                run.news.extend(run.incoming.hear(number, kind, value))

    def _told(self, run: RayRun) -> Iterator[News]:
        while run.news:
            kind, value = run.news.popleft()
            if kind == "ended":
                self._going.pop(run.name, None)
                run.task = None  # Ray keeps what nobody refers to no more
                self._mailbox.forget.remote(run.name)
            yield kind, value

    def leave(self, run: RayRun) -> None:
        if not run.told and run.name in self._going:
            run.told = True
            self._mailbox.tell.remote(run.name)

    def kill(self, run: RayRun) -> None:
        self._cancel(run)
        if run.incoming is not None:
            run.news.extend(run.incoming.lost(-signal.SIGKILL))

    def _cancel(self, run: RayRun) -> None:
        import ray

        if run.task is not None:
            with contextlib.suppress(Exception):
                ray.cancel(run.task, force=True)
        if self._mailbox is not None:
            with contextlib.suppress(Exception):
                self._mailbox.forget.remote(run.name)

    # Resources

    def _needs(self, spec: RunSpec) -> dict[str, float]:
        """Of a whole run, all of whose workers are on one node."""
        workers = workers_of(spec)
        return {"CPU": workers * self.cpus, "GPU": workers * self.gpus, "memory": workers * (self.memory or 0)}

    def _at_once(self, needs: Mapping[str, float]) -> int:
        """How many runs with such needs the cluster has room for."""
        assert self._cluster is not None
        return sum(_fitting(node, needs) for node in self._cluster.nodes())

    def _short_of(self, spec: RunSpec) -> Iterator[News]:
        """A line, once, where no node of the cluster as it is could make such a run."""
        needs = self._needs(spec)
        if not self._at_once(needs):
            asked = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            line = f"no node of the Ray cluster has {asked}, which one run asks for; it waits until one comes"
            if line not in self._said:
                self._said.add(line)
                yield "note", line


def _end_of(task: Any) -> int | str:
    """How a task has ended whose run has not told its end."""
    import ray

    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:  # of suite.launch.far itself
        return f"its task failed: {why(error)}"
    except ray.exceptions.RayError as error:
        return f"lost with its node or its task: {why(error)}"
    except Exception as error:  # noqa: BLE001 - of reading what came back
        return f"its task failed: {why(error)}"
    return "its last message was lost"


def _fitting(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many runs with such needs a node has room for."""
    return int(min((node.get(name, 0) / amount for name, amount in needs.items() if amount), default=0))
