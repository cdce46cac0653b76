"""The commands that say what there is, and prepare data: list ..., data ..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from suite.cli.app import SETTINGS, AsJson, DataDir, Plugins, app
from suite.console import documented, print_document, print_lines, print_notes
from suite.plugins import load_plugins

list_app = typer.Typer(help="What there is: norms, tasks, data sets, metrics.", **SETTINGS)
data_app = typer.Typer(help="Data sets: what is here, and how to prepare the rest.", **SETTINGS)
app.add_typer(list_app, name="list")
app.add_typer(data_app, name="data")


@list_app.command("norms")
def list_norms(as_json: AsJson = False, plugin: Plugins = None) -> None:
    """Registered norms and the facts they declare."""
    from norms.registry import norm_info, norm_names, norm_option_defaults
    from suite.as_json import norms_document
    from suite.progress import columns

    with documented(as_json):
        load_plugins(plugin)
    if as_json:
        print_document(norms_document())
        return
    rows = [("name", "mixes samples", "statistics over", "keeps statistics", "needs", "options", "source")]
    for name in norm_names():
        info = norm_info(name)
        options = ", ".join(f"{k}={v!r}" for k, v in norm_option_defaults(name).items())
        needs = ", ".join(sorted(info.needs)) or "nothing"
        mixes = "train and eval" if info.mixes_samples_in_eval else "train" if info.mixes_samples else "no"
        over = "?" if info.axes is None else " ".join(info.axes) or "nothing"
        rows.append((name, mixes, over, "yes" if info.keeps_stats else "no", needs, options, info.source))
    print_lines(columns(rows))


@list_app.command("tasks")
def list_tasks(as_json: AsJson = False, plugin: Plugins = None) -> None:
    """Tasks, their metrics, and their options with defaults."""
    from suite.as_json import tasks_document, type_text
    from suite.progress import columns
    from tasks import get_task, task_names

    with documented(as_json):
        load_plugins(plugin)
    if as_json:
        print_document(tasks_document())
        return
    for name in task_names():
        task = get_task(name)
        print(f"{name}: {', '.join(task.metrics)}")
        rows = [
            (f"  {key}", f"= {field.get_default(call_default_factory=True)!r}", type_text(field.annotation))
            for key, field in task.options.model_fields.items()
        ]
        print_lines(columns(rows))


@list_app.command("datasets")
def list_datasets(as_json: AsJson = False, data_dir: DataDir = Path("data"), plugin: Plugins = None) -> None:
    """Data sets, and whether they are prepared."""
    data_list(as_json, data_dir, plugin)


@list_app.command("metrics")
def list_metrics(as_json: AsJson = False, plugin: Plugins = None) -> None:
    """Metrics: unit, direction, meaning."""
    from results import metrics
    from suite.as_json import metrics_document

    with documented(as_json):
        load_plugins(plugin)
    if as_json:
        print_document(metrics_document())
        return
    from suite.progress import columns

    rows = [("name", "unit", "better", "meaning")]
    for name in metrics.METRICS:
        metric = metrics.METRICS[name]
        better = {True: "higher", False: "lower", None: "-"}[metric.higher_is_better]
        rows.append((name, metric.unit or "-", better, metric.description))
    print_lines(columns(rows))


@data_app.command("list")
def data_list(as_json: AsJson = False, data_dir: DataDir = Path("data"), plugin: Plugins = None) -> None:
    """Data sets, and whether they are prepared."""
    from suite.as_json import datasets_document
    from suite.progress import columns
    from tasks import data

    with documented(as_json):
        load_plugins(plugin)
    if as_json:
        print_document(datasets_document(data_dir))
        return
    rows = [("name", "here", "what"), *((each.name, each.here, each.what) for each in data.listed(data_dir))]
    print_lines(columns(rows))


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="A data set, see `data list`.")],
    data_dir: DataDir = Path("data"),
    source: Annotated[
        Path | None, typer.Option(help="A folder with the images (imagenet) or the archives that it is read from.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of a folder's images in pixels.")] = None,
    force: Annotated[bool, typer.Option(help="Make it again; what is prepared stays until that is complete.")] = False,
    plugin: Plugins = None,
) -> None:
    """Download and decode a data set: the only command that downloads anything."""
    from tasks import data

    load_plugins(plugin)
    done = data.prepare(name, data_dir, source=source, size=size, force=force)
    if done.layout:
        print_notes([done.layout])
    for note in done.notes:
        print(f"warning: {note}", file=sys.stderr)
    if done.made:
        print(f"{name} is prepared in {data_dir}")
    elif data.dataset_info(name).builtin:
        print(f"{name} is built in: nothing to do")
    elif not data.is_prepared(name, data_dir):
        raise ValueError(f'data set "{name}" is not here, and its source prepares nothing')
    else:
        print(f"{name} is prepared already in {data_dir}: nothing to do")
