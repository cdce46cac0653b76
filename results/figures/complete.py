"""The task x setting blocks of a frame in which the same norms have results: what ranks and profiles compare over."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from results import statistics as summary
from results.figures.asked import setting_text
from results.figures.remembered import remembered
from results.figures.words import told
from results.metrics import Metric
from results.rows import natural
from results.tables.pivot import every_pivot
from results.tables.table import Cell


@dataclass(frozen=True)
class CompleteBlock:
    """One task in one setting, by the task's headline metric.

    Attributes:
        task: its name.
        setting: the options that vary, as text; "" if none does.
        metric: the headline.
        cells: norm -> its cell, of every norm that was asked for here.
        seeds: how many any norm has here.
    """

    task: str
    setting: str
    metric: Metric
    cells: dict[str, Cell]
    seeds: int

    @property
    def name(self) -> str:
        """Task and setting, as in 'task, norm_batch_size=2'."""
        return told(f"{self.task}, {self.setting}" if self.setting else self.task)

    def ranks(self, norms: Sequence[str]) -> dict[str, float]:
        """norm -> its rank among these."""
        return summary.rank({norm: self.cells[norm] for norm in norms}, self.metric)


@dataclass(frozen=True)
class Complete:
    """Norms and blocks such that every norm has a result over all seeds in every block.

    Attributes:
        norms: labels, the reference first.
        blocks: in the order of tasks.
        without: norms that are left out -> the number of these blocks in which they have no whole result.
        lacking: blocks that are left out, by name.
        unranked: tasks without a metric that has a direction.
    """

    norms: tuple[str, ...]
    blocks: tuple[CompleteBlock, ...]
    without: dict[str, int]
    lacking: tuple[str, ...]
    unranked: tuple[str, ...]

    @property
    def seeds(self) -> str:
        """'2 seeds', '1 to 3 seeds'."""
        counts = sorted({block.seeds for block in self.blocks}) or [0]
        many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{many} seed{'' if many == '1' else 's'}"

    @property
    def number(self) -> str:
        """'8 blocks of 5 tasks'."""
        counts = ((len(self.blocks), "block"), (len(self.tasks), "task"))
        return " of ".join(f"{n} {what}{'' if n == 1 else 's'}" for n, what in counts)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.task for block in self.blocks))

    @property
    def shared(self) -> bool:
        """Whether blocks share a task, and so its data and even runs."""
        return len(self.blocks) > len(self.tasks)

    @property
    def behind(self) -> int:
        """How many of their cells have diverged or failed runs."""
        cells = [block.cells[norm] for block in self.blocks for norm in self.norms]
        return sum(cell.diverged + cell.failed > 0 for cell in cells)

    def caption(self) -> list[str]:
        """Sentences on what is compared, what is left out, and what blocks are not."""
        said = [f"Blocks: {_listed(_by_task(self.blocks))}; in each a norm counts by its mean over {self.seeds}."]
        if self.without:
            those = [f"{told(norm)} (in {n} of {len(self.blocks)})" for norm, n in self.without.items()]
            said.append(f"Left out, since they lack a whole result in these blocks: {_listed(those)}.")
        if self.lacking:
            said.append(f"Blocks left out, since norms lack a whole result there: {_listed(self.lacking)}.")
        if self.unranked:
            said.append(f"Without a metric to compare by: {_listed(self.unranked)}.")
        if self.shared:
            said.append(
                "Settings of one task share its data, and a norm that does not mix samples its runs in every norm "
                "batch: such blocks are not independent, and differences over them look surer than they are."
            )
        return said


@remembered
def complete_blocks(df: pd.DataFrame, reference: str = "bn") -> Complete:
    """The largest complete part of a frame: whole tasks, and the norms that have a whole result in each block of them.

    A norm has a whole result in a block if each seed of it gave a value, diverged or failed, and not all failed. Of
    the sets of tasks in which some norm is complete, that is taken which, with all norms that are complete in it,
    holds the most norms x blocks (of equal ones that with more blocks). So norms that lack anything are left out, yet
    a task that other norms took part in leaves something to compare. No result has a say in it. Blocks in which no
    norm has a whole result are left out first.

    Args:
        df: from `results.load`, or a part of it.
        reference: label or name of the norm that stands first.
    """
    pivots = every_pivot(df, reference)
    blocks: list[CompleteBlock] = []
    unranked = []
    first: set[str] = set()
    for pivot in pivots:
        first |= {pivot.labels[pivot.reference]} if pivot.reference is not None else set()
        if pivot.facts.headline is None:
            unranked.append(pivot.task)
            continue
        metric = pivot.facts.metric(pivot.facts.headline)
        for block in pivot.blocks:
            cells = {pivot.labels[row]: pivot.cell(row, block, metric) for row in pivot.rows if pivot.asked(row, block)}
            blocks.append(CompleteBlock(pivot.task, setting_text(pivot, block), metric, cells, len(pivot.seeds[block])))
    labels = sorted(
        {label for block in blocks for label in block.cells}, key=lambda name: (name not in first, natural(name))
    )
    whole = {
        label: {i for i, block in enumerate(blocks) if label in block.cells and _whole(block.cells[label])}
        for label in labels
    }
    anywhere = set().union(*whole.values())
    of_task: dict[str, set[int]] = defaultdict(set)
    for i in anywhere:
        of_task[blocks[i].task].add(i)
    complete = {
        label: frozenset(i for places in of_task.values() if places <= whole[label] for i in places) for label in labels
    }

    def size(places: frozenset[int]) -> tuple[int, int, list[int]]:
        norms = sum(places <= found for found in complete.values())
        # one norm is no comparison, however many its blocks
        return (norms * len(places) if norms > 1 else 0, len(places), sorted(places))

    chosen = max(set(complete.values()), key=size, default=frozenset())
    norms = tuple(label for label in labels if chosen and chosen <= complete[label])
    return Complete(
        norms,
        tuple(blocks[i] for i in sorted(chosen)),
        {label: len(chosen - whole[label]) for label in labels if label not in norms},
        tuple(block.name for i, block in enumerate(blocks) if i not in chosen),
        tuple(unranked),
    )


def _whole(cell: Cell) -> bool:
    return summary.has_result(cell) and summary.covers_its_seeds(cell)


def _by_task(blocks: Sequence[CompleteBlock]) -> list[str]:
    """The task, and how many settings it has here, of each."""
    counts = {task: len(list(group)) for task, group in itertools.groupby(blocks, key=lambda block: block.task)}
    return [f"{told(task)} ({n} settings)" if n > 1 else told(task) for task, n in counts.items()]


def _listed(names: Sequence[str], longest: int = 12) -> str:
    """At most so many of them, and how many more there are."""
    more = [f"{len(names) - longest} more"] if len(names) > longest else []
    return ", ".join([*names[:longest], *more])
