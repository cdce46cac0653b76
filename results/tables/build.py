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
from results.frame import HELD_OUT, NORM_BATCH, distinct, natural
from results.metrics import METRICS, Metric, metric, metric_or_plain, nearest, primary_metric
from results.selection import select
from results.tables.captions import chosen, evidence, grid_caption
from results.tables.pivot import (
    LONGEST_VALUE,
    OUTCOME,
    Block,
    Grid,
    current,
    option_columns,
    present_metrics,
    value_text,
    without,
)
from results.tables.render import FORMATS, latex_document, to_csv, to_latex, to_markdown, to_text, write_tables
from results.tables.table import Cell, Column, Row, Setting, Table

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

REFERENCE = "bn"
AUTO_SWEEPS = (NORM_BATCH, "batch_size", "learning_rate")
RANK = Metric("average_rank", "average rank", "", False, 2, description="Mean rank over settings; 1 is best.")
REPEATED = "does not mix samples: the same runs stand in every norm batch"


def render_all(
    df: pd.DataFrame,
    select: str | None = None,
    metrics: Sequence[str] | None = None,
    sweep: str | Sequence[str] | None = None,
    reference: str = REFERENCE,
) -> list[Table]:
    """Every table that a frame supports: per task one table and its sweeps, then the overall ranking.

    Args:
        df: from `results.load`, or a part of it.
        select: a task option; each norm's value is chosen by validation on seeds that the tables then leave out.
        metrics: columns of the task tables and subjects of the sweeps; None: all, and the task's primary metric.
        sweep: task or norm options that become columns; None: norm batch, SGD batch and learning rate, each where it
            varies while all other options stay.
        reference: label or name of the norm that others are compared with.

    Raises:
        ValueError: no runs; unknown metric or option (with the nearest); what `select` refuses.
    """
    df = _some_runs(df)
    measured = present_metrics(_derived(df)) if metrics else []
    for name in metrics or ():
        if name not in measured:
            metric(name)  # a known metric that no run here measured is another mistake than an unknown one
            raise ValueError(f'no run here measured "{name}"; measured: {", ".join(measured) or "nothing"}')
    asked = [sweep] if isinstance(sweep, str) else list(sweep or ())
    for option in asked:
        _sweepable(df, option)
    if select is not None:
        df = selection.select(df, select)
    whole = _derived(df)
    result: list[Table] = []
    grids = []
    for task in distinct(df["task"]):
        part = df[df["task"] == task]
        grid = Grid(whole[whole["task"] == task], reference)
        grids.append(grid)
        names = [m for m in grid.metrics if metrics is None or m.name in metrics]
        if names or metrics is None or not grid.metrics:
            result.append(_task_table(grid, part, names))
        swept = [o for o in asked if _options_of(part, o)]
        if sweep is None:
            swept = [o for o in AUTO_SWEEPS if grid.sweeps(o)]
        primary = primary_metric(task, [m.name for m in grid.metrics])
        subjects = names if metrics is not None else [m for m in grid.metrics if m.name == primary]
        single = present_metrics(part)
        for option, subject in itertools.product(swept, subjects):
            if option == HELD_OUT and subject.name not in single:
                continue  # it takes the runs of all domains
            if f"option.{option}" in grid.varying:
                result.append(_sweep_table(grid, part, option, subject))
            else:
                result.append(sweep_table(part, option, subject.name, reference))
    return [*result, _overall_table(df, grids)]


def task_table(df: pd.DataFrame, metrics: Sequence[str] | None = None, reference: str = REFERENCE) -> Table:
    """Norms by metrics, one group of rows per setting (combination of the options that vary). `df`: one task's runs.

    Raises:
        ValueError: no runs, runs of several tasks, or an unknown metric (with the nearest).
    """
    df = _one_task(df)
    whole = _derived(df)
    grid = Grid(whole, reference)
    return _task_table(grid, df, grid.metrics if metrics is None else [_subject(whole, name) for name in metrics])


def sweep_table(df: pd.DataFrame, option: str, metric_name: str | None = None, reference: str = REFERENCE) -> Table:
    """Norms by the values of one option, for one metric; a group of rows per setting of the other options that vary.

    Args:
        df: one task's runs.
        option: a task option (with "learning_rate" this is the sensitivity table; with "held_out" its values are those
            of single runs), or a norm option such as "num_groups": then the norms that have it take part, and their
            rows are told apart by the others.
        metric_name: None: the task's primary metric.
        reference: as in `render_all`.

    Raises:
        ValueError: no runs, runs of several tasks, an unknown option or metric (with the nearest).
    """
    df = _one_task(df)
    _sweepable(df, option)
    task = str(df["task"].iloc[0])
    column = f"option.{option}"
    of_norm = column not in option_columns(df)
    whole = _derived(df, fold=option != HELD_OUT)
    name = metric_name or primary_metric(task, present_metrics(whole))
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
        whole = _derived(df)
    return _sweep_table(Grid(whole, reference, always=column), df, option, subject)


