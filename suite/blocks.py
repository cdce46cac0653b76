"""Entries of a config as blocks: the settings, norms and seeds of one task.

All mistakes are collected; what no run could be made of is never expanded.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from norms.protocol import NormInfo
from norms.registry import norm_info, norm_label, norm_names, norm_option_defaults, norm_option_types
from norms.values import cut, nearest, sequence_depth, shown
from results.escape import one_line
from suite.config import KEYS, MOST_LINES, kind, parse_seeds, parse_value, whole
from tasks import get_task, task_names
from tasks.base import NotPrepared, Task
from tasks.options import LeftOut, Options

BUDGETS = ("reduced", "full")
MOST_THREADS = 4096
"""Of a run; more than any machine has, and not all systems start more for one process."""
MOST_COMBINATIONS = 100_000
"""Settings of one block, or options of one norm: a grid of more is refused before it is expanded."""


@dataclass(frozen=True)
class Overrides:
    """Changes to a config that the command line, or a caller from Python, asks for.

    Args:
        tasks: only these tasks of the config.
        norms: instead of the config's norms: a name or a label selects the config's entries, another registered name
            is added with its defaults.
        seeds: instead of every `seeds:` of the config, as text ("0-4", "0,2,5").
        settings: "task.option=value" texts; the value is YAML, and a list is an axis.
        plugin_norms: names added to every norm list (not where `norms` is given).
        threads: instead of the config's.
        many: more than MOST_RUNS runs are meant (suite.planning).
        timeout: seconds a run may take; planning tries no norm for longer (suite.trial).
    """

    tasks: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    seeds: str | None = None
    settings: tuple[str, ...] = ()
    plugin_norms: tuple[str, ...] = ()
    threads: int | None = None
    many: bool = False
    timeout: float | None = None


@dataclass(frozen=True)
class Norm:
    """One norm with options as given (not yet completed by a run's setting)."""

    name: str
    options: Mapping[str, Any]
    label: str
    info: NormInfo


@dataclass(frozen=True)
class Block:
    """One entry of a task: every setting is crossed with every norm and every seed."""

    task: Task
    settings: list[tuple[Options, str]]  # with the checksum of the data they name
    norms: list[Norm]
    seeds: list[int]


class Reader:
    """Collects every mistake of a config instead of stopping at the first.

    Args:
        config: it holds nothing that `suite.config.form_mistakes` names.

    Attributes:
        mistakes: one line each.
        missing: the messages of NotPrepared, one line each; no mistake of the config.
        left_out: one line for each combination of options that an options model leaves out of a grid.
    """

    def __init__(self, config: Mapping[str, Any], overrides: Overrides, data_dir: Path):
        self.config, self.overrides, self.data_dir = config, overrides, data_dir
        self.mistakes: list[str] = []
        self.missing: list[str] = []
        self.left_out: list[str] = []
        for key in config:
            if key not in KEYS and not key.startswith("x-"):
                self.mistakes.append(
                    f'unknown key "{key}"; a config has {", ".join(KEYS)}, and x-... for anchors{nearest(key, KEYS)}'
                )
        self.budget = self._one_of("budget", config.get("budget", "reduced"), BUDGETS)
        self.threads = self._threads()

    def blocks(self) -> list[Block]:
        entries = self._entries()
        self._check_selected_norms(entries)
        blocks = []
        for name, given in entries:
            block = self._block(name, given)
            if block is not None:
                blocks.append(block)
        if not entries:
            if not self.mistakes:
                self.mistakes.append(f"tasks: nothing to run; tasks: {', '.join(task_names())}")
            self._norms(self.config.get("norms"), "")  # for their mistakes
            self._seeds(self.config.get("seeds"))
        return blocks

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        """(task, mapping of its block) in the file's order, with --tasks and --set applied."""
        tasks = self.config.get("tasks")
        if not isinstance(tasks, dict):
            if isinstance(tasks, list) and all(isinstance(t, str) for t in tasks):
                tasks = dict.fromkeys(tasks)
            else:
                what = "missing" if "tasks" not in self.config else f"a mapping is needed, not {kind(tasks)}"
                self.mistakes.append(f"tasks: {what}; for example tasks: {{classification: {{epochs: 3}}}}")
                return []
        for name in self.overrides.tasks:
            if name not in tasks:
                self.mistakes.append(
                    f'--tasks "{name}": the config has {", ".join(map(str, tasks)) or "none"}{nearest(name, tasks)}'
                )
        settings = self._settings(list(tasks))
        entries: list[tuple[str, dict[str, Any]]] = []
        for name, given in tasks.items():
            selected = not self.overrides.tasks or name in self.overrides.tasks
            if given == []:
                self.mistakes.append(f'task "{name}": an empty list leaves nothing to run')
            for block in given if isinstance(given, list) else [given]:
                if block is not None and not isinstance(block, dict):
                    self.mistakes.append(f'task "{name}": a mapping of options is needed, not {kind(block)}')
                elif selected:
                    entries.append((name, {**(block or {}), **settings.get(name, {})}))
        return entries

    def _settings(self, tasks: list[str]) -> dict[str, dict[str, Any]]:
        settings: dict[str, dict[str, Any]] = {}
        seen: set[tuple[str, str]] = set()
        for text in self.overrides.settings:
            match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
            text = cut(text, 80)
            if match is None:
                self.mistakes.append(f'--set "{text}": task.option=value is needed, as classification.epochs=3')
                continue
            task, option, value = match.groups()
            if task not in tasks:
                known = ", ".join(tasks) or "none"
                self.mistakes.append(
                    f'--set "{text}": the config has no task "{task}" but {known}{nearest(task, tasks)}'
                )
                continue
            if (task, option) in seen:
                self.mistakes.append(
                    f'--set "{text}": {task}.{option} is given twice; an axis is a list, as {task}.{option}=[1, 2]'
                )
                continue
            seen.add((task, option))
            try:
                settings.setdefault(task, {})[option] = parse_value(value)
            except ValueError as error:
                self.mistakes.append(f'--set "{text}": {error}')
        return settings

    def _block(self, name: str, given: dict[str, Any]) -> Block | None:
        before = len(self.mistakes)
        norms = self._norms(
            given.get("norms", self.config.get("norms")), f'task "{name}": ' if "norms" in given else ""
        )
        seeds = self._seeds(given.get("seeds", self.config.get("seeds")))
        try:
            task = get_task(name)
        except ValueError as error:
            self.mistakes += str(error).splitlines()
            return None
        options = {key: value for key, value in given.items() if key not in ("norms", "seeds")}
        settings = self._task_settings(task, options)
        return Block(task, settings, norms, seeds) if len(self.mistakes) == before else None

    def _task_settings(self, task: Task, options: dict[str, Any]) -> list[tuple[Options, str]]:
        fields = task.options.model_fields
        axes: dict[str, list[Any]] = {}
        for key, value in options.items():
            if key not in fields:
                self.mistakes.append(
                    f'task "{task.name}": unknown option "{key}"; it has {", ".join(fields)}{nearest(key, fields)}'
                )
            elif _depth(value) > sequence_depth(fields[key].annotation):
                axes[key] = value
                if not value:
                    self.mistakes.append(f'task "{task.name}": option "{key}": an empty list leaves nothing to run')
            else:
                axes[key] = [value]
        if too_many := _too_many(axes):
            self.mistakes.append(f'task "{task.name}": {too_many}')
            return []
        before = len(self.mistakes)
        settings, left_out = [], []
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True))
            try:
                chosen = task.options(**given)
            except ValidationError as error:
                errors = error.errors(include_url=False)
                if all(isinstance(e.get("ctx", {}).get("error"), LeftOut) for e in errors):
                    left_out += [f'task "{task.name}": {e["ctx"]["error"]}' for e in errors]
                else:
                    self._refused(task, given, errors)
            else:
                settings.append((chosen, self._checksum(task, chosen)))
            if len(self.mistakes) - before > MOST_LINES:
                break  # as many as are shown; each takes time
        if settings:
            self.left_out += left_out
        elif len(self.mistakes) == before:
            self.mistakes += left_out
        return settings

    def _refused(self, task: Task, given: dict[str, Any], errors: Iterable[Mapping[str, Any]]) -> None:
        for e in errors:
            where = ".".join(str(part) for part in e["loc"][:1])
            what = f'option "{where}" given {shown(e["input"])}: ' if where else ""
            for line in e["msg"].removeprefix("Value error, ").splitlines():
                self.mistakes.append(_as_list(f'task "{task.name}": {what}{line}', given))
            given.pop(where, None)
        with contextlib.suppress(ValidationError):  # the rest may name data that is not there
            self._checksum(task, task.options(**given))

    def _checksum(self, task: Task, options: Options) -> str:
        """The checksum of the data; empty where the data is not prepared."""
        try:
            return task.data_checksum(options, self.data_dir)
        except ValueError as error:
            lines = self.missing if isinstance(error, NotPrepared) else self.mistakes
            said = [f'task "{task.name}": {line}' for line in str(error).splitlines()]
            lines += [_as_list(line, dict(options)) for line in said]
        except OSError as error:
            where = cut(str(error.filename or self.data_dir), 120)
            self.mistakes.append(f'task "{task.name}": its data can not be read: {error.strerror}: {where}')
        except Exception as error:  # noqa: BLE001 - a user's own task
            text = cut(one_line(f"{type(error).__name__}: {error}"), 200)
            self.mistakes.append(f'task "{task.name}": data_checksum(options, data_dir) raised {text}')
        return ""

    def _norms(self, given: Any, where: str) -> list[Norm]:
        if given is None and not self.overrides.norms:
            self.mistakes.append(f"{where}norms: missing; registered: {', '.join(norm_names())}")
            return []
        entries = self._norm_entries(given if given is not None else [], where)
        if self.overrides.norms:
            chosen = []
            for name in self.overrides.norms:
                matching = [e for e in entries if name in (e.name, e.label)]
                chosen += matching or self._norm_entries([name] if name in norm_names() else [], where)
            return list({(e.label, repr(e.options)): e for e in chosen}.values())
        present = {e.name for e in entries}
        entries += self._norm_entries([n for n in self.overrides.plugin_norms if n not in present], where)
        if not entries and given == []:
            self.mistakes.append(f"{where}norms: an empty list leaves nothing to run")
        return entries

    def _check_selected_norms(self, entries: list[tuple[str, dict[str, Any]]]) -> None:
        """--norms names what is registered, or the label of an entry of some selected task."""
        if not self.overrides.norms:
            return
        lists = [given.get("norms", self.config.get("norms")) or [] for _, given in entries]
        quiet = Reader({}, Overrides(), self.data_dir)  # these entries' mistakes are reported where they are read
        known = {*norm_names(), *(e.label for each in lists for e in quiet._norm_entries(each, ""))}
        for name in self.overrides.norms:
            if name not in known:
                self.mistakes.append(
                    f'--norms "{name}": unknown; known: {", ".join(sorted(known))}{nearest(name, known)}'
                )

    def _norm_entries(self, given: Any, where: str) -> list[Norm]:
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list):
            self.mistakes.append(f"{where}norms: a list of names is needed, not {kind(given)}")
            return []
        entries: list[Norm] = []
        for item in given:
            if isinstance(item, str):
                name, options = item, None
            elif isinstance(item, dict) and len(item) == 1:
                name, options = next(iter(item.items()))
            else:
                self.mistakes.append(f"{where}norms: {shown(item)}: a name or {{name: {{option: value}}}} is needed")
                continue
            entries += self._norm_grid(name, options if options is not None else {}, where)
        return entries

    def _norm_grid(self, name: Any, options: Any, where: str) -> Iterator[Norm]:
        try:
            info, defaults, types = norm_info(name), norm_option_defaults(name), norm_option_types(name)
        except ValueError as error:
            self.mistakes.append(_as_list(f"{where}{error}", {"norms": name}))
            return
        if not isinstance(options, dict):
            self.mistakes.append(f'{where}norm "{name}": a mapping of options is needed, not {kind(options)}')
            return
        axes = {}
        for key, value in options.items():
            one = max(_depth(defaults.get(key)), sequence_depth(types.get(key)))  # a default of None tells nothing
            axes[key] = value if _depth(value) > one else [value]
        if too_many := _too_many(axes):
            self.mistakes.append(f'{where}norm "{name}": {too_many}')
            return
        for key, values in axes.items():
            if not values:
                self.mistakes.append(f'{where}norm "{name}": option "{key}": an empty list leaves nothing to run')
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            try:
                yield Norm(name, chosen, norm_label(name, chosen), info)
            except ValueError as error:
                self.mistakes += [f"{where}{one_line(line)}" for line in str(error).splitlines()]

    def _seeds(self, given: Any) -> list[int]:
        given = given if self.overrides.seeds is None else self.overrides.seeds
        try:
            if given is None:
                raise ValueError('seeds: missing; for example seeds: [0, 1] or seeds: "0-4"')
            return parse_seeds(given)
        except ValueError as error:
            self.mistakes.append(str(error))
            return []

    def _threads(self) -> int:
        given = self.overrides.threads if self.overrides.threads is not None else self.config.get("threads", 1)
        threads = whole(given)
        if threads is None or not 1 <= threads <= MOST_THREADS:
            self.mistakes.append(f"threads {shown(given)}: an integer from 1 to {MOST_THREADS} is needed")
            return 1
        return threads

    def _one_of(self, key: str, given: Any, allowed: Collection[str]) -> str:
        if given not in allowed:
            near = nearest(given, allowed) if isinstance(given, str) else ""
            self.mistakes.append(f"{key} {shown(given)}: allowed: {', '.join(allowed)}{near}")
        return str(given)


def _depth(value: Any) -> int:
    """How deep lists are nested: 0 for a plain value, 1 for a list of plain values."""
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _as_list(line: str, given: Mapping[str, Any]) -> str:
    """A line about something in `given`, which says how a list is written where it quotes a text with commas."""
    for value in given.values():
        if isinstance(value, str) and "," in value and value in line and "a list is written" not in line:
            items = ", ".join(item.strip() for item in value.split(","))
            return f"{line}; a list is written [{cut(items, 60)}]"
    return line


def _too_many(axes: Mapping[str, Collection[Any]]) -> str | None:
    """The reason why these axes are too many to expand, or None."""
    count = math.prod(map(len, axes.values()))
    if count <= MOST_COMBINATIONS:
        return None
    sizes = " x ".join(f"{len(values)} {key}" for key, values in axes.items() if len(values) > 1)
    number = f"{count:,}" if count < 10**12 else "more than 10^12"
    return f"{number} combinations ({cut(sizes, 100)}); at most {MOST_COMBINATIONS:,} are planned"
