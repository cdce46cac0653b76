"""The application that all commands are added to, and what they share: options, and the reading of their values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from suite.cli import completing
from suite.console import voice

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}

Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        help="A file with your own norms, tasks, models, ... (repeatable).",
        autocompletion=completing.python_files,
    ),
]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of prepared data sets.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout in the place of text.")]


ORDER = (
    *("run", "debug", "watch", "status", "cancel", "tables", "figures", "report"),
    *("runs", "merge", "diff", "config", "check", "convert-report", "list", "data", "bench", "docs"),
)
"""The commands as `--help` lists them: what a newcomer needs first."""


class _Commands(typer.core.TyperGroup):
    """The commands. Click takes an EOFError for Ctrl-C; here it is a file that ends too early."""

    def list_commands(self, ctx: Any) -> list[str]:
        place = {name: number for number, name in enumerate(ORDER)}
        return sorted(super().list_commands(ctx), key=lambda name: place.get(name, len(place)))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise ValueError(f"a file ends too early: {error}") from error


app = typer.Typer(
    cls=_Commands,
    help="NormSuite: what does a normalization layer change?",
    context_settings={"help_option_names": ["-h", "--help"]},  # which every command inherits
    **(SETTINGS | {"add_completion": True}),
)


def _print_version(asked: bool) -> None:
    if asked:
        from suite.environment import version_line

        print(version_line())
        raise typer.Exit


def _be_quiet(asked: bool) -> None:
    voice.quiet = voice.quiet or asked
    _check_voice()


def _be_verbose(asked: bool) -> None:
    voice.verbose = voice.verbose or asked
    _check_voice()


def _check_voice() -> None:
    if voice.quiet and voice.verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other")


@app.callback()
def every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, expose_value=False, help="What runs here."),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=_be_quiet,
            expose_value=False,
            help="Neither progress nor notes: results, failed runs and errors only.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            callback=_be_verbose,
            expose_value=False,
            help="On stderr: what is loaded, where time goes, and the traceback of a mistake.",
        ),
    ] = False,
) -> None:
    """NormSuite: what does a normalization layer change?"""


def whole_command() -> Any:
    """The command of all commands, in which --quiet and --verbose may also stand behind a command's name."""
    command: Any = typer.main.get_command(app)
    of_all = [option for option in command.params if option.name in ("quiet", "verbose")]
    for each in _below(command):
        taken = {text for option in each.params for text in option.opts}
        each.params += [option for option in of_all if not taken.intersection(option.opts)]
    return command


def _below(command: Any) -> Iterator[Any]:
    for each in getattr(command, "commands", {}).values():
        yield each
        yield from _below(each)


def command_of(arguments: Sequence[str]) -> str:
    """The name of the command that is called, "" without one. What may stand before it are flags, without values."""
    return next((argument for argument in arguments if not argument.startswith("-")), "")


def split_names(option: str, text: str | None) -> tuple[str, ...]:
    """ "bn, gn(num_groups=8,eps=0.1)" -> its parts; a comma inside brackets separates nothing. None: not given.

    Raises:
        ValueError: no name at all, or brackets that do not match.
    """
    if text is None:
        return ()
    from suite.naming import split_outside

    try:
        parts = split_outside(text)
    except ValueError as error:
        raise ValueError(f'{option} "{text[:120]}": {error}') from error
    names = tuple(filter(None, parts))
    if not names:
        raise ValueError(f'{option} "{text[:120]}": a name is needed')
    return names


def parse_options(texts: Sequence[str] | None) -> dict[str, Any]:
    from suite.config import parse_value

    given = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f'--option "{text}": KEY=VALUE is needed')
        if (key := key.strip()) in given:
            raise ValueError(f'--option "{text}": {key} is given twice')
        try:
            given[key] = parse_value(value)
        except ValueError as error:
            raise ValueError(f'--option "{text}": {error}') from error
    return given


@contextlib.contextmanager
def as_options() -> Iterator[None]:
    """Mistakes about an argument of a function are mistakes about the option of that name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith("--") else f"--{error}") from error
