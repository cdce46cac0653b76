"""A config file and overrides -> the list of runs. All mistakes of a config are reported at once; nothing runs here.

A config is a grid: a list is an axis, every combination of axes is a setting, and every setting is crossed with the
norms and the seeds. For an option whose type is a sequence, a list of lists is the axis. A task's entry may be a list
of mappings (blocks), each with its own grid; an entry may carry its own `norms:` and `seeds:`.

    budget: reduced
    norms: [bn, {gn: {num_groups: 8}}, {bgn: {num_groups: [1, 8]}}]
    seeds: 0-4
    tasks:
      classification: {dataset: fashion_mnist_mini, norm_batch_size: [2, 64]}

Precedence of an option: options model < file < `--set`.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from norms.registry import (
    NormInfo,
    nearest,
    norm_info,
    norm_label,
    norm_names,
    norm_option_defaults,
    resolve_norm_options,
)
from results.record import RunSpec
from suite.config import KEYS, PlanError, kind, parse_seeds, parse_value, read_config
from suite.trial import Trials, trial_seconds
from tasks import get_task, task_names, task_version
from tasks.base import NormChoice, Options, Task

BUDGETS = ("reduced", "full")


@dataclass(frozen=True)
class Overrides:
    """What the command line says on top of a config.

    Args:
        tasks: only these tasks of the config.
        norms: instead of the config's norms: a name or a label selects the config's entries, another registered name
            is added with its defaults.
        seeds: instead of every `seeds:` of the config, as text ("0-4", "0,2,5").
        settings: "task.option=value" texts; the value is YAML, and a list is an axis.
        plugin_norms: names added to every norm list (not where `norms` is given).
        threads: instead of the config's.
        timeout: seconds a run may take; planning tries no norm for longer (suite.trial).
    """

    tasks: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    seeds: str | None = None
    settings: tuple[str, ...] = ()
    plugin_norms: tuple[str, ...] = ()
    threads: int | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a config asks for: `runs` to do, `skipped` ones with the reason, each exactly once.

    `notes`: one line for each norm and task that could not be tried (suite.trial); its runs are planned.
    """

    runs: list[RunSpec]
    skipped: list[tuple[RunSpec, str]]
    budget: str
    threads: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Norm:
    """One norm with options as given (not yet completed by a run's setting)."""

    name: str
    options: Mapping[str, Any]
    label: str
    info: NormInfo


@dataclass(frozen=True)
class _Block:
    task: Task
    settings: list[tuple[Options, str]]  # with the checksum of the data they name
    norms: list[_Norm]
    seeds: list[int]


def plan(path: str | Path, overrides: Overrides | None = None, data_dir: str | Path = "data") -> Plan:
    """Read a config file and expand it. Plugins must be loaded before.

    Raises:
        PlanError: every mistake of the file and the overrides, one line each with the nearest known name.
    """
    return plan_config(read_config(path), overrides, data_dir)


def plan_config(config: Mapping[str, Any], overrides: Overrides | None = None, data_dir: str | Path = "data") -> Plan:
    """Expand a config that is already a mapping; see `plan`."""
    reader = _Reader(config, overrides or Overrides(), Path(data_dir))
    blocks = reader.blocks()
    if reader.mistakes:
        raise PlanError(reader.mistakes)
    with Trials(trial_seconds(reader.overrides.timeout)) as trials:
        runs, skipped = _expand(blocks, trials)
    return Plan(runs, skipped, reader.budget, reader.threads, tuple(trials.notes))


