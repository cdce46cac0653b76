"""DataFrame -> comparison tables. Pure functions of a frame made by `results.load`.

What holds in every table:
- A cell is the mean over seeds, with the sample standard deviation (n - 1). Nothing is averaged over settings.
- Holes are never hidden: diverged, failed, skipped and missing runs are counted at the cell. What was asked for is read
  from the records, since nothing else is stored: a norm was asked for in a setting if any of its runs left a record
  there, a failed or skipped one included, and of such a norm each seed is missing that only others have there. A norm
  without any record in a setting has no row there (a blank where settings are columns) and is no hole; the caption
  counts these pairs, since a run that is asked for and not yet begun leaves no record either.
- The best mean is bold, the next distinct one underlined, by the metric's direction; equal means tie. A cell with
  holes is never marked: its mean is that of the runs which survived, or over other seeds than the others'.
- Differences to the reference norm are paired by seed, with the sign-flip p value, not corrected for the number of
  comparisons. Up to 20 pairs it is exact and can not fall below 2 / 2^n, so five seeds or fewer never carry a mark;
  beyond, it is that of sampled flips. The caption says which.
- The overall table ranks norms over the same settings and seeds only: one that lacks some has no rank.
- A task without one good run has a table too: its rows say what happened instead.
- Where a task holds out one domain after the other, a seed's value is the mean over all of them (results.derived). Only
  the sweep over `held_out` shows single runs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pandas as pd

from results import derived, selection
from results import statistics as summary
from results.escape import cut
from results.facts import every_task, present_metrics, task_facts
from results.frame import NORM_BATCH
from results.metrics import Metric, metric, nearest
from results.rows import current, distinct, option_columns, value_text
from results.selection import select
from results.tables.captions import pivot_caption, short_caption
from results.tables.csv import to_csv
from results.tables.latex import latex_document, to_latex
from results.tables.markdown import to_markdown
from results.tables.overall import ranking_table
from results.tables.pivot import (
    LONGEST_VALUE,
    OUTCOME,
    REFERENCE,
    Block,
    Pivot,
    without,
)
from results.tables.table import Cell, Column, OptionTexts, Row, Table
from results.tables.text import to_text
from results.tables.writing import FORMATS, write_tables

__all__ = [
    "FORMATS",
    "Table",
    "latex_document",
    "overall_table",
    "render_all",
    "select",
    "sweep_table",
    "task_table",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_text",
    "write_tables",
]

AUTO_SWEEPS = (NORM_BATCH, "batch_size", "learning_rate")
REPEATED = "does not mix samples: the same runs stand in every norm batch"


def render_all(
    df: pd.DataFrame,
    select: str | None = None,
    metrics: Sequence[str] | None = None,
    sweep: str | Sequence[str] | None = None,
    reference: str = REFERENCE,
    digits: int | None = None,
) -> list[Table]:
    """Every table that a frame supports: per task one table and its sweeps, then the overall ranking.

    Args:
        df: from `results.load`, or a part of it.
        select: a task option; each norm's value is chosen by validation on seeds that the tables then leave out.
        metrics: columns of the task tables and subjects of the sweeps; None: all, and the task's headline metric.
        sweep: task or norm options that become columns; None: norm batch, SGD batch and learning rate, each where it
            varies while all other options stay.
        reference: label or name of the norm that others are compared with.
        digits: after the decimal point, of every metric that has a direction; None: each metric's own.

    Raises:
        ValueError: no runs; unknown metric or option (with the nearest); what `select` refuses.
    """
    df = _some_runs(df)
    measured = present_metrics(derived.with_derived(df)) if metrics else []
    for name in metrics or ():
        if name not in measured:
            metric(name)  # a known metric that no run here measured is another mistake than an unknown one
            raise ValueError(f'no run here measured "{name}"; measured: {", ".join(measured) or "nothing"}')
    asked = [sweep] if isinstance(sweep, str) else list(sweep or ())
    for option in asked:
        _sweepable(df, option)
    if select is not None:
        df = selection.select(df, select)
    whole = derived.with_derived(df)
    result: list[Table] = []
    pivots = []
    for task in distinct(df["task"]):
        part = df[df["task"] == task]
        pivot = Pivot(whole[whole["task"] == task], reference)
        pivots.append(pivot)
        names = [m for m in pivot.metrics if metrics is None or m.name in metrics]
        if names or metrics is None or not pivot.metrics:
            result.append(_task_table(pivot, part, names))
        swept = [o for o in asked if _options_of(part, o)]
        if sweep is None:
            swept = [o for o in AUTO_SWEEPS if pivot.sweeps(o)]
        headline = pivot.facts.headline
        subjects = names if metrics is not None else [m for m in pivot.metrics if m.name == headline]
        single = present_metrics(part)
        for option, subject in itertools.product(swept, subjects):
            if option == pivot.facts.folds_over and subject.name not in single:
                continue  # it takes the runs of all domains
            if f"option.{option}" in pivot.varying:
                result.append(_sweep_table(pivot, part, option, subject))
            else:
                result.append(sweep_table(part, option, subject.name, reference))
    if digits is not None:
        result = [replace(t, columns=tuple(_with_digits(c, digits) for c in t.columns)) for t in result]
    return [*result, ranking_table(df, pivots)]


def task_table(df: pd.DataFrame, metrics: Sequence[str] | None = None, reference: str = REFERENCE) -> Table:
    """Norms by metrics, one group of rows per setting (combination of the options that vary). `df`: one task's runs.

    Raises:
        ValueError: no runs, runs of several tasks, or an unknown metric (with the nearest).
    """
    df = _one_task(df)
    whole = derived.with_derived(df)
    pivot = Pivot(whole, reference)
    return _task_table(pivot, df, pivot.metrics if metrics is None else [_subject(whole, name) for name in metrics])


def sweep_table(df: pd.DataFrame, option: str, metric_name: str | None = None, reference: str = REFERENCE) -> Table:
    """Norms by the values of one option, for one metric; a group of rows per setting of the other options that vary.

    Args:
        df: one task's runs.
        option: a task option (with "learning_rate" this is the sensitivity table; with "held_out" its values are those
            of single runs), or a norm option such as "num_groups": then the norms that have it take part, and their
            rows are told apart by the others.
        metric_name: None: the task's headline metric.
        reference: as in `render_all`.

    Raises:
        ValueError: no runs, runs of several tasks, an unknown option or metric (with the nearest).
    """
    df = _one_task(df)
    _sweepable(df, option)
    task = str(df["task"].iloc[0])
    column = f"option.{option}"
    of_norm = column not in option_columns(df)
    whole = derived.with_derived(df, fold=option != task_facts(df, task).folds_over)
    name = metric_name or task_facts(whole, task).headline
    if name is None:
        known = present_metrics(whole)
        raise ValueError(
            f'task "{task}" has no metric with a direction; name one of {", ".join(known)}'
            if known
            else f'task "{task}": no run has a metric to tabulate'
        )
    subject = _subject(whole, name)
    if of_norm:
        df = _norm_option_as_option(df, option)
        whole = derived.with_derived(df)
    return _sweep_table(Pivot(whole, reference, always=column), df, option, subject)


def _sweep_table(pivot: Pivot, df: pd.DataFrame, option: str, subject: Metric) -> Table:
    column = f"option.{option}"
    place = pivot.varying.index(column)
    apply = [block for block in pivot.blocks if pivot.applies(block, subject)] or pivot.blocks
    values = list(dict.fromkeys(v for v in distinct(block[place] for block in apply)))
    texts = [value_text(option, v) for v in values]
    columns = tuple(Column(subject, cut(text, LONGEST_VALUE), option, ((option, text),)) for text in texts)
    others = [*pivot.varying[:place], *pivot.varying[place + 1 :]]
    rows: list[Row] = []
    for group in dict.fromkeys(without(block, place) for block in apply):
        blocks = [(*group[:place], v, *group[place:]) for v in values]
        here = [row for row in pivot.rows if any(pivot.asked(row, block) for block in blocks)]
        shown = [pivot.applies(b, subject) for b in blocks]
        cells = [
            [
                pivot.cell(row, b, subject) if s and pivot.asked(row, b) else None
                for b, s in zip(blocks, shown, strict=True)
            ]
            for row in here
        ]
        rows += _rows(pivot, here, cells, [subject] * len(blocks), _setting(others, group), _kinds(pivot, blocks))
    title = f"{pivot.task}: {subject.heading} by {option}" + (" (sensitivity)" if option == "learning_rate" else "")
    caption = pivot_caption(pivot, df, rows, [subject])
    name = f"{pivot.task}_by_{option}_{subject.name}"
    short = short_caption(pivot, rows)
    return Table(name, title, columns, _hoist_equals(rows), caption, pivot.task, short=short)


def overall_table(df: pd.DataFrame, reference: str = REFERENCE) -> Table:
    """Average rank of every norm over task x setting blocks, by each task's headline metric; a column per task too.

    Ranks as `summary.rank`. An average is given only to norms with a result in every block of a column and no seed
    missing there, and they are ranked against each other only: all averages of a column are over the same blocks and
    seeds, and against the same rivals. Without anything to rank by, one column says so.

    Raises:
        ValueError: no runs.
    """
    df = _some_runs(df)
    whole = derived.with_derived(df)
    return ranking_table(df, [Pivot(whole[whole["task"] == task], reference) for task in distinct(df["task"])])


def _task_table(pivot: Pivot, df: pd.DataFrame, metrics: Sequence[Metric]) -> Table:
    if not pivot.metrics:  # no run ended well: the rows say what happened instead
        metrics = [OUTCOME]
    rows: list[Row] = []
    for block in pivot.blocks:
        here = [row for row in pivot.rows if pivot.asked(row, block)]
        shown = [pivot.applies(block, subject) for subject in metrics]
        cells = [
            [pivot.cell(row, block, subject) if s else None for subject, s in zip(metrics, shown, strict=True)]
            for row in here
        ]
        rows += _rows(pivot, here, cells, metrics, _setting(pivot.varying, block), _kinds(pivot, [block]))
    columns = tuple(Column(subject, subject.heading) for subject in metrics)
    caption = pivot_caption(pivot, df, rows, metrics)
    short = short_caption(pivot, rows)
    return Table(pivot.task, pivot.task, columns, _hoist_equals(rows), caption, pivot.task, short=short)


def _with_digits(column: Column, digits: int) -> Column:
    return replace(column, metric=column.metric.with_digits(digits))


def _rows(
    pivot: Pivot,
    names: Sequence[str],
    cells: Sequence[Sequence[Cell | None]],
    metrics: Sequence[Metric],
    setting: OptionTexts,
    kinds: set[str],
) -> list[Row]:
    """The rows of one group, each column's best and second marked."""
    marked = [summary.mark([line[i] for line in cells], subject) for i, subject in enumerate(metrics)]
    # what the data set or the method implies stands in the caption
    given = {k for k, _ in setting}
    implied = {option for deciding, options in pivot.implied.items() if deciding in given for option in options}
    heading = ", ".join(f"{k}={cut(v, LONGEST_VALUE)}" for k, v in setting if k not in implied)
    if heading and len(kinds) == 1 and len(_kinds(pivot, pivot.blocks)) > 1:
        heading += f" [{next(iter(kinds))} data]"
    return [
        Row(
            label=pivot.labels[name],
            cells=tuple(column[i] for column in marked),
            norm=pivot.norms[name],
            setting=setting,
            group=heading,
            notes=(REPEATED,) if any(cell is not None and cell.repeated for cell in cells[i]) else (),
        )
        for i, name in enumerate(names)
    ]


