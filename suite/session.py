"""A plan made into records: what `run_suite.py run` does, from Python.

    import suite

    if __name__ == "__main__":  # in a script: every run's process imports it once more; a notebook needs no such line
        df = suite.run("configs/quick.yaml", norms=["bn", "gn"], seeds=[0], settings={"classification.epochs": 1})
        print(df[["task", "norm_label", "seed", "status", "top1"]])

`plan` says what would be made, `run` makes it, and `Session` is the steps between the two for who shows them, as the
command line does.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.escape import cut
from suite import engine
from suite.arguments import asked_now, config_as_text, plain, several, texts
from suite.blocks import Overrides
from suite.config import config_text, find_config, folder_of, parse_config, read_config
from suite.describing import headline, tell_folder
from suite.engine import Event, time_limit, write_skipped
from suite.environment import commit, export_threads
from suite.estimate import Estimate, Remaining, Steps, begun, left_to_do
from suite.launch.choosing import choose
from suite.launch.making import trouble
from suite.launch.places import Local, Place, read_place
from suite.planning import Plan, plan_config
from suite.plugins import load_plugins, refuse_what_workers_lack
from suite.progress import Names
from suite.ranks import take_part
from suite.runner import Runner
from suite.status import Status, restate_budget
from suite.torchrun import torchrun_place
from suite.trackers import check_trackers
from suite.trial import surroundings_kept

if TYPE_CHECKING:
    from pandas import DataFrame

    from results.record import RunSpec

CHECKPOINT_EVERY = "5m"
"""Time between two checkpoints of a run."""
HERE = Place("local", Local())


def plan(
    config: str | Path | Mapping[str, Any],
    *,
    tasks: Sequence[str] = (),
    norms: Sequence[str] = (),
    seeds: Sequence[int] | str | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    threads: int | None = None,
    timeout: float | str | None = None,
    data_dir: str | Path = "data",
    many: bool = False,
    without_data: bool = False,
    folder: str | Path | None = None,
) -> Plan:
    """The runs that a config asks for, and those that it skips with the reasons. Nothing is made or written.

    Args:
        config: a YAML file (`configs/NAME.yaml` is the suite's own where there is none here), or a mapping of the same
            form.
        tasks: only these tasks of the config.
        norms: instead of the config's norms; a name or label selects the config's entries, another registered name is
            added with its defaults, and "gn(num_groups=4)" with its options.
        seeds: instead of the config's, as a list or as text ("0-4").
        settings: {"task.option": value}, on top of the config; a list is an axis. Or texts "task.option=value".
        plugins: files of the user's own norms, tasks and the like; their norms are added to the config's.
        threads: of each run, instead of the config's.
        timeout: the time that a run may take, in seconds or as "90s", "5m", "2h"; no norm is tried for longer.
        data_dir: folder of prepared data sets.
        many: more than 100,000 runs are meant.
        without_data: data that is not here stands in `Plan.missing` and is no mistake.
        folder: the folder to which a mapping's `plugins:` are relative; None: the working folder. A file's are relative
            to the file.

    Raises:
        PlanError: every mistake of the config and of what was given beside it, one line each (a ValueError).
        ManyRuns: more than 100,000 runs without `many`.
        ValueError: plugins that can not be loaded; a time limit that is no time.
    """
    for what, given_names in (("tasks", tasks), ("norms", norms)):
        if wrong := [name for name in several(given_names) if not isinstance(name, str)]:
            raise ValueError(f"{what}: names are needed, not {cut(repr(wrong[0]), 80)}")
    with surroundings_kept():
        overrides = Overrides(
            tasks=several(tasks),
            norms=several(norms),
            seeds=seeds if seeds is None or isinstance(seeds, str) else ",".join(map(str, several(seeds))),
            settings=texts(settings),
            plugin_norms=load_plugins(several(plugins)),
            threads=threads,
            many=many,
            timeout=time_limit(timeout),
        )
        if isinstance(config, Mapping):
            given = plain(config)
        elif isinstance(config, str | Path):
            given = read_config(config)
        else:
            raise ValueError(f"config: a file or a mapping is needed, not a {type(config).__name__}")
        beside = folder or (Path() if isinstance(config, Mapping) else folder_of(config))
        planned = plan_config(given, overrides, data_dir, without_data=without_data, folder=beside)
    refuse_what_workers_lack(planned.runs)
    return planned


def run(
    config: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    tasks: Sequence[str] = (),
    norms: Sequence[str] = (),
    seeds: Sequence[int] | str | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    jobs: int | None = None,
    threads: int | None = None,
    timeout: float | str | None = None,
    checkpoint_every: float | str = CHECKPOINT_EVERY,
    device: str = "cpu",
    runs_per_device: int | None = None,
    on: str | Place = HERE,
    wait: bool = True,
    data_dir: str | Path = "data",
    retry: bool | datetime = False,
    keep_weights: bool = False,
    trackers: Sequence[str] = (),
    loader_workers: int | None = None,
    many: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> DataFrame:
    """Make the runs of a config that are still missing, and return one row per run that it asks for.

    What is done already is not repeated, and what was interrupted (Ctrl-C, an interrupted kernel) goes on when the same
    call is made again. Every run has its own process: norms and tasks of one's own come from files (`plugins`) or from
    the script that calls this, below `if __name__ == "__main__":`, and not from a notebook's cells.

    Args:
        config, tasks, norms, seeds, settings, plugins, threads, timeout, data_dir, many: as of `plan`.
        out: folder of results; None: runs/<name of the config's file>, runs/session for a mapping.
        jobs: runs at a time; None: as many as there are cores for, on accelerators as these have room for.
        checkpoint_every: time between two checkpoints of a run, in seconds or as "5m"; "inf": only when it is stopped.
        device: where runs compute: "cpu"; "cuda", every visible accelerator, each run on one (or one per worker) of its
            own; "cuda:0,2", these.
        runs_per_device: runs that share an accelerator at a time; None: one.
        on: where runs are made, as `--on` has it: "local", "ray", "ray:ADDRESS", a YAML file; or a Place.
        wait: also for runs that other invocations make; False: return when only such runs are left.
        retry: make failed runs again; a time: those that ended before it.
        keep_weights: keep the trained network of each run that is ok, as weights.pt.
        trackers: also log every run there; "tensorboard" is known.
        loader_workers: processes of a run that decode images too many for memory; None: one for each core, at most 4.
        on_event: told about every start, progress and end (suite.Event); None: a line per finished run on stdout.

    Returns:
        The frame of `results.load`, of the runs of this config alone; failed, diverged and skipped runs are rows, too.

    Raises:
        PlanError, ManyRuns, ValueError: as `plan`, and for an unknown device or tracker; nothing was run.
        KeyboardInterrupt: it was stopped; finished runs are stored, the others go on next time.
    """
    import results
    from suite.progress import Progress

    named = find_config(config) if isinstance(config, str | Path) else None
    text = config_text(named) if named is not None else ""
    planned = plan(
        config if named is None else parse_config(text, named),
        tasks=tasks,
        norms=norms,
        seeds=seeds,
        settings=settings,
        plugins=plugins,
        threads=threads,
        timeout=timeout,
        data_dir=data_dir,
        many=many,
        folder=None if named is None else folder_of(named),
    )
    session = Session(
        planned,
        out if out is not None else Path("runs") / ("session" if named is None else named.stem),
        config=named,
        text=config_as_text(config) if isinstance(config, Mapping) else text,
        jobs=jobs,
        plugins=plugins,
        timeout=timeout,
        checkpoint_every=checkpoint_every,
        device=device,
        runs_per_device=runs_per_device,
        on=on,
        wait=wait,
        data_dir=data_dir,
        retry=retry,
        keep_weights=keep_weights,
        trackers=trackers,
        loader_workers=loader_workers,
    )
    session.begin()
    progress = Progress(
        session.status.todo, session.names, session.headlines, session.remaining, session.folder, session.begun
    )

    def print_line(event: Event) -> None:
        if (line := progress.take(event)) is not None:
            print(line, flush=True)

    session.make(print_line if on_event is None else on_event)
    return results.load(session.folder, keys=session.keys)


class Session:
    """A plan beside a folder of results: what is done, what is to do, and the making of it.

    Args:
        planned: of `plan`.
        folder: of results; made by `begin`.
        config: the file that was planned, for a note in the folder; None: there is none that could be read again.
        text, command: of the config, and the command line's words, for another one (results.asked).
        jobs, plugins, timeout, checkpoint_every, device, runs_per_device, on, wait, data_dir, retry, keep_weights,
            trackers, loader_workers: as of `run`.

    Attributes:
        status: which runs are done and which are to do (suite.status.Status).
        names: short names of the runs (suite.progress.Names).
        keys: the keys of all runs of the plan, skipped ones included.
        notes: lines of `begin`: a plugin's text that could not be kept, a tasks.json that was passed over.
        restated: records whose budget `begin` corrected.

    Raises:
        ValueError: an unknown device or tracker, a number out of range, a time that is none, a folder that is a file.
    """

    def __init__(
        self,
        planned: Plan,
        folder: str | Path,
        *,
        config: Path | None = None,
        text: str = "",
        command: Sequence[str] = (),
        jobs: int | None = None,
        plugins: Sequence[str | Path] = (),
        timeout: float | str | None = None,
        checkpoint_every: float | str = CHECKPOINT_EVERY,
        device: str = "cpu",
        runs_per_device: int | None = None,
        on: str | Place = HERE,
        wait: bool = True,
        data_dir: str | Path = "data",
        retry: bool | datetime = False,
        keep_weights: bool = False,
        trackers: Sequence[str] = (),
        loader_workers: int | None = None,
    ):
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs {jobs}: 1 or more is needed")
        if runs_per_device is not None and runs_per_device < 1:
            raise ValueError(f"runs-per-device {runs_per_device}: 1 or more is needed")
        trackers = several(trackers)
        check_trackers(trackers)
        check_loader_workers(loader_workers)
        self.plan, self.folder, self.config = planned, Path(folder), config
        self.text, self.command = text, tuple(command)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f'out "{self.folder}": is a file; a folder is needed')
        place = read_place(on) if isinstance(on, str) else on
        chosen = choose(place, device, jobs, runs_per_device, planned.threads, planned.runs)
        self.launcher, self.wait, self.at_a_time = chosen.launcher, wait, chosen.at_a_time
        self.jobs = chosen.jobs or 1
        self.timeout, self.retry = time_limit(timeout), retry
        self.data_dir = Path(data_dir)
        self.everything: list[RunSpec] = [*planned.runs, *(spec for spec, _ in planned.skipped)]
        self.status = Status(planned, self.folder, retry)
        self.notes: list[str] = []
        self.restated = 0
        self.names = Names(self.everything)
        self.runner = Runner(
            device=chosen.device,
            threads=planned.threads,
            data_dir=self.data_dir.resolve(),
            plugins=(*map(Path, several(plugins)), *planned.plugins),
            budget=planned.budget,
            commit=commit(),
            folders=planned.folders,
            checkpoint_every=time_limit(checkpoint_every, "checkpoint-every") or math.inf,
            trackers=tuple(dict.fromkeys(trackers)),
            keep_weights=keep_weights,
            loader_workers=loader_workers,
        )

    @property
    def keys(self) -> set[str]:
        return {spec.key for spec in self.everything}

    @property
    def headlines(self) -> dict[str, str]:
        """task -> the metric that a finished run's line shows."""
        from tasks import get_task

        return {name: headline(get_task(name)) for name in dict.fromkeys(spec.task for spec in self.plan.runs)}

    @cached_property
    def remaining(self) -> Remaining:
        """Estimates of how long runs take, by those that are done."""
        return Remaining(self.jobs, self.status.records, Steps(self.plan.folders, self.data_dir))

    @cached_property
    def begun(self) -> dict[str, int]:
        """key -> updates that are done, of the runs that go on from a checkpoint."""
        return begun(self.folder, self.status.todo)

    def left(self) -> Estimate | None:
        """How long the runs to do will take, where that can be estimated."""
        return left_to_do(self.remaining, self.status.todo, self.begun)

    def begin(self) -> list[str]:
        """Make the folder and write all in it that is no run: skipped runs, versions, plugins' texts, and the plan's
        budget in records that were made under another one (`restated` counts them).

        Returns:
            A line about each thing that could not be stored.

        Raises:
            ValueError: the folder can not be made or written to.
        """
        from results.store import write_asked, write_versions

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f'out "{self.folder}": {error.strerror}') from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f'out "{self.folder}": not writable')
        unstored = write_skipped(self.folder, self.plan.skipped)
        try:
            write_versions(self.folder, self.everything, "" if self.config is None else str(self.config.resolve()))
            self.notes += tell_folder(self.folder, self.everything, self.plan.told)
            self.notes += write_asked(self.folder, asked_now(self.command, self.config, self.text))
        except OSError as error:
            unstored.append(trouble(error))
        self.notes += self.runner.keep_plugins(self.folder)
        self.restated = restate_budget(self.status)
        return unstored

    def make(self, on_event: Callable[[Event], None] = lambda event: None) -> Counter[str]:
        """Make the runs to do; returns how many ended in each status. A copy of the process that torchrun has started
        as another worker than the first takes part in them.

        Raises:
            KeyboardInterrupt: it was stopped; see `suite.engine.execute`.
        """
        if (crew := torchrun_place()) is not None:
            if crew.rank:
                take_part(crew, self.plan.runs, self.runner)
                return Counter()
            with crew.leading():
                return self._execute(on_event)
        return self._execute(on_event)

    def _execute(self, on_event: Callable[[Event], None]) -> Counter[str]:
        if not self.status.todo:
            return Counter()
        if self.launcher is None:
            raise ValueError("on slurm: `run_suite.py run ... --on slurm` submits an array; nothing here waits for it")
        export_threads(self.plan.threads)
        return engine.execute(
            self.status.todo,
            self.runner,
            self.folder,
            jobs=self.jobs,
            timeout=self.timeout,
            retry=bool(self.retry),
            on_event=on_event,
            launcher=self.launcher,
            wait=self.wait,
        )


def check_loader_workers(number: int | None) -> None:
    """ValueError for a number of decoding processes that no machine has."""
    from tasks.data.lazy import MOST_WORKERS

    if number is not None and not 0 <= number <= MOST_WORKERS:
        raise ValueError(
            f"loader-workers {number}: 0 to {MOST_WORKERS} are allowed; 0 decodes in the run's own process"
        )
