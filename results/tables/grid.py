"""A table as a paper prints it: heads over columns, labels beside rows, entries, notes. Turned, if it asks for that.

Nothing is escaped here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from results.escape import cut
from results.metrics import Metric
from results.tables.marked import LONGEST_HEADING, LONGEST_LABEL, note_letter, numbers
from results.tables.table import Cell, Row, Table


@dataclass(frozen=True)
class Entry:
    """What stands in one place.

    Attributes:
        mean, std: as printed; "" for none.
        value: the mean in printed units, unrounded; None for none.
        digits: after its decimal point; None where it is not printed so.
        best, second, dagger: marks.
        letters: of footnotes.
        blank: nothing was asked for here, and nothing is printed.
    """

    mean: str = ""
    std: str = ""
    value: float | None = None
    digits: int | None = None
    best: bool = False
    second: bool = False
    dagger: bool = False
    letters: str = ""
    blank: bool = False

    @property
    def suffix(self) -> str:
        """What stands above the line behind the number."""
        return "†" * self.dagger + self.letters


@dataclass(frozen=True)
class Grid:
    """A table's texts.

    Attributes:
        heads: one tuple for each column, of a text for each level; the levels are the same in all.
        labels: one tuple for each row, of a text for each level.
        entries: rows of entries.
        notes: (letter, text).
        corner: what stands over the labels.
        shortened: (short, whole) of the rows' labels that are printed short.
    """

    heads: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    entries: tuple[tuple[Entry, ...], ...]
    notes: tuple[tuple[str, str], ...]
    corner: str
    shortened: tuple[tuple[str, str], ...] = ()


def grid(table: Table, short: bool = False) -> Grid:
    """A table's grid.

    Args:
        table: one without groups of rows.
        short: with abbreviated tasks, and the short texts of columns and, where there are any, of rows.
    """
    letters: dict[str, str] = {}

    def letter(note: str) -> str:
        return letters.setdefault(note, note_letter(len(letters)))

    entries = tuple(
        tuple(
            _entry(row, c.metric, cell, table.spread, letter) for c, cell in zip(table.columns, row.cells, strict=True)
        )
        for row in table.rows
    )
    overs = dict.fromkeys(column.over for column in table.columns)
    texts = _abbreviated(list(overs)) if short and len(overs) > 1 else {name: name.replace("_", " ") for name in overs}
    heads = [(texts[c.over], cut(c.short if short else c.title, LONGEST_HEADING)) for c in table.columns]
    # the heading of a task's only column stands next to its numbers, where there are several levels
    columns = _without_blank_levels([(over, title) if title else ("", over) for over, title in heads])
    shortened = tuple((row.short, row.label) for row in table.rows if short and row.short)
    labels = tuple((_label(row, short),) for row in table.rows)
    made = Grid(columns, labels, entries, tuple((s, note) for note, s in letters.items()), table.heading, shortened)
    return turned(made) if table.transpose else made


def turned(made: Grid) -> Grid:
    """Columns as rows; of equal neighbours on the first level of labels only the first is printed."""
    heads = [head if head[0] else (*head[1:], "") for head in made.heads]
    before = ("", *(head[0] for head in heads))
    labels = tuple(
        ("" if len(head) > 1 and head[0] == last else head[0], *head[1:])
        for head, last in zip(heads, before, strict=False)
    )
    return replace(
        made, heads=made.labels, labels=labels, entries=tuple(zip(*made.entries, strict=True)), corner="task"
    )


def _entry(row: Row, metric: Metric, cell: Cell | None, spread: bool, letter: Callable[[str], str]) -> Entry:
    if cell is None:
        return Entry(blank=True)
    notes = [cell.note] if cell.note else []
    notes += [f"identical to {cell.equals}"] if cell.mean is not None and cell.equals not in ("", row.equals) else []
    mean, std = numbers(metric, cell, spread)
    fixed = mean.removeprefix("-").replace(".", "", 1).isdecimal() and not metric.significant
    return Entry(
        mean,
        std,
        None if cell.mean is None else cell.mean * metric.scale,
        metric.digits if fixed else None,
        cell.best,
        cell.second,
        cell.significant and cell.mean is not None,
        ",".join(letter(note) for note in notes),
    )


def _label(row: Row, short: bool) -> str:
    text = row.short if short and row.short else row.label
    return cut(f"{text} = {row.equals}" if row.equals else text, LONGEST_LABEL)


def _without_blank_levels(heads: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    kept = [level for level in range(len(heads[0])) if any(head[level] for head in heads)]
    return tuple(tuple(head[level] for level in kept) for head in heads)


def _abbreviated(names: Sequence[str]) -> dict[str, str]:
    """Names whose long words are cut; the names of which two would be one stay as they are."""
    cuts = {name: " ".join(map(_cut_word, name.replace("_", " ").split(" "))) for name in names}
    twice = {text for text in cuts.values() if list(cuts.values()).count(text) > 1}
    return {name: name.replace("_", " ") if text in twice else text for name, text in cuts.items()}


def _cut_word(word: str) -> str:
    """alternating -> alt.: cut between a consonant and a vowel, behind the third letter or later."""
    if len(word) <= 5 or not word.isalpha():
        return word
    for end in range(3, 6):
        if word[end - 1].lower() not in "aeiouy" and word[end].lower() in "aeiouy":
            return f"{word[:end]}."
    return word
