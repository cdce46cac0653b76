"""The table over all tasks: the average rank of every norm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd

from results import statistics as summary
from results.metrics import Metric
from results.rows import natural
from results.tables.captions import chosen, domains_name, evidence
from results.tables.pivot import Pivot
from results.tables.table import Cell, Column, Row, Table

RANK = Metric("average_rank", "average rank", "", False, 2, description="Mean rank over settings; 1 is best.")


def ranking_table(df: pd.DataFrame, every: Sequence[Pivot]) -> Table:
    """The table of `results.tables.build.overall_table`, from the arranged runs of every task.

    Args:
        df: the single runs behind them.
        every: one for each task.
    """
    headlines = {pivot.task: pivot.facts.headline for pivot in every}
    pivots = [(pivot, pivot.facts.metric(name)) for pivot in every for name in [headlines[pivot.task]] if name]
    unranked = [task for task, name in headlines.items() if name is None]
    shown = [pivot for pivot, _ in pivots] or every
    norms = {pivot.labels[row]: pivot.norms[row] for pivot in shown for row in pivot.rows}
    first = {label for pivot in shown for label in [pivot.labels.get(str(pivot.reference))] if label}
    labels = sorted(norms, key=lambda label: (label not in first, natural(label)))
    blocks: dict[str, list[dict[str, Cell]]] = {
        pivot.task: [
            {pivot.labels[row]: pivot.cell(row, block, subject) for row in pivot.rows if pivot.asked(row, block)}
            for block in pivot.blocks
        ]
        for pivot, subject in pivots
    }
    directions = {pivot.task: subject for pivot, subject in pivots}
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
        f"Ranked by {', '.join(itertools.starmap(_ranking, pivots))}, each norm by its mean over seeds.",
        "Cells with diverged or failed runs rank behind all others, by their share of such runs.",
        "A norm without a result in some block of a column, or with seeds missing, skipped or unmeasured there, has "
        "no average there, and the others are ranked without it.",
        *(["Blank: no record in any block of the column."] if any(None in row.cells for row in rows) else []),
    ]
    caption = [
        *(ranking if pivots else []),
        *([f"Without a metric to rank by: {', '.join(unranked)}."] if unranked else []),
        *itertools.chain.from_iterable(chosen(pivot, df) for pivot, _ in pivots),
        *evidence(df),
    ]
    short = tuple(ranking[:2] if pivots else caption[:1])
    return Table("overall", "Overall: average rank", tuple(columns), rows, tuple(caption), show_n=False, short=short)


def _ranking(pivot: Pivot, subject: Metric) -> str:
    over = f" (mean over {domains_name(pivot)})" if any(pivot.domains.values()) else ""
    return f"{subject.title}{over} in {pivot.task}"


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
