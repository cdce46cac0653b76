"""A table's cells as marked-up texts: what LaTeX, Markdown and plain text have in common.

Numbers are rounded here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from results.escape import columns_of, cut
from results.metrics import Metric
from results.tables.table import Cell, Column, Row, Table

LONGEST_LABEL, LONGEST_HEADING, LONGEST_SENTENCE = 160, 400, 4000
"""Characters that are printed of a row's label, of a heading, and of a sentence below a table; CSV has all."""


@dataclass(frozen=True)
class Style:
    """How a format writes a text, marks a cell and says that there is nothing.

    Attributes:
        write: escapes a text.
        best, second, note: with %s for what is marked.
        plus_minus, dash: as they are printed.
    """

    write: Callable[[str], str]
    best: str
    second: str
    note: str
    plus_minus: str
    dash: str

    def escape(self, text: str, longest: int = LONGEST_HEADING) -> str:
        return self.write(cut(text, longest))


def marked_texts(table: Table, style: Style) -> tuple[list[list[str]], list[str]]:
    """Label and cells of every row as text, and the notes that their letters stand for."""
    letters: dict[str, str] = {}

    def letter(note: str) -> str:
        return style.note % letters.setdefault(note, note_letter(len(letters)))

    rows: list[list[str]] = []
    usual_n = table.usual_n if table.show_n else 0
    for row in table.rows:
        label = f"{row.label} = {row.equals}" if row.equals else row.label
        texts = [style.escape(label, LONGEST_LABEL) + "".join(letter(note) for note in row.notes)]
        for column, cell in zip(table.columns, row.cells, strict=True):
            told = (row, column.metric, cell, usual_n, table.spread)
            texts.append(_cell_text(*told, style, letter))
        rows.append(texts)
    return rows, [f"{style.note % short} {style.escape(note)}" for note, short in letters.items()]


def numbers(metric: Metric, cell: Cell, spread: bool = True) -> tuple[str, str]:
    """A cell's mean and its standard deviation as printed; "" for what it has not or does not show."""
    if cell.mean is None:
        return "", ""
    # a count that never varies needs no ±
    shown = spread and (cell.std or (cell.std == 0 and metric.higher_is_better is not None))
    return metric.text(cell.mean), metric.text(cell.std) if shown and cell.std is not None else ""


def _cell_text(
    row: Row,
    metric: Metric,
    cell: Cell | None,
    usual_n: int,
    spread: bool,
    style: Style,
    letter: Callable[[str], str],
) -> str:
    if cell is None:
        return ""
    text = style.dash
    if cell.mean is not None:
        mean, std = numbers(metric, cell, spread)
        text = style.escape(mean)
        if std:
            text += style.plus_minus + style.escape(std)
        text = style.best % text if cell.best else style.second % text if cell.second else text
        text += style.escape("†") if cell.significant else ""
        # where a footnote counts the holes, n is what they leave
        text += f" (n={cell.n})" if usual_n not in (0, cell.seeds) else ""
        text += f" = {style.escape(cell.equals)}" if cell.equals and cell.equals != row.equals else ""
    return text + (letter(cell.note) if cell.note else "")


def marked_grid(table: Table, style: Style) -> tuple[list[list[str]], list[str]]:
    """Headings, headings of groups, and rows as lines of texts, and the footnotes."""
    rows, notes = marked_texts(table, style)
    repeat = table.transpose  # below each other, headings are read one by one
    over = [
        f"{c.over}: {c.title}" if c.over and (repeat or c.over != b) else c.title
        for c, b in _with_before(table.columns)
    ]
    grid = [[style.escape(t) for t in (table.heading, *over)]]
    before = ""
    for row, texts in zip(table.rows, rows, strict=True):
        if row.group and row.group != before:
            grid.append([style.escape(row.group), *[""] * len(table.columns)])
        before = row.group
        grid.append(texts)
    return [list(line) for line in zip(*grid, strict=True)] if table.transpose else grid, notes


def _with_before(columns: Sequence[Column]) -> list[tuple[Column, str]]:
    return list(zip(columns, ["", *(c.over for c in columns)], strict=False))


def left(text: str, width: int) -> str:
    return text + " " * (width - columns_of(text))


def right(text: str, width: int) -> str:
    return " " * (width - columns_of(text)) + text


def note_letter(index: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa: as spreadsheets count columns."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("a") + rest) + text
    return text
