"""One RunSpec -> one RunRecord, inside the process that belongs to this run.

The only place that seeds global generators, picks the device, measures a run's time and catches every exception: what
goes wrong in a run becomes its record's status and reason.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results.record import RunRecord, RunSpec
from suite.environment import describe, now, set_threads

TRACEBACK = "traceback.txt"


@dataclass(frozen=True)
class Runner:
    """How runs are made here: everything but the spec. A value that travels to worker processes.

    Args:
        device: a torch device, "cpu" or "cuda:0".
        threads: threads per run; changes results in the last digits, so it is recorded.
        data_dir: folder of prepared data sets.
        plugins: files of the user's own norms, loaded before the run.
        budget: "reduced" | "full", for the caption of tables.
        commit: of the checkout, asked once by the planning process.
        folders: Plan.folders, data sets "folder:NAME" -> "folder:PATH" here; without it NAME is a path.
    """

    device: str = "cpu"
    threads: int = 1
    data_dir: Path = Path("data")
    plugins: tuple[Path, ...] = ()
    budget: str = "reduced"
    commit: str = "unknown"
    folders: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, spec: RunSpec, folder: Path, report: Callable[[float], None]) -> RunRecord:
        return run_one(spec, folder, report, self)


def run_one(spec: RunSpec, folder: Path, report: Callable[[float], None], runner: Runner) -> RunRecord:
    """Make the run; the caller stores the record.

    Args:
        spec: what to run.
        folder: where artifacts go, and the traceback of a failed run.
        report: called with the finished fraction in [0, 1].
        runner: device, threads, data, plugins.

    Returns:
        A record with status "ok", "diverged" (the task raised Diverged) or "failed" (anything else it raised, or
        metrics that are not finite or not the declared ones).
    """
    from tasks.base import Diverged

    (folder / TRACEBACK).unlink(missing_ok=True)
    start = time.perf_counter()
    environment: dict[str, Any] = {"commit": runner.commit, "device": runner.device, "threads": runner.threads}

    def record(result: dict[str, Any]) -> RunRecord:
        evidence = {"budget": runner.budget, **result.pop("evidence", {})}
        seconds, around = time.perf_counter() - start, {**environment, "finished": now()}
        return RunRecord(spec=spec, seconds=seconds, environment=around, evidence=evidence, **result)

    try:
        set_threads(runner.threads)
        environment = describe(runner.device, runner.threads, runner.commit)
        made = record(_attempt(spec, folder, report, runner))
        made.model_dump_json()  # what a task returns and no record can hold is the task's failure
        return made
    except Diverged as error:
        return record(
            {"status": "diverged", "reason": one_line(error), "history": error.history, "evidence": error.evidence}
        )
    except Exception as error:  # noqa: BLE001 - a run that fails must not take the grid with it; the reason is stored
        (folder / TRACEBACK).write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
        reason = f"{type(error).__name__}: {one_line(error)}"
        return record({"status": "failed", "reason": reason, "artifacts": [TRACEBACK]})


def one_line(error: object) -> str:
    """The message in one line; the type's name where there is no message. What UTF-8 can not hold is spelt out."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.encode(errors="backslashreplace").decode()


def _attempt(spec: RunSpec, folder: Path, report: Callable[[float], None], runner: Runner) -> dict[str, Any]:
    import torch

    from norms.registry import load_plugin, make_norm, norm_info
    from suite.folders import located
    from tasks import get_task
    from tasks.base import RunContext

    for plugin in runner.plugins:
        load_plugin(plugin)
    task = get_task(spec.task)
    for what, planned, loaded in (
        *(
            (f'norm "{name}"', version, str(norm_info(name).version))
            for name, version in ((spec.norm, spec.norm_version), *spec.further_norms.values())
        ),
        (f'task "{spec.task}"', spec.task_version, str(task.version)),
    ):
        if planned != loaded:
            raise RuntimeError(
                f"{what} changed after planning: version {planned} was planned, {loaded} is here; run again"
            )
    options = task.options.model_validate(located(spec.task_options, runner.folders))
    norm = make_norm(spec.norm, **spec.norm_options)
    _seed_everything(spec.seed)
    context = RunContext(torch.device(runner.device), spec.seed, runner.data_dir, folder, report)
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
        "artifacts": outcome.artifacts,
        "evidence": outcome.evidence,
    }


def _seed_everything(seed: int) -> None:
    """A safety net: tasks draw from `RunContext.generator`; a library that draws globally still repeats itself."""
    import numpy
    import torch

    digest = int.from_bytes(hashlib.sha256(f"{seed}/global".encode()).digest()[:4], "big")
    random.seed(digest)
    numpy.random.seed(digest)
    torch.manual_seed(digest)
