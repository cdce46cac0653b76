"""A table as Markdown."""

from __future__ import annotations

from results.escape import columns_of, escape_markdown
from results.tables.marked import LONGEST_SENTENCE, Style, left, marked_grid, right
from results.tables.table import Table

_STYLE = Style(escape_markdown, "**%s**", "<ins>%s</ins>", "<sup>%s</sup>", " ± ", "—")


def to_markdown(table: Table) -> str:
    """The table as Markdown (pipes), its caption as a list below it."""
    lines = [f"### {_STYLE.escape(table.title)}", ""]
    grid, notes = marked_grid(table, _STYLE)
    widths = [max(3, *(columns_of(line[i]) for line in grid)) for i in range(len(grid[0]))]
    for number, line in enumerate(grid):
        padded = [
            left(text, w) if i == 0 else right(text, w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
            lines.append(f"| {' | '.join(rule)} |")
    lines += [
        "",
        *(f"- {_STYLE.escape(sentence, LONGEST_SENTENCE)}" for sentence in table.caption),
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"
