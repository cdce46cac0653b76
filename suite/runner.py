"""One RunSpec -> one RunRecord, inside the process that belongs to this run.

The only place that seeds global generators, picks the device, measures a run's time and catches every exception: what
goes wrong in a run becomes its record's status and reason. Of a run of several workers (suite.ranks) this process is
rank 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import files
from results.record import RunRecord, RunSpec, dataset_of, record_text
from suite import leaving
from suite.checkpoints import Checkpoints, keep_weights, remove_weights
from suite.environment import describe, now, set_threads
from suite.estimate import task_steps
from suite.live import Live
from suite.meeting import Failure
from suite.ranks import Crew, crew_of
from tasks.weights import WEIGHTS

if TYPE_CHECKING:
    from norms.plugins import Plugin
    from norms.workers import Workers
    from tasks.base import Trained
    from tasks.journal import Journal

TRACEBACK = "traceback.txt"
PLUGINS = "plugins"
"""Folder of the texts of plugins in a folder of results."""

_REASON = 2_000  # characters of a record's reason
_HALF = 50_000  # characters of a traceback's start, and of its end
_SIGNALLED = 0.3  # seconds in which a signal to all processes of a job reaches this one after a data loader's


@dataclass(frozen=True)
class Runner:
    """Everything that a process needs to make a run, but for the spec. A value that travels to worker processes.

    Args:
        device: a torch device, "cpu" or "cuda:0".
        threads: threads per run; changes results in the last digits, so it is recorded.
        data_dir: folder of prepared data sets.
        plugins: the user's own files, as they were loaded here before, else as they are now, and Plan.plugins: runs
            execute this text, whatever becomes of the files. A run loads those of whose norms, task, model, optimizer
            or data set it asks for.
        budget: "reduced" | "full", for the caption of tables.
        commit: of the checkout, asked once by the planning process.
        folders: Plan.folders, data sets "folder:NAME" -> "folder:PATH" here; without it NAME is a path.
        checkpoint_every: seconds between two checkpoints of a run; None: none at all.
        keep_weights: the trained network of a run that is ok stays beside its record.
        trackers: names of suite.trackers.TRACKERS that hear each run.
        loader_workers: processes of a run that decode images which are not held in memory; None: as the data chooses.
            Recorded where it is given, though no number depends on it.
    """

    device: str = "cpu"
    threads: int = 1
    data_dir: Path = Path("data")
    plugins: tuple[Path | Plugin, ...] = ()
    budget: str = "reduced"
    commit: str = "unknown"
    folders: Mapping[str, str] = field(default_factory=dict)
    checkpoint_every: float | None = None
    keep_weights: bool = False
    trackers: tuple[str, ...] = ()
    loader_workers: int | None = None

    def __post_init__(self) -> None:
        from norms import plugins
        from suite.plugins import distinct, watch_metrics

        def found(each: Path | Plugin) -> Plugin:
            return each if isinstance(each, plugins.Plugin) else plugins.loaded(each) or plugins.load(each)

        if self.plugins:
            watch_metrics()
            object.__setattr__(self, "plugins", distinct([found(each) for each in self.plugins]))

    def keep_plugins(self, out: str | Path) -> list[str]:
        """Leave the plugins' texts in `<out>/plugins/<file>-<version>/`, for who asks what a record's version was.

        A text that is there already stays: it is of the same version. Returns one line for each that can not be kept.
        """
        from norms.plugins import Plugin, texts

        failed = []
        for plugin in (each for each in self.plugins if isinstance(each, Plugin)):
            folder = Path(out) / PLUGINS / f"{plugin.file.stem}-{plugin.version}"
            try:
                for name, text in texts(plugin).items():
                    if not (folder / name).exists():
                        (folder / name).parent.mkdir(parents=True, exist_ok=True)
                        files.write_text(folder / name, text)
            except OSError as error:
                failed.append(f'no copy of plugin "{plugin.file.name}" in "{folder}": {error.strerror}')
        return failed

    def __call__(self, spec: RunSpec, folder: Path, report: Callable[[float], None]) -> RunRecord:
        return run_one(spec, folder, report, self)


def run_one(spec: RunSpec, folder: Path, report: Callable[[float], None], runner: Runner) -> RunRecord:
    """Make the run; the caller stores the record.

    Args:
        spec: what to run.
        folder: where artifacts go, and the traceback of a failed run.
        report: called with the finished fraction in [0, 1]; a suite.live.Live hears positions and rows, too.
        runner: device, threads, data, plugins.

    Returns:
        A record with status "ok", "diverged" (the task raised Diverged) or "failed" (anything else it raised, or
        metrics that are not finite or not the declared ones).

    Raises:
        Interrupted: this process was told to leave (suite.leaving); the run goes on from its checkpoint.
    """
    from norms.plugins import loaded_here
    from tasks.base import Diverged
    from tasks.journal import Interrupted, Journal, Unusable

    with contextlib.suppress(OSError):  # in the way: a failed run is then recorded without its traceback
        (folder / TRACEBACK).unlink()
    remove_weights(folder)
    start = time.perf_counter()
    environment: dict[str, Any] = {"commit": runner.commit, "device": runner.device, "threads": runner.threads}
    checkpoints: Checkpoints | None = None
    crew: Crew | None = None
    journal = Journal()
    live = report if isinstance(report, Live) else Live(None, spec)

    def record(result: dict[str, Any]) -> RunRecord:
        evidence = {"budget": runner.budget, **result.pop("evidence", {})}
        own: dict[str, Any] = {"plugins": loaded_here()}  # what could reach into this run, whatever it asked for
        if runner.loader_workers is not None:
            own["loader_workers"] = runner.loader_workers
        seconds = time.perf_counter() - start
        if checkpoints is not None and checkpoints.note is not None:
            own["parts"] = checkpoints.parts("the end")
            seconds += checkpoints.seconds
        if live.clock[0]:
            own["clock"] = {"steps": live.clock[0], "seconds": live.clock[1], "total": journal.steps_done}
        around = {**environment, **own, "finished": now()}
        return RunRecord(spec=spec, seconds=seconds, environment=around, evidence=evidence, **result)

    try:
        set_threads(runner.threads)
        environment = describe(runner.device, runner.threads, runner.commit)
        crew = crew_of(spec, runner, _when_stuck(folder, live))
        environment |= crew.meet()
        checkpoints = Checkpoints(folder, spec.key, environment, live.say, lambda: time.perf_counter() - start)
        for state in checkpoints.candidates():
            save = None if runner.checkpoint_every is None else checkpoints.save
            every = runner.checkpoint_every or math.inf
            try:
                crew.share(state)
                journal = Journal(state, save=save, every=every, tell=live.tell, device=crew.device, note=live.say)
                live.begin(journal, runner.trackers, "" if checkpoints.note is None else checkpoints.note.origin)
                with leaving.computing(journal):
                    here = runner if crew.device == runner.device else replace(runner, device=crew.device)
                    result = attempt(spec, folder, report, here, journal, crew.workers)
                made = record(result)
                break
            except Unusable as error:
                if state is None:
                    raise
                crew.pass_over(error)
                checkpoints.pass_over(f"a checkpoint of this run can not be used: {one_line(error)}")
        record_text(made)  # what a task returns and no record can hold is the task's failure
        return made
    except Diverged as error:
        history = error.history or journal.rows
        return record({"status": "diverged", "reason": one_line(error), "history": history, "evidence": error.evidence})
    except Exception as error:
        remove_weights(folder)
        if "DataLoader worker" in one_line(error):
            time.sleep(_SIGNALLED)
        if leaving.told():  # what was told with it, or in its stead, broke; no failure of the run's own
            journal.save()
            raise Interrupted from error
        failure = failure_of(error)
        if crew is not None:
            failure = crew.cause(failure)
        artifacts = _write_traceback(folder, failure.trace)
        reason = one_line(failure)
        return record({"status": "failed", "reason": reason, "history": journal.rows, "artifacts": artifacts})
    finally:
        if crew is not None:
            crew.close()


def failure_of(error: BaseException, rank: int = 0) -> Failure:
    """The error of a worker that is being handled; the traceback's middle is left out where it is long."""
    text = traceback.format_exc()
    if len(text) > 2 * _HALF:
        text = f"{text[:_HALF]}\n[{len(text) - 2 * _HALF} characters are left out here]\n{text[-_HALF:]}"
    return Failure(rank, one_line(f"{type(error).__name__}: {one_line(error)}"), text)


