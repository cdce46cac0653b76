"""The command line: the only module that reads argv and chooses exit codes; suite.console prints.

Exit codes: 0 done (diverged and skipped are results); 1 a run failed, or a norm does not keep what it declares; 2 a
mistake in what was given, nothing was run; 130 stopped by Ctrl-C or another signal, or a run was told to leave.

Modules that import torch or pandas are imported inside the commands that need them, so that `--help`, `tables` and
`list metrics` start without torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from results.escape import cut
from suite import terminal
from suite.console import display, fail, print_lines, print_notes, screen, shown
from suite.environment import commit, cpu_count, export_threads, set_allocator
from suite.forked import watched

if TYPE_CHECKING:
    from pandas import DataFrame

    from norms.conformance import Check
    from results.record import RunSpec
    from tasks.conformance import Check as TaskCheck

_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}


class _Commands(typer.core.TyperGroup):
    """The commands. Click takes an EOFError for Ctrl-C; here it is a file that ends too early."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise ValueError(f"a file ends too early: {error}") from error


app = typer.Typer(cls=_Commands, help="NormSuite: what does a normalization layer change?", **_SETTINGS)
list_app = typer.Typer(help="What there is: norms, tasks, data sets, metrics.", **_SETTINGS)
data_app = typer.Typer(help="Data sets: what is here, and how to prepare the rest.", **_SETTINGS)
app.add_typer(list_app, name="list")
app.add_typer(data_app, name="data")

Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A file with your own norms (repeatable).")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of prepared data sets.")]


def main() -> None:
    """Entry point of `run_suite.py` and of the console script."""
    set_allocator()  # before any command imports torch
    before = set(threading.enumerate())
    with terminal.steady() as (out, _):
        code = _watch_app() if sys.argv[1:2] in (["check"], ["convert-report"]) else _run_app()
        out.flush()
        if out.lost is not None and not isinstance(out.lost, BrokenPipeError):  # a reader that has seen enough is none
            missing = fail(f"standard output: {getattr(out.lost, 'strerror', None) or out.lost}")
            code = code or (0 if sys.argv[1:2] == ["run"] else missing)
    if any(not thread.daemon for thread in set(threading.enumerate()) - before):
        atexit._run_exitfuncs()  # all of the interpreter's exit but that it would wait for a plugin's thread for ever
        os._exit(code)
    sys.exit(code)


def _watch_app() -> int:
    """The command in a child: the layers that it forwards are users' code, and may end or crash their process."""
    try:
        code, ended = watched(_run_app)
    except KeyboardInterrupt:
        return 130
    return fail(f"{ended}, by a user's file or layer; the command is not finished") if code is None else code


