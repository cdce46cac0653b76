"""Tries norms while planning: a process of its own asks the task whether a norm can serve (tasks.admission).

A layer is a user's code. While planning it may end its process, crash, hang, eat the machine, change folders, settings
or the environment: all that stays in a forked child, which answers one question after the other. Each set of plugins
has its own, so that none can change another's answers, and the suite's own norms are never asked beside a plugin's.

Forking needs Linux: elsewhere (macOS, Windows) threads of system libraries may not survive it, and questions are
answered in this process, where only `sys.exit` is held.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from norms import plugins
from norms.registry import make_norm, norm_info
from results.record import RunSpec, dataset_of
from suite.forked import ending, fork, stop
from tasks import get_task
from tasks.options import Options, named_parts

SECONDS = 60.0
"""What one trial may take; less where a run may take less, but never so little that torch's compiler can not load."""
LEAST_SECONDS = 10.0
IMPORT_SECONDS = 180.0
"""What the import of a plugin may take; large libraries on a network's disk take their time."""
LOST_SECONDS = 180.0
"""After so much time in trials that had to be stopped, no further norm is tried."""
ALL_SECONDS = 600.0
"""The same of all trials together: a grid over options of norms can ask for 100,000 of some milliseconds each."""
MEMORY = 4 * 2**30
"""Bytes that a trial may take beside what the planning process holds."""
LONGEST = 1000
"""Letters of a reason that are kept."""

Answer = tuple[str | None, str]
"""Why the norm can not serve, or None; and what ended the trial, or ""."""


def trial_seconds(timeout: float | None) -> float:
    """The time limit of one trial, in seconds, where a run may take `timeout` seconds (None: no limit)."""
    return SECONDS if timeout is None else min(SECONDS, max(LEAST_SECONDS, timeout))


class Trials:
    """Asks tasks whether norms can serve. A context: the processes are gone after it.

    A trial that ends, crashes or is stopped decides nothing: its run stays planned, and says why in its own process.

    Args:
        seconds: what one trial may take.
        memory: bytes that one may take.

    Attributes:
        notes: one line for each norm and task whose trial had no end of its own.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY):
        self.seconds, self.memory = seconds, memory
        self.notes: list[str] = []
        self._children: dict[frozenset[Path], _Child] = {}
        self._given_up: set[tuple[str, str]] = set()  # (task, norm) that are not tried again
        self._lost = self._taken = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children.values():
            child.end()
        self._children.clear()

    def why_not(self, spec: RunSpec, options: Options) -> str | None:
        """The task's reason why this norm can not serve with these options (of the task, as they are here), or None."""
        label = spec.norm_label or spec.norm
        if (spec.task, label) in self._given_up or self._lost > LOST_SECONDS or self._taken > ALL_SECONDS:
            return None
        start = time.monotonic()
        reason, ended = self._ask(spec, options.model_dump(mode="json"))
        taken = time.monotonic() - start
        self._taken += taken
        if self._taken > ALL_SECONDS:
            self._note(f"trying norms took {self._taken:.0f} s: those that are left are planned untried")
        if ended:
            memory = ended == _memory_words(self.memory)  # another setting of this norm may need less
            self._given_up |= set() if memory else {(spec.task, label)}
            self._lost += taken
            self._note(f'norm "{label}" in {spec.task}: {ended} while it was tried; its runs will say why')
            if self._lost > LOST_SECONDS:
                self._note(f"{self._lost:.0f} s went into such trials: the norms that are left are planned untried")
        return reason

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _ask(self, spec: RunSpec, options: dict[str, Any]) -> Answer:
        if sys.platform != "linux":
            return self._ask_here(spec, options)
        own = frozenset(plugin.file for key in asked_for(spec) if (plugin := plugins.plugin_of(*key)) is not None)
        child = self._children.get(own)
        if child is None:
            try:
                child = self._children[own] = _Child(self.memory, [each.questions for each in self._children.values()])
            except OSError:  # no process to be had
                return self._ask_here(spec, options)
        answer, ended = child.ask(spec, options, self.seconds)
        if answer is None:
            del self._children[own]
            return None, ended
        return answer

    def _ask_here(self, spec: RunSpec, options: dict[str, Any]) -> Answer:
        with surroundings_kept():
            return _answer(spec, options, self.memory)


