"""Runs of a task under check: small, watched, and stopped at any place."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from norms.factory import NormFactory
from norms.protocol import NormInfo
from tasks.base import Diverged, Outcome, RunContext, Task
from tasks.journal import Interrupted, Journal, Position, Row, State

TIMED = ("seconds", "_memory_mb")
"""Endings of the names of metrics and columns that may differ between equal runs."""
Stop = tuple[Any, ...]


class Stopped(Journal):
    """A journal that keeps its states in memory, and tells its run to leave at the given places, each once.

    Args:
        state: to go on from.
        stops: in the order in which the run comes to them, emptied while it does: ("step", n): before the update after
            the n-th; ("part", name, n): once n items of `each` of this name are done; ("evaluation", n, k): after n
            updates, in the k-th forward of a norm in evaluation mode that this process makes since its last update, as
            a signal comes (`Subject.run` tells of these).

    Attributes:
        stored: the state that the run goes on from, once it has left; at first the given one.
        ends: updates at the end of every epoch that this process finished.
        items: (name, number, updates so far) of every item of `each` that it finished.
    """

    def __init__(self, state: State | None = None, stops: list[Stop] | None = None):
        self.stops: list[Stop] = [] if stops is None else stops
        self.stored = state  # told to leave before there is a newer one, it stands where it stood
        self.ends: list[int] = []
        self.items: list[tuple[str, int, int]] = []
        super().__init__(state, save=self._keep)

    def _keep(self, state: State, position: Position) -> None:
        self.stored = reread(state)

    @property
    def due(self) -> bool:
        if self.stops and not self.leaving and self._reached(*self.stops[0]):
            self.stops.pop(0)
            self.leaving = True
        return self.leaving

    def _reached(self, kind: str, *where: Any) -> bool:
        if kind == "step":
            return self.steps_done >= where[0]
        if kind == "part":
            name, done = where
            return len(self._state["results"].get(name, {"found": ()})["found"]) >= done
        return False

    def evaluated(self, forwards: int) -> None:
        """Told of every forward in evaluation mode, from inside of it: how many there were since the last update."""
        if self.stops and self.stops[0][0] == "evaluation":
            _, steps, least = self.stops[0]
            if self.steps_done >= steps and forwards >= least:
                self.stops.pop(0)
                self.leave()

    def at(self, position: Position, row: Row | None = None) -> None:
        if row is not None:
            self.ends.append(self.steps_done)
        super().at(position, row)

    def each(self, name: str, items: Any, measure: Callable[[Any], Any]) -> list[Any]:
        def finished(numbered: tuple[int, Any]) -> Any:
            result = measure(numbered[1])
            self.items.append((name, numbered[0], self.steps_done))
            return result

        return super().each(name, enumerate(items, 1), finished)


def reread(state: State) -> State:
    """A state as another process reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: State = torch.load(file, weights_only=True)
    return found


@dataclass
class Made:
    """The result of a run, or of the processes that made it in turn.

    Attributes:
        outcome: None where it diverged or left.
        diverged: the error of a run that diverged.
        journal: of the last process.
        updates: steps of optimizers, in all processes.
        processes: the number of processes.
        files: artifact -> content.
        reports: finished fractions, in order.
        evaluations: forwards of norms in evaluation mode since the last update, in the last process.
        strays: files written outside the run's folder.
    """

    journal: Stopped
    outcome: Outcome | None = None
    diverged: Diverged | None = None
    updates: int = 0
    processes: int = 1
    files: dict[str, bytes] = field(default_factory=dict)
    reports: list[float] = field(default_factory=list)
    evaluations: int = 0
    strays: list[str] = field(default_factory=list)

    @property
    def ok(self) -> Outcome:
        if self.outcome is None:
            raise self.diverged or AssertionError("the run left")
        return self.outcome


class TooLong(ValueError):
    """A run takes longer than a check may."""