def _run_app() -> int:
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        code = fail(error.format_message() if hasattr(error, "format_message") else str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except (ValueError, OSError) as error:  # by the rules of this house, what a user can mend
        code = fail(str(error))
    except (
        SystemExit
    ) as error:  # nothing of ours raises it: a user's file or layer would end the command as if all was done
        code = fail(f"sys.exit({error.code!r:.40}) was called in {_innermost(error)}; the command is not finished")
    return code if isinstance(code, int) else 0


@app.command()
def run(
    config: Annotated[
        Path, typer.Argument(help="A config file; configs/NAME.yaml is the suite's own where there is none here.")
    ] = Path("configs/quick.yaml"),
    tasks: Annotated[str | None, typer.Option(help="Only these tasks of the config, separated by commas.")] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            help="Instead of the config's norms: a name or label selects the config's entries, another registered "
            "name is added with its defaults."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help='Instead of the config\'s seeds: "0-4", "0,2,5".')] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TASK.OPTION=VALUE", help="Change an option; a list is an axis (repeatable)."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time.  [default: cores // threads; 1 on an accelerator]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads per run; recorded, since results depend on it.  [default: 1]")
    ] = None,
    loader_workers: Annotated[
        int | None,
        typer.Option(
            help="Processes of a run that decode images too many for memory; no result depends on it.  [default: one "
            "for each core, at most 4]"
        ),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(help="Time a run may take: seconds, or 90s, 5m, 2h, 1d.  [default: no limit]")
    ] = None,
    checkpoint_every: Annotated[
        str,
        typer.Option(
            help="Time between two checkpoints of a run, from which the same command goes on; inf: only when it is "
            "stopped (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1)."
        ),
    ] = "5m",
    out: Annotated[Path | None, typer.Option(help="Folder of results.  [default: runs/<name of the config>]")] = None,
    plugin: Plugins = None,
    device: Annotated[str, typer.Option(help="Where runs compute: cpu, cuda, cuda:1, ...")] = "cpu",
    data_dir: DataDir = Path("data"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the grid and what is done; run nothing.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Make failed runs again.")] = False,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep the trained network of each run that is ok, as weights.pt.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Make more than 100,000 runs without a question.")] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help="Log every run to OUT/tracking/NAME, too; NAME is tensorboard (repeatable)."),
    ] = None,
) -> int:
    """Make the runs of a config that are still missing, and print the tables."""
    export_threads(1)  # planning computes next to nothing; torch's pool of threads, once loaded, keeps its size
    from norms.plugins import registered_by
    from suite.blocks import Overrides
    from suite.config import ManyRuns, find_config, read_config
    from suite.engine import execute, time_limit, write_skipped
    from suite.leaving import REQUESTS
    from suite.plan import plan_config
    from suite.trackers import check_trackers
    from suite.trial import surroundings_kept
    from tasks.data.lazy import MOST_WORKERS

    for option, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: 1 or more is needed")
    if loader_workers is not None and not 0 <= loader_workers <= MOST_WORKERS:
        raise ValueError(
            f"--loader-workers {loader_workers}: 0 to {MOST_WORKERS} are allowed; 0 decodes in the run's own process"
        )
    try:
        limit = time_limit(timeout)
        every = time_limit(checkpoint_every, "checkpoint-every") or math.inf
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    _check_device(device)
    trackers = tuple(dict.fromkeys(tracker or ()))
    check_trackers(trackers)
    with surroundings_kept():
        overrides = Overrides(
            tasks=_split("--tasks", tasks),
            norms=_split("--norms", norms),
            seeds=seeds,
            settings=tuple(settings or ()),
            plugin_norms=_load_plugins(plugin),
            threads=threads,
            many=yes,
            timeout=limit,
        )
        given = read_config(config)  # once: a pipe has one end
        try:
            planned = plan_config(given, overrides, data_dir, without_data=dry_run)
        except ManyRuns as error:
            if not sys.stdin.isatty() or not typer.confirm(f"{error.lines[0].partition(';')[0]}. Make them?", err=True):
                raise
            planned = plan_config(given, replace(overrides, many=True), data_dir, without_data=dry_run)
    idle = [file for file in plugin or () if not registered_by(file)]
    print_notes([f'plugin "{file}" registers no norm and no task, so no run executes it' for file in idle])
    print_notes(planned.notes)
    folder = out if out is not None else Path("runs") / config.stem
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'--out "{folder}": is a file; a folder is needed')
    file = find_config(config)
    a_file = file.is_file()  # else a pipe, which nobody can read again
    jobs = jobs or (max(1, cpu_count() // planned.threads) if device == "cpu" else 1)

    from results.store import record_files, write_versions
    from suite.estimate import Remaining, Steps, begun, left_to_do
    from suite.progress import Names, Progress
    from suite.runner import Runner
    from suite.status import (
        Grid,
        describe,
        dry_summary,
        failed_before,
        left_out,
        not_of_config,
        restate_budget,
        shared_folder,
        summary,
        without_weights,
    )
    from suite.worker import trouble

    grid = Grid(planned, folder, retry)
    names = Names([*planned.runs, *(spec for spec, _ in planned.skipped)])
    remaining = Remaining(jobs, grid.records, Steps(planned.folders, data_dir))
    done = begun(folder, grid.todo)
    if out is None:
        for line in shared_folder(folder, file.resolve() if a_file else file):
            print(line, file=sys.stderr)
    if dry_run:
        print_lines(describe(grid, names))
        print_lines(failed_before(grid, names))
        print_lines(dry_summary(grid, jobs, left_to_do(remaining, grid.todo, done)))
        return 0
    print_lines(left_out(planned))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--out "{folder}": {error.strerror}') from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f'--out "{folder}": not writable')
    everything = [*planned.runs, *(spec for spec, _ in planned.skipped)]
    unstored = write_skipped(folder, planned.skipped)
    try:
        write_versions(folder, everything, str(file.resolve()) if a_file else "")
    except OSError as error:
        unstored.append(trouble(error))
    for line in unstored:
        print(f"not stored: {line}", file=sys.stderr)
    if restated := restate_budget(grid):
        print(f"budget: restated as {planned.budget} in {restated} records that were made before")
    progress = Progress(grid.todo, names, _main_metrics(planned.runs), remaining, folder, done)
    runner = Runner(
        device=device,
        threads=planned.threads,
        data_dir=data_dir.resolve(),
        plugins=tuple(plugin or ()),
        budget=planned.budget,
        commit=commit(),
        folders=planned.folders,
        checkpoint_every=every,
        trackers=trackers,
        keep_weights=keep_weights,
        loader_workers=loader_workers,
    )
    print_notes(runner.keep_plugins(folder))
    counts: Counter[str] = Counter()
    if grid.todo:
        export_threads(planned.threads)
        print(
            f"{len(grid.todo)} runs to do, {jobs} at a time, {planned.threads} thread(s) each -> "
            f"{shlex.quote(str(folder))}",
            flush=True,
        )
        # a scheduler's SIGTERM or SIGUSR1 and a closed terminal are as good as Ctrl-C: runs save and leave
        # (suite.leaving), the terminal is put right; what is ignored (nohup) stays so
        before = {
            number: signal.signal(number, signal.default_int_handler)
            for number in REQUESTS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            with display(progress) as tell:
                counts = execute(grid.todo, runner, folder, jobs=jobs, timeout=limit, retry=retry, on_event=tell)
        except KeyboardInterrupt:
            print(f"\n{shown(progress.stopped_line())}", file=sys.stderr)
            return 130
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    failed = grid.failed + counts["failed"]
    try:
        df, files = _show_tables(folder, ("csv", "latex", "markdown"))
        print(f"{len(files)} files of tables (CSV, LaTeX, Markdown) in {shlex.quote(str(folder / 'tables'))}")
        if a_file and not (tasks or norms or seeds is not None or settings):  # else the plan is smaller on purpose
            others = int((~df["key"].isin([spec.key for spec in everything])).sum())
            print_lines(not_of_config(others, folder, config, _plan_options(plugin, data_dir)))
    except (ValueError, OSError) as error:
        if not counts["stopped"] or any(record_files(folder)):  # else there is nothing to tabulate yet
            fail(str(error))
    except Exception as error:  # noqa: BLE001 - a mistake of ours; the runs are made, and the exit code tells of them
        fail(
            f"no tables: {type(error).__name__}: {error}\n"
            f"`python run_suite.py tables {shlex.quote(str(folder))}` shows where; the records are complete"
        )
    print_lines(failed_before(grid, names))
    if keep_weights:
        print_notes([*without_weights(grid)])
    print_lines(summary(grid, counts, failed))
    if counts["stopped"]:
        print(shown(progress.stopped_line()), file=sys.stderr)
        return 130
    return 1 if failed or unstored else 0


@app.command()
def debug(
    config: Annotated[Path, typer.Argument(help="A config file, as of `run`.")] = Path("configs/quick.yaml"),
    norm: Annotated[
        str | None, typer.Option(help="Its norm, by name or label.  [default: that of the plugin, else the config's]")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Its task.  [default: the config's first]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Its seed.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="TASK.OPTION=VALUE", help="Change an option (repeatable).")
    ] = None,
    plugin: Plugins = None,
    device: Annotated[str, typer.Option(help="Where the run computes: cpu, cuda, cuda:1, ...")] = "cpu",
    data_dir: DataDir = Path("data"),
) -> int:
    """Make one run of a config in this process, to look for a mistake: no record is written.

    No norm is tried before, prints appear where they are made, breakpoint() works, and an error shows its traceback
    (exit code 1). Where several runs are asked for, the first one is made.
    """
    from suite.debug import choose, load_plugins, make, planned
    from suite.runner import Runner

    _check_device(device)
    with terminal.as_they_are():
        own = load_plugins(plugin or ())
        plan = planned(config, _split("--norm", norm), _split("--task", task), seed, settings or (), own, data_dir)
        runner = Runner(device, plan.threads, data_dir.resolve(), tuple(plugin or ()), folders=plan.folders)
        return make(*choose(plan.runs), runner)


@app.command()
def tables(
    folder: Annotated[Path, typer.Argument(help="A folder of results.")],
    formats: Annotated[
        str | None,
        typer.Option("--format", help="csv, latex, markdown, separated by commas: written to FOLDER/tables."),
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics, separated by commas.")] = None,
    select: Annotated[
        str, typer.Option(help="Choose this option per norm by validation, on seeds that the table leaves out.")
    ] = "",
    sweep: Annotated[str | None, typer.Option(help="The option along the columns of the sweep table.")] = None,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--config", help="Only the runs that this config asks for, as it is now (repeatable)."),
    ] = None,
    plugin: Plugins = None,
    data_dir: DataDir = Path("data"),
) -> None:
    """Print the tables of the runs that are there, and write them.

    With --config, give the same --plugin and --data-dir as to `run`: code and data decide which runs are asked for.
    """
    own = _load_plugins(plugin)  # their metrics count without --config, too
    keys = _keys(configs, own, data_dir) if configs else None
    names = _split("--format", formats), _split("--metrics", metrics)
    df, _ = _show_tables(folder, *names, select, _split("--sweep", sweep), keys)
    if keys is not None:
        print(
            f"{df.attrs['records']} records of {', '.join(map(str, configs or ()))}; "
            f"{sum(df.attrs['not_asked'].values())} others in {folder} are left out"
        )


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="A folder of results.")],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Print what there is now, and leave.")] = False,
) -> None:
    """Show the runs that are being made in a folder, from any terminal or machine that sees it, until Ctrl-C.

    Per run: epoch or what is measured, steps, loss and validation of the last epoch and its age, the time that its
    remaining steps will take; and how many records there are. Nothing is changed and no run is held up.
    """
    from suite.watch import Watch

    if not 0.1 <= interval <= 86400:
        raise ValueError(f"--interval {interval:g}: 0.1 to 86400 seconds are needed")
    seen = Watch(folder)
    if once:
        print_lines(map(shown, seen.lines()))
        return
    with screen() as show:
        while getattr(sys.stdout, "lost", None) is None:  # else nobody reads on
            show([shown(line) for line in seen.lines()])
            time.sleep(interval)


@app.command()
def check(
    norms: Annotated[
        list[str] | None, typer.Argument(help="Norms to check.  [default: those of the plugins, else all]")
    ] = None,
    all_norms: Annotated[bool, typer.Option("--all", help="Every registered norm, plugins' included.")] = False,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of the one norm, such as num_groups=4 (repeatable)."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Check this task instead, by small runs; --option is then one of the task."),
    ] = None,
    norm: Annotated[
        str | None, typer.Option("--norm", help='With --task: the norm of its runs.  [default: "bn"]')
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="A Python file with a function reference(x, weight, bias, ...), to compare the one norm with."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout in the place of tables.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the layers are measured: cpu, cuda, ...")] = "cpu",
    plugin: Plugins = None,
    data_dir: DataDir = Path("data"),
) -> int:
    """Measure what norms (or, with --task, a task) promise; exit 1 when a fact is false.

    Under each false fact stands what usually causes it. A note: what a plugin's norm does not keep outside this suite.

    The file of --like is executed. Its reference(x, weight, bias, ...) gives the training output, and evaluation(x,
    running_mean, running_var, weight, bias, ...), where it is there, that of evaluation: a float64 tensor of the shape
    of x (N, C, H, W). Arguments are passed by name: x, any parameter, buffer or option of the norm, and domain (N,),
    conv_weight and activation where the norm needs them.
    """
    import torch

    from norms.conformance import check_like, check_norm
    from norms.conformance.like import load_formula
    from norms.registry import norm_info, norm_label, resolve_norm_options

    given = _parse_options(options)
    if task is not None:
        for option, value in (("norms", norms), ("--all", all_norms), ("--like", like), ("--json", as_json)):
            if value:
                raise ValueError(f"--task checks one task; {option} is for norms")
        if device != "cpu":
            raise ValueError(f'--device "{cut(device, 40)}": a task is checked on the cpu')
        return _check_one_task(task, given, norm, plugin, data_dir)
    if norm is not None:
        raise ValueError("--norm is for --task; norms to check are named without it")
    # what a user's file prints is no part of the document
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        chosen = _norms_to_check(norms, all_norms, plugin)
        if len(chosen) != 1 and (given or like):
            option, those = "--option" if given else "--like", ", ".join(norms or ()) or f"{len(chosen)} norms"
            raise ValueError(f"{option} is for one norm; given {those}")
        _check_device(device)
        formula = None if like is None else load_formula(like)
    torch.set_num_threads(1)  # on inputs this small a second one costs more than it computes
    found, false = [], []
    for name in chosen:
        with torch.device(device), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            checks = check_like(name, formula, **given) if formula else []
            checks += [c for c in check_norm(name, **given) if c not in checks]
        label = norm_label(name, given)
        options_used = {key: value for key, value in resolve_norm_options(name, given).items() if key in given}
        found.append({"norm": name, "options": options_used, "source": norm_info(name).source, "facts": checks})
        if not as_json:
            print_lines(_check_lines(f"{label}: {norm_info(name).source}", checks))
            sys.stdout.flush()
        false += [f"{label}: {c.fact}: declared {c.declared}, measured {c.measured}" for c in checks if c.false]
    for line in false:
        print(f"false: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"norms": found, "false": len(false)}, default=_fact, allow_nan=False, indent=2))
    else:
        print(f"{len(chosen)} norms checked, {len(false)} false facts")
    return 1 if false else 0


@app.command("convert-report")
def convert_report(
    model: Annotated[
        str,
        typer.Argument(help="A model of torchvision (classification, segmentation, detection, video), or timm:NAME."),
    ],
    norm: Annotated[str, typer.Argument(help="The norm to put in.")],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the norm, such as num_groups=8 (repeatable)."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="PATH", help="A norm of the model that stays (repeatable).")
    ] = None,
    plugin: Plugins = None,
) -> int:
    """Put a norm into an existing model, and show what was swapped and what was not; exit 1 when a norm is left.

    The model has random weights. It is forwarded once in both modes, on torch's meta device where model and norm can be
    (nothing is computed then), else on the CPU. A model whose norms are all channels-last (ViT, Swin) is refused. A
    detector is converted in parts where the norm needs more than x. A norm that stays because of --keep is left, too.
    """
    from norms.registry import make_norm, norm_label
    from suite.foreign import conversion_lines, convert_model

    _load_plugins(plugin)
    given = _parse_options(options)
    factory, label = make_norm(norm, **given), norm_label(norm, given)
    conversion = convert_model(model, factory, label, keep or ())
    print_lines(conversion_lines(conversion, model, label))
    return 0 if conversion.complete else 1


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which benchmarks.  [default: all]")] = None,
) -> None:
    """Timings as ratios: layers, training steps, checkpoints, the loop, images read, the allocator, scale."""
    from norms.values import nearest
    from suite.bench.timings import BENCHMARKS

    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        lines = [
            f'unknown benchmark "{n}"; benchmarks: {", ".join(BENCHMARKS)}{nearest(n, BENCHMARKS)}' for n in unknown
        ]
        raise ValueError("\n".join(lines))
    for name in names or BENCHMARKS:
        for line in BENCHMARKS[name]():
            print(line, flush=True)


