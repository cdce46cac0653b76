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

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from results.escape import cut, one_line
from results.record import RunSpec
from suite.environment import cpu_count
from suite.launch import code, far
from suite.launch.incoming import Incoming, News, newest
from suite.launch.launcher import Kind, LaunchError
from suite.launch.local import workers_of
from suite.launch.making import RunOne, Signature, take, trouble
from suite.launch.travelling import plain

_MISSING = 'Ray is not installed; `python -m pip install "ray[default]"` installs it, as does the extra `".[ray]"`'
_CONNECT = 10.0  # seconds for an address to answer
_PROBE = 60.0  # seconds for a node to say which code it has
_LOOK = 0.2  # seconds in the mailbox at a time: so long a request to stop waits
_RESOURCES = 2.0  # seconds between looks at what the cluster has
_QUEUED = 8
"""Runs beyond those that the cluster has room for: they wait in Ray's queue, where an autoscaler sees them."""
_FULL = 64 * 2**20  # bytes in the mailbox at which senders wait
_WAIT = 60.0  # seconds that a message may wait there
_SENT = 2 * 2**30  # bytes of the largest data set that is sent to the nodes
_PART = 32 * 2**20  # bytes of its parts


class Mailbox:
    """The messages of all runs, on their way to the command. An actor of Ray's."""

    def __init__(self) -> None:
        self._words: dict[str, far.Answer] = {}  # by the name of a run that is waited for
        self._messages: deque[tuple[str, int, str, Any]] = deque()
        self._bytes = 0
        self._came, self._went = asyncio.Event(), asyncio.Event()

    async def expect(self, name: str) -> None:
        """Messages of this run are waited for."""
        self._words[name] = ""

    async def forget(self, name: str) -> None:
        """They are no more; those that still come are answered "gone"."""
        self._words.pop(name, None)

    async def tell(self, name: str) -> None:
        """This run shall leave."""
        if name in self._words:
            self._words[name] = "leave"

    async def put(self, name: str, number: int, kind: str, value: Any) -> far.Answer:
        """A message of a run; returns what it is to do."""
        while self._bytes > _FULL and name in self._words:
            self._went.clear()
            await self._went.wait()
        if name not in self._words:
            return "gone"
        self._messages.append((name, number, kind, value))
        self._bytes += _size(value)
        self._came.set()
        return self._words[name]

    async def take(self, seconds: float) -> list[tuple[str, int, str, Any]]:
        """All messages that came, or the first ones that come in so many seconds."""
        if not self._messages and seconds > 0:
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), seconds)
        taken, self._messages, self._bytes = list(self._messages), deque(), 0
        self._went.set()
        return taken


