"""Records of runs -> a tidy frame -> tables. Needs neither torch nor any of our other packages.

    import results

    df = results.load("runs/quick")  # one row per run: options, metrics, status, environment
    part = results.in_every_norm_batch(df[df["task"] == df["task"].iloc[0]])
    print(part.groupby(["norm_label", "option.norm_batch_size"])["top1"].agg(["mean", "std", "count"]))

    tables = results.render_all(df)  # per task one table and its sweeps, then the overall ranking
    print(results.tables_text(tables))
    files = results.write_tables(tables, "tables", ["csv", "latex"])

    part = df[df["task"] == df["task"].iloc[0]]
    print(results.to_markdown(results.task_table(part, metrics=["top1"])))
    print(results.to_latex(results.sweep_table(part, "norm_batch_size")))

Frames
    load, load_history    one row per run; one per run and epoch
    load_whole            both, of one reading of the folder
    in_every_norm_batch   runs without a norm batch once for each, to group by it
    select                each norm's own value of an option, chosen by validation
Tables
    render_all            every table that a frame supports
    task_table, sweep_table, overall_table   one of them
    tables_text, to_text, to_csv, to_latex, to_markdown, write_tables   their formats
Metrics and records
    metric, add_metric    what is known of a metric: unit, direction, digits
    read_record           one record.json, a RunRecord of one RunSpec
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from results.frame import load
    from results.history import load_history, load_whole
    from results.metrics import Metric, add_metric, metric
    from results.norm_batches import in_every_norm_batch
    from results.record import RunRecord, RunSpec
    from results.selection import select
    from results.store import read_record
    from results.tables.build import overall_table, render_all, sweep_table, task_table
    from results.tables.csv import to_csv
    from results.tables.latex import to_latex
    from results.tables.markdown import to_markdown
    from results.tables.table import Table
    from results.tables.text import tables_text, to_text
    from results.tables.writing import write_tables

__all__ = [
    "Metric",
    "RunRecord",
    "RunSpec",
    "Table",
    "add_metric",
    "in_every_norm_batch",
    "load",
    "load_history",
    "load_whole",
    "metric",
    "overall_table",
    "read_record",
    "render_all",
    "select",
    "sweep_table",
    "tables_text",
    "task_table",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_text",
    "write_tables",
]

# Imported when first asked for: every worker imports results.record, and none of them needs pandas.
_HOMES = {
    "frame": ("load",),
    "history": ("load_history", "load_whole"),
    "metrics": ("Metric", "add_metric", "metric"),
    "norm_batches": ("in_every_norm_batch",),
    "record": ("RunRecord", "RunSpec"),
    "store": ("read_record",),
    "selection": ("select",),
    "tables.csv": ("to_csv",),
    "tables.latex": ("to_latex",),
    "tables.markdown": ("to_markdown",),
    "tables.table": ("Table",),
    "tables.text": ("tables_text", "to_text"),
    "tables.writing": ("write_tables",),
    "tables.build": ("overall_table", "render_all", "sweep_table", "task_table"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"results.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