@list_app.command("norms")
def list_norms(plugin: Plugins = None) -> None:
    """Registered norms and the facts they declare."""
    from norms.registry import norm_info, norm_names, norm_option_defaults
    from suite.progress import columns

    _load_plugins(plugin)
    rows = [("name", "mixes samples", "statistics over", "keeps statistics", "needs", "options", "source")]
    for name in norm_names():
        info = norm_info(name)
        options = ", ".join(f"{k}={v!r}" for k, v in norm_option_defaults(name).items())
        needs = ", ".join(sorted(info.needs)) or "nothing"
        mixes = "train and eval" if info.mixes_samples_in_eval else "train" if info.mixes_samples else "no"
        over = "?" if info.axes is None else " ".join(info.axes) or "nothing"
        rows.append((name, mixes, over, "yes" if info.keeps_stats else "no", needs, options, info.source))
    print_lines(columns(rows))


@list_app.command("tasks")
def list_tasks(plugin: Plugins = None) -> None:
    """Tasks, their metrics, and their options with defaults."""
    from suite.progress import columns
    from tasks import get_task, task_names

    _load_plugins(plugin)
    for name in task_names():
        task = get_task(name)
        print(f"{name}: {', '.join(task.metrics)}")
        rows = [
            (f"  {key}", f"= {field.get_default(call_default_factory=True)!r}", _annotation(field.annotation))
            for key, field in task.options.model_fields.items()
        ]
        print_lines(columns(rows))


