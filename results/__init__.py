"""Records of runs -> a tidy frame -> tables and figures. Needs neither torch nor any of our other packages.

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

    table = results.paper_table(df, rows={"bn": "BN"}, spread="none")  # norms by tasks
    results.write_paper(table, "paper", ["latex", "html"], environment="table*")

Frames
    load, load_history    one row per run; one per run and epoch
    load_whole            both, of one reading of the folder
    in_every_norm_batch   runs without a norm batch once for each, to group by it
    select                each norm's own value of an option, chosen by validation
Tables
    render_all            every table that a frame supports
    task_table, sweep_table, overall_table   one of them
    paper_table, write_paper   the table of a paper, norms by tasks, and its files
    tables_text, to_text, to_csv, to_latex, to_markdown, write_tables   their formats
Figures
    draw_all, write_drawings   every figure that a frame supports, each a Drawing, and their files
    option_curve, learning_curves, cost_against_accuracy, domain_heat_map   one of them
    critical_difference, performance_profiles, paired_differences, axes_cubes   likewise
Folders
    diff                  two frames beside each other, run by run
    merge                 several folders made into one
    read_asked            the commands and configs that made a folder
Metrics and records
    metric, add_metric    what is known of a metric: unit, direction, digits
    read_record           one record.json, a RunRecord of one RunSpec
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from results.differences import diff
    from results.figures.axes import axes_cubes
    from results.figures.cost import cost_against_accuracy
    from results.figures.curves import option_curve
    from results.figures.differences import paired_differences
    from results.figures.domains import domain_heat_map
    from results.figures.drawing import Drawing, write_drawings
    from results.figures.every import draw_all
    from results.figures.learning import learning_curves
    from results.figures.profiles import performance_profiles
    from results.figures.ranks import critical_difference
    from results.frame import load
    from results.history import load_history, load_whole
    from results.merging import merge
    from results.metrics import Metric, add_metric, metric
    from results.norm_batches import in_every_norm_batch
    from results.record import RunRecord, RunSpec
    from results.selection import select
    from results.store import read_asked, read_record
    from results.tables.build import overall_table, render_all, sweep_table, task_table
    from results.tables.csv import to_csv
    from results.tables.latex import to_latex
    from results.tables.markdown import to_markdown
    from results.tables.paper import paper_table
    from results.tables.table import Table
    from results.tables.text import tables_text, to_text
    from results.tables.writing import write_paper, write_tables

__all__ = [
    "Drawing",
    "Metric",
    "RunRecord",
    "RunSpec",
    "Table",
    "add_metric",
    "axes_cubes",
    "cost_against_accuracy",
    "critical_difference",
    "diff",
    "domain_heat_map",
    "draw_all",
    "in_every_norm_batch",
    "learning_curves",
    "load",
    "load_history",
    "load_whole",
    "merge",
    "metric",
    "option_curve",
    "overall_table",
    "paired_differences",
    "paper_table",
    "performance_profiles",
    "read_asked",
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
    "write_drawings",
    "write_paper",
    "write_tables",
]

# Imported when first asked for: every worker imports results.record, and none of them needs pandas.
_HOMES = {
    "figures.axes": ("axes_cubes",),
    "figures.differences": ("paired_differences",),
    "figures.profiles": ("performance_profiles",),
    "figures.ranks": ("critical_difference",),
    "figures.cost": ("cost_against_accuracy",),
    "figures.curves": ("option_curve",),
    "figures.domains": ("domain_heat_map",),
    "figures.drawing": ("Drawing", "write_drawings"),
    "figures.every": ("draw_all",),
    "figures.learning": ("learning_curves",),
    "differences": ("diff",),
    "merging": ("merge",),
    "frame": ("load",),
    "history": ("load_history", "load_whole"),
    "metrics": ("Metric", "add_metric", "metric"),
    "norm_batches": ("in_every_norm_batch",),
    "record": ("RunRecord", "RunSpec"),
    "store": ("read_asked", "read_record"),
    "selection": ("select",),
    "tables.csv": ("to_csv",),
    "tables.latex": ("to_latex",),
    "tables.markdown": ("to_markdown",),
    "tables.table": ("Table",),
    "tables.text": ("tables_text", "to_text"),
    "tables.paper": ("paper_table",),
    "tables.writing": ("write_paper", "write_tables"),
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