@dataclass(frozen=True)
class Subject:
    """A task with the options, the norm and the data that it is run with.

    Attributes:
        kind: of the planted data; "": the task reads data of its own.
        data_dir: folder of its data.
        folder: for everything that runs write.
        limit: seconds of one run.
    """

    task: Task
    norm: NormFactory
    info: NormInfo
    options: Any
    kind: str
    data_dir: Path
    folder: Path
    limit: float

    @functools.cached_property
    def whole(self) -> Made:
        """The run that all others are compared with."""
        return self.run()

    @functools.cached_property
    def again(self) -> Made:
        """The same under other global generators."""
        return self.run(ambient=1)

    def run(
        self,
        *,
        seed: int = 0,
        ambient: int = 0,
        data_dir: Path | None = None,
        stops: Sequence[Stop] = (),
        breaks: Callable[[Stopped], bool] | None = None,
        norm: NormFactory | None = None,
        options: Any = None,
        keep_weights: bool = True,
    ) -> Made:
        """One run; where it is stopped, as many processes as it takes.

        Args:
            ambient: seeds the global generators, in each process another number.
            breaks: from when on the norms give NaN in training.
            Others instead of the subject's own.
        """
        state: State | None = None
        made = Made(Stopped())
        left = list(stops)
        while True:
            journal = Stopped(state, left)
            finished = self._part(
                made, journal, seed, ambient + 1000 * made.processes, data_dir, breaks, norm, options, keep_weights
            )
            made.journal = journal
            if finished:
                return made
            state = journal.stored
            made.processes += 1

    def _part(
        self,
        made: Made,
        journal: Stopped,
        seed: int,
        ambient: int,
        data_dir: Path | None,
        breaks: Callable[[Stopped], bool] | None,
        norm: NormFactory | None,
        options: Any,
        keep_weights: bool,
    ) -> bool:
        """One process' share of a run; whether the run is over."""
        start = time.monotonic()
        made.evaluations = 0

        def updated(*_: Any) -> None:
            made.updates += 1
            made.evaluations = 0
            if time.monotonic() - start > self.limit:
                raise TooLong(
                    f"a run of {self.task.name} with these options takes more than {self.limit:g} s; give it fewer "
                    "updates with --option"
                )

        def forwarded(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not hasattr(module, "norm_info"):
                return None
            if module.training:
                return output * float("nan") if breaks is not None and breaks(journal) else None
            made.evaluations += 1
            journal.evaluated(made.evaluations)
            return None

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        context = RunContext(
            torch.device("cpu"), seed, data_dir or self.data_dir, folder, made.reports.append, journal, keep_weights
        )
        hooks = register_optimizer_step_post_hook(updated), register_module_forward_hook(forwarded)
        try:
            with _elsewhere(self.folder, context.data_dir) as strays:
                _seed(ambient)
                try:
                    outcome = self.task.run(norm or self.norm, options or self.options, context)
                finally:
                    made.strays += strays()
        except Interrupted:
            return False
        except Diverged as error:
            made.diverged = error
        else:
            made.outcome = outcome
            made.files = {name: (folder / name).read_bytes() for name in outcome.artifacts}
        finally:
            for hook in hooks:
                hook.remove()
            shutil.rmtree(folder, ignore_errors=True)
        return True


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextlib.contextmanager
def _elsewhere(folder: Path, data_dir: Path) -> Iterator[Callable[[], list[str]]]:
    """Within the block the process is in an empty folder; what is yielded tells which files came to be, or were
    changed, there or below the data folder."""
    here, place = os.getcwd(), Path(tempfile.mkdtemp(dir=folder))
    before = _files(data_dir)
    os.chdir(place)
    try:
        yield lambda: [
            *(str(name.relative_to(place)) for name in _files(place)),
            *(f"data: {name.name}" for name, found in _files(data_dir).items() if before.get(name) != found),
        ]
    finally:
        os.chdir(here)
        shutil.rmtree(place, ignore_errors=True)


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    found = {name: name.lstat() for name in folder.rglob("*")} if folder.is_dir() else {}
    return {name: (what.st_mtime_ns, what.st_size) for name, what in found.items()}