@list_app.command("datasets")
def list_datasets(data_dir: DataDir = Path("data")) -> None:
    """Data sets, and whether they are prepared."""
    data_list(data_dir)


@list_app.command("metrics")
def list_metrics() -> None:
    """Metrics: unit, direction, meaning."""
    from results import metrics
    from suite.progress import columns

    rows = [("name", "unit", "better", "meaning")]
    for name in metrics.METRICS:
        metric = metrics.METRICS[name]
        better = {True: "higher", False: "lower", None: "-"}[metric.higher_is_better]
        rows.append((name, metric.unit or "-", better, metric.description))
    print_lines(columns(rows))


@data_app.command("list")
def data_list(data_dir: DataDir = Path("data")) -> None:
    """Data sets, and whether they are prepared."""
    from suite.progress import columns
    from tasks import data

    rows = [("name", "here", "what")]
    for name in data.dataset_names():
        what = str(data.dataset_info(name))
        try:
            here = "yes" if data.is_prepared(name, data_dir) else "no"
        except ValueError as error:  # of one set; the others are listed all the same
            here, what = "damaged", str(error)
        rows.append((name, here, what))
    print_lines(columns(rows))


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="A data set, see `data list`.")],
    data_dir: DataDir = Path("data"),
    source: Annotated[Path | None, typer.Option(help="Where the images of a set lie that is not downloaded.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of a folder's images in pixels.")] = None,
    force: Annotated[bool, typer.Option(help="Make it again; what is prepared stays until that is complete.")] = False,
) -> None:
    """Download and decode a data set: the only command that downloads anything."""
    from tasks import data

    done = data.prepare(name, data_dir, source=source, size=size, force=force)
    for note in done.notes:
        print(f"warning: {note}", file=sys.stderr)
    if done.made:
        print(f"{name} is prepared in {data_dir}")
    elif data.dataset_info(name).builtin:
        print(f"{name} is built in: nothing to do")
    else:
        print(f"{name} is prepared already in {data_dir}: nothing to do")