def _when_stuck(folder: Path, live: Live) -> Callable[[Failure], None] | None:
    """What is said of a run before its process ends because it hangs without a worker that is lost."""
    if (trouble := live.trouble) is None:
        return None

    def tell(failure: Failure) -> None:
        _write_traceback(folder, failure.trace)
        trouble(one_line(failure))

    return tell


def one_line(error: object) -> str:
    """The message in one line of at most 2,000 characters; the type's name where there is no message.

    What UTF-8 can not hold is spelt out.
    """
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the message is written by whoever raised it
        text = ""
    text = " ".join(text[: 10 * _REASON].split()) or type(error).__name__
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _REASON else text[: _REASON - 4] + " ..."


def _write_traceback(folder: Path, text: str) -> list[str]:
    """Leave a traceback, where there is one; returns the artifacts."""
    if not text:
        return []
    try:
        with files.open_new(folder / TRACEBACK) as stream:
            stream.write(text.encode(errors="backslashreplace"))
    except OSError:  # a full disk, or something else of this name: the reason is in the record
        return []
    return [TRACEBACK]


def attempt(
    spec: RunSpec,
    folder: Path,
    report: Callable[[float], None],
    runner: Runner,
    journal: Journal,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Make the run and return the fields of its record; every exception of the run passes. See `run_one`.

    Args:
        workers: that make it together, this process among them; None: it is alone.
    """
    import torch

    from norms import plugins
    from norms.registry import make_norm, norm_info
    from norms.workers import ALONE
    from suite.folders import located
    from tasks import get_task, task_version
    from tasks.base import RunContext
    from tasks.options import plugin_parts

    plugins.offer(plugin for plugin in runner.plugins if isinstance(plugin, plugins.Plugin))
    task = get_task(spec.task)
    _as_planned(
        *(
            (f'norm "{name}"', version, str(norm_info(name).version))
            for name, version in ((spec.norm, spec.norm_version), *spec.further_norms.values())
        ),
        (f'task "{spec.task}"', spec.task_version, task_version(spec.task)),
    )
    options = task.options.model_validate(located(spec.task_options, runner.folders))
    here = plugin_parts(options)
    _as_planned(
        *((option, spec.parts.get(option, "none"), here.get(option, "none")) for option in {**spec.parts, **here})
    )
    _check_data(spec, task.data_checksum(options, runner.data_dir) if spec.data_checksum else "")
    journal.total = task_steps(task, options, runner.data_dir)
    norm = make_norm(spec.norm, **spec.norm_options)
    _seed_everything(spec.seed)
    context = RunContext(
        torch.device(runner.device),
        spec.seed,
        runner.data_dir,
        folder,
        report,
        journal,
        runner.keep_weights,
        runner.loader_workers,
        workers or ALONE,
    )
    outcome = task.run(norm, options, context)
    wrong = sorted(set(task.metrics) ^ set(outcome.metrics))
    if wrong:
        raise RuntimeError(f'task "{spec.task}" must return exactly {sorted(task.metrics)}; differs in {wrong}')
    metrics = {name: float(value) for name, value in outcome.metrics.items() if value is not None}
    endless = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if endless:
        raise RuntimeError(f"metrics are not finite although the loss was: {', '.join(endless)}")
    return {
        "status": "ok",
        "metrics": metrics,
        "history": outcome.history,
        "artifacts": [*outcome.artifacts, *(_keep(spec, outcome.trained, folder) if runner.keep_weights else [])],
        "evidence": outcome.evidence,
    }


def _as_planned(*versions: tuple[str, str, str]) -> None:
    """RuntimeError for the first (what, version planned, version here) whose versions differ."""
    for what, planned, here in versions:
        if planned != here:
            raise RuntimeError(
                f"{what} changed after planning: version {planned} was planned, {here} is here; run again"
            )


def _check_data(spec: RunSpec, here: str) -> None:
    """RuntimeError where the data are not those of the run's key: a folder that was prepared again meanwhile, or
    a user's function that gives other arrays in every process."""
    if here != spec.data_checksum:
        raise RuntimeError(
            f'data set "{dataset_of(spec)}" changed after planning: checksum {spec.data_checksum} was planned, '
            f"{here} is here; run again (a function that gives data must give the same each time: seed its draws)"
        )


def _keep(spec: RunSpec, trained: Trained | None, folder: Path) -> list[str]:
    """Leave the weights of a run that is ok; returns the artifacts. The run is ok without them, too."""
    try:
        if trained is None:
            raise ValueError(f'task "{spec.task}" gives none')
        keep_weights(folder, spec, trained)
    except (OSError, TypeError, ValueError) as error:
        print(f"weights are not kept: {one_line(getattr(error, 'strerror', None) or error)}")
        return []
    return [WEIGHTS]


def _seed_everything(seed: int) -> None:
    """A safety net: tasks draw from `RunContext.generator`; a library that draws globally still repeats itself."""
    import numpy
    import torch

    digest = int.from_bytes(hashlib.sha256(f"{seed}/global".encode()).digest()[:4], "big")
    random.seed(digest)
    numpy.random.seed(digest)
    torch.manual_seed(digest)
