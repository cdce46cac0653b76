"""A table as HTML: a native <table>, to stand in any page.

A cell with a mean has `data-value`, the mean in full precision and base units. Which runs stand behind a cell is in
`data-runs`: on the row where all its cells have the same, else on the cell.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from results.escape import one_line
from results.tables.marked import LONGEST_SENTENCE, Style, marked_texts
from results.tables.table import Cell, Column, Row, Table

SHORT = ("Values: ", "Runs: ", "No run here ", "Left out", "No significance ")
"""How the sentences begin that a reader needs before any number: n, holes, and what n can not support."""


def escape_html(text: str) -> str:
    """Any text as HTML, inside an attribute's quotes too: one line, what does not show as U+XXXX."""
    return html.escape(one_line(text))


_STYLE = Style(escape_html, "<strong>%s</strong>", "<u>%s</u>", "<sup>%s</sup>", " ± ", "—")


def short_caption(table: Table) -> tuple[str, ...]:
    """The sentences of a caption that say n, holes and what n can not support; the first one where none does."""
    return tuple(s for s in table.caption if s.startswith(SHORT)) or table.caption[:1]


def spaced(keys: Sequence[str]) -> str:
    """Keys as a cell's `data-runs` has them by default."""
    return " ".join(keys)


def to_html(
    table: Table,
    links: Mapping[str, str] | None = None,
    runs: Callable[[Sequence[str]], str] = spaced,
    most: int | None = None,
) -> str:
    """The table as one <table> element, its title and short caption as <caption>, footnotes and the other sentences
    below it as <ul>.

    Args:
        table: what to write.
        links: row label -> address; such a label is a link.
        runs: a cell's keys (`Cell.keys`) -> its `data-runs`; "" for none.
        most: rows that are shown; None: all. Marks and footnotes are those of the whole table.
    """
    body, notes = html_table(table, links, runs, most)
    short = short_caption(table)
    below = [*(_STYLE.escape(s, LONGEST_SENTENCE) for s in table.caption if s not in short), *notes]
    return body + ("\n<ul>\n" + "\n".join(f"<li>{line}</li>" for line in below) + "\n</ul>" if below else "") + "\n"


def html_table(
    table: Table,
    links: Mapping[str, str] | None = None,
    runs: Callable[[Sequence[str]], str] = spaced,
    most: int | None = None,
) -> tuple[str, list[str]]:
    """The <table> element alone, and its footnotes as HTML. Arguments: as of `to_html`."""
    marked, notes = marked_texts(table, _STYLE)
    short = " ".join(_STYLE.escape(s, LONGEST_SENTENCE) for s in short_caption(table))
    parts = [f"<table>\n<caption><b>{_STYLE.escape(table.title)}</b> <span>{short}</span></caption>"]
    parts += ["<thead>", *_head(table), "</thead>"]
    pairs = list(zip(table.rows, marked, strict=True))[:most]
    for group, rows in itertools.groupby(pairs, key=lambda pair: pair[0].group):
        parts.append("<tbody>")
        if group:
            width = len(table.columns) + 1
            heading = f'<th colspan="{width}" scope="rowgroup"><span>{_STYLE.escape(group)}</span></th>'
            parts.append(f'<tr class="group">{heading}</tr>')
        parts += [_row(row, texts, links or {}, runs) for row, texts in rows]
        parts.append("</tbody>")
    parts.append("</table>")
    return "\n".join(parts), notes


def _head(table: Table) -> list[str]:
    lines = []
    if any(column.over for column in table.columns):
        spans = [(over, len(list(same))) for over, same in itertools.groupby(c.over for c in table.columns)]
        cells = [
            f'<th colspan="{n}" scope="colgroup">{_STYLE.escape(over)}</th>' if over else f'<td colspan="{n}"></td>'
            for over, n in spans
        ]
        lines.append(f'<tr class="over"><td></td>{"".join(cells)}</tr>')
    return [*lines, f"<tr>{_heading(table.heading)}{''.join(_heading(c.title, c) for c in table.columns)}</tr>"]


def _heading(title: str, column: Column | None = None) -> str:
    name = f' data-metric="{escape_html(column.metric.name)}"' if column else ""
    text = re.sub(" (?=[↑↓]$)", "&nbsp;", _STYLE.escape(title))  # an arrow alone on a line says nothing
    return f'<th scope="col"{name}>{text}</th>'


def _row(row: Row, texts: Sequence[str], links: Mapping[str, str], runs: Callable[[Sequence[str]], str]) -> str:
    label, mark, letters = texts[0].partition("<sup>")  # an escaped label has no "<"
    label = label.replace("(", "<wbr>(")  # the one place where a long label may break
    if row.label in links:
        label = f'<a href="{escape_html(links[row.label])}">{label}</a>'
    keys = [runs(cell.keys) if cell is not None else "" for cell in row.cells]
    shared = keys[0] if len(keys) > 1 and len(set(keys)) == 1 else ""
    cells = [
        _cell(cell, text, "" if shared else own) for cell, text, own in zip(row.cells, texts[1:], keys, strict=True)
    ]
    return f'<tr{_runs(shared)}><th scope="row">{label}{mark}{letters}</th>{"".join(cells)}</tr>'


def _cell(cell: Cell | None, text: str, keys: str) -> str:
    value = "" if cell is None or cell.mean is None else f' data-value="{cell.mean!r}"'
    return f"<td{value}{_runs(keys)}>{text}</td>"


def _runs(keys: str) -> str:
    return f' data-runs="{escape_html(keys)}"' if keys else ""
