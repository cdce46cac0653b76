"""The application that all commands are added to, and what they share: options, and the reading of their values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A file with your own norms, tasks, models, ... (repeatable).")
]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of prepared data sets.")]


ORDER = (
    *("run", "debug", "watch", "tables", "figures", "report"),
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


app = typer.Typer(cls=_Commands, help="NormSuite: what does a normalization layer change?", **SETTINGS)


def split_names(option: str, text: str | None) -> tuple[str, ...]:
    """ "bn, gn(num_groups=8,eps=0.1)" -> its parts; a comma inside brackets separates nothing. None: not given.

    Raises:
        ValueError: no name at all, or brackets that do not match.
    """
    if text is None:
        return ()
    parts, open_ = [""], ""
    for character in text:
        if character in "([":
            open_ += character
        elif character in ")]":
            if open_[-1:] + character not in ("()", "[]"):
                raise ValueError(f'{option} "{text[:120]}": a "{character}" closes nothing')
            open_ = open_[:-1]
        if character == "," and not open_:
            parts.append("")
        else:
            parts[-1] += character
    if open_:
        raise ValueError(f'{option} "{text[:120]}": a "{open_[-1]}" is not closed')
    names = tuple(part.strip() for part in parts if part.strip())
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
        raise ValueError(f"--{error}") from error
