"""The table of a paper: norms by tasks, one number for each norm, task and setting.

Nothing is averaged over settings. A task with several has a column for each of them under its own heading; one with
more than MOST_SETTINGS is refused with the options to choose by.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from results import selection
from results import statistics as summary
from results.derived import with_derived
from results.escape import cut
from results.metrics import Metric, nearest
from results.rows import current, distinct, natural, value_text
from results.tables import captions
from results.tables.choices import (
    Norms,
    Where,
    check_metrics,
    check_reference,
    chosen_rows,
    chosen_tasks,
    only_where,
    renamed,
)
from results.tables.pivot import LONGEST_VALUE, OUTCOME, REFERENCE, Block, Pivot
from results.tables.table import Cell, Column, Row, Table

MOST_SETTINGS = 8
"""Columns of one task; a task with more settings is refused, since a reader could not tell them apart."""
SPREADS = ("std", "none")
MOST_DIGITS = 6


@dataclass(frozen=True)
class _Place:
    """A column: a task's runs in one setting, seen through one metric."""

    pivot: Pivot
    block: Block
    metric: Metric


def paper_table(
    df: pd.DataFrame,
    *,
    tasks: Sequence[str] | None = None,
    norms: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    rows: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    where: Where | None = None,
    select: str | None = None,
    transpose: bool = False,
    reference: str | None = None,
    digits: int | None = None,
    spread: str = "std",
    name: str = "paper",
) -> Table:
    """Norms by tasks, each task with its headline metric; best bold, second underlined, † where the test allows it.

    A cell is the mean over seeds (over held-out domains first), as in every other table: holes are counted in
    footnotes, and a cell with holes is never marked. What is left out here (norms, tasks, settings) counts nowhere.

    Args:
        df: from `results.load`, or a part of it.
        tasks: names, in the order of columns; None: all.
        norms: labels or registered names, in the order of rows; a name stands for all rows of its norm. None: all, the
            reference first, then by label.
        metrics: instead of the headline metrics, a column for each that a task measured; tasks without any fall out.
        rows: label, or name of a norm with a single row -> what is printed in its place.
        order: labels or names (old ones or those of `rows`) of the rows that come first.
        where: option, or task.option -> the value, or a list of values, that a run must have.
        select: as in `render_all`: each norm's value of this option, chosen by validation.
        transpose: the formats of a paper print a row for each task and a column for each norm.
        reference: label or name of the norm that others are compared with. None: bn, if it is there.
        digits: 0 to 6, after the decimal point, of every metric that has a direction; None: each metric's own.
        spread: "std" or "none"; without it cells show the mean alone.
        name: the stem of the table's files.

    Raises:
        ValueError: no runs; unknown names or values (each with the nearest; one line for each mistake); a task with
            more than MOST_SETTINGS settings; two rows of one name; what `select` refuses.
    """
    df = current(df)
    if df.empty:
        stale = sum(df.attrs.get("stale", {}).values())
        raise ValueError(f"no runs to tabulate{f'; {stale} records are of other versions or data' if stale else ''}")
    mistakes: list[str] = []
    if digits is not None and digits not in range(MOST_DIGITS + 1):
        mistakes.append(f"digits {digits}: 0 to {MOST_DIGITS} are allowed")
    if spread not in SPREADS:
        mistakes.append(f'spread "{spread}": {" or ".join(SPREADS)}{nearest(spread, SPREADS)}')
    if select is not None and not mistakes:
        df = selection.select(df, select)
    whole = with_derived(df)
    shown = chosen_tasks(df, tasks, mistakes)
    mistakes += check_metrics(whole, metrics or ())
    known = Norms.among(
        Pivot(whole[whole["task"] == task], "") for task in (distinct(df["task"]) if mistakes else shown)
    )
    if reference is not None:
        mistakes += check_reference(known, reference)
    printed = renamed(known, rows or {}, mistakes)
    old = {text: row for row, text in printed.items()}
    wanted = chosen_rows(known, "norms", (old.get(n, n) for n in norms), mistakes) if norms is not None else None
    first = chosen_rows(known, "order", (old.get(n, n) for n in order or ()), mistakes)
    # gains are there already, so that a setting may be chosen without that of their baseline
    whole, singles = only_where(whole, where or {}, mistakes), only_where(df, where or {}, [])
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    pivots = []
    for task in shown:
        part = _only_norms(whole[whole["task"] == task], wanted, known)
        if len(part):
            pivots.append(Pivot(part, reference or REFERENCE))
    if not pivots:
        raise ValueError("no run is left of the tasks, norms and settings that were asked for")
    usual = sorted(known.of, key=lambda row: (row not in known.find(reference or REFERENCE), natural(row)))
    rows_ = list(dict.fromkeys((*first, *(usual if wanted is None else wanted))))
    maker = _Maker(pivots, known, singles, metrics, printed, digits, spread == "std", transpose, name)
    return maker.table([row for row in rows_ if wanted is None or row in wanted])


