"""How long runs will take, from those that are finished and the epochs of those that are being made.

    seconds of a run = what does not depend on its steps + steps x seconds per step

The first part is what a run does before and after its trainings: data, tests, attacks. The second has everything that
comes with an epoch, its validation included. A record says which is which (environment `clock`: the steps that its
process made, their seconds, and the steps of the whole run). One that was made before there was a clock has the seconds
of its training steps in its history; data and validation of its epochs then count as not depending on steps, so that
longer runs are taken for a little too short. A run whose steps nobody knows, or whose record says nothing about them,
depends on steps as a whole; where its task can not tell them, it has one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.record import RunRecord, RunSpec
from results.store import run_folder
from suite.checkpoints import found
from suite.live import number

if TYPE_CHECKING:
    from tasks.base import Task
    from tasks.options import Options

Levels = tuple[tuple[Any, ...], ...]

_LENGTH = frozenset({"epochs", "max_steps", "search_epochs", "search_max_steps", "retrain_epochs", "retrain_max_steps"})
"""Options that change how many steps a run has, and not what one takes."""
_SIZE = ("dataset", "model", "method", "width", "batch_size", "norm_batch_size", "workers")


@dataclass(frozen=True)
class Kind:
    """The facts of a run that an estimate compares.

    Args:
        levels: what runs may be compared by, closest first.
        steps: that are to do; 1, the run itself, where they are not known.
    """

    levels: Levels
    steps: int


@dataclass(frozen=True)
class Estimate:
    """Seconds; `at_least` where a part of the runs is not known yet."""

    seconds: float
    at_least: bool = False


class Steps:
    """Updates of a run, as its task tells them (tasks.base.Telling); None where it can not.

    Args:
        folders: Plan.folders.
        data_dir: folder of prepared data sets.
    """

    def __init__(self, folders: Mapping[str, str], data_dir: Path):
        self.folders, self.data_dir = folders, data_dir
        self._known: dict[tuple[str, str], int | None] = {}
        self._texts = _Texts(frozenset())

    def __call__(self, spec: RunSpec) -> int | None:
        from suite.folders import located
        from tasks import get_task

        known = (spec.task, self._texts(spec))
        if known not in self._known:
            try:
                task = get_task(spec.task)
                options = task.options.model_validate(located(spec.task_options, self.folders))
                self._known[known] = task_steps(task, options, self.data_dir) or None
            except ValueError:  # of a task that is not here
                self._known[known] = None
        return self._known[known]


def task_steps(task: Task, options: Options, data_dir: Path) -> int:
    """Updates of a run with these options; 0 where its task can not tell them."""
    tell = getattr(task, "steps", None)
    try:
        steps = tell(options, data_dir) if callable(tell) else 0
    except Exception:  # noqa: BLE001 - a user's task, or data that is not here: nothing but an estimate depends on it
        return 0
    return steps if isinstance(steps, int) and steps > 0 else 0


class Remaining:
    """Estimates from records and running runs, closest first: the same options and norm, the same options, the same
    data and model and norm, these without the norm, the same task.

    Args:
        jobs: runs at a time.
        records: of runs that are finished.
        steps: of a spec; None where nobody knows.
    """

    def __init__(
        self,
        jobs: int,
        records: Iterable[RunRecord] = (),
        steps: Callable[[RunSpec], int | None] = lambda spec: None,
    ):
        self.jobs, self.steps = jobs, steps
        self._whole, self._texts = _Texts(frozenset()), _Texts(_LENGTH)
        self._paces: dict[Any, tuple[float, float]] = {}  # level -> steps and their seconds
        self._others: dict[Any, tuple[int, float]] = {}  # level -> runs and their other seconds
        self._running: dict[str, tuple[Levels, float, float]] = {}
        for record in records:
            self.add(record)

    def kind(self, spec: RunSpec, done: int = 0) -> Kind:
        """The kind of a run of which so many steps are done."""
        steps = self.steps(spec)
        return Kind(self._levels(spec), 1 if steps is None else max(0, steps - done))

    def add(self, record: RunRecord) -> None:
        """Learn from a finished run."""
        self.drop(record.spec)
        if record.status in ("ok", "diverged"):
            all_steps = self.steps(record.spec)
            levels, (steps, seconds, other) = self._levels(record.spec), _measured(record, all_steps)
            self._pace(levels, steps, seconds)
            if record.status == "ok" or all_steps is None:
                for level in levels:
                    runs, total = self._others.get(level, (0, 0.0))
                    self._others[level] = runs + 1, total + other

    def heard(self, spec: RunSpec, steps: int, seconds: float) -> None:
        """A running run has made so many steps in so many seconds, in epochs that are finished."""
        if self.steps(spec) is not None and steps > 0:
            self.drop(spec)
            self._running[spec.key] = self._levels(spec), steps, seconds
            self._pace(self._levels(spec), steps, seconds)

    def drop(self, spec: RunSpec) -> None:
        """A run runs no longer."""
        if spec.key in self._running:
            levels, steps, seconds = self._running.pop(spec.key)
            self._pace(levels, -steps, -seconds)

    def pace(self, kind: Kind) -> float | None:
        """Seconds per step; None where none has been made."""
        found = next((self._paces[level] for level in kind.levels if level in self._paces), None)
        return None if found is None else found[1] / found[0]

    def other(self, kind: Kind) -> float | None:
        """Seconds of a run that do not depend on its steps; None as long as no run has been finished."""
        found = next((self._others[level] for level in kind.levels if level in self._others), None)
        return None if found is None else found[1] / found[0]

    def of(self, kind: Kind) -> Estimate | None:
        """The estimate for one run of this kind; None as long as no run of its task has finished an epoch."""
        pace, other = self.pace(kind), self.other(kind)
        if pace is None and other is None:
            return None
        missing = other is None or (pace is None and kind.steps > 0)
        return Estimate(max(0.0, kind.steps * (pace or 0.0)) + (other or 0.0), missing)

    def total(self, kinds: Mapping[Kind, int], rest: Iterable[Estimate | None] = ()) -> Estimate | None:
        """Seconds until all runs are done; None where nothing is known of any of them.

        Args:
            kinds: how many there are of each kind.
            rest: of further runs, which have begun; None: not known.
        """
        parts = [(self.of(kind), number) for kind, number in kinds.items() if number > 0]
        parts += [(estimate, 1) for estimate in rest]
        known = [(estimate, number) for estimate, number in parts if estimate is not None]
        if not known:
            return None
        total = sum(estimate.seconds * number for estimate, number in known)
        longest = max(estimate.seconds for estimate, _ in known)
        at_least = len(known) < len(parts) or any(estimate.at_least for estimate, _ in known)
        return Estimate(max(total / self.jobs, longest), at_least)

    def _pace(self, levels: Levels, steps: float, seconds: float) -> None:
        for level in levels if steps else ():
            before = self._paces.get(level, (0, 0.0))
            self._paces[level] = before[0] + steps, before[1] + seconds
            if self._paces[level][0] <= 0:
                del self._paces[level]

    def _levels(self, spec: RunSpec) -> Levels:
        task, told = spec.task, self.steps(spec) is not None
        options = self._texts(spec) if told else self._whole(spec)
        size = tuple(str(spec.task_options.get(name)) for name in (*_SIZE, *(() if told else ("epochs",))))
        return (task, options, spec.norm), (task, options), (task, *size, spec.norm), (task, *size), (task,)


def begun(out: Path, specs: Iterable[RunSpec]) -> dict[str, int]:
    """key -> steps that are done, of the runs that go on from a checkpoint."""
    steps: dict[str, int] = {}
    for spec in specs:
        note = found(run_folder(out, spec), spec.key)
        if note is not None and (done := number(note.position.get("step"))):
            steps[spec.key] = int(done)
    return steps


def left_to_do(remaining: Remaining, specs: Iterable[RunSpec], done: Mapping[str, int]) -> Estimate | None:
    """The estimate for runs that nobody is making yet. done: from `begun`."""
    return remaining.total(Counter(remaining.kind(spec, done.get(spec.key, 0)) for spec in specs))


class _Texts:
    """The options of a spec, but for those that are left out, as one text; the seeds of a plan share theirs."""

    def __init__(self, left_out: frozenset[str]) -> None:
        self._left_out = left_out
        self._known: dict[int, tuple[Mapping[str, Any], str]] = {}  # with the mapping, so that its number stays its own

    def __call__(self, spec: RunSpec) -> str:
        options = spec.task_options
        if id(options) not in self._known:
            kept = {name: value for name, value in options.items() if name not in self._left_out}
            self._known[id(options)] = options, json.dumps(kept, sort_keys=True)
        return self._known[id(options)][1]


def _measured(record: RunRecord, steps: int | None) -> tuple[float, float, float]:
    """(steps, their seconds, other seconds) of a finished run."""
    if steps is None:
        return 1, record.seconds, 0.0
    clock = record.environment.get("clock")
    given = clock if isinstance(clock, dict) else {}
    made, seconds, total = (number(given.get(name)) or 0.0 for name in ("steps", "seconds", "total"))
    if made > 0 and seconds > 0:
        return made, seconds, max(0.0, record.seconds - seconds / made * max(made, total))
    if record.status == "diverged":  # where, nobody knows
        return 0, 0.0, 0.0
    took = sum(number(row.get("seconds")) or 0.0 for row in record.history)
    if not 0 < took <= record.seconds:
        return steps, record.seconds, 0.0
    return steps, took, record.seconds - took
