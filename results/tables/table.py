"""A finished table as a value: cells, columns, rows. What is in a cell is computed in results.statistics and
results.tables.pivot, what it looks like is decided by its format.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from results.metrics import Metric

HOLES = ("diverged", "failed", "skipped", "missing", "unmeasured")

OptionTexts = tuple[tuple[str, str], ...]
"""(option, value as text) pairs."""


@dataclass(frozen=True)
class Cell:
    """The runs of one norm in one setting, seen through one metric.

    Attributes:
        mean: over the seeds that gave a value (base units); None if there is none.
        std: sample standard deviation (n - 1); None for n < 2.
        n: seeds that gave a value.
        ci95: half the width of the 95 % t-interval; None for n < 2.
        diverged, failed, skipped, missing: seeds that gave none, and why; missing is a seed that another norm has here
            and this one has not, or one without some run that the value needs.
        unmeasured: runs that ended well but hold no value of this metric.
        best, second: by the metric's direction, among the cells it stands with.
        difference, difference_std, difference_n: to the reference norm, paired by seed.
        p: two-sided sign-flip p value of the difference (summary.sign_flip_p); None where it was not tested.
        significant: p < 0.05.
        repeated: the same runs stand in every norm batch.
        equals: name of a norm that this one is identical to here; "" if none.
        reason: why runs failed or were skipped, several reasons separated by semicolons; or why there is no mean.
        keys: the keys of its runs, by seed; of runs folded over held-out domains those of each, joined by "+".
    """

    mean: float | None = None
    std: float | None = None
    n: int = 0
    ci95: float | None = None
    diverged: int = 0
    failed: int = 0
    skipped: int = 0
    missing: int = 0
    unmeasured: int = 0
    best: bool = False
    second: bool = False
    difference: float | None = None
    difference_std: float | None = None
    difference_n: int = 0
    p: float | None = None
    significant: bool = False
    repeated: bool = False
    equals: str = ""
    reason: str = ""
    keys: tuple[str, ...] = ()

    @property
    def holes(self) -> dict[str, int]:
        """The kinds of holes that this cell has, with their numbers."""
        return {kind: getattr(self, kind) for kind in HOLES if getattr(self, kind)}

    @property
    def seeds(self) -> int:
        """The seeds that it should have: n and the holes."""
        return self.n + sum(self.holes.values())

    @property
    def note(self) -> str:
        """'diverged 1/3, missing 1/3', or '' without holes."""
        words = {"unmeasured": "without this metric"}
        text = ", ".join(f"{words.get(kind, kind)} {count}/{self.seeds}" for kind, count in self.holes.items())
        return f"{text} ({self.reason})" if text and self.reason else text or self.reason


@dataclass(frozen=True)
class Column:
    """One column: its metric, its heading, a heading over it and its neighbours, the options that it fixes.

    Attributes:
        task: where it is not the table's.
        short: its heading below `over` where the title is too wide; "" where `over` says enough.
    """

    metric: Metric
    title: str
    over: str = ""
    setting: OptionTexts = ()
    task: str = ""
    short: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: its norm, as people call it.
        cells: one per column; None (a blank) where the column does not apply or nothing was asked for.
        norm: the norm's registered name.
        setting: the options that the row fixes.
        group: heading over the rows of one setting; "" for none.
        notes: footnotes at the label.
        equals: the norm that it is identical to in every setting, printed behind the label.
        short: a label for a place where this one is too wide; "" for none.
    """

    label: str
    cells: tuple[Cell | None, ...]
    norm: str = ""
    setting: OptionTexts = ()
    group: str = ""
    notes: tuple[str, ...] = ()
    equals: str = ""
    short: str = ""


@dataclass(frozen=True)
class Table:
    """What is printed. Rows of one group stand together.

    Attributes:
        name: the stem of its files.
        caption: everything that must be said, in sentences.
        short: the sentences among them without which the numbers can not be read; LaTeX prints these above the table.
        show_n: cells with another number of seeds than the usual one show theirs.
        spread: cells show their standard deviation.
        transpose: the formats of a paper print columns as rows.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: tuple[str, ...] = ()
    task: str = ""
    heading: str = "norm"
    show_n: bool = True
    short: tuple[str, ...] = ()
    spread: bool = True
    transpose: bool = False

    @property
    def usual_n(self) -> int:
        """The commonest number of seeds of a cell, holes included (of two, the larger); other cells show theirs."""
        counts = Counter(cell.seeds for row in self.rows for cell in row.cells if cell is not None)
        return max(counts, key=lambda n: (counts[n], n), default=0)
