"""docs/commands.md: every command with its --help; and the configs that ship, with what they say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer.main

from suite.config import read_config
from suite.documents.docstrings import in_a_cell
from suite.environment import ROOT

WIDTH = 100
"""Columns of a help text, whatever the terminal has."""


def pages_of_commands() -> str:
    """A section for each command, in the order of `--help`, with its help as it is printed."""
    from suite.cli.app import app

    top = typer.main.get_command(app)
    sections = [f"## `{name[len('run_suite.py ') :] or 'run_suite.py'}`\n\n{_help(text)}" for name, text in _helps(top)]
    return "\n\n".join(sections)


def _helps(command: Any, name: str = "run_suite.py", parent: Any = None) -> Iterator[tuple[str, str]]:
    context = command.make_context(
        name, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context.command_path, command.get_help(context)
    for below in command.list_commands(context) if hasattr(command, "list_commands") else ():
        found = command.get_command(context, below)
        if found is not None and not found.hidden:
            yield from _helps(found, below, context)


def _help(text: str) -> str:
    return "\n".join(["```", *(line.rstrip() for line in text.strip().splitlines()), "```"])


def all_configs() -> str:
    """Every config of the suite: what its comment says first, its tasks and its budget."""
    rows = ["| config | what | tasks | budget |", "| --- | --- | --- | --- |"]
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        config = read_config(file)
        tasks = ", ".join(f"`{task}`" for task in config["tasks"])
        what = in_a_cell(_first_sentence(file.read_text(encoding="utf-8")))
        rows.append(f"| `configs/{file.name}` | {what} | {tasks} | {config['budget']} |")
    return "\n".join(rows)


def _first_sentence(text: str) -> str:
    """Of the comment at the top of a file."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#") or line.startswith("#   "):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", " ".join(comment), maxsplit=1)[0]
