"""The command `tables`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from suite.cli.app import DataDir, Plugins, app, split_names
from suite.console import show_tables
from suite.environment import export_threads
from suite.plugins import load_plugins


@app.command()
def tables(
    folder: Annotated[Path, typer.Argument(help="A folder of results.")],
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
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write the tables into this page of Markdown, with command, config, commit, machine and dates, in "
            "the place of printing them; the text that people wrote there stays."
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="With --page: its title.  [default: the config's name]")] = "",
    only: Annotated[
        str | None, typer.Option(help="With --page: only these tables by their files' names, separated by commas.")
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
    if page is None and (title or only is not None):
        raise ValueError(f"--{'title' if title else 'only'} is for --page")
    if page is not None:
        if formats is not None:
            raise ValueError("--format writes files of tables, --page a page; give one of them")
        asked = split_names("--metrics", metrics), select, split_names("--sweep", sweep)
        _write_page(folder, page, title, split_names("--only", only), asked, keys)
        return
    names = split_names("--format", formats), split_names("--metrics", metrics)
    df, _ = show_tables(folder, *names, select, split_names("--sweep", sweep), keys)
    if keys is not None:
        print(
            f"{df.attrs['records']} records of {', '.join(map(str, configs or ()))}; "
            f"{sum(df.attrs['not_asked'].values())} others in {folder} are left out"
        )


def _write_page(
    folder: Path,
    page: Path,
    title: str,
    only: Sequence[str],
    asked: tuple[Sequence[str], str, Sequence[str]],
    keys: Collection[str] | None,
) -> None:
    """asked: metrics, the option that validation chooses, swept options."""
    import results
    from results.tables.page import write_page

    df = results.load(folder, keys=keys)
    metrics, select, sweep = asked
    rendered = results.render_all(df, select=select or None, metrics=list(metrics) or None, sweep=list(sweep) or None)
    command = shlex.join(["python", "run_suite.py", *sys.argv[1:]])
    write_page(df, rendered, page, command, title, only)
    print(f"{len(only or rendered)} tables of {len(df)} runs in {shlex.quote(str(page))}")