def survives(action: Callable[[], object], seconds: float = IMPORT_SECONDS) -> str:
    """Try an action in another process; returns how that process died, "" where the action ended or raised.

    Only on Linux; elsewhere always "".
    """
    if sys.platform != "linux":
        return ""
    ours, theirs = Pipe()
    child = fork(lambda: _once(action, ours, theirs, seconds))
    theirs.close()
    try:
        if not ours.poll(seconds):
            return f"took more than {seconds:g} s"
        ours.recv()
        return ""
    except (EOFError, OSError):
        return ending(child)
    finally:
        stop(child)
        ours.close()


@contextlib.contextmanager
def surroundings_kept() -> Iterator[None]:
    """Undo what user code changes inside the block: folder, environment, sys.path, streams, signals, torch's settings.

    The processes of runs take over some of it, and a plugin is not to reach further than its own runs.
    """
    import torch

    folder, environment, path, streams = os.getcwd(), dict(os.environ), list(sys.path), (sys.stdout, sys.stderr)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    dtype, gradients, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    generators = torch.random.get_rng_state()
    try:
        yield
    finally:
        os.chdir(folder)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.path[:] = path
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.random.set_rng_state(generators)


class _Child:
    """A forked process that answers questions, one at a time."""

    def __init__(self, memory: int, others: list[Connection]):
        self.questions, theirs = Pipe()
        ours = [self.questions, *others]  # a child that held them would keep its siblings from seeing their end
        self.process = fork(lambda: _serve(theirs, ours, memory))
        theirs.close()

    def ask(self, spec: RunSpec, options: dict[str, Any], seconds: float) -> tuple[Answer | None, str]:
        """The answer, or None and how the process ended."""
        try:
            self.questions.send((spec, options, seconds))
            if self.questions.poll(seconds):
                return self.questions.recv(), ""
            ended = f"took more than {seconds:g} s"
        except (EOFError, OSError):
            ended = ending(self.process)
        self.end()
        return None, ended

    def end(self) -> None:
        stop(self.process)
        self.questions.close()


def _serve(questions: Connection, others: list[Connection], memory: int) -> None:
    import torch

    for other in others:
        other.close()
    _limit_memory(memory)
    torch.set_num_threads(1)  # a pool of threads does not survive the fork
    while True:
        try:
            spec, options, seconds = questions.recv()
        except EOFError:
            return
        _end_after(seconds)
        with surroundings_kept():
            answer = _answer(spec, options, memory)
        signal.alarm(0)
        questions.send(answer)


def _end_after(seconds: float) -> None:
    """End this process, whatever it does, where the parent that limits it was killed."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(seconds) + 5)


def _answer(spec: RunSpec, options: dict[str, Any], memory: int) -> Answer:
    try:
        task = get_task(spec.task)
        norm, chosen = make_norm(spec.norm, **spec.norm_options), task.options.model_validate(options)
        reason = task.why_not(norm, norm_info(spec.norm), chosen)
        return None if reason is None else str(reason)[:LONGEST], ""
    except MemoryError:
        return None, _memory_words(memory)
    except Exception:  # noqa: BLE001 - a layer that breaks is no reason to stop a grid: its run fails and says why
        return None, ""
    except SystemExit as error:
        return None, f"sys.exit({error.code if isinstance(error.code, int) else ''}) was called"


def asked_for(spec: RunSpec) -> Iterator[tuple[str, str]]:
    """(kind, name) of everything in a run that a plugin, or a program, may have registered."""
    yield from (("norm", spec.norm), ("task", spec.task), ("dataset", dataset_of(spec)))
    yield from (("norm", name) for name, _ in spec.further_norms.values())
    yield from ((kind, name) for _, kind, name in named_parts(spec.task_options))


def _memory_words(memory: int) -> str:
    return f"more than {memory / 2**30:g} GiB of memory were needed"


def _once(action: Callable[[], object], ours: Connection, theirs: Connection, seconds: float) -> None:
    ours.close()
    _end_after(seconds)
    with contextlib.suppress(Exception, SystemExit):
        action()
    theirs.send(None)


def _limit_memory(memory: int) -> None:
    """At most `memory` bytes more of private memory than now: an allocation beyond it fails (MemoryError)."""
    import resource

    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    held = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")), None)
    if held is not None:
        limit, hard = held * 1024 + memory, resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