def _show_tables(
    folder: Path,
    formats: Sequence[str],
    metrics: Sequence[str] = (),
    select: str = "",
    sweep: Sequence[str] = (),
    keys: Collection[str] | None = None,
) -> tuple[DataFrame, list[Path]]:
    """Print every table of a folder of results, or of the runs with these keys, and write them in the given formats.

    Returns:
        The runs, and the files, which lie in the folder.

    Raises:
        ValueError: there is no run, or a name is unknown; or, after all is printed, the tables can not be written.
    """
    import results
    from results.tables.build import render_all
    from results.tables.render import tables_text, write_tables

    df = results.load(folder, keys=keys)
    if df.empty and (others := sum(df.attrs["not_asked"].values())):
        raise ValueError(
            f"none of the {others} records in {folder} is what the config asks for now: code, options and "
            "data count; without --config all are shown"
        )
    for line in df.attrs["damaged"]:
        print(f"damaged, left out of the tables: {line}", file=sys.stderr)
    rendered = render_all(df, select=select or None, metrics=list(metrics) or None, sweep=list(sweep) or None)
    files, unwritten = [], ""
    try:
        files = write_tables(rendered, folder / "tables", list(formats)) if formats else []
    except OSError as error:
        why = "a file has this name" if isinstance(error, FileExistsError) else error.strerror or error
        unwritten = f"tables are not written to {shlex.quote(str(folder / 'tables'))}: {why}"
    width = shutil.get_terminal_size((120, 24)).columns
    print(tables_text(rendered, width, sys.stdout.encoding))
    if unwritten:
        raise ValueError(unwritten)
    return df, files


