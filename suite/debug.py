"""One run of a config in this process, to find a mistake in a norm or a task.

Nothing is tried before, forked, caught or stored: prints appear where they are made, `breakpoint()` has the terminal,
and an error comes out with all of its traceback. Everything that decides the run's numbers (options, seed, data,
threads) is what `run` would make of the same config.
"""

from __future__ import annotations

import bdb
import contextlib
import faulthandler
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from results.record import RunSpec
from suite.blocks import Overrides
from suite.config import PlanError
from suite.environment import set_threads
from suite.planning import Plan, plan
from suite.progress import Names, columns, duration
from suite.runner import Runner, attempt
from suite.torchrun import workers_of
from tasks.base import Diverged
from tasks.journal import Journal, Position, Row


def load_plugins(files: Sequence[Path]) -> tuple[str, ...]:
    """The names of the norms in the user's files; the traceback of one that can not be loaded is printed.

    Raises:
        ValueError: a file can not be loaded.
    """
    from norms.plugins import load_plugin
    from suite.plugins import watch_metrics

    watch_metrics()
    names: list[str] = []
    for file in files:
        try:
            names += load_plugin(file)
        except ValueError as error:
            if error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            raise
    return tuple(dict.fromkeys(names))


def planned(
    config: Path,
    norm: tuple[str, ...],
    task: tuple[str, ...],
    seed: int,
    settings: Sequence[str],
    own: tuple[str, ...],
    data_dir: Path,
) -> Plan:
    """The runs of a config among which one is chosen; no norm is tried.

    Args:
        norm: name or label, as --norms takes it; empty: those of the plugins, else the config's.
        task: empty: all of the config.
        own: norms of the plugins.

    Raises:
        PlanError: as `suite.planning.plan`.
    """
    overrides = Overrides(
        tasks=task, norms=norm or own[:1], seeds=str(seed), settings=tuple(settings), plugin_norms=own, many=True
    )
    return plan(config, overrides, data_dir, tried=False)


def choose(runs: Sequence[RunSpec]) -> tuple[RunSpec, str]:
    """The first run and its name; where there are others, the name says so and which options choose among them.

    Raises:
        PlanError: there is none, or several workers are to make it: a breakpoint would hold one of them, and the others
            would wait for it.
    """
    if not runs:
        raise PlanError(["nothing to run"])
    spec, others = runs[0], len(runs) - 1
    if (workers := workers_of(spec)) > 1:
        raise PlanError(
            [
                f"{spec.task}: workers: {workers} are {workers} processes, and a debugger has one; "
                f"--set {spec.task}.workers=1 makes the run in this one"
            ]
        )
    name = Names(runs).run(spec)
    if not others:
        return spec, name
    ways = ["--task"] if len({run.task for run in runs}) > 1 else []
    ways += ["--norm"] if len({run.norm_label or run.norm for run in runs}) > 1 else []
    ways += ["--set"] if len({(run.task, str(run.task_options)) for run in runs}) > len({r.task for r in runs}) else []
    return spec, f"{name}, the first of {len(runs)} runs ({', '.join(ways)} choose another)"


def make(spec: RunSpec, name: str, runner: Runner) -> int:
    """Make the run and print its metrics; returns the exit code, 1 for a run that failed.

    Artifacts lie in a temporary folder, whose path is printed; it is removed where it is empty.
    """
    folder = Path(tempfile.mkdtemp(prefix="normsuite-debug-"))
    with contextlib.suppress(Exception):  # a crash in C then says where; standard error may be no file
        faulthandler.enable()
    print(f"{name}\nno record is written; artifacts: {folder}", flush=True)
    start = time.perf_counter()
    try:
        set_threads(runner.threads)
        result = attempt(spec, folder, lambda fraction: None, runner, Journal(device=runner.device, tell=_tell))
    except BaseException as error:  # noqa: BLE001 - all that a run can end by is what is looked for here
        sys.stdout.flush()
        if not isinstance(error, bdb.BdbQuit):  # of the debugger's `q`
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt | bdb.BdbQuit):
            print("stopped", file=sys.stderr)
            return 130
        print("diverged, which is a result" if isinstance(error, Diverged) else "failed", file=sys.stderr)
        return 0 if isinstance(error, Diverged) else 1
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
    for line in columns([(metric, f"{value:.6g}") for metric, value in result["metrics"].items()]):
        print(line)
    for artifact in result["artifacts"]:
        print(folder / artifact)
    print(f"ok, {duration(time.perf_counter() - start)}")
    return 0


def _tell(position: Position, row: Row | None) -> None:
    if row is not None:
        rest = (f"{key} {value:.4g}" for key, value in row.items() if key not in ("epoch", "step"))
        where = f"{position.unit} {position.done}" if position.phase == "training" else f"{position.phase}, {position}"
        print(f"{where}: {', '.join(rest)}", flush=True)