def _hoist_equals(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Where a row's norm is identical to another in every cell of the table that has a mean, its label says so."""
    same: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        same[row.label] |= {cell.equals for cell in row.cells if cell is not None and cell.mean is not None}
    return tuple(replace(row, equals=next(iter(same[row.label]))) if len(same[row.label]) == 1 else row for row in rows)


def _setting(options: Sequence[str], block: Block) -> OptionTexts:
    names = [o.removeprefix("option.") for o in options]
    return tuple((name, value_text(name, value)) for name, value in zip(names, block, strict=True))


def _kinds(pivot: Pivot, blocks: Iterable[Block]) -> set[str]:
    """Kinds of data ("real", "synthetic") of the runs in these blocks."""
    return set().union(*(pivot.kinds.get(block, ()) for block in blocks))


def _some_runs(df: pd.DataFrame) -> pd.DataFrame:
    df = current(df)
    if df.empty:
        stale = sum(df.attrs.get("stale", {}).values())
        why = f"; left out, of other versions or data than were planned last: {stale} records" if stale else ""
        raise ValueError(f"no runs to tabulate{why}")
    return df


def _one_task(df: pd.DataFrame) -> pd.DataFrame:
    df = current(df)
    tasks = distinct(df["task"]) if len(df) else []
    if len(tasks) != 1:
        raise ValueError(f"a frame of one task is needed; this one has {', '.join(tasks) or 'no runs'}")
    return df


def _subject(df: pd.DataFrame, name: str) -> Metric:
    (facts,) = every_task(df).values()
    return facts.metric(name) if name in facts.present else metric(name)


def _options_of(df: pd.DataFrame, option: str) -> list[str]:
    """The columns, of a task option or else of a norm option, that hold this option's values."""
    columns = [c for c in (f"option.{option}", f"norm.{option}") if c in df.columns]
    return [c for c in columns if not df[c].isna().all()][:1]


def _sweepable(df: pd.DataFrame, option: str) -> None:
    if not _options_of(df, option):
        columns = [c for c in map(str, df.columns) if c.startswith(("option.", "norm.")) and not df[c].isna().all()]
        known = list(dict.fromkeys(c.partition(".")[2] for c in columns))
        raise ValueError(f'unknown option "{option}"; options: {", ".join(known)}{nearest(option, known)}')


def _norm_option_as_option(df: pd.DataFrame, option: str) -> pd.DataFrame:
    """The runs whose norm has this option, with it among the settings and no longer in the rows' identity."""
    column = f"norm.{option}"
    attrs = df.attrs
    df = df[df[column].notna()].copy()
    others = [c for c in map(str, df.columns) if c.startswith("norm.") and c != column]
    varying = [
        c for c in others if c != f"norm.{NORM_BATCH}" and any(len(distinct(g)) > 1 for _, g in df.groupby("norm")[c])
    ]
    identity = []
    for norm, values in zip(df["norm"].tolist(), df[varying].astype(object).values.tolist(), strict=True):
        pairs = [f"{c.partition('.')[2]}={v}" for c, v in zip(varying, values, strict=True) if not pd.isna(v)]
        identity.append(f"{norm}({', '.join(pairs)})" if pairs else str(norm))
    df["row"] = df["norm_label"] = identity
    df[f"option.{option}"] = df[column]
    df.attrs = attrs
    return df