def _only_norms(part: pd.DataFrame, rows: Sequence[str] | None, known: Norms) -> pd.DataFrame:
    if rows is None or part.empty:
        return part
    pivot = Pivot(part, "")
    labels = {known.labels[row].get(pivot.task) for row in rows}
    return part[part["row"].isin([row for row in pivot.rows if pivot.labels[row] in labels])]


class _Maker:
    """The columns, the rows and the sentences of one table."""

    def __init__(
        self,
        pivots: Sequence[Pivot],
        known: Norms,
        singles: pd.DataFrame,
        metrics: Sequence[str] | None,
        printed: Mapping[str, str],
        digits: int | None,
        spread: bool,
        transpose: bool,
        name: str,
    ):
        self.known, self.singles, self.printed, self.look = known, singles, printed, (spread, transpose, name)
        self.without: list[str] = []
        self.places: list[_Place] = []
        for pivot in pivots:
            subjects = self._subjects(pivot, metrics)
            if len(pivot.blocks) > MOST_SETTINGS:
                raise ValueError(_too_many(pivot))
            for block in pivot.blocks:
                self.places += [
                    _Place(pivot, block, m.with_digits(digits))
                    for m in subjects
                    if pivot.applies(block, m) or m == OUTCOME
                ]
        self.pivots = list(dict.fromkeys(place.pivot for place in self.places))
        if not self.places:
            raise ValueError(f"no task of the table measured {', '.join(metrics or ['anything'])}")

    def _subjects(self, pivot: Pivot, metrics: Sequence[str] | None) -> list[Metric]:
        """The metrics of a task's columns."""
        if not pivot.metrics:  # no run ended well: the cells say what happened instead
            return [OUTCOME]
        by_name = {m.name: m for m in pivot.metrics}
        names = [pivot.facts.headline] if metrics is None else metrics
        found = [by_name[n] for n in names if n in by_name]
        self.without += [] if found else [pivot.task]
        return found

    def table(self, names: Sequence[str]) -> Table:
        """The table; `names` are its rows in their order, some of which may have no run here."""
        lines = {name: self._cells(name) for name in names}
        lines = {name: cells for name, cells in lines.items() if any(cell is not None for cell in cells)}
        marked = [
            summary.mark([cells[i] for cells in lines.values()], place.metric) for i, place in enumerate(self.places)
        ]
        short = _short_labels({name: self.known.of[name] for name in lines})
        made = []
        for i, name in enumerate(lines):
            cells = tuple(column[i] for column in marked)
            same = {cell.equals for cell in cells if cell is not None and cell.mean is not None}
            equals = next(iter(same)) if len(same) == 1 else ""
            own = self.printed.get(name)
            equals = self.printed.get(equals, equals)
            made.append(Row(own or name, cells, self.known.of[name], equals=equals, short="" if own else short[name]))
        spread, transpose, stem = self.look
        title = "Norms by tasks" if len(self.pivots) > 1 else f"Norms in {self.pivots[0].task}"
        brief = self._short(made)
        caption = (*brief, *self._options(list(lines)), *self._full(made))
        columns = tuple(map(self._column, self.places))
        return Table(stem, title, columns, tuple(made), caption, "", "norm", False, brief, spread, transpose)

    def _cells(self, name: str) -> list[Cell | None]:
        cells: list[Cell | None] = []
        for place in self.places:
            label = self.known.labels[name].get(place.pivot.task)
            rows = [row for row in place.pivot.rows if place.pivot.labels[row] == label]
            asked = rows and place.pivot.asked(rows[0], place.block)
            cells.append(place.pivot.cell(rows[0], place.block, place.metric) if asked else None)
        return cells

    def _options(self, names: Sequence[str]) -> list[str]:
        """What rows that are called otherwise are."""
        lines = []
        for name in names:
            labels: dict[str, list[str]] = {}
            for task, label in self.known.labels[name].items():
                if task in [pivot.task for pivot in self.pivots]:
                    labels.setdefault(label, []).append(task)
            text = self.printed.get(name, name)
            if list(labels) == [text]:
                continue
            (usual, _), *others = sorted(labels.items(), key=lambda item: -len(item[1]))
            said = "".join(f", in {_and(tasks)} {label}" for label, tasks in others)
            lines.append(f"{text} is {usual}{said}.")
        return lines

    def _column(self, place: _Place) -> Column:
        pivot = place.pivot
        setting = tuple(
            (name, value_text(name, value))
            for option, value in zip(pivot.varying, place.block, strict=True)
            for name in [option.removeprefix("option.")]
        )
        several = len({p.metric.name for p in self.places if p.pivot is pivot}) > 1
        telling, shown = _telling(pivot), self._shown(pivot)
        texts = [f"{k}={cut(v, LONGEST_VALUE)}" for k, v in setting if k in telling or (k, v) in shown]
        values = [cut(v, LONGEST_VALUE) for k, v in setting if k in telling]
        metric = place.metric
        texts += [metric.heading] if several or not telling else []
        values += [metric.title] if several else []
        return Column(metric, ", ".join(texts), pivot.task, setting, pivot.task, ", ".join(values))

    def _shown(self, pivot: Pivot) -> list[tuple[str, str]]:
        """The options that tell no settings apart, and without whose value results can not be read."""
        names = [name for name in pivot.facts.always_shown if f"option.{name}" in pivot.varying]
        places = [(name, pivot.varying.index(f"option.{name}")) for name in names if name not in _telling(pivot)]
        return [
            (name, value_text(name, value))
            for name, place in places
            for value in distinct(block[place] for block in pivot.blocks)
            if value is not None
        ]

    # --- sentences ---------------------------------------------------------------------------------------------------

    def _short(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Metrics and settings; n and seeds; marks."""
        cells = [cell for row in rows for cell in row.cells if cell is not None]
        lines = [self._measured()]
        if not any(cell.n for cell in cells):
            lines.append("No run here has a value: the footnotes say why.")
        else:
            std = self.look[0] and any(cell.std is not None for cell in cells)
            lines.append(f"Mean{' ± sample standard deviation' if std else ''} over seeds: {self._seeds()}.")
        if any(cell.best for cell in cells):
            lines.append("Best bold, second underlined.")
        return (*lines, *filter(None, [captions.short_test(name, cells) for name in self._compared()]))

    def _measured(self) -> str:
        """Which metric of which task, and by which options its columns differ."""
        tasks: dict[Metric, list[Pivot]] = {}
        for place in self.places:
            at = tasks.setdefault(place.metric, [])
            at += [place.pivot] if place.pivot not in at else []
        kinds = {(m.unit, m.higher_is_better) for m in tasks}
        unit, higher = next(iter(kinds))
        alike = len(kinds) == 1 and higher is not None
        texts = [
            f"{m.title if alike else m.heading} in {_and([self._with_options(p) for p in pivots])}"
            for m, pivots in tasks.items()
        ]
        end = f"; {f'in {unit}, ' if unit else ''}{'higher' if higher else 'lower'} is better" if alike else ""
        return f"{_capital(', '.join(texts))}{end}."

    def _with_options(self, pivot: Pivot) -> str:
        options = [f"by {_and(_telling(pivot))}"] if len(pivot.blocks) > 1 else []
        options += [f"{k}={cut(v, LONGEST_VALUE)}" for k, v in self._shown(pivot)]
        return cut(pivot.task, LONGEST_VALUE) + (f" ({', '.join(options)})" if options else "")

    def _seeds(self) -> str:
        """n and the seeds of every task, those of several tasks together."""
        places: dict[tuple[int, ...], list[str]] = {}
        for place in self.places:
            places.setdefault(tuple(place.pivot.seeds[place.block]), []).append(place.pivot.task)
        texts = [(f"n = {len(seeds)} ({captions.seed_list(seeds)})", dict.fromkeys(t)) for seeds, t in places.items()]
        texts.sort(key=lambda item: len(item[1]))
        parts = [f"{text} in {_and(tasks)}" for text, tasks in texts[:-1]]
        mixed = set(texts[-1][1]) & {task for _, tasks in texts[:-1] for task in tasks}
        last = f" in {_and(texts[-1][1])}" if mixed else " elsewhere" if parts else ""
        return ", ".join([*parts, f"{texts[-1][0]}{last}"])

    def _compared(self) -> list[str]:
        """The row that others are compared with, if there is one."""
        compared = [p for p in self.pivots if p.reference is not None and len(p.rows) > 1]
        rows = {row for p in compared for row in self.known.find(p.labels[str(p.reference)])}
        return sorted(self.printed.get(row, row) for row in rows)[:1]

    def _full(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """All that stands under the tables of the tasks, too."""
        cells = [cell for row in rows for cell in row.cells if cell is not None]
        lines = ["Marks compare the cells of a column; cells with holes are not eligible."] * any(c.best for c in cells)
        lines += itertools.chain.from_iterable(captions.tests(name, cells) for name in self._compared())
        blank = any(cell is None for row in rows for cell in row.cells)
        lines += ["A blank: no record of this norm in this setting."] if blank else []
        lines += [f"Without any of these metrics: {_and(self.without)}."] if self.without else []
        said: dict[str, list[str]] = {}
        for pivot in self.pivots:
            at = [i for i, place in enumerate(self.places) if place.pivot is pivot]
            part = [replace(row, cells=tuple(row.cells[i] for i in at)) for row in rows]
            metrics = [place.metric for place in self.places if place.pivot is pivot]
            df = self.singles[(self.singles["task"] == pivot.task) & self.singles["row"].isin(pivot.rows)]
            marks = set(captions.short_caption(pivot, part))
            for line in captions.pivot_caption(pivot, df, part, dict.fromkeys(metrics)):
                if line not in marks:
                    said.setdefault(line, []).append(pivot.task)
        whole = len(self.pivots)
        lines += [line if len(tasks) == whole else f"{_and(tasks)}: {line}" for line, tasks in said.items() if tasks]
        return tuple(lines)


def _telling(pivot: Pivot) -> list[str]:
    """The fewest options that tell a task's settings apart: options that others decide are dropped."""
    names = [option.removeprefix("option.") for option in pivot.varying]
    kept = list(range(len(names))) if len(pivot.blocks) > 1 else []
    leading = {i for i in kept if names[i] in pivot.facts.deciding}
    for i in sorted(kept, key=lambda i: (i in leading, i)):
        less = [j for j in kept if j != i]
        if len({tuple(block[j] for j in less) for block in pivot.blocks}) == len(pivot.blocks):
            kept = less
    return [names[i] for i in kept]


def _too_many(pivot: Pivot) -> str:
    telling = _telling(pivot)
    values = [
        f"{name} ({', '.join(cut(value_text(name, v), 20) for v in distinct(b[place] for b in pivot.blocks))})"
        for name in telling
        for place in [pivot.varying.index(f"option.{name}")]
    ]
    return (
        f'task "{pivot.task}" has {len(pivot.blocks)} settings, {MOST_SETTINGS} fit in a table: '
        f"{', '.join(values)}; choose with where: {pivot.task}.{telling[0]}=VALUE, or let validation select an option"
    )


def _short_labels(norms: Mapping[str, str]) -> dict[str, str]:
    """label -> the norm's name, where no other row has this norm or is called so."""
    count: dict[str, int] = {}
    for norm in norms.values():
        count[norm] = count.get(norm, 0) + 1
    alone = {label: count[norm] == 1 and (norm == label or norm not in norms) for label, norm in norms.items()}
    return {label: norm if alone[label] and len(norm) < len(label) else "" for label, norm in norms.items()}


def _and(names: Iterable[str]) -> str:
    texts = [cut(name, LONGEST_VALUE) for name in names]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