def _keys(configs: Sequence[Path], plugin_norms: tuple[str, ...], data_dir: Path) -> set[str]:
    """The keys of all runs that the configs ask for; mistakes of all of them are reported at once."""
    export_threads(1)
    from suite.blocks import Overrides
    from suite.config import PlanError
    from suite.plan import plan

    overrides = Overrides(plugin_norms=plugin_norms, many=True)
    keys: set[str] = set()
    mistakes: list[str] = []
    for config in configs:
        try:
            planned = plan(config, overrides, data_dir)
        except PlanError as error:
            mistakes += error.lines
        else:
            keys.update(spec.key for spec in (*planned.runs, *(spec for spec, _ in planned.skipped)))
    if mistakes:
        raise PlanError(mistakes)
    return keys


def _plan_options(plugin: Sequence[Path] | None, data_dir: Path) -> list[str]:
    """What a plan of the same runs needs on the command line beside the config."""
    given = [part for file in plugin or () for part in ("--plugin", str(file))]
    return given if data_dir == Path("data") else [*given, "--data-dir", str(data_dir)]


def _parse_options(texts: Sequence[str] | None) -> dict[str, Any]:
    from suite.config import parse_value

    given = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f'--option "{text}": KEY=VALUE is needed')
        if (key := key.strip()) in given:
            raise ValueError(f'--option "{text}": {key} is given twice')
        try:
            given[key] = parse_value(value)
        except ValueError as error:
            raise ValueError(f'--option "{text}": {error}') from error
    return given


