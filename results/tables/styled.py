"""A table by the Styler of pandas: HTML, Excel, and the rows of LaTeX.

Texts are escaped before a Styler has them: its own escapes leave ^ and ~ in mathematics, formulas and marks that turn
the direction of text.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from results import files
from results.escape import columns_of, escape_csv, visible
from results.tables.csv import to_csv
from results.tables.grid import Entry, grid
from results.tables.marked import LONGEST_SENTENCE
from results.tables.table import Table

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

INSTALL_EXCEL = 'Excel files need openpyxl: pip install "normsuite[excel]", or pip install openpyxl'

_CSS = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#111;background:#fff}
table{border-collapse:collapse;border-top:2px solid;border-bottom:2px solid}
caption{text-align:left;max-width:60em;padding-bottom:.6em}th,td{padding:.15em .6em;text-align:right}
thead tr:last-child th{border-bottom:1px solid}tbody th{text-align:left;font-weight:normal}
thead th[colspan]{text-align:center}ol,ul{max-width:60em}sup{line-height:0}
@media(prefers-color-scheme:dark){body{color:#eee;background:#111}}"""


Texts = Sequence[Sequence[str]]


def styler(heads: Texts, labels: Texts, values: Sequence[Sequence[Any]]) -> Styler:
    """A Styler of values under heads; equal neighbours on a level of the heads are joined.

    Args:
        heads, labels: escaped texts, one tuple for each column or row, of a text for each level.
        values: rows of what stands in the cells, escaped.
    """
    # a level that is not shown tells equal texts apart, which a Styler refuses
    frame = pd.DataFrame(
        [list(line) for line in values],
        index=pd.MultiIndex.from_tuples([(*label, str(i)) for i, label in enumerate(labels)]),
        columns=pd.MultiIndex.from_tuples([(*head, str(i)) for i, head in enumerate(heads)]),
        dtype=object,
    )
    return frame.style.hide(axis="columns", level=len(heads[0])).hide(axis="index", level=len(labels[0]))


def escaped(texts: Texts, write: Callable[[str], str]) -> list[tuple[str, ...]]:
    """Every text of every level, as a format writes it."""
    return [tuple(map(write, levels)) for levels in texts]


def to_html(table: Table) -> str:
    """The table as a page of HTML of its own: no script, nothing that loads anything."""
    made = grid(table)
    values = [[_html(entry) for entry in line] for line in made.entries]
    shown = styler(escaped(made.heads, _escape_html), escaped(made.labels, _escape_html), values)
    marks = pd.DataFrame([list(map(_css, line)) for line in made.entries], shown.index, shown.columns)
    shown = shown.apply(lambda _: marks, axis=None)
    shown = shown.set_caption(" ".join(map(_escape_html, (f"{table.title}.", *table.short))))
    body = shown.to_html(table_uuid="table", cell_ids=False, sparse_index=False, sparse_columns=True)
    notes = "".join(f"<li><sup>{letter}</sup> {_escape_html(text)}</li>" for letter, text in made.notes)
    rest = [sentence for sentence in table.caption if sentence not in table.short]
    said = "".join(f"<li>{_escape_html(sentence[:LONGEST_SENTENCE])}</li>" for sentence in rest)
    title = _escape_html(table.title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{_CSS}</style>'
        f"</head>\n<body>\n{body}{f'<ul>{notes}</ul>' if notes else ''}<ul>{said}</ul>\n</body></html>\n"
    )


def write_excel(table: Table, file: Path) -> None:
    """Write the table as a workbook: "table" as printed, its numbers in full precision; "notes"; "cells", as in CSV.

    Raises:
        ValueError: openpyxl is not installed.
        OSError: the file can not be written.
    """
    check_excel()
    from openpyxl.styles import Alignment

    made = grid(table)
    values = [[_excel(entry) for entry in line] for line in made.entries]
    index, columns = (_told_apart(escaped(texts, escape_csv)) for texts in (made.labels, made.heads))
    frame = pd.DataFrame([list(line) for line in values], index, columns, dtype=object)
    marks = pd.DataFrame([list(map(_excel_css, line)) for line in made.entries], index, columns)
    shown = frame.style.apply(lambda _: marks, axis=None)
    stream = io.BytesIO()
    with pd.ExcelWriter(stream, engine="openpyxl") as writer:
        shown.to_excel(writer, sheet_name="table", merge_cells=False)
        book = writer.book
        _sheet(book, "notes", [[text] for text in (f"{table.title}.", *table.caption)])
        for letter, text in made.notes:
            book["notes"].append([escape_csv(f"{letter} {text}")])
        _sheet(book, "cells", list(csv.reader(io.StringIO(to_csv(table)))))
        for sheet in book.worksheets:
            for column in sheet.columns:
                # numbers are cut by their formats
                longest = max((columns_of(c.value) for c in column if isinstance(c.value, str)), default=0)
                sheet.column_dimensions[column[0].column_letter].width = min(max(12, longest + 2), 100)
        for row in book["notes"].iter_rows():
            row[0].alignment = Alignment(wrap_text=True, vertical="top")
    with files.replacing(file) as out:
        out.write(stream.getvalue())


def check_excel() -> None:
    """Raises ValueError, with the command that installs it, where openpyxl is missing."""
    try:
        import openpyxl  # noqa: F401 - whether it is there
    except ImportError:
        raise ValueError(INSTALL_EXCEL) from None


def _told_apart(texts: Sequence[tuple[str, ...]]) -> pd.MultiIndex:
    """An index of these texts; of equal ones the later get a number."""
    count: dict[tuple[str, ...], int] = {}
    made = []
    for levels in texts:
        count[levels] = count.get(levels, 0) + 1
        made.append((*levels[:-1], f"{levels[-1]} ({count[levels]})") if count[levels] > 1 else levels)
    return pd.MultiIndex.from_tuples(made)


def _sheet(book: Any, name: str, lines: Sequence[Sequence[str]]) -> None:
    sheet = book.create_sheet(name)
    for line in lines:
        sheet.append([_number(text) for text in line])


def _number(text: str) -> str | float:
    """A number as one, everything else as a text that is no formula."""
    try:
        return float(text) if text[:1].isdigit() or text[:2].strip("-")[:1].isdigit() else escape_csv(text)
    except ValueError:
        return escape_csv(text)


def _escape_html(text: str) -> str:
    return html.escape(visible(text))


def _html(entry: Entry) -> str:
    if entry.blank:
        return ""
    text = _escape_html(entry.mean or "—") + (f" ± {_escape_html(entry.std)}" if entry.std else "")
    return text + (f"<sup>{_escape_html(entry.suffix)}</sup>" if entry.suffix else "")


def _css(entry: Entry) -> str:
    return "font-weight: bold" if entry.best else "text-decoration: underline" if entry.second else ""


def _excel(entry: Entry) -> float | str:
    """A number that prints as it should by its format, else a text."""
    if entry.value is None or entry.digits is None:
        return escape_csv("" if entry.blank else f"{entry.mean or '—'}{f' {entry.suffix}' if entry.suffix else ''}")
    return entry.value


def _excel_css(entry: Entry) -> str:
    styles = [_css(entry)]
    if entry.value is not None and entry.digits is not None:
        behind = (f" ± {entry.std}" if entry.std else "") + (f" {entry.suffix}" if entry.suffix else "")
        number = f"0.{'0' * entry.digits}".rstrip(".")
        styles.append(f"number-format: {number}" + (f'"{behind}"' if behind else ""))
    return "; ".join(filter(None, styles))
