"""A config file and overrides -> the list of runs. All mistakes of a config are reported at once; nothing runs here.

A config is a grid: a list is an axis, every combination of axes is a setting, and every setting is crossed with the
norms and the seeds. For an option whose type is a sequence, a list of lists is the axis. A task's entry may be a list
of mappings (blocks), each with its own grid; an entry may carry its own `norms:` and `seeds:`.

    budget: reduced
    norms: [bn, {gn: {num_groups: 8}}, {bgn: {num_groups: [1, 8]}}]
    seeds: 0-4
    tasks:
      classification: {dataset: fashion_mnist_mini, norm_batch_size: [2, 64]}
    plugins: [my_norm.py]            # files beside the config, with what it names that the suite has not

Precedence of an option: options model < file < `--set`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from norms.plugins import Plugin, loaded, plugin_of
from norms.protocol import NormInfo
from norms.registry import norm_info, resolve_norm_options
from results.declared import TaskNotes
from results.escape import cut, one_line
from results.record import RunSpec
from suite.blocks import Block, Overrides, Reader
from suite.config import ManyRuns, PlanError, folder_of, form_mistakes, read_config
from suite.describing import Described, baseline, declaration
from suite.folders import Folders
from suite.norm_entries import Norm
from suite.plugins import distinct, load_configured, load_installed
from suite.trial import Trials, asked_for, trial_seconds
from tasks import task_version
from tasks.base import Setting, Task
from tasks.options import NormChoice, Options, newer_options, plugin_parts

MOST_RUNS = 100_000
"""Runs that are planned without a question."""
MOST_RUNS_EVER = 1_000_000
MOST_CELLS = 100_000
"""Settings x norms: each is tried, which takes time that seeds do not."""


@dataclass(frozen=True)
class Plan:
    """The runs that a config asks for, and the skipped ones with their reasons, each exactly once.

    Attributes:
        folders: data set "folder:NAME" as specs name it -> "folder:PATH" here, for the Runner.
        missing: lines that name the data which is not here and the command that prepares it; the runs that need it
            have no checksum, and so not the keys with which they will be made.
        left_out: one line for each combination of options that make no setting (tasks.options.LeftOut).
        notes: one line for each norm and task that could not be tried (suite.trial); its runs are planned.
        told: what the results folder is told of the tasks and runs (suite.describing).
        plugins: those of the config and of installed packages, for the Runner, and those that were loaded before where
            a run asks for something of theirs.
    """

    runs: list[RunSpec]
    skipped: list[tuple[RunSpec, str]]
    budget: str
    threads: int
    folders: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    told: TaskNotes = field(default_factory=TaskNotes)
    plugins: tuple[Plugin, ...] = ()


def plan(
    path: str | Path,
    overrides: Overrides | None = None,
    data_dir: str | Path = "data",
    *,
    without_data: bool = False,
    tried: bool = True,
) -> Plan:
    """Read a config file and expand it. Its own plugins and those of installed packages are loaded; others must be.

    Args:
        path: of the file.
        overrides: what the command line says on top of it.
        data_dir: folder of prepared data sets.
        without_data: data that is not here stands in `Plan.missing`, in the place of a mistake.
        tried: False: every norm is planned for every task, and no process is started.

    Raises:
        PlanError: every mistake of the file and the overrides, one line each with the nearest known name.
        ManyRuns: more than MOST_RUNS, and `overrides.many` is not set.
    """
    config = read_config(path)
    return plan_config(config, overrides, data_dir, without_data=without_data, tried=tried, folder=folder_of(path))


def plan_config(
    config: Mapping[str, Any],
    overrides: Overrides | None = None,
    data_dir: str | Path = "data",
    *,
    without_data: bool = False,
    tried: bool = True,
    folder: str | Path = "",
) -> Plan:
    """Expand a config that is already a mapping; see `plan`. Its `plugins:` are relative to `folder`."""
    if mistakes := form_mistakes(config):
        raise PlanError(mistakes)
    overrides = overrides or Overrides()
    installed, configured = load_installed(tried), load_configured(config, Path(folder), tried)
    reader = Reader(config, overrides, Path(data_dir))
    blocks = reader.blocks()
    of_plugins = [*installed.mistakes, *configured.mistakes]
    if mistakes := of_plugins + reader.mistakes + ([] if without_data else reader.missing):
        raise PlanError(mistakes)
    _check_size(blocks, overrides.many)
    folders, described = Folders(), Described()
    with Trials(trial_seconds(overrides.timeout)) as trials:
        why_not = trials.why_not if tried else lambda spec, options: None
        runs, skipped = _expand(blocks, folders, why_not, described, Path(data_dir))
    if mistakes := folders.mistakes(Path(data_dir)):
        raise PlanError(mistakes)
    missing = dict.fromkeys(line.partition(": ")[2] for line in reader.missing)  # without the task
    return Plan(
        runs,
        skipped,
        reader.budget,
        reader.threads,
        folders.paths,
        tuple(missing),
        tuple(reader.left_out),
        tuple(trials.notes),
        described.notes([*runs, *(spec for spec, _ in skipped)]),
        distinct([*installed.plugins, *configured.plugins, *_of_runs(runs)]),
    )


def _of_runs(runs: Sequence[RunSpec]) -> list[Plugin]:
    """The plugins that registered what runs ask for."""
    asked = dict.fromkeys(key for spec in runs for key in asked_for(spec))
    files = dict.fromkeys(plugin.file for key in asked if (plugin := plugin_of(*key)) is not None)
    return [plugin for file in files if (plugin := loaded(file)) is not None]


def _check_size(blocks: Sequence[Block], many: bool) -> None:
    """Refuse a grid that is too large, before anything is expanded."""
    cells = sum(len(block.settings) * len(block.norms) for block in blocks)
    runs = sum(len(block.settings) * len(block.norms) * len(block.seeds) for block in blocks)
    if cells > MOST_CELLS:
        raise PlanError([f"{cells:,} combinations of settings and norms; at most {MOST_CELLS:,} are planned"])
    if runs > MOST_RUNS_EVER:
        raise PlanError([f"{runs:,} runs; at most {MOST_RUNS_EVER:,} are planned"])
    if runs > MOST_RUNS and not many:
        raise ManyRuns([f"{runs:,} runs, which is more than {MOST_RUNS:,}; --yes makes them"])


def _expand(
    blocks: Sequence[Block],
    folders: Folders,
    why_not: Callable[[RunSpec, Options], str | None],
    described: Described,
    data_dir: Path,
) -> tuple[list[RunSpec], list[tuple[RunSpec, str]]]:
    """Every setting x norm x seed once. Seeds are the outermost axis within a block, so that a grid that is stopped
    early leaves whole columns with fewer seeds rather than missing norms."""
    mistakes: list[str] = []
    runs: dict[tuple[str, int], RunSpec] = {}
    skipped: dict[tuple[str, int], tuple[RunSpec, str]] = {}
    for block in blocks:
        task = block.task
        cells: dict[str, tuple[RunSpec, str | None]] = {}  # by the key that seed 0 has: a key takes time, so once each
        try:
            declaration(task)
            baselines = [_baseline(task, *setting, data_dir) for setting in block.settings]
        except ValueError as error:
            mistakes += str(error).splitlines()
            continue
        for (setting, compared), norm in itertools.product(zip(block.settings, baselines, strict=True), block.norms):
            try:
                spec, options = _cell(task, *setting, norm, folders)
            except ValueError as error:
                mistakes += [f'task "{task.name}": {line}' for line in str(error).splitlines()]
                continue
            if (key := spec.key) in cells:
                continue
            cells[key] = spec, why_not(spec, options)
            other = None
            if compared is not None:
                with contextlib.suppress(ValueError):  # a norm that no such run can have
                    other, _ = _cell(task, *compared, norm, folders)
            described.add(spec, norm, block.seeds, other)
        for seed, (cell, (spec, reason)) in itertools.product(block.seeds, cells.items()):
            spec = spec.model_copy(update={"seed": seed})
            if reason is None:
                runs.setdefault((cell, seed), spec)
            else:
                skipped.setdefault((cell, seed), (spec, one_line(reason)))
    if skipped and not runs:
        mistakes += [
            f'task "{spec.task}": nothing to run: norm "{spec.norm_label}": {reason}'
            for spec, reason in skipped.values()
        ]
    if not runs and not skipped and not mistakes:
        mistakes = ["nothing to run: no task has both norms and seeds"]
    if mistakes:
        raise PlanError(mistakes)
    return list(runs.values()), list(skipped.values())


def _cell(task: Task, options: Options, checksum: str, norm: Norm, folders: Folders) -> tuple[RunSpec, Options]:
    """The run of a setting and norm with seed 0, and its options. Raises ValueError for what the norm refuses."""
    options = _with_norm_batch(options, norm.info)
    spec = RunSpec(
        task=task.name,
        norm=norm.name,
        norm_options=resolve_norm_options(norm.name, norm.options, asdict(_setting(task, options))),
        task_options=folders.named(options.model_dump(mode="json")),
        seed=0,
        norm_version=str(norm.info.version),
        task_version=task_version(task.name),
        data_checksum=checksum,
        norm_label=norm.label,
        newer=newer_options(task.options),
        parts=plugin_parts(options),
    )
    return spec, options


def _setting(task: Task, options: Options) -> Setting:
    """What the task says of a run. Raises ValueError for what else it raises or returns: it may be a user's own."""
    try:
        found = task.setting(options)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"setting(options) raised {cut(one_line(f'{type(error).__name__}: {error}'), 200)}") from error
    if not isinstance(found, Setting):
        raise ValueError(f"setting(options) gives a tasks.Setting; given {cut(repr(found), 80)}")
    return found