def _norms_to_check(norms: Sequence[str] | None, all_norms: bool, plugin: Sequence[Path] | None) -> list[str]:
    """Registered names. All that are unknown are reported at once."""
    from norms.registry import norm_info, norm_names

    own = _load_plugins(plugin)
    if all_norms and norms:
        raise ValueError(f"--all checks every norm; given {', '.join(norms)}, too")
    if plugin and not (own or norms or all_norms):
        files = ", ".join(map(str, plugin))
        raise ValueError(f"{files}: registers no norm; put @register(...) before the class (README, Your own norm)")
    chosen = norm_names() if all_norms else list(norms or own or norm_names())
    mistakes = []
    for name in chosen:
        try:
            norm_info(name)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return chosen


def _check_one_task(
    name: str, options: dict[str, Any], norm: str | None, plugin: Sequence[Path] | None, data_dir: Path
) -> int:
    from results.metrics import METRICS
    from suite.config import parse_value
    from tasks import get_task
    from tasks.conformance import Check, check_task, small_options

    _load_plugins(plugin)
    task = get_task(name)
    small = {**small_options(name), **options}
    shown = ", ".join(f"{key}={value}" for key, value in small.items()) or "its defaults"
    print(f"{name}: runs of {shown}", flush=True)
    checks = check_task(name, options, norm="bn" if norm is None else parse_value(norm), data_dir=data_dir)
    unknown = [metric for metric in task.metrics if metric not in METRICS]
    detail = f"no unit, no direction: {', '.join(unknown)}" if unknown else ""
    hint = "results.metrics.add_metric(Metric(...)) tells tables how to print it" if unknown else ""
    found = f"{len(task.metrics) - len(unknown)} of {len(task.metrics)}"
    checks.append(Check(name, "metrics known to tables", "all", found if unknown else "all", not unknown, detail, hint))
    print_lines(_check_lines(name, checks))
    for c in checks:
        if c.false:
            print(f"false: {name}: {c.fact}: declared {c.declared}, measured {c.measured}", file=sys.stderr)
    print(f"{len(checks)} facts of {name}, {sum(c.false for c in checks)} of them false")
    return 1 if any(c.false for c in checks) else 0


