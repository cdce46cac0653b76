"""How runs are put into words: their names, one line per finished run, the remaining time, rows of text.

Pure: events in, text out. The command line prints it.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results.escape import cut, visible
from results.record import RunRecord, RunSpec, run_folder
from suite.engine import Event
from suite.runner import TRACEBACK
from suite.worker import OUTPUT

Levels = tuple[tuple[Any, ...], ...]

_LONGEST = 300  # characters of a reason in a line; the whole stands in the record


class Names:
    """Short names of runs: norm, the options in which the runs of a task differ, seed."""

    def __init__(self, specs: Iterable[RunSpec]):
        values: dict[tuple[str, str], set[str]] = defaultdict(set)
        for spec in {id(spec.task_options): spec for spec in specs}.values():  # the seeds of a plan share theirs
            for option, value in spec.task_options.items():
                if value is not None:  # norm_batch_size of a norm that does not mix: it serves every size
                    values[spec.task, option].add(_text(value))
        self._varying: dict[str, list[str]] = defaultdict(list)
        for (task, option), found in values.items():
            if len(found) > 1:
                self._varying[task].append(option)

    def setting(self, spec: RunSpec) -> str:
        """ "norm_batch_size=2 learning_rate=0.1": the options that vary, empty where none does."""
        options = spec.task_options
        return " ".join(f"{k}={_text(options[k])}" for k in self._varying[spec.task] if options.get(k) is not None)

    def run(self, spec: RunSpec) -> str:
        parts = (spec.task, spec.norm_label or spec.norm, self.setting(spec), f"seed {spec.seed}")
        return visible(" ".join(part for part in parts if part))


class Remaining:
    """Estimates how long runs will take, from those that are finished: the mean of the same task and norm, else task.

    Args:
        jobs: runs at a time.
    """

    def __init__(self, jobs: int, records: Iterable[RunRecord] = ()):
        self.jobs = jobs
        self._seconds: dict[Any, tuple[float, int]] = {}  # sum and number
        for record in records:
            self.add(record)

    def add(self, record: RunRecord) -> None:
        if record.status in ("ok", "diverged"):
            for level in levels(record.spec):
                total, number = self._seconds.get(level, (0.0, 0))
                self._seconds[level] = total + record.seconds, number + 1

    def of(self, kind: Levels) -> float | None:
        """Seconds one run of this kind will take; None as long as no run of its task has finished."""
        for level in kind:
            if level in self._seconds:
                total, number = self._seconds[level]
                return total / number
        return None

    def total(self, kinds: Mapping[Levels, int]) -> float | None:
        """Seconds until all runs, given as how many there are of each kind, are done; None where one is unknown."""
        total = 0.0
        for kind, number in kinds.items():
            seconds = self.of(kind)
            if seconds is None:
                return None
            total += seconds * number
        return total / self.jobs


class Progress:
    """Follows the events of `suite.engine.execute`.

    Args:
        specs: the runs that will be made.
        metrics: task -> the metric shown in a finished run's line.
        remaining: estimates, primed with the records that exist already.
        folder: of results; a failed run's line then names what it left there.
    """

    def __init__(
        self,
        specs: Sequence[RunSpec],
        names: Names,
        metrics: Mapping[str, str],
        remaining: Remaining,
        folder: Path | None = None,
    ):
        self.names, self.metrics, self.remaining, self.folder = names, metrics, remaining, folder
        self.todo = {spec.key: spec for spec in specs}
        self.kinds = Counter(map(levels, self.todo.values()))
        self.total = len(self.todo)
        self.running: dict[str, float] = {}
        """key -> finished fraction of the runs that are being made now."""

    @property
    def finished(self) -> int:
        return self.total - len(self.todo)

    def take(self, event: Event) -> str | None:
        """Note an event; returns a line worth printing, or None."""
        key, name = event.spec.key, self.names.run(event.spec)
        if event.kind == "damaged":
            return f"damaged record of {name}: set aside as {event.text}, made again"
        if event.kind == "waiting":
            self.running.pop(key, None)
            return f"waiting for {name}: {event.text}"
        if event.kind in ("started", "progress"):
            self.running[key] = min(1.0, max(0.0, event.fraction))
            return None
        assert event.record is not None
        self.running.pop(key, None)
        if self.todo.pop(key, None) is not None:
            kind = levels(event.spec)
            self.kinds[kind] -= 1
            if not self.kinds[kind]:
                del self.kinds[kind]
        self.remaining.add(event.record)
        return self._line(name, event.record)

    def seconds_left(self) -> float | None:
        """What is left of all runs, those being made counted by their fraction; None while nothing is known."""
        total = self.remaining.total(self.kinds)
        if total is None:
            return None
        done = sum(f * (self.remaining.of(levels(self.todo[key])) or 0.0) for key, f in self.running.items())
        return max(0.0, total - done / self.remaining.jobs)

    def _line(self, name: str, record: RunRecord) -> str:
        width = len(str(self.total))
        metric = self.metrics.get(record.spec.task, "")
        if record.status == "ok":
            said = f"  {metric} {record.metrics[metric]:.4g}" if metric in record.metrics else ""
        else:
            said = f"  {cut(visible(record.reason), _LONGEST)}"
        left = self.seconds_left() if self.todo else None
        tail = f"  [{duration(left)} left]" if left is not None else ""
        line = f"[{self.finished:{width}}/{self.total}] {record.status:8} {record.seconds:7.1f} s  {name}{said}{tail}"
        if self.folder is None or record.status != "failed":
            return line
        return line + left_behind(self.folder, record.spec)


def failed_line(name: str, record: RunRecord, folder: Path) -> str:
    """What is stored of a run that failed before, in the words of a run that has just failed."""
    return f"failed before  {name}  {cut(visible(record.reason), _LONGEST)}{left_behind(folder, record.spec)}"


def left_behind(out: Path, spec: RunSpec) -> str:
    """A second line that says where a failed run's traceback and output lie, if there are any."""
    folder = run_folder(out, spec)
    found = [name for name in (TRACEBACK, OUTPUT) if (folder / name).is_file()]
    beside = f" and {found[1]} beside it" if len(found) > 1 else ""
    return f"\n    see {_near(folder / found[0])}{beside}" if found else ""


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def seed_text(seeds: Iterable[int]) -> str:
    """Seeds as a config would name them: "0-2,5"."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of text as aligned columns; the last one is left ragged."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()


def _near(path: Path) -> str:
    """From the current folder, where it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def levels(spec: RunSpec) -> Levels:
    """What runs may be compared by for time, closest first."""
    size = tuple(str(spec.task_options.get(option)) for option in ("dataset", "model", "epochs", "norm_batch_size"))
    return (spec.task, size, spec.norm), (spec.task, size), (spec.task,)


def _text(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("label"), str):
        return value["label"]  # a norm or genotype that an option names
    return value if isinstance(value, str) else json.dumps(value)
