"""The command `tables`: every table of a folder, or with --paper the one of a paper."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suite.cli import completing
from suite.cli.app import DataDir, Plugins, app, as_options, split_names
from suite.console import Asked, load_runs, print_notes, print_tables, render, show_tables, writing_to
from suite.environment import export_threads
from suite.plugins import load_plugins

if TYPE_CHECKING:
    from pandas import DataFrame

    from results.tables.paper_style import PaperStyle
    from results.tables.table import Table

PAPER = "With --paper: "
LISTS = ("tasks", "norms", "metrics", "order")


@app.command()
def tables(
    folder: Annotated[Path, typer.Argument(help="A folder of results.", autocompletion=completing.results)],
    formats: Annotated[
        str | None,
        typer.Option(
            "--format", help="Formats to write, separated by commas: csv, latex, markdown; of a paper also html, excel."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the files.  [default: FOLDER/tables as `run` writes them; FOLDER/tables/custom with an "
            "option that changes a table; FOLDER/tables/paper with --paper]"
        ),
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics, separated by commas.")] = None,
    select: Annotated[
        str | None, typer.Option(help="Choose this option per norm by validation, on seeds that the table leaves out.")
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="The option along the columns of the sweep table.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The norm that others are compared with.  [default: bn]")
    ] = None,
    digits: Annotated[int | None, typer.Option(help="Digits after the point of metrics with a direction.")] = None,
    caption: Annotated[
        str | None, typer.Option(help="Of LaTeX: short, the rest in small print or a note file; full; none.")
    ] = None,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--config", help="Only the runs that this config asks for, as it is now (repeatable)."),
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="One table: norms by tasks, each by its headline metric.")] = (
        False
    ),
    style: Annotated[
        Path | None, typer.Option(help="A YAML file whose keys are these options; implies --paper.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help=f"{PAPER}these tasks, in this order.")] = None,
    norms: Annotated[str | None, typer.Option(help=f"{PAPER}these norms, by name or label, in this order.")] = None,
    rows: Annotated[
        list[str] | None, typer.Option(metavar="NORM=TEXT", help=f"{PAPER}what a norm is called (repeatable).")
    ] = None,
    order: Annotated[str | None, typer.Option(help=f"{PAPER}the norms of the first rows.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK.]OPTION=VALUE", help=f"{PAPER}only runs with this value, or one of several (repeatable)."
        ),
    ] = None,
    transpose: Annotated[bool, typer.Option("--transpose", help=f"{PAPER}a row for each task.")] = False,
    spread: Annotated[str | None, typer.Option(help=f"{PAPER}std or none.")] = None,
    environment: Annotated[
        str | None, typer.Option(help=f"{PAPER}table, a column of 237 pt, or table*, a page of 492 pt.")
    ] = None,
    numbers: Annotated[
        str | None, typer.Option(help=f"{PAPER}plain, or siunitx for columns aligned at the decimal point.")
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
    """Print the tables of the runs that are there, and write them; with --paper the one table of a paper.

    `run` writes into FOLDER/tables, so tables that any option changes are written elsewhere. With --config, give the
    same --plugin and --data-dir as to `run`: code and data decide which runs are asked for.
    """
    own = load_plugins(plugin)  # their metrics count without --config, too
    of_paper: dict[str, Any] = {
        "tasks": tasks,
        "norms": norms,
        "order": order,
        "rows": rows,
        "where": where,
        "transpose": transpose or None,
        "spread": spread,
        "environment": environment,
        "numbers": numbers,
    }
    if not (paper or style):
        _refuse(of_paper)
    keys = None
    if configs:
        export_threads(1)
        from suite.planning import planned_keys

        keys = planned_keys(configs, own, data_dir)
    if page is None and (title or only is not None):
        raise ValueError(f"--{'title' if title else 'only'} is for --page")
    if page is not None and (formats is not None or out is not None):
        raise ValueError("--format and --out are for files of tables, --page for a page; give one of them")
    pages = None if page is None else Page(page, title, split_names("--only", only))
    if paper or style:
        if sweep is not None:
            raise ValueError("--sweep: not with --paper, whose table has a column for each setting")
        given = {"metrics": metrics, "select": select, "reference": reference, "digits": digits, "caption": caption}
        df = _paper(folder, style, _asked({**of_paper, **given, "format": formats, "out": out}), keys, pages)
    else:
        with as_options():
            asked = Asked(
                split_names("--metrics", metrics),
                select or None,
                split_names("--sweep", sweep),
                reference,
                digits,
                "short" if caption is None else caption,
            )
        changed = asked != Asked() or keys is not None
        if pages is not None:
            df = load_runs(folder, keys)
            pages.write(df, render(df, asked))
        else:
            target = _target(folder, out, "custom" if changed else "")
            names = split_names("--format", formats) or (("csv", "latex", "markdown") if out is not None else ())
            df, files = show_tables(folder, names, asked, keys, target)
            if files:
                print(_written(len(files), target, changed))
    if keys is not None:
        print(
            f"{df.attrs['records']} records of {', '.join(map(str, configs or ()))}; "
            f"{sum(df.attrs['not_asked'].values())} others in {folder} are left out"
        )


def _paper(
    folder: Path, style: Path | None, given: PaperStyle, keys: Collection[str] | None, page: Page | None
) -> DataFrame:
    from results.tables.paper import paper_table
    from results.tables.writing import write_paper

    asked = given if style is None else given.over(_read_style(style))
    df = load_runs(folder, keys)
    table = paper_table(df, **asked.of_table)
    if page is not None:
        named = tuple(line for line in table.caption if any(line.startswith(f"{row.label} is ") for row in table.rows))
        replace(page, only=(table.name,)).write(df, [replace(table, caption=(*table.short, *named))])
        return df
    out = _target(folder, None if asked.out is None else Path(asked.out), "paper")
    with writing_to(out) as files, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        files += write_paper(table, out, asked.format or ("latex",), **asked.of_files)
    print_tables([replace(table, caption=table.short)])  # all that must be said stands in the note file
    print_notes([str(warning.message) for warning in seen])
    if files.problem:
        raise ValueError(files.problem)
    print(_written(len(files), out, True))
    return df


def _read_style(file: Path) -> PaperStyle:
    from results.tables.paper_style import PaperStyle
    from suite.config import form_mistakes, read_mapping

    name = f'style "{file}"'
    content = read_mapping(file, name, PaperStyle.model_fields, file.parent.glob("*.yaml"))
    if mistakes := form_mistakes(content, name):
        raise ValueError("\n".join(mistakes))
    return PaperStyle.of(content, name)


def _asked(options: Mapping[str, Any]) -> PaperStyle:
    """What the options say of a paper's table; those that are not given are left to the style file."""
    from results.tables.paper_style import PaperStyle

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name in (*LISTS, "format"):
        if name in given:
            given[name] = split_names(f"--{name}", given[name])
    for name, texts in (("rows", given.get("rows", ())), ("where", given.get("where", ()))):
        if texts:
            given[name] = dict(_pair(name, text) for text in texts)
    if "where" in given:
        given["where"] = {k: list(split_names("--where", v) or (v,)) for k, v in given["where"].items()}
    if "out" in given:
        given["out"] = str(given["out"])
    return PaperStyle.of(given, "options")