def _check_lines(title: str, checks: Sequence[Check | TaskCheck]) -> Iterator[str]:
    """The facts of one norm as a table, and under each false one its hint."""
    from suite.progress import columns

    yield title
    rows = [("", "fact", "declared", "measured", "")]
    rows += [
        ("FALSE" if c.false else "ok" if c.ok else "note", c.fact, c.declared, c.measured, c.detail) for c in checks
    ]
    head, *lines = columns(rows)
    yield head
    for check, line in zip(checks, lines, strict=True):
        yield line
        if check.hint:
            yield f"       usually: {check.hint}"


def _fact(check: Check) -> dict[str, Any]:
    """A check in a JSON document, without the norm that it stands under."""
    return {key: value for key, value in asdict(check).items() if key != "norm"}


def _load_plugins(files: Sequence[Path] | None) -> tuple[str, ...]:
    """The names of the norms in the user's files. All files that can not be loaded are reported at once.

    A file that would end this process, or never returns, ends another one first.
    """
    if not files:
        return ()
    from norms.registry import load_plugin
    from suite.trial import survives

    names: list[str] = []
    mistakes, here = [], Path.cwd()
    for file in files:
        try:
            if ended := survives(lambda file=file: load_plugin(file)):  # type: ignore[misc]
                mistakes.append(f'plugin "{file}": {ended} while it was imported')
            else:
                names += load_plugin(file)
        except ValueError as error:
            mistakes.append(str(error))
        finally:
            os.chdir(here)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return tuple(dict.fromkeys(names))


def _innermost(error: BaseException) -> str:
    """The line of code at which an exception arose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "a user's file" if trace is None else f'"{trace.tb_frame.f_code.co_filename}", line {trace.tb_lineno}'


def _check_device(device: str) -> None:
    import torch

    shown = cut(device, 40)
    try:
        with warnings.catch_warnings(action="ignore"):  # of kinds that torch is about to give up
            kind = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'--device "{shown}": not a device; for example cpu, cuda, cuda:1') from error
    if kind.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # torch takes 256 for 0 without a word
        if str(kind) != device or (kind.index or 0) >= count:
            raise ValueError(f'--device "{shown}": {count} CUDA devices are available here; cpu always is')
    elif kind.type == "cpu":
        if device not in ("cpu", "cpu:0"):
            raise ValueError(f'--device "{shown}": there is one cpu')
    else:
        try:
            torch.zeros(1, device=kind).item()  # a value to look at: there is none on "meta"
        except Exception as error:  # each kind that is not here has its own, ImportError among them
            raise ValueError(f'--device "{shown}": not available here; cpu always is') from error


def _main_metrics(specs: Sequence[RunSpec]) -> dict[str, str]:
    from tasks import get_task

    return {name: get_task(name).metrics[0] for name in dict.fromkeys(spec.task for spec in specs)}


def _split(option: str, text: str | None) -> tuple[str, ...]:
    """ "bn, gn(num_groups=8,eps=0.1)" -> its parts; a comma inside brackets separates nothing. None: not given.

    Raises:
        ValueError: no name at all, or brackets that do not match.
    """
    if text is None:
        return ()
    parts, open_ = [""], ""
    for character in text:
        if character in "([":
            open_ += character
        elif character in ")]":
            if open_[-1:] + character not in ("()", "[]"):
                raise ValueError(f'{option} "{text[:120]}": a "{character}" closes nothing')
            open_ = open_[:-1]
        if character == "," and not open_:
            parts.append("")
        else:
            parts[-1] += character
    if open_:
        raise ValueError(f'{option} "{text[:120]}": a "{open_[-1]}" is not closed')
    names = tuple(part.strip() for part in parts if part.strip())
    if not names:
        raise ValueError(f'{option} "{text[:120]}": a name is needed')
    return names


def _annotation(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