def _sweep_table(grid: Grid, df: pd.DataFrame, option: str, subject: Metric) -> Table:
    column = f"option.{option}"
    place = grid.varying.index(column)
    apply = [block for block in grid.blocks if grid.applies(block, subject)] or grid.blocks
    values = list(dict.fromkeys(v for v in distinct(block[place] for block in apply)))
    texts = [value_text(option, v) for v in values]
    columns = tuple(Column(subject, cut(text, LONGEST_VALUE), option, ((option, text),)) for text in texts)
    others = [*grid.varying[:place], *grid.varying[place + 1 :]]
    rows: list[Row] = []
    for group in dict.fromkeys(without(block, place) for block in apply):
        blocks = [(*group[:place], v, *group[place:]) for v in values]
        here = [row for row in grid.rows if any(grid.asked(row, block) for block in blocks)]
        shown = [grid.applies(b, subject) for b in blocks]
        cells = [
            [
                grid.cell(row, b, subject) if s and grid.asked(row, b) else None
                for b, s in zip(blocks, shown, strict=True)
            ]
            for row in here
        ]
        rows += _rows(grid, here, cells, [subject] * len(blocks), _setting(others, group), _kinds(grid, blocks))
    title = f"{grid.task}: {subject.heading} by {option}" + (" (sensitivity)" if option == "learning_rate" else "")
    caption = grid_caption(grid, df, rows, [subject])
    name = f"{grid.task}_by_{option}_{subject.name}"
    return Table(name, title, columns, _hoist_equals(rows), caption, grid.task)


def overall_table(df: pd.DataFrame, reference: str = REFERENCE) -> Table:
    """Average rank of every norm over task x setting blocks, by each task's primary metric; a column per task too.

    Ranks as `summary.rank`. An average is given only to norms with a result in every block of a column and no seed
    missing there, and they are ranked against each other only: all averages of a column are over the same blocks and
    seeds, and against the same rivals. Without anything to rank by, one column says so.

    Raises:
        ValueError: no runs.
    """
    df = _some_runs(df)
    whole = _derived(df)
    return _overall_table(df, [Grid(whole[whole["task"] == task], reference) for task in distinct(df["task"])])


def _overall_table(df: pd.DataFrame, every: Sequence[Grid]) -> Table:
    primary = {grid.task: primary_metric(grid.task, [m.name for m in grid.metrics]) for grid in every}
    grids = [(grid, METRICS[name]) for grid in every for name in [primary[grid.task]] if name is not None]
    unranked = [task for task, name in primary.items() if name is None]
    shown = [grid for grid, _ in grids] or every
    norms = {grid.labels[row]: grid.norms[row] for grid in shown for row in grid.rows}
    first = {label for grid in shown for label in [grid.labels.get(str(grid.reference))] if label}
    labels = sorted(norms, key=lambda label: (label not in first, natural(label)))
    blocks: dict[str, list[dict[str, Cell]]] = {
        grid.task: [
            {grid.labels[row]: grid.cell(row, block, subject) for row in grid.rows if grid.asked(row, block)}
            for block in grid.blocks
        ]
        for grid, subject in grids
    }
    directions = {grid.task: subject for grid, subject in grids}
    parts = {"all tasks": list(blocks)} if len(blocks) != 1 else {}
    parts |= {task: [task] for task in blocks}
    columns, cells = [], []
    for name, tasks in parts.items():
        entries = [(directions[task], block) for task in tasks for block in blocks[task]]
        columns.append(Column(RANK, f"{name} ({len(entries)} setting{'s' if len(entries) != 1 else ''})"))
        ranks = _average_ranks(labels, entries) if entries else [Cell(reason="nothing to rank by")] * len(labels)
        cells.append(ranks)
    same = {
        label: {b[label].equals for entries in blocks.values() for b in entries if label in b and b[label].n}
        for label in labels
    }
    rows = tuple(
        Row(label, tuple(c[i] for c in cells), norms[label], equals=same[label].pop() if len(same[label]) == 1 else "")
        for i, label in enumerate(labels)
    )
    ranking = [
        "Average rank over task × setting blocks, 1 is best (± standard deviation over blocks, n = blocks).",
        f"Ranked by {', '.join(_ranking(grid, subject) for grid, subject in grids)}, each norm by its mean over seeds.",
        "Cells with diverged or failed runs rank behind all others, by their share of such runs.",
        "A norm without a result in some block of a column, or with seeds missing, skipped or unmeasured there, has "
        "no average there, and the others are ranked without it.",
        *(["Blank: no record in any block of the column."] if any(None in row.cells for row in rows) else []),
    ]
    caption = [
        *(ranking if grids else []),
        *([f"Without a metric to rank by: {', '.join(unranked)}."] if unranked else []),
        *itertools.chain.from_iterable(chosen(grid, df) for grid, _ in grids),
        *evidence(df),
    ]
    return Table("overall", "Overall: average rank", tuple(columns), rows, tuple(caption), show_n=False)