def _pair(option: str, text: str) -> tuple[str, str]:
    # a label may hold "=": bgn(num_groups=8)=Ours
    cut_at = text.rpartition("=") if option == "rows" else text.partition("=")
    key, equals, value = (part.strip() for part in cut_at)
    if not (key and equals and value):
        needed = "NORM=TEXT" if option == "rows" else "OPTION=VALUE or TASK.OPTION=VALUE"
        raise ValueError(f'--{option} "{text}": {needed} is needed')
    return key, value


def _refuse(of_paper: Mapping[str, Any]) -> None:
    """Raises ValueError for options that mean nothing without --paper."""
    given = [f"--{name}" for name, value in of_paper.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)}: only with --paper, the one table of norms by tasks")


def _target(folder: Path, out: Path | None, below: str) -> Path:
    """Where files go; never where `run` writes, if an option changes them."""
    own = folder / "tables"
    if out is None:
        return own / below
    if below and out.resolve() == own.resolve():
        raise ValueError(f"--out {shlex.quote(str(out))}: `run` writes its own tables there; name another folder")
    return out


def _written(count: int, out: Path, changed: bool) -> str:
    kept = "; `run` does not touch them" if changed else ""
    return f"{count} files of tables in {shlex.quote(str(out))}{kept}"


@dataclass(frozen=True)
class Page:
    """A page of Markdown that takes tables in the place of the terminal; `only`: names of tables, none: all."""

    file: Path
    title: str
    only: tuple[str, ...]

    def write(self, df: DataFrame, tables: Sequence[Table]) -> None:
        from results.tables.page import write_page

        command = shlex.join(["python", "run_suite.py", *sys.argv[1:]])
        write_page(df, tables, self.file, command, self.title, self.only)
        print(f"{len(self.only or tables)} tables of {len(df)} runs in {shlex.quote(str(self.file))}")
