"""The command `tables`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from suite.cli import completing
from suite.cli.app import DataDir, Plugins, app, split_names
from suite.console import show_tables
from suite.environment import export_threads
from suite.plugins import load_plugins


@app.command()
def tables(
    folder: Annotated[Path, typer.Argument(help="A folder of results.", autocompletion=completing.results)],
    formats: Annotated[
        str | None,
        typer.Option("--format", help="csv, latex, markdown, separated by commas: written to FOLDER/tables."),
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics, separated by commas.")] = None,
    select: Annotated[
        str, typer.Option(help="Choose this option per norm by validation, on seeds that the table leaves out.")
    ] = "",
    sweep: Annotated[str | None, typer.Option(help="The option along the columns of the sweep table.")] = None,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--config", help="Only the runs that this config asks for, as it is now (repeatable)."),
    ] = None,
    plugin: Plugins = None,
    data_dir: DataDir = Path("data"),
) -> None:
    """Print the tables of the runs that are there, and write them.

    With --config, give the same --plugin and --data-dir as to `run`: code and data decide which runs are asked for.
    """
    own = load_plugins(plugin)  # their metrics count without --config, too
    keys = None
    if configs:
        export_threads(1)
        from suite.session import planned_keys

        keys = planned_keys(configs, own, data_dir)
    names = split_names("--format", formats), split_names("--metrics", metrics)
    df, _ = show_tables(folder, *names, select, split_names("--sweep", sweep), keys)
    if keys is not None:
        print(
            f"{df.attrs['records']} records of {', '.join(map(str, configs or ()))}; "
            f"{sum(df.attrs['not_asked'].values())} others in {folder} are left out"
        )