def _ranking(grid: Grid, subject: Metric) -> str:
    over = " (mean over held-out domains)" if any(grid.domains.values()) else ""
    return f"{subject.title}{over} in {grid.task}"


def _average_ranks(labels: Sequence[str], entries: Sequence[tuple[Metric, dict[str, Cell]]]) -> list[Cell | None]:
    """One cell per label (None if in no block): the mean rank over the blocks (metric, label -> cell), n = blocks."""
    found = {label: [block[label] for _, block in entries if label in block] for label in labels}
    complete = [label for label in labels if sum(map(_rankable, found[label])) == len(entries)]
    ranks = [summary.rank({label: block[label] for label in complete}, subject) for subject, block in entries]
    result: list[Cell | None] = []
    for label in labels:
        if not found[label]:
            result.append(None)
            continue
        if label not in complete:
            result.append(Cell(reason=_lacking(found[label], len(entries))))
            continue
        if len(complete) < 2:
            result.append(Cell(reason="no other norm has a result over all seeds in every setting"))
            continue
        mean, std, n, ci95 = summary.summarize(rank[label] for rank in ranks)
        result.append(Cell(mean=mean, std=std, n=n, ci95=ci95))
    return summary.mark(result, RANK)


def _lacking(found: Sequence[Cell], settings: int) -> str:
    """Why there is no average: of so many settings some have no result, some not all seeds, some no record at all."""
    empty = sum(not summary.has_result(cell) for cell in found)
    partly = sum(not _rankable(cell) for cell in found) - empty
    numbers = (
        ("no result", empty),
        ("seeds missing, skipped or unmeasured", partly),
        ("no record", settings - len(found)),
    )
    parts = [f"{what} in {n}" for what, n in numbers if n]
    return f"{' and '.join(parts)} of {settings} settings"


def _rankable(cell: Cell) -> bool:
    return summary.has_result(cell) and summary.covers_its_seeds(cell)


def _task_table(grid: Grid, df: pd.DataFrame, metrics: Sequence[Metric]) -> Table:
    if not grid.metrics:  # no run ended well: the rows say what happened instead
        metrics = [OUTCOME]
    rows: list[Row] = []
    for block in grid.blocks:
        here = [row for row in grid.rows if grid.asked(row, block)]
        shown = [grid.applies(block, subject) for subject in metrics]
        cells = [
            [grid.cell(row, block, subject) if s else None for subject, s in zip(metrics, shown, strict=True)]
            for row in here
        ]
        rows += _rows(grid, here, cells, metrics, _setting(grid.varying, block), _kinds(grid, [block]))
    columns = tuple(Column(subject, subject.heading) for subject in metrics)
    caption = grid_caption(grid, df, rows, metrics)
    return Table(grid.task, grid.task, columns, _hoist_equals(rows), caption, grid.task)


def _rows(
    grid: Grid,
    names: Sequence[str],
    cells: Sequence[Sequence[Cell | None]],
    metrics: Sequence[Metric],
    setting: Setting,
    kinds: set[str],
) -> list[Row]:
    """The rows of one group, each column's best and second marked."""
    marked = [summary.mark([line[i] for line in cells], subject) for i, subject in enumerate(metrics)]
    # what the data set or the method implies stands in the caption
    given = {k for k, _ in setting}
    implied = {option for deciding, options in grid.implied.items() if deciding in given for option in options}
    heading = ", ".join(f"{k}={cut(v, LONGEST_VALUE)}" for k, v in setting if k not in implied)
    if heading and len(kinds) == 1 and len(_kinds(grid, grid.blocks)) > 1:
        heading += f" [{next(iter(kinds))} data]"
    return [
        Row(
            label=grid.labels[name],
            cells=tuple(column[i] for column in marked),
            norm=grid.norms[name],
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


def _setting(options: Sequence[str], block: Block) -> Setting:
    names = [o.removeprefix("option.") for o in options]
    return tuple((name, value_text(name, value)) for name, value in zip(names, block, strict=True))


def _kinds(grid: Grid, blocks: Iterable[Block]) -> set[str]:
    """Kinds of data ("real", "synthetic") of the runs in these blocks."""
    inside = set(blocks)
    found = {str(r["data"] or "") for (_, b), runs in grid.runs.items() if b in inside for r in runs.values()}
    return found - {""}


def _derived(df: pd.DataFrame, fold: bool = True) -> pd.DataFrame:
    """The runs with the metrics that need several of them; after any selection, which works on single runs."""
    df = derived.with_gain(df)
    return derived.fold_held_out(df) if fold else df


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
    return metric_or_plain(name) if name in present_metrics(df) else metric(name)


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