def _size(value: Any) -> int:
    return len(value["data"]) if isinstance(value, dict) and "data" in value else 0


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

    at_once = False
    """Whether a run that is started begins at once: a task may wait for its node."""

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
        self._mailbox: Any = None
        self._task: Any = None
        self._ours = False  # the connection: ours to end
        self._nodes: tuple[float, list[Mapping[str, float]]] = (-math.inf, [])
        self._sets: dict[str, dict[str, Any]] = {}  # data sets that were sent, by their folders
        self._said: set[str] = set()
        self._staged: Path | None = None

    # Connection

    def open(self, run_one: RunOne, out: Path) -> None:
        """See suite.launch.launcher.Launcher, as for all methods here."""
        if importlib.util.find_spec("ray") is None:
            raise LaunchError(_MISSING)
        try:
            self._run_one = plain(run_one)
        except ValueError as error:
            raise LaunchError(str(error)) from error
        self._runner, self._out = run_one, out.absolute()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if not ray.is_initialized():
            with _signals_kept():
                self._connect()
            self._ours = True
        try:
            self._code = code.here()
            self._compare_code()
            here = _on(ray.get_runtime_context().get_node_id())
            actor = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=100_000, scheduling_strategy=here)
            self._mailbox = actor.remote()
            ray.get(self._mailbox.take.remote(0), timeout=_PROBE)
            self._task = ray.remote(max_retries=0, max_calls=0)(run_there)
        except LaunchError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise LaunchError(f"Ray: {_why(error)}") from error

    def _connect(self) -> None:
        import ray

        address = self.address or os.environ.get("RAY_ADDRESS") or None
        told: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if self.ship:
            self._staged = Path(tempfile.mkdtemp(prefix="normsuite-code-"))
            code.copy_to(self._staged)
            told["runtime_env"] = {"working_dir": str(self._staged)}
        if address not in (None, "auto", "local"):
            _check_answers(address)
        try:
            try:
                ray.init(address=address or "auto", **told)
            except ConnectionError:
                if address is not None:
                    raise
                ray.init(address="local", num_cpus=cpu_count(), include_dashboard=False, **told)
        except (Exception, SystemExit) as error:  # its own process is asked to end where the cluster does not answer
            self._unstage()
            where = f'Ray at "{cut(address, 80)}"' if address else "Ray"
            raise LaunchError(f"{where}: {_why(error)}") from error

    def _compare_code(self) -> None:
        """Raises LaunchError where a node has other code than this command."""
        import ray

        def probe(fingerprint: str) -> dict[str, str]:  # by its text: the nodes need not have this module
            import platform

            try:
                from suite.launch import code

                return code.here()
            except Exception as error:  # noqa: BLE001 - whatever is there in its place
                return {"host": platform.node(), "trouble": f"{type(error).__name__}: {error}"}

        asked = ray.remote(num_cpus=0, max_retries=0)(probe)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
        replies = {
            asked.options(scheduling_strategy=_on(node["NodeID"])).remote(self._code["fingerprint"]): node
            for node in nodes
        }
        ready, _ = ray.wait(list(replies), num_returns=len(replies), timeout=_PROBE) if replies else ([], [])
        lines = []
        for reply in ready:
            try:
                found = ray.get(reply)
            except Exception as error:  # noqa: BLE001 - a node that went away meanwhile is nobody's mistake
                if not isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.RuntimeEnvSetupError):
                    continue
                found = {"host": replies[reply]["NodeManagerAddress"], "trouble": _why(error)}
            if "trouble" in found:
                lines.append(f"node {found['host']} can not import NormSuite ({cut(one_line(found['trouble']), 200)})")
            elif found["fingerprint"] != self._code["fingerprint"]:
                lines.append(f"node {found['host']} has other code: {code.in_words(found)}")
        if lines:
            more = f" (and {len(lines) - 1} more nodes)" if len(lines) > 1 else ""
            raise LaunchError(
                f"{lines[0]}{more}; here it is {code.in_words(self._code)}; give the nodes the same checkout, or send "
                "it with --on ray:code=ship"
            )

    def close(self) -> None:
        if importlib.util.find_spec("ray") is None:
            return
        import ray

        for run in list(self._going.values()):
            self._cancel(run)
            if run.incoming is not None:
                for _ in run.incoming.lost(-signal.SIGKILL):
                    pass
        self._going.clear()
        self._sets.clear()
        if self._mailbox is not None:
            with contextlib.suppress(Exception):
                ray.kill(self._mailbox)
            self._mailbox = None
        if self._ours:
            self._ours = False
            ray.shutdown()
        self._unstage()

    def _unstage(self) -> None:
        if self._staged is not None:
            shutil.rmtree(self._staged, ignore_errors=True)
            self._staged = None

    # Runs

    def room(self, spec: RunSpec) -> bool:
        if self.jobs is not None:
            return len(self._going) < self.jobs
        needs = self._needs(spec)
        at_once = sum(_fitting(node, needs) for node in self._resources())
        return len(self._going) < at_once + _QUEUED

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
            raise LaunchError(f"Ray: {_why(error)}") from error
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
        checkpoint = newest(self._out / "runs" / spec.task / spec.norm / spec.key, spec.key)
        return {
            "name": run.name,
            "spec": spec.model_dump(mode="json"),
            "run_one": self._run_one,
            "code": self._code,
            "gpus": self._needs(spec)["GPU"],
            "checkpoint": None if checkpoint is None else checkpoint.read_bytes(),
            "data": self._data(spec),
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
                raise LaunchError(f"the connection to Ray was lost: {_why(error)}") from error
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

    def _resources(self) -> list[Mapping[str, float]]:
        """What each node has in all."""
        import ray

        at, nodes = self._nodes
        if time.monotonic() - at >= _RESOURCES:
            with contextlib.suppress(ray.exceptions.RayError):
                nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._nodes = (time.monotonic(), nodes)
        return nodes

    def _short_of(self, spec: RunSpec) -> Iterator[News]:
        """A line, once, where no node of the cluster as it is could make such a run."""
        needs = self._needs(spec)
        if not any(_fitting(node, needs) for node in self._resources()):
            asked = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            line = f"no node of the Ray cluster has {asked}, which one run asks for; it waits until one comes"
            if line not in self._said:
                self._said.add(line)
                yield "note", line

    # Data

    def _data(self, spec: RunSpec) -> dict[str, Any]:
        """Where a node finds the prepared data sets of a run; sent once, to the cluster."""
        if "runner" not in self._run_one:
            return {"data_dir": "", "sets": {}}
        from suite.launch.sets import sets_of

        here = Path(self._run_one["runner"]["data_dir"])
        sets = {}
        for name in sets_of(spec, self._runner):
            manifest = (here / name / "manifest.json").read_bytes()
            known = self._sets.get(name)
            if known is None or known["manifest"] != manifest:
                known = self._sets[name] = {"manifest": manifest, **self._sent(here / name, manifest)}
            sets[name] = known
        return {"data_dir": self.data_dir or str(here), "sets": sets}

    def _sent(self, folder: Path, manifest: bytes) -> dict[str, Any]:
        """The files of a data set in the cluster's memory: references to their parts by name, or None and why."""
        import ray

        names = ["manifest.json", *json.loads(manifest)["files"]]
        size = sum((folder / name).stat().st_size for name in names)
        if "index.json" in names:
            return {"files": None, "why": "its images are files that are not sent: prepare it on the nodes"}
        if size > _SENT:
            return {"files": None, "why": f"has {size / 2**30:.1f} GiB, too much to be sent: prepare it on the nodes"}

        def parts(file: Path) -> list[Any]:
            with file.open("rb") as stream:
                return [ray.put(part) for part in iter(lambda: stream.read(_PART), b"")]

        return {"files": {name: parts(folder / name) for name in names}, "why": ""}


def _end_of(task: Any) -> int | str:
    """How a task has ended whose run has not told its end."""
    import ray

    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:  # of suite.launch.far itself
        return f"its task failed: {_why(error)}"
    except ray.exceptions.RayError as error:
        return f"lost with its node or its task: {_why(error)}"
    except Exception as error:  # noqa: BLE001 - of reading what came back
        return f"its task failed: {_why(error)}"
    return "its last message was lost"


def _why(error: BaseException) -> str:
    """Ray's words in one short line: the first one that says something, and its kind."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return _why(cause)
    words = " ".join(str(error).split()).split(". ")[0]
    return cut(one_line(f"{type(error).__name__}: {words}" if words else type(error).__name__), 300)


def _fitting(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many runs with such needs a node has room for."""
    return int(min((node.get(name, 0) / amount for name, amount in needs.items() if amount), default=0))


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _check_answers(address: str) -> None:
    """LaunchError where nobody listens: Ray itself tries for minutes, and ends the process then."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise LaunchError(f'Ray at "{cut(address, 80)}": HOST:PORT is needed, such as 10.0.0.1:6379, or auto')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except OSError as error:
        raise LaunchError(f'Ray at "{cut(address, 80)}": nobody answers ({error.strerror or error})') from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself where it connects; ours means to save and to leave."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
