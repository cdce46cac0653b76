"""The few calls of Ray that suite.launch.ray makes, answered by threads of this process."""

import asyncio
import concurrent.futures
import contextlib
import importlib.machinery
import sys
import threading
import types

from results.record import RunRecord


def make_ok(spec, folder, report):
    """A RunOne that others import by its name."""
    print("said by the run", flush=True)
    (folder / "weights.pt").write_bytes(b"w" * 10)
    report(1.0)
    return RunRecord(spec=spec, status="ok", metrics={"top1": 0.5}, artifacts=["weights.pt"])


class FakeRay(types.ModuleType):
    """A cluster of nodes with one CPU each.

    Attributes:
        script: makes a run: called with the job and a function that sends a message and gives its answer.
        tasks: how many runs were sent.
        code: what a node answers when it is asked for its code; None: the truth.
        cancelled: set when a task was ended by force.
    """

    def __init__(self, nodes):
        super().__init__("ray")
        self.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        self.script, self.tasks, self.code = None, 0, None
        self.cancelled, self.up = threading.Event(), False
        self._nodes = [
            {"Alive": True, "NodeID": str(number), "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 1.0}}
            for number in range(nodes)
        ]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._pool = concurrent.futures.ThreadPoolExecutor(32)
        self.exceptions = types.ModuleType("ray.exceptions")
        self.exceptions.RayError = type("RayError", (Exception,), {})
        for name in (
            "NodeDiedError",
            "WorkerCrashedError",
            "RayTaskError",
            "RuntimeEnvSetupError",
            "TaskCancelledError",
        ):
            setattr(self.exceptions, name, type(name, (self.exceptions.RayError,), {}))

    def install(self, monkeypatch, answers=True):
        """Stand in for ray in this process; the address need not be anybody's."""
        from suite.launch import cluster

        strategies = types.ModuleType("ray.util.scheduling_strategies")
        strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node
        for name, module in {
            "ray": self,
            "ray.exceptions": self.exceptions,
            "ray.util": types.ModuleType("ray.util"),
            "ray.util.scheduling_strategies": strategies,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)
        if answers:
            monkeypatch.setattr(cluster, "check_answers", lambda address: None)

    def stop(self):
        self.cancelled.set()
        self._pool.shutdown(wait=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        # calls that nobody waited for, as of an actor that ends: else they are complained of when they are collected
        self._loop.run_until_complete(asyncio.sleep(0))
        if left := asyncio.all_tasks(self._loop):
            self._loop.run_until_complete(asyncio.wait(left, timeout=1))
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    # Ray's

    def init(self, **given):
        self.up = True

    def shutdown(self):
        self.up = False

    def is_initialized(self):
        return self.up

    def nodes(self):
        return self._nodes

    def get_runtime_context(self):
        return types.SimpleNamespace(get_node_id=lambda: "0")

    def put(self, value):
        done = concurrent.futures.Future()
        done.set_result(value)
        return done

    def get(self, reference, timeout=None):
        return reference.result(timeout)

    def wait(self, references, num_returns=1, timeout=None):
        done, left = concurrent.futures.wait(references, timeout=timeout)
        return [each for each in references if each in done], [each for each in references if each in left]

    def cancel(self, reference, force=False):
        self.cancelled.set()

    def kill(self, actor):
        actor.stop()

    def remote(self, *given, **options):
        if not given:
            return lambda what: self.remote(what)
        (what,) = given
        return _Actors(self, what) if isinstance(what, type) else _Task(self, what)


class _Task:
    def __init__(self, fake, function):
        self.fake, self.function = fake, function

    def options(self, **given):
        return self

    def remote(self, *given):
        if self.function.__name__ == "probe":
            return self.fake.put(self.fake.code or self.function(*given))
        job, mailbox = given
        self.fake.tasks += 1

        def send(number, kind, value):
            return mailbox.put.remote(job["name"], number, kind, value).result(10)

        return self.fake._pool.submit(self.fake.script, job, send)


class _Actors:
    def __init__(self, fake, kind):
        self.fake, self.kind = fake, kind

    def options(self, **given):
        return self

    def remote(self):
        return _Actor(self.fake, self.kind)


class _Actor:
    def __init__(self, fake, kind):
        async def made():
            return kind()

        self._fake = fake
        self._made = asyncio.run_coroutine_threadsafe(made(), fake._loop).result()

    def __getattr__(self, name):
        method = getattr(self._made, name)
        call = types.SimpleNamespace()
        call.remote = lambda *given: asyncio.run_coroutine_threadsafe(method(*given), self._fake._loop)
        return call

    def stop(self):
        with contextlib.suppress(RuntimeError):
            self._fake._loop.call_soon_threadsafe(lambda: None)
