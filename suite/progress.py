"""How runs are put into words: their names, one line per finished run, the remaining time, rows of text.

Pure: events in, text out. The command line prints it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results.escape import cut, visible
from results.record import RunRecord, RunSpec
from results.store import run_folder
from suite.checkpoints import going_on
from suite.engine import Event
from suite.estimate import Estimate, Kind, Remaining
from suite.live import number, telling, where
from suite.output import OUTPUT, printed
from suite.runner import TRACEBACK

_LONGEST = 300  # characters of a reason in a line; the whole stands in the record
_MOST_NAMES = 8  # in a line
_LONGEST_NOTE = 60  # of each part of what a running run says


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


class Progress:
    """Follows the events of `suite.engine.execute`.

    Args:
        specs: the runs that will be made.
        metrics: task -> the metric shown in a finished run's line.
        remaining: estimates, primed with the records that exist already.
        folder: of results; a failed run's line then names what it left there.
        begun: key -> steps that are done, of the runs that go on from a checkpoint.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        specs: Sequence[RunSpec],
        names: Names,
        metrics: Mapping[str, str],
        remaining: Remaining,
        folder: Path | None = None,
        begun: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.names, self.metrics, self.remaining, self.folder = names, metrics, remaining, folder
        self.todo = {spec.key: spec for spec in specs}
        self.begun, self.clock = dict(begun or {}), clock
        self.kinds = Counter(map(self._kind, self.todo.values()))
        self.total = len(self.todo)
        self.running: dict[str, float] = {}
        """key -> finished fraction of the runs that are being made now."""
        self._positions: dict[str, Mapping[str, Any]] = {}
        self._rows: dict[str, Mapping[str, float | None]] = {}
        self._since: dict[str, float] = {}

    @property
    def finished(self) -> int:
        return self.total - len(self.todo)

    def take(self, event: Event) -> str | None:
        """Note an event; returns a line worth printing, or None."""
        key, name = event.spec.key, self.names.run(event.spec)
        if event.kind == "damaged":
            return f"damaged record of {name}: set aside as {event.text}, made again"
        if event.kind == "waiting":
            self._forget(event.spec)
            return f"waiting for {name}: {event.text}"
        if event.kind == "note":
            return f"{name}: {event.text}"
        if event.kind == "stopped":
            self._forget(event.spec)
            return (
                f"stopped: {name}, which goes on {event.text} when the command is given again" if event.text else None
            )
        if event.kind in ("started", "progress"):
            self._hear(event)
            return f"going on: {name} {event.text}" if event.text else None
        assert event.record is not None
        self._forget(event.spec)
        if self.todo.pop(key, None) is not None:
            kind = self._kind(event.spec)
            self.kinds[kind] -= 1
            if not self.kinds[kind]:
                del self.kinds[kind]
        self.remaining.add(event.record)
        return self._line(name, event.record)

    def stopped_line(self) -> str:
        """The line of a grid that was stopped: how many runs are finished, and which go on from where."""
        line = f"stopped: {self.finished} of {self.total} runs were finished and are kept"
        origins = {} if self.folder is None else going_on(self.folder, self.todo.values())
        named = [f"{self.names.run(self.todo[key])} {origin}" for key, origin in origins.items()]
        return f"{line}; the same command goes on: {_first(named)}" if named else line

    def left(self) -> Estimate | None:
        """The time left for all runs, by the progress of those being made; None while nothing is known."""
        waiting = Counter(self.kinds)
        making = [self.todo[key] for key in self.running if key in self.todo]
        for spec in making:
            waiting[self._kind(spec)] -= 1
        return self.remaining.total(waiting, map(self._rest, making))

    def note(self, key: str) -> str:
        """Where a running run stands, and what its last epoch gave: "epoch 3/10  train_loss 0.5123  val_top1 0.81"."""
        position = self._positions.get(key)
        parts = [] if position is None else [where(position)]
        parts += [f"{name} {number_text(value)}" for name, value in telling(self._rows.get(key, {}))]
        return "  ".join(cut(visible(part), _LONGEST_NOTE) for part in parts)

    def _kind(self, spec: RunSpec) -> Kind:
        return self.remaining.kind(spec, self.begun.get(spec.key, 0))

    def _hear(self, event: Event) -> None:
        key = event.spec.key
        self.running[key] = min(1.0, max(0.0, event.fraction))
        if event.kind == "started":
            self._since[key] = self.clock()
        if event.position is not None:
            self._positions[key] = event.position
        if event.row is not None:
            self._rows[key] = event.row
        if event.clock is not None:
            self.remaining.heard(event.spec, *event.clock)

    def _forget(self, spec: RunSpec) -> None:
        for known in (self.running, self._positions, self._rows, self._since):
            known.pop(spec.key, None)
        self.remaining.drop(spec)

    def _rest(self, spec: RunSpec) -> Estimate | None:
        """The time that is left for a run that is being made."""
        key, kind = spec.key, self._kind(spec)
        estimate, steps = self.remaining.of(kind), self.remaining.steps(spec)
        done = number(self._positions.get(key, {}).get("step"))
        if estimate is None:
            return None
        if steps is None or done is None:
            return Estimate(estimate.seconds * (1 - self.running[key]), estimate.at_least)
        pace, other = self.remaining.pace(kind) or 0.0, self.remaining.other(kind) or 0.0
        here = max(0.0, done - self.begun.get(key, 0))  # steps of this process
        spent = max(0.0, self.clock() - self._since.get(key, self.clock()) - here * pace)
        return Estimate(max(0.0, steps - done) * pace + max(0.0, other - spent), estimate.at_least)

    def _line(self, name: str, record: RunRecord) -> str:
        width = len(str(self.total))
        metric = self.metrics.get(record.spec.task, "")
        if record.status == "ok":
            said = f"  {metric} {record.metrics[metric]:.4g}" if metric in record.metrics else ""
        else:
            said = f"  {cut(visible(record.reason), _LONGEST)}"
        left = self.left() if self.todo else None
        tail = f"  [{time_left(left)} left]" if left is not None else ""
        line = f"[{self.finished:{width}}/{self.total}] {record.status:8} {record.seconds:7.1f} s  {name}{said}{tail}"
        if self.folder is None or record.status != "failed":
            return line
        return line + left_behind(self.folder, record.spec)


def failed_line(name: str, record: RunRecord, folder: Path) -> str:
    """The line of a run that failed before, in the words of a run that has just failed."""
    return f"failed before  {name}  {cut(visible(record.reason), _LONGEST)}{left_behind(folder, record.spec)}"


def left_behind(out: Path, spec: RunSpec) -> str:
    """A second line that says where a failed run's traceback and output lie, if there are any."""
    folder = run_folder(out, spec)
    # a killed process leaves its output behind even where it printed nothing
    found = [name for name, there in ((TRACEBACK, Path.is_file), (OUTPUT, printed)) if there(folder / name)]
    beside = f" and {found[1]} beside it" if len(found) > 1 else ""
    return f"\n    see {_near(folder / found[0])}{beside}" if found else ""


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def time_left(estimate: Estimate) -> str:
    """ "45 s", "at least 12 min"."""
    return ("at least " if estimate.at_least else "") + duration(estimate.seconds)


def number_text(value: float | None) -> str:
    """Of a history: four digits; what was not finite is null there."""
    return "nan" if value is None else f"{value:.4g}"


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


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _near(path: Path) -> str:
    """From the current folder, where it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _text(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("label"), str):
        return value["label"]  # a norm or genotype that an option names
    return value if isinstance(value, str) else json.dumps(value)
