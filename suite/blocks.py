"""Entries of a config as blocks: the settings, norms and seeds of one task.

All mistakes are collected; what no run could be made of is never expanded.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from norms.values import cut, nearest, sequence_depth, shown
from results.escape import one_line
from suite.config import KEYS, MOST_LINES, kind, parse_seeds, parse_value, whole
from suite.norm_entries import Norm, NormEntries, as_list, depth, too_many
from tasks import get_task, task_names
from tasks.base import NotPrepared, Task
from tasks.options import LeftOut, Options

BUDGETS = ("reduced", "full")
MOST_THREADS = 4096
"""Of a run; more than any machine has, and not all systems start more for one process."""


@dataclass(frozen=True)
class Overrides:
    """Changes to a config that the command line, or a caller from Python, asks for.

    Args:
        tasks: only these tasks of the config.
        norms: instead of the config's norms: a name or a label selects the config's entries, another registered name
            is added with its defaults, and gn(num_groups=4) with its options.
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
        self.norms = NormEntries(self.mistakes, overrides.norms, overrides.plugin_norms)
        for key in config:
            if key not in KEYS and not key.startswith("x-"):
                self.mistakes.append(
                    f'unknown key "{key}"; a config has {", ".join(KEYS)}, and x-... for anchors{nearest(key, KEYS)}'
                )
        self.budget = self._one_of("budget", config.get("budget", "reduced"), BUDGETS)
        self.threads = self._threads()

    def blocks(self) -> list[Block]:
        entries = self._entries()
        self.norms.check_wanted([given.get("norms", self.config.get("norms")) or [] for _, given in entries])
        blocks = []
        for name, given in entries:
            block = self._block(name, given)
            if block is not None:
                blocks.append(block)
        if not entries:
            if not self.mistakes:
                self.mistakes.append(f"tasks: nothing to run; tasks: {', '.join(task_names())}")
            self.norms.of(self.config.get("norms"), "")  # for their mistakes
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
        norms = self.norms.of(
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
            elif depth(value) > sequence_depth(fields[key].annotation):
                axes[key] = value
                if not value:
                    self.mistakes.append(f'task "{task.name}": option "{key}": an empty list leaves nothing to run')
            else:
                axes[key] = [value]
        if many := too_many(axes):
            self.mistakes.append(f'task "{task.name}": {many}')
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
                self.mistakes.append(as_list(f'task "{task.name}": {what}{line}', given))
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
            lines += [as_list(line, dict(options)) for line in said]
        except OSError as error:
            where = cut(str(error.filename or self.data_dir), 120)
            self.mistakes.append(f'task "{task.name}": its data can not be read: {error.strerror}: {where}')
        except Exception as error:  # noqa: BLE001 - a user's own task
            text = cut(one_line(f"{type(error).__name__}: {error}"), 200)
            self.mistakes.append(f'task "{task.name}": data_checksum(options, data_dir) raised {text}')
        return ""

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
