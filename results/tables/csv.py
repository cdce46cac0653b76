"""A table as CSV, in full precision and base units."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from results.escape import escape_csv
from results.tables.table import HOLES, Table

NUMBERS = ("mean", "std", "ci95", "n", *HOLES, "difference", "difference_std", "difference_n", "p")
"""A cell's columns in the tidy CSV."""


def to_csv(table: Table, wide: bool = False) -> str:
    """The table as CSV in full precision and base units (fractions, seconds).

    A text that a spreadsheet would take for a formula (it begins with =, +, - or @ and is no number) has "'" before it,
    and control characters are written as U+XXXX; the frame of `results.load` has every text as it is.

    Args:
        table: what to write.
        wide: one line per row with mean, std and n of every column, instead of one line per cell with everything.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")

    def write(cells: Sequence[str | int]) -> None:
        writer.writerow([escape_csv(cell) if isinstance(cell, str) else cell for cell in cells])

    settings = [*(row.setting for row in table.rows), *(column.setting for column in table.columns)]
    options = list(dict.fromkeys(name for setting in settings for name, _ in setting))
    if wide:
        fixed = [o for o in options if any(o == k for row in table.rows for k, _ in row.setting)]
        parts = [(c.task, c.metric.name, *(f"{k}={v}" for k, v in c.setting)) for c in table.columns]
        names = [" ".join(filter(None, part)) for part in parts]
        write(["task", *fixed, table.heading, *(f"{name}{end}" for name in names for end in ("", " std", " n"))])
        for row in table.rows:
            numbers = [_number(v) for c in row.cells for v in ((c.mean, c.std, c.n) if c else (None, None, None))]
            write([table.task, *(dict(row.setting).get(o, "") for o in fixed), row.label, *numbers])
        return out.getvalue()
    flags = ("best", "second", "repeated")
    write(["table", "task", *options, table.heading, "metric", *NUMBERS, *flags, "equals"])
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is None:
                continue
            setting = dict((*row.setting, *column.setting))
            task = column.task or table.task
            place = [table.name, task, *(setting.get(o, "") for o in options), row.label, column.metric.name]
            shown = [_number(getattr(cell, name)) for name in NUMBERS]
            write([*place, *shown, *(int(getattr(cell, name)) for name in flags), cell.equals])
    return out.getvalue()


def _number(value: float | int | None) -> str:
    return "" if value is None else repr(value)
