"""A page of findings: the tables of a results folder as Markdown, with what has to be known of how they were made."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

import pandas as pd

from results import pages
from results.escape import escape_markdown, one_line
from results.metrics import nearest
from results.rows import distinct
from results.store import read_versions
from results.tables.markdown import to_markdown
from results.tables.table import Table

_OURS = re.compile(r"python run_suite\.py tables (\S+|'[^']*') .*--page\b")
_MOST_COMMANDS = 5
_STATUSES = ("ok", "diverged", "failed", "skipped")


def findings(df: pd.DataFrame, tables: Sequence[Table], made_by: str = "", brief: bool = False) -> str:
    """The facts about the runs as a list, then every table with its caption.

    Args:
        df: from `results.load`; the numbers are those of `tables`, which were made of it.
        tables: what to print, in this order.
        made_by: the command that made the runs; "": what the folder says of it.
        brief: the tables first, the facts as one paragraph below them: for a page about something else.

    Returns:
        Markdown without a title and without markers. No path of the machine is in it.
    """
    rendered = [to_markdown(table) for table in tables]
    if brief:
        return "\n".join([*rendered, " ".join(_facts(df, made_by))])
    return "\n".join([*(f"- {fact}" for fact in _facts(df, made_by)), "", *rendered])


def write_page(
    df: pd.DataFrame,
    tables: Sequence[Table],
    file: str | Path,
    command: str,
    title: str = "",
    only: Sequence[str] = (),
    made_by: str = "",
) -> Path:
    """Write `findings` into a page of Markdown, between the markers of the command that was given.

    Every line outside of them stays: the sentences of people, and blocks of other commands.

    Args:
        df, tables, made_by: see `findings`.
        file: the page; a new one gets a title, and a place for sentences above the block.
        command: this command, as the marker shall show it.
        title: of the page; "": a new page is named after its config, an old one keeps its own.
        only: names of tables; none: all.

    Raises:
        ValueError: an unknown table (with the nearest); the page is there and has no block of this command.
        OSError: the page can not be written.
    """
    names = [table.name for table in tables]
    for name in only:
        if name not in names:
            raise ValueError(f'no table is named "{name}"; tables: {", ".join(names)}{nearest(name, names)}')
    chosen = [table for table in tables if not only or table.name in only]
    config = _config(df)
    heading = title or PurePath(config or df.attrs.get("folder", "")).stem.replace("_", " ") or "Findings"
    source = _OURS.match(command)

    def mine(other: str) -> bool:
        """Of the same folder, whatever the options; a page for another folder is another page."""
        match = _OURS.match(other)
        return bool(match and source and match[1] == source[1])

    tasks = {table.task for table in chosen}
    if only and "" not in tasks:  # the facts are those of the runs in the tables
        df = df[df["task"].isin(tasks)]
    return pages.write_block(
        file,
        command,
        findings(df, chosen, made_by, brief=bool(only)),
        escape_markdown(heading),
        mine,
        retitle=bool(title),
    )


def _facts(df: pd.DataFrame, made_by: str) -> list[str]:
    config, facts = _config(df), []
    commands = [made_by] if made_by else _commands(df)
    if commands:
        facts.append(f"Made by {', then '.join(map(_code, commands))}.")
    if config:
        facts.append(f"Config: {_code(config)}.")
    counts = df["status"].value_counts()
    seeds = sorted({int(seed) for seed in df["seed"]})
    facts.append(
        f"Runs: {len(df)}, of which {', '.join(f'{int(counts.get(s, 0))} {s}' for s in _STATUSES)}; "
        f"seeds {', '.join(map(str, seeds))}."
    )
    for name, column in (("Commit", "commit"), ("Machine", "device_name"), ("System", "environment.platform")):
        if values := _values(df, column):
            facts.append(f"{name}: {', '.join(values)}.")
    versions = [
        f"{name} {', '.join(values)}"
        for name, column in (
            ("torch", "torch"),
            ("Python", "environment.python"),
            ("threads per run", "threads"),
            ("kernels", "kernels"),
        )
        if (values := _values(df, column))
    ]
    if versions:
        facts.append(f"With {'; '.join(versions)}.")
    days = sorted({str(time)[:10] for time in df["finished"].dropna()}) if "finished" in df else []
    if days:
        facts.append(f"Finished: {days[0]}" + (f" to {days[-1]}." if len(days) > 1 else "."))
    if left := sum((df.attrs.get("stale") or {}).values()):
        facts.append(f"Left out: {left} records of other versions or data.")
    if damaged := len(df.attrs.get("damaged") or ()):
        facts.append(f"Left out: {damaged} damaged records.")
    return facts


def _values(df: pd.DataFrame, column: str) -> list[str]:
    if column not in df:
        return []
    found = [str(value) for value in distinct(df[column].dropna())]
    if column == "commit":
        found = [value[:12] + ("+changes" if value.endswith("+changes") else "") for value in found]
    if column == "threads":
        found = [value.removesuffix(".0") for value in found]
    return [escape_markdown(value) for value in found if value]


def _commands(df: pd.DataFrame) -> list[str]:
    """The commands that the folder was made by, each once, in their order; of an older folder the one that its last
    config asks for."""
    plans = df.attrs.get("asked") or ()
    found = [
        shlex.join(["python", "run_suite.py", *map(_without_place, plan["command"])])
        for plan in plans
        if plan.get("command")
    ]
    if found:
        return list(dict.fromkeys(found))[-_MOST_COMMANDS:]
    config = _config(df)
    return [shlex.join(["python", "run_suite.py", "run", config])] if config else []


def _config(df: pd.DataFrame) -> str:
    """The config that was planned last: its name and its folder's."""
    folder = df.attrs.get("folder")
    return _without_place(read_versions(folder)["config"]) if folder else ""


def _without_place(word: str) -> str:
    """An absolute path without what only its machine knows: its last two parts. Other words stay."""
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={_without_place(value)}"
    if not re.match(r"/|~|[A-Za-z]:[\\/]", word):
        return word
    return "/".join(PurePath(word.replace("\\", "/")).parts[-2:]).lstrip("/")


def _code(text: str) -> str:
    """A text as Markdown's code, in which nothing is markup."""
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"
