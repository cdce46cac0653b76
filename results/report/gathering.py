"""A folder of results -> all that its report says, of one reading of the folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from results import store
from results.escape import cut, one_line, visible
from results.figures.drawing import Drawing
from results.figures.every import draw_all
from results.history import load_whole
from results.report.cards import make_cards
from results.report.content import LARGEST, Content
from results.report.overview import cautions, overview
from results.report.runs import drawings_that_fit, list_runs
from results.tables.build import render_all
from results.tables.paper import paper_table
from results.tables.pivot import every_pivot
from results.tables.table import Table

ROOM_FOR_FIGURES = 700_000
"""Bytes of all figures in a page, with their numbers;"""
MANY, ROOM_BESIDE_MANY = 3_000, 100_000
"""of more runs than so many, whose curves need the page, so many bytes: the smallest figures."""
MOST_DRAWN = 30_000
"""Runs up to which a report has figures: of 10,000 they take 5 s."""
_OF_CELL = 150
"""Bytes of a table's cell in a page, with its share of the table's CSV and LaTeX."""
_BESIDES = 190_000  # bytes of style, script, cards and sentences
_LONGEST_CONFIG = 100_000


def gather(folder: str | Path, keys: Collection[str] | None = None) -> Content:
    """Everything that the report of a folder says.

    Args:
        folder: an output folder of `run`.
        keys: only the runs with these keys, as of a plan; None: all.

    Raises:
        ValueError: `folder` is missing or holds no `runs`.
    """
    folder = Path(folder)
    whole = load_whole(folder, keys=keys)
    df = whole.df
    plans = _plans(folder)
    asked = plans[-1] if plans else None
    pivots = every_pivot(df)
    tables = render_all(df) if len(df) else []
    headline, no_headline = _headline(df)
    drawings, refused, undrawn = _drawings(df, whole.history)
    drawings, lost = drawings_that_fit(drawings, ROOM_FOR_FIGURES if len(df) <= MANY else ROOM_BESIDE_MANY)
    cells = sum(len(table.rows) * len(table.columns) for table in tables)
    figures = sum(len(drawing.svg()) for drawing in drawings)
    listed = list_runs(folder, whole, LARGEST - _BESIDES - figures - _OF_CELL * cells)
    return Content(
        title=cut(one_line(folder.resolve().name or str(folder)), 200),
        facts=tuple(overview(df, pivots, asked, len(plans))),
        warnings=(*cautions(df, pivots, tables), *_lacking(df)),
        headline=headline,
        tables=tuple(tables),
        drawings=tuple(drawings),
        refused=tuple(refused),
        cards=tuple(make_cards(df, pivots)),
        runs=listed.runs,
        left_out=(*no_headline, *undrawn, *lost, *listed.left_out),
        config=_config(asked),
    )


def _plans(folder: Path) -> list[dict[str, Any]]:
    return store.read_asked(folder)


def _config(asked: dict[str, Any] | None) -> str:
    text = str((asked or {}).get("text") or "")
    lines = "\n".join(visible(line) for line in text.splitlines())
    return lines if len(lines) <= _LONGEST_CONFIG else f"{lines[:_LONGEST_CONFIG]}\n…"


def _lacking(df: pd.DataFrame) -> list[str]:
    """What the folder does not say of its norms."""
    silent = sorted({*df["norm"].tolist()} - df.attrs.get("norms", {}).keys()) if len(df) else []
    if not silent:
        return []
    names = ", ".join(cut(one_line(name), 60) for name in silent[:8]) + (", ..." if len(silent) > 8 else "")
    return [
        f"The folder does not say what these norms declare: {names} (no readable norms.json of their versions); "
        "their cards show what the records say."
    ]


def _headline(df: pd.DataFrame) -> tuple[Table | None, list[str]]:
    """The table of norms by tasks, or why there is none."""
    try:
        return (paper_table(df), []) if len(df) else (None, [])
    except ValueError as error:
        return None, [f"No table of norms by tasks: {one_line(str(error))}."]


def _drawings(df: pd.DataFrame, history: pd.DataFrame) -> tuple[list[Drawing], list[tuple[str, str]], list[str]]:
    """The figures, those that the folder can not support with the reasons, and why there are none at all."""
    if df.empty:
        return [], [], []
    if len(df) > MOST_DRAWN:
        return [], [], [f"No figures of more than {MOST_DRAWN:,} runs here; `run_suite.py figures FOLDER` draws them."]
    drawings, refused = draw_all(df, history)
    return list(drawings), list(refused.items()), []
