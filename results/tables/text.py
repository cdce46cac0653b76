"""Tables as plain text, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from results.escape import columns_of, one_line, spell
from results.tables.marked import LONGEST_SENTENCE, Style, left, marked_grid, right
from results.tables.table import Table

MARKS = ("*%s*", "_%s_")
"""The best and the second."""
NARROWEST = 20
"""Characters of a line at least, whatever the terminal says of itself."""


def to_text(table: Table, width: int | None = None, encoding: str = "utf-8") -> str:
    """The table for a terminal: aligned columns, the best as *x*, the second as _x_.

    Args:
        table: what to print.
        width: characters of a line, 20 or more; columns that do not fit follow below, their rows labelled again, and
            the caption is wrapped. None: no limit.
        encoding: of the terminal; what it lacks is printed in other characters, ± as +- and ↑ as ^.
    """
    return tables_text([table], width, encoding)


def tables_text(
    tables: Sequence[Table], width: int | None = None, encoding: str = "utf-8", marks: tuple[str, str] = MARKS
) -> str:
    """Tables for a terminal, one below the other. What stands under several of them is printed once, after the last.

    Arguments as `to_text`, and marks: of the best and the second, with %s for the number; each of their characters
    counts as one column.
    """
    width = None if width is None else max(width, NARROWEST)
    style = _text_style(encoding, marks)
    homes: dict[str, list[Table]] = {}
    for table in tables:
        for sentence in table.caption:
            homes.setdefault(sentence, []).append(table)
    lines: list[str] = []
    legend: list[str] = []
    for table in tables:
        body, notes = _body(table, width, style)
        own = [style.escape(sentence, LONGEST_SENTENCE) for sentence in table.caption if len(homes[sentence]) == 1]
        if any(cell is not None and cell.best for row in table.rows for cell in row.cells):
            legend = [f"Here the best is {marks[0] % 'so'}, the second {marks[1] % 'so'}."]
        lines += [*body, "", *_wrapped([*own, *notes], width), *([""] if own or notes else [])]
    shared: list[str] = []
    for sentence, where in homes.items():
        if len(where) > 1:
            of = "" if len(where) == len(tables) else ", ".join(dict.fromkeys(t.task or t.name for t in where)) + ": "
            shared.append(style.escape(of + sentence, LONGEST_SENTENCE))
    if shared:
        lines.append("Under several tables:")
    return "\n".join([*lines, *_wrapped([*shared, *legend], width)]).rstrip() + "\n"


def _wrapped(texts: Sequence[str], width: int | None) -> list[str]:
    if width is None:
        return list(texts)
    return [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ")]


def _body(table: Table, width: int | None, style: Style) -> tuple[list[str], list[str]]:
    """Title and cells as lines of text, and the footnotes."""
    grid, notes = marked_grid(table, style)
    widths = [max((columns_of(line[i]) for line in grid if any(line[1:])), default=0) for i in range(len(grid[0]))]
    parts: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if width is not None and parts[-1] and widths[0] + sum(widths[j] + 2 for j in (*parts[-1], i)) > width:
            parts.append([])
        parts[-1].append(i)
    lines = [style.escape(table.title)]
    for part in parts:
        lines.append("")
        for number, line in enumerate(grid):
            if number and not any(line[1:]):  # the heading of a group
                lines += ["", line[0]]
                continue
            lines.append("  ".join([left(line[0], widths[0]), *(right(line[i], widths[i]) for i in part)]).rstrip())
            if not number:
                lines.append("  ".join("-" * widths[i] for i in (0, *part)))
    return lines, notes


def _text_style(encoding: str, marks: tuple[str, str]) -> Style:
    def say(text: str) -> str:
        return spell(text, encoding)

    return Style(lambda text: say(one_line(text)), *marks, "[%s]", say(" ± "), say("—"))
