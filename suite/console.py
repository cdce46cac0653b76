"""The output of the command line: lines that are safe on any terminal, notes and mistakes on stderr, a grid's bars,
a screen that is drawn anew, tables."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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


class Voice:
    """How much a command says beside its results and its errors: a state of the process, chosen before it starts.

    Attributes:
        quiet: neither progress nor notes.
        verbose: also what is loaded and where time goes, and the traceback of a mistake, on stderr.
    """

    quiet = verbose = False


voice = Voice()


def say(line: str) -> None:
    """Print a line about the progress of a command, unless it is to be quiet."""
    if not voice.quiet:
        print(line, flush=True)


def explain(line: str) -> None:
    """Print a line on stderr where the command is verbose."""
    if voice.verbose:
        print(f"verbose: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Where the command is verbose, say how long the part inside took, and whether it loaded torch."""
    start, before = time.perf_counter(), "torch" in sys.modules
    try:
        yield
    finally:
        loaded = ", loading torch among it" if not before and "torch" in sys.modules else ""
        explain(f"{what}: {time.perf_counter() - start:.2f} s{loaded}")


def shown(text: str) -> str:
    """A text of one line or more, each of which shows on a terminal and has an end."""
    return "\n".join(cut(visible(line), _LONGEST_LINE) for line in text.split("\n"))


_STATUS = re.compile(r"^(\[ *[0-9]+/[0-9]+\] )?(ok|diverged|failed before|failed|FALSE|note)(?= )")
_COUNT = re.compile(r"\b([0-9]+ (?:ok|diverged|failed before|failed))(?=,|$)")
_LOOKS = {
    "ok": "green",
    "diverged": "yellow",
    "note": "yellow",
    "failed": "red",
    "failed before": "red",
    "FALSE": "red",
}


def painted(line: str) -> str:
    """A line whose first word, or the one behind "[3/92]", is a status: that word in its colour."""
    return _STATUS.sub(lambda found: (found[1] or "") + terminal.paint(found[2], _LOOKS[found[2]]), line)


def painted_counts(line: str) -> str:
    """A line of counts, "4 ok, 1 failed, ...": those of a status in its colour."""
    return _COUNT.sub(lambda found: terminal.paint(found[1], _LOOKS[found[1].partition(" ")[2]]), line)


def print_document(document: Mapping[str, Any]) -> None:
    """Print a JSON document (suite.as_json)."""
    from suite.as_json import as_text

    print(as_text(dict(document)))


def documented(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """While inside, nothing else reaches stdout where it is to hold a document: a user's file may print."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def print_notes(notes: Iterable[str]) -> None:
    for note in () if voice.quiet else notes:
        print(f"note: {note}", file=sys.stderr)


def fail(message: str) -> int:
    lines = [line for line in message.split("\n") if line.strip()] or ["unknown error"]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"{len(lines) - _MOST_LINES + 1} more"]
    for line in lines:
        print(f"{terminal.paint('error:', 'red', sys.stderr)} {cut(line, _LONGEST_LINE)}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def display(progress: Progress) -> Iterator[Callable[[Event], None]]:
    """Prints events: a live display with one bar per run on a terminal, plain lines elsewhere."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    from suite.progress import time_left

    if voice.quiet:

        def tell_failures(event: Event) -> None:
            line = progress.take(event)
            if line is not None and event.record is not None and event.record.status == "failed":
                print(painted(shown(line)), flush=True)

        yield tell_failures
        return
    console = _console()
    if not console.is_terminal:

        def tell_plainly(event: Event) -> None:
            line = progress.take(event)
            if line is not None:
                print(painted(shown(line)), flush=True)

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
                console.print(Text.from_ansi(terminal.codes(painted(shown(line)))))
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
    return Console(
        file=screen,  # type: ignore[arg-type]
        force_terminal=screen.isatty(),  # else FORCE_COLOR would have a file hold movements of the cursor
        no_color=not screen.colours,
        soft_wrap=True,
        highlight=False,
        markup=False,
        emoji=False,
    )


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
    for line in df.attrs["doubles"]:
        print(f"left out of the tables: {line}", file=sys.stderr)
    if unread := df.attrs.get("unread"):
        print(f"passed over, as if it was not there: {unread}", file=sys.stderr)
    return df


def render(df: DataFrame, asked: Asked) -> list[Table]:
    """The tables of runs, as they are asked for. Raises ValueError for an unknown name, or no runs."""
    from results.tables.build import render_all
    from results.tables.choices import named_reference
    from results.tables.pivot import REFERENCE

    reference = REFERENCE if asked.reference is None or df.empty else named_reference(df, asked.reference)
    names = list(asked.metrics) or None, list(asked.sweep) or None
    return render_all(df, asked.select, *names, reference, asked.digits)


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
    from results.tables.writing import write_tables

    asked, out = asked or Asked(), out or folder / "tables"
    df = load_runs(folder, keys)
    rendered = render(df, asked)
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
    print(_tables(tables, shutil.get_terminal_size((120, 24)).columns))


_BEST, _SECOND = ("\x01", "\x02"), ("\x03", "\x04")
"""What stands around the best and the second before they are painted; in a name it would be made visible."""


def _tables(rendered: Sequence[Table], width: int) -> str:
    """Tables as text, the best in bold and the second underlined where stdout is in colours."""
    from results.tables.text import tables_text

    if not terminal.in_colours(sys.stdout):
        return tables_text(rendered, width, sys.stdout.encoding)
    text = tables_text(rendered, width, sys.stdout.encoding, ("%s".join(_BEST), "%s".join(_SECOND)))
    for (before, after), look in ((_BEST, "bold"), (_SECOND, "underline")):
        text = text.replace(f"{before}so{after}", terminal.paint("so", look))  # in a sentence: no columns to keep
        on, off = terminal.paint("\0", look).split("\0")
        text = text.replace(before, f" {on}").replace(after, f"{off} ")
    return text


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
