"""What stands at the top of a report: facts of the folder, and what must be said before any number."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from results.escape import cut, one_line
from results.record import DATASET
from results.rows import distinct, is_nothing
from results.tables.captions import evidence, seed_list, tests
from results.tables.pivot import Pivot
from results.tables.table import Table

_LONGEST = 2_000  # characters of a fact
_MOST_NAMED = 8  # values that a fact names; the rest is counted

UNREADABLE = "No record here can be read."


def overview(df: pd.DataFrame, pivots: Sequence[Pivot], asked: Mapping[str, Any] | None, plans: int) -> list[Any]:
    """(what, value) of a folder: what was asked, what is there, where and when it was made.

    Args:
        df: of `results.load`.
        pivots: of all tasks.
        asked: the newest plan that the folder holds (results.store.read_asked); None: none.
        plans: how many it holds.
    """
    facts = [
        *_asked(asked, plans),
        ("runs", _counts(df, pivots)),
        ("tasks", _counted(df, "task")),
        ("norms", _counted(df, "norm_label")),
        ("seeds", _seeds(df)),
        ("finished", _span(df)),
        ("computing time", _hours(df)),
        ("data sets", _counted(df, f"option.{DATASET}")),
        ("data", _counted(df, "data")),
        ("budget", _counted(df, "budget")),
        ("reported checkpoint", _counted(df, "selection")),
        ("commit", _counted(df, "commit")),
        ("torch", _counted(df, "torch")),
        ("python", _counted(df, "environment.python")),
        ("device", _counted(df, "device")),
        ("hardware", _counted(df, "device_name")),
        ("threads", _counted(df, "threads")),
        ("kernels", _counted(df, "kernels")),
        ("platform", _counted(df, "environment.platform")),
    ]
    return [(what, cut(one_line(value), _LONGEST)) for what, value in facts if value]


def cautions(df: pd.DataFrame, pivots: Sequence[Pivot], tables: Sequence[Table]) -> list[str]:
    """The sentences of the captions that a reader must see before any number, and what the folder lacks."""
    lines = []
    if df.empty:
        lines += _nothing(df)
    elif not (df["status"] == "ok").any():
        lines.append("No run ended well: tables say what happened instead.")
    lines += _holes(pivots)
    lines += _significance(pivots, tables)
    lines += evidence(df) if len(df) else _damaged(df)
    lines += [f"Not read: {line}" for line in df.attrs.get("damaged", ())[:_MOST_NAMED]]
    if unread := df.attrs.get("unread"):
        lines.append(f"Passed over, as if it was not there: {unread}.")
    if len(df) and not df.attrs.get("tasks"):
        lines.append(
            "The folder does not say what its tasks declare (no readable tasks.json): headline metrics follow general "
            "rules."
        )
    return [cut(one_line(line), _LONGEST) for line in dict.fromkeys(lines)]


def _asked(asked: Mapping[str, Any] | None, plans: int) -> list[tuple[str, str]]:
    if asked is None:
        return [("command", "not stored in this folder")]
    words = asked.get("command")
    known = isinstance(words, list | tuple) and bool(words)
    command = shlex.join(["python", "run_suite.py", *map(str, words or ())]) if known else "from Python"
    made = [("planned", asked.get("time")), ("by version", asked.get("version")), ("at commit", asked.get("commit"))]
    return [
        ("command", command),
        ("config", str(asked.get("config") or "")),
        *((what, str(value)) for what, value in made if value),
        ("plans", f"{plans}; the newest is shown" if plans > 1 else ""),
    ]


def _counts(df: pd.DataFrame, pivots: Sequence[Pivot]) -> str:
    statuses = Counter(df["status"].tolist()) if len(df) else Counter()
    missing = sum(pivot.holes()[0]["missing"] for pivot in pivots)
    parts = [f"{statuses[status]} {status}" for status in ("ok", "diverged", "failed", "skipped") if statuses[status]]
    return f"{len(df)}{': ' if parts else ''}{', '.join(parts)}" + (f"; {missing} missing" if missing else "")


def _counted(df: pd.DataFrame, column: str) -> str:
    """The values of a column, each with its number of runs where there are several."""
    if column not in df.columns:
        return ""
    counts = Counter(str(v) for v in df[column].tolist() if not is_nothing(v) and v != "")
    if len(counts) == 1:
        return cut(next(iter(counts)), 200)
    shown = counts.most_common(_MOST_NAMED)
    more = f" and {len(counts) - len(shown)} more" if len(counts) > len(shown) else ""
    return (f"{len(counts)}: " if len(counts) > 1 else "") + ", ".join(f"{cut(v, 100)} ({n})" for v, n in shown) + more


def _seeds(df: pd.DataFrame) -> str:
    seeds = distinct(df["seed"].tolist()) if len(df) else []
    return seed_list(seeds).partition(" ")[2] if seeds else ""


def _span(df: pd.DataFrame) -> str:
    """First and last end of a run."""
    times = df["finished"].dropna()
    if times.empty:
        return ""
    first, last = (time.strftime("%Y-%m-%d %H:%M") for time in (times.min(), times.max()))
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"


def _hours(df: pd.DataFrame) -> str:
    seconds = float(df["seconds"].sum()) if len(df) else 0.0
    for unit, size in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}, all runs together"
    return ""


def _nothing(df: pd.DataFrame) -> list[str]:
    stale = sum(df.attrs.get("stale", {}).values())
    others = sum(df.attrs.get("not_asked", {}).values())
    if stale:
        return [f"Nothing to show: all {stale} records are of other versions or data than were planned last."]
    if others:
        return [f"Nothing to show: none of the {others} records is what the config asks for now."]
    return [UNREADABLE if df.attrs.get("damaged") else "There is no record here yet."]


def _damaged(df: pd.DataFrame) -> list[str]:
    number = len(df.attrs.get("damaged", ()))
    return [f"{number} damaged record{'s' if number > 1 else ''} could not be read."] if number else []


def _holes(pivots: Sequence[Pivot]) -> list[str]:
    lines = []
    for pivot in pivots:
        count, total = pivot.holes()
        holes = [f"{count[kind]} {kind}" for kind in ("diverged", "failed", "skipped", "missing") if count[kind]]
        if holes:
            lines.append(f"{pivot.task}: of {total} runs {', '.join(holes)}.")
    return lines


def _significance(pivots: Sequence[Pivot], tables: Iterable[Table]) -> list[str]:
    """What the tests of the task tables can show, each sentence once with the tasks that it is about."""
    about: dict[str, list[str]] = {}
    of_task = {table.task: table for table in tables if table.name == table.task}
    for pivot in pivots:
        table = of_task.get(pivot.task)
        if table is None:
            continue
        cells = [cell for row in table.rows for cell in row.cells if cell is not None]
        if not any(cell.std is not None for cell in cells) and any(cell.n for cell in cells):
            about.setdefault("One run a cell: no spread, and nothing is tested.", []).append(pivot.task)
        elif pivot.reference is not None and len(pivot.rows) > 1:
            for line in tests(pivot.labels[pivot.reference], cells):
                about.setdefault(line, []).append(pivot.task)
    return [f"{', '.join(tasks)}: {line}" for line, tasks in about.items()]
