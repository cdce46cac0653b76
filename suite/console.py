"""The output of the command line: lines that are safe on any terminal, notes and mistakes on stderr, a grid's bars,
a screen that is drawn anew, tables."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.escape import cut, visible
from suite import terminal

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

    from results.tables.table import Table
    from suite.engine import Event
    from suite.progress import Progress

_LONGEST_LINE, _LONGEST_NAME, _MOST_LINES = 2000, 120, 50
"""Characters of a line about a run or a mistake, and of a run's name beside its bar; lines about mistakes."""
MOST_REPORTED = 10_000
"""Records up to which `run` writes a report: seconds."""


def shown(text: str) -> str:
    """A text of one line or more, each of which shows on a terminal and has an end."""
    return "\n".join(cut(visible(line), _LONGEST_LINE) for line in text.split("\n"))


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def fail(message: str) -> int:
    lines = [line for line in message.split("\n") if line.strip()] or ["unknown error"]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"{len(lines) - _MOST_LINES + 1} more"]
    for line in lines:
        print(f"error: {cut(line, _LONGEST_LINE)}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def display(progress: Progress) -> Iterator[Callable[[Event], None]]:
    """Prints events: a live display with one bar per run on a terminal, plain lines elsewhere."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from suite.progress import time_left

    console = _console()
    if not console.is_terminal:

        def tell_plainly(event: Event) -> None:
            line = progress.take(event)
            if line is not None:
                print(shown(line), flush=True)

        yield tell_plainly
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        everything = bars.add_task("all runs", total=progress.total, note="")
        rows: dict[str, Any] = {}

        def tell(event: Event) -> None:
            line = progress.take(event)
            if line is not None:
                console.print(shown(line))
            key = event.spec.key
            if key in progress.running and key not in rows:
                name = cut(visible(progress.names.run(event.spec)), _LONGEST_NAME)
                rows[key] = bars.add_task(name, total=1.0, note="")
            elif key not in progress.running and key in rows:
                bars.remove_task(rows.pop(key))
            if key in rows:
                bars.update(rows[key], completed=progress.running[key], note=progress.note(key))
            left = progress.left()
            note = f"{progress.finished}/{progress.total}" + (f", {time_left(left)} left" if left is not None else "")
            bars.update(everything, completed=progress.finished + sum(progress.running.values()), note=note)

        yield tell


@contextlib.contextmanager
def screen() -> Iterator[Callable[[Sequence[str]], None]]:
    """Shows lines in the place of those before on a terminal, below them elsewhere."""
    from rich.live import Live
    from rich.text import Text

    console = _console()
    if not console.is_terminal:

        def show_plainly(lines: Sequence[str]) -> None:
            print("\n".join([*lines, ""]), flush=True)

        yield show_plainly
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda lines: live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)


def _console() -> Console:
    """A console whose output may move the cursor; its callers make control characters in texts visible."""
    from rich.console import Console

    screen = terminal.Output(sys.stdout.stream if isinstance(sys.stdout, terminal.Output) else sys.stdout, escape=False)
    return Console(file=screen, soft_wrap=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Asked:
    """What a person may ask of the tables of a folder; the arguments of `results.render_all`, and LaTeX's caption."""

    metrics: tuple[str, ...] = ()
    select: str | None = None
    sweep: tuple[str, ...] = ()
    reference: str | None = None
    digits: int | None = None
    caption: str = "short"

    def __post_init__(self) -> None:
        if self.digits is not None and self.digits not in range(7):
            raise ValueError(f"--digits {self.digits}: 0 to 6 are allowed")


def load_runs(folder: Path, keys: Collection[str] | None = None) -> DataFrame:
    """The runs of a folder of results, or those with these keys; what could not be read is told on stderr.

    Raises:
        ValueError: there are records, but none has one of the keys.
    """
    import results

    df = results.load(folder, keys=keys)
    if df.empty and (others := sum(df.attrs["not_asked"].values())):
        raise ValueError(
            f"none of the {others} records in {folder} is what the config asks for now: code, options and "
            "data count; without --config all are shown"
        )
    for line in df.attrs["damaged"]:
        print(f"damaged, left out of the tables: {line}", file=sys.stderr)
    if unread := df.attrs.get("unread"):
        print(f"passed over, as if it was not there: {unread}", file=sys.stderr)
    return df


def show_tables(
    folder: Path,
    formats: Sequence[str],
    asked: Asked | None = None,
    keys: Collection[str] | None = None,
    out: Path | None = None,
) -> tuple[DataFrame, list[Path]]:
    """Print every table of a folder of results, or of the runs with these keys, and write them in the given formats.

    Args:
        folder: of results.
        formats: none: nothing is written.
        asked: None: the tables as `run` makes them.
        keys: None: all.
        out: where files go; None: "tables" in the folder.

    Returns:
        The runs, and the files.

    Raises:
        ValueError: there is no run, or a name is unknown; or, after all is printed, the tables can not be written.
    """
    from results.tables.build import render_all
    from results.tables.choices import named_reference
    from results.tables.pivot import REFERENCE
    from results.tables.writing import write_tables

    asked, out = asked or Asked(), out or folder / "tables"
    df = load_runs(folder, keys)
    reference = REFERENCE if asked.reference is None or df.empty else named_reference(df, asked.reference)
    names = list(asked.metrics) or None, list(asked.sweep) or None
    rendered = render_all(df, asked.select, *names, reference, asked.digits)
    with writing_to(out) as written:
        written += write_tables(rendered, out, list(formats), asked.caption) if formats else []
    print_tables(rendered)
    if written.problem:
        raise ValueError(written.problem)
    return df, written


class Written(list[Path]):
    """Files; `problem` says why they could not be written, "" if they were."""

    problem = ""


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[Written]:
    """A list for files that are written inside to a folder; what goes wrong is kept until the tables are printed."""
    written = Written()
    try:
        yield written
    except OSError as error:
        why = "a file has this name" if isinstance(error, FileExistsError) else error.strerror or error
        written.problem = f"tables are not written to {shlex.quote(str(out))}: {why}"


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables as wide as the terminal is."""
    from results.tables.text import tables_text

    print(tables_text(tables, shutil.get_terminal_size((120, 24)).columns, sys.stdout.encoding))


def report_line(folder: Path, records: int) -> str:
    """Write the report of a folder; returns the line that says where it is, or why there is none."""
    from results.report import gather, write_report

    command = f"`python run_suite.py report {shlex.quote(str(folder))}`"
    if records > MOST_REPORTED:
        return f"{command} writes a page of these {records:,} records"
    try:
        file = write_report(folder, gather(folder))
    except Exception as error:  # noqa: BLE001 - the runs and their tables are there, and the exit code tells of these
        return f"no report ({type(error).__name__}: {cut(str(error), 300)}); {command} shows why"
    return f"report: {shlex.quote(str(file))}"