class _Reader:
    """Collects every mistake of a config instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any], overrides: Overrides, data_dir: Path):
        self.config, self.overrides, self.data_dir = config, overrides, data_dir
        self.mistakes: list[str] = []
        for key in config:
            if key not in KEYS:
                self.mistakes.append(f'unknown key "{key}"; a config has {", ".join(KEYS)}{nearest(key, KEYS)}')
        self.budget = self._one_of("budget", config.get("budget", "reduced"), BUDGETS)
        self.threads = self._threads()

    def blocks(self) -> list[_Block]:
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
            for block in given if isinstance(given, list) else [given]:
                if block is not None and not isinstance(block, dict):
                    self.mistakes.append(f'task "{name}": a mapping of options is needed, not {kind(block)}')
                elif selected:
                    entries.append((str(name), {**(block or {}), **settings.get(name, {})}))
        return entries

    def _settings(self, tasks: list[str]) -> dict[str, dict[str, Any]]:
        settings: dict[str, dict[str, Any]] = {}
        for text in self.overrides.settings:
            match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
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
            try:
                settings.setdefault(task, {})[option] = parse_value(value)
            except ValueError as error:
                self.mistakes.append(f'--set "{text}": {error}')
        return settings

    def _block(self, name: str, given: dict[str, Any]) -> _Block | None:
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
        return _Block(task, settings, norms, seeds) if len(self.mistakes) == before else None

    def _task_settings(self, task: Task, options: dict[str, Any]) -> list[tuple[Options, str]]:
        fields = task.options.model_fields
        axes: dict[str, list[Any]] = {}
        for key, value in options.items():
            if key not in fields:
                self.mistakes.append(
                    f'task "{task.name}": unknown option "{key}"; it has {", ".join(fields)}{nearest(key, fields)}'
                )
            elif _depth(value) > _sequence_depth(fields[key].annotation):
                axes[key] = value
                if not value:
                    self.mistakes.append(f'task "{task.name}": option "{key}": an empty list leaves nothing to run')
            else:
                axes[key] = [value]
        settings = []
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True))
            try:
                chosen = task.options(**given)
            except ValidationError as error:
                for e in error.errors(include_url=False, include_context=False):
                    where = ".".join(str(part) for part in e["loc"][:1])
                    what = f'option "{where}" given {e["input"]!r}: ' if where else ""
                    for line in e["msg"].removeprefix("Value error, ").splitlines():
                        self.mistakes.append(f'task "{task.name}": {what}{line}')
                    given.pop(where, None)
                with contextlib.suppress(ValidationError):  # the rest may name data that is not there
                    self._checksum(task, task.options(**given))
            else:
                settings.append((chosen, self._checksum(task, chosen)))
        return settings

    def _checksum(self, task: Task, options: Options) -> str:
        try:
            return task.data_checksum(options, self.data_dir)
        except ValueError as error:  # NotPrepared among them
            self.mistakes += [f'task "{task.name}": {line}' for line in str(error).splitlines()]
            return ""

    def _norms(self, given: Any, where: str) -> list[_Norm]:
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
        return entries + self._norm_entries([n for n in self.overrides.plugin_norms if n not in present], where)

    def _check_selected_norms(self, entries: list[tuple[str, dict[str, Any]]]) -> None:
        """--norms names what is registered, or the label of an entry of some selected task."""
        if not self.overrides.norms:
            return
        lists = [given.get("norms", self.config.get("norms")) or [] for _, given in entries]
        quiet = _Reader(
            {}, Overrides(), self.data_dir
        )  # the same entries' own mistakes are reported where they are read
        known = {*norm_names(), *(e.label for each in lists for e in quiet._norm_entries(each, ""))}
        for name in self.overrides.norms:
            if name not in known:
                self.mistakes.append(
                    f'--norms "{name}": unknown; known: {", ".join(sorted(known))}{nearest(name, known)}'
                )

    def _norm_entries(self, given: Any, where: str) -> list[_Norm]:
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list):
            self.mistakes.append(f"{where}norms: a list of names is needed, not {kind(given)}")
            return []
        entries: list[_Norm] = []
        for item in given:
            if isinstance(item, str):
                name, options = item, None
            elif isinstance(item, dict) and len(item) == 1:
                name, options = next(iter(item.items()))
            else:
                self.mistakes.append(f"{where}norms: {item!r}: a name or {{name: {{option: value}}}} is needed")
                continue
            entries += self._norm_grid(name, options if options is not None else {}, where)
        return entries

    def _norm_grid(self, name: Any, options: Any, where: str) -> Iterator[_Norm]:
        try:
            info, defaults = norm_info(name), norm_option_defaults(name)
        except ValueError as error:
            self.mistakes.append(f"{where}{error}")
            return
        if not isinstance(options, dict):
            self.mistakes.append(f'{where}norm "{name}": a mapping of options is needed, not {kind(options)}')
            return
        axes = {k: v if _depth(v) > _depth(defaults.get(k)) else [v] for k, v in options.items()}
        for key, values in axes.items():
            if not values:
                self.mistakes.append(f'{where}norm "{name}": option "{key}": an empty list leaves nothing to run')
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            try:
                yield _Norm(name, chosen, norm_label(name, chosen), info)
            except ValueError as error:
                self.mistakes += [f"{where}{_one_line(line)}" for line in str(error).splitlines()]

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
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            self.mistakes.append(f"threads {given!r}: an integer of 1 or more is needed")
            return 1
        return given

    def _one_of(self, key: str, given: Any, allowed: Collection[str]) -> str:
        if given not in allowed:
            self.mistakes.append(f'{key} "{given}": allowed: {", ".join(allowed)}{nearest(str(given), allowed)}')
        return str(given)


def _expand(blocks: Sequence[_Block], trials: Trials) -> tuple[list[RunSpec], list[tuple[RunSpec, str]]]:
    """Every setting x norm x seed once. Seeds are the outermost axis within a block, so that a grid that is stopped
    early leaves whole columns with fewer seeds rather than missing norms."""
    mistakes: list[str] = []
    runs: dict[tuple[str, int], RunSpec] = {}
    skipped: dict[tuple[str, int], tuple[RunSpec, str]] = {}
    for block in blocks:
        task = block.task
        cells: dict[str, tuple[RunSpec, str | None]] = {}  # by the key that seed 0 has: a key takes time, so once each
        for (options, checksum), norm in itertools.product(block.settings, block.norms):
            options = _with_norm_batch(options, norm.info)
            try:
                norm_options = resolve_norm_options(norm.name, norm.options, asdict(task.setting(options)))
            except ValueError as error:
                mistakes += [f'task "{task.name}": {line}' for line in str(error).splitlines()]
                continue
            spec = RunSpec(
                task=task.name,
                norm=norm.name,
                norm_options=norm_options,
                task_options=options.model_dump(mode="json"),
                seed=0,
                norm_version=str(norm.info.version),
                task_version=task_version(task.name),
                data_checksum=checksum,
                norm_label=norm.label,
            )
            if spec.key not in cells:
                cells[spec.key] = spec, trials.why_not(spec, options)
        for seed, (cell, (spec, reason)) in itertools.product(block.seeds, cells.items()):
            spec = spec.model_copy(update={"seed": seed})
            if reason is None:
                runs.setdefault((cell, seed), spec)
            else:
                skipped.setdefault((cell, seed), (spec, _one_line(reason)))
    if skipped and not runs:
        mistakes += [
            f'task "{spec.task}": nothing to run: norm "{spec.norm_label}": {reason}'
            for spec, reason in skipped.values()
        ]
    if mistakes:
        raise PlanError(mistakes)
    return list(runs.values()), list(skipped.values())


def _with_norm_batch(options: Options, info: NormInfo) -> Options:
    """`norm_batch_size` as the key holds it: a number where samples mix, else null (any size is the same run).

    Samples mix where they do so in any norm of the run, those that its options name included.
    """
    fields = type(options).model_fields
    if "norm_batch_size" not in fields:
        return options
    values = dict(options)
    infos = [info, *(norm_info(value.name) for value in values.values() if isinstance(value, NormChoice))]
    if not any(each.mixes_samples or each.mixes_samples_in_eval for each in infos):
        wanted = None
    elif values["norm_batch_size"] is None:
        wanted = getattr(options, "batch_size", None)
    else:
        return options
    return options.model_copy(update={"norm_batch_size": wanted})


def _depth(value: Any) -> int:
    """How deep lists are nested: 0 for a plain value, 1 for a list of plain values."""
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _sequence_depth(annotation: Any) -> int:
    """The list depth of one value of this type: 0 for int, 1 for tuple[int, ...], the deepest member of a union."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _sequence_depth(members[0])
    if origin in (typing.Union, types.UnionType):
        return max(map(_sequence_depth, members))
    if inspect.isclass(origin or annotation) and issubclass(origin or annotation, list | tuple | Sequence):
        if issubclass(origin or annotation, str | bytes):
            return 0
        return 1 + max((_sequence_depth(member) for member in members if member is not Ellipsis), default=0)
    return 0


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