def _baseline(task: Task, options: Options, checksum: str, data_dir: Path) -> tuple[Options, str] | None:
    """The setting that one is compared with, with the checksum of its data. Raises as suite.describing.baseline."""
    found = baseline(task, options)
    if found is None:
        return None
    with contextlib.suppress(ValueError, OSError):  # data that can not serve it: nobody can make such a run
        checksum = task.data_checksum(found, data_dir)
    return found, checksum


def _with_norm_batch(options: Options, info: NormInfo) -> Options:
    """`norm_batch_size` as the key holds it: a number where samples mix, else null (any size is the same run);
    `sync_norms` likewise, unless it is what allows workers with unequal parts.

    Samples mix where they do so in any norm of the run, those that its options name included.
    """
    fields = type(options).model_fields
    if "norm_batch_size" not in fields:
        return options
    values = dict(options)
    infos = [info, *(norm_info(value.name) for value in values.values() if isinstance(value, NormChoice))]
    if not any(each.mixes_samples or each.mixes_samples_in_eval for each in infos):
        unsaid: dict[str, Any] = {"norm_batch_size": None}
        if "sync_norms" in fields and not values["batch_size"] % values["workers"]:
            unsaid["sync_norms"] = False
        return options.model_copy(update=unsaid)
    if values["norm_batch_size"] is None:
        wanted = _of_a_worker(options, getattr(options, "batch_size", None))
        return options.model_copy(update={"norm_batch_size": wanted})
    return options


def planned_keys(configs: Sequence[str | Path], plugin_norms: tuple[str, ...], data_dir: str | Path) -> set[str]:
    """The keys of all runs that the configs ask for. No norm's fitness changes a key.

    Raises:
        PlanError: the mistakes of all of the configs.
    """
    overrides = Overrides(plugin_norms=plugin_norms, many=True)
    keys: set[str] = set()
    mistakes: list[str] = []
    for config in configs:
        try:
            planned = plan_config(read_config(config), overrides, data_dir, folder=folder_of(config))
        except PlanError as error:
            mistakes += error.lines
        else:
            keys.update(spec.key for spec in (*planned.runs, *(spec for spec, _ in planned.skipped)))
    if mistakes:
        raise PlanError(mistakes)
    return keys


def _of_a_worker(options: Options, batch_size: int | None) -> int | None:
    """The images of an SGD batch that share statistics where nothing divides a worker's part of it further."""
    if batch_size is None or getattr(options, "sync_norms", False):
        return batch_size
    return int(batch_size // getattr(options, "workers", 1))
