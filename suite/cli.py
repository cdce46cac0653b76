"""The command line: the only module that reads argv and chooses exit codes; suite.console prints.

Exit codes: 0 done (diverged and skipped are results); 1 a run failed, or a norm does not keep what it declares; 2 a
mistake in what was given, nothing was run; 130 stopped by Ctrl-C or another signal, or a run was told to leave.

Modules that import torch or pandas are imported inside the commands that need them, so that `--help`, `tables` and
`list metrics` start without torch. One module, although it is long: a function per command, and most of the lines are
options with their help.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from results.escape import cut
from suite import terminal
from suite.checking import check_lines, check_one_task, norms_to_check
from suite.console import display, fail, print_lines, print_notes, screen, show_tables, shown
from suite.environment import check_device, export_threads, set_allocator
from suite.forked import watched
from suite.plugins import load_plugins

if TYPE_CHECKING:
    from norms.conformance import Check

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

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A file with your own norms, tasks, models, ... (repeatable).")
]
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
    from results.store import record_files
    from suite import status
    from suite.config import ManyRuns, find_config, folder_of, read_config
    from suite.engine import time_limit
    from suite.leaving import as_interrupts
    from suite.progress import Progress
    from suite.session import Session, check_loader_workers, plan
    from suite.trackers import check_trackers

    for option, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: 1 or more is needed")
    with _as_options():
        time_limit(timeout)
        time_limit(checkpoint_every, "checkpoint-every")
        check_device(device)
        check_loader_workers(loader_workers)
    check_trackers(tracker or ())
    asked: dict[str, Any] = {
        "tasks": _split("--tasks", tasks),
        "norms": _split("--norms", norms),
        "seeds": seeds,
        "settings": tuple(settings or ()),
        "plugins": tuple(plugin or ()),
        "threads": threads,
        "timeout": timeout,
        "data_dir": data_dir,
        "without_data": dry_run,
        "folder": folder_of(config),
    }
    given = read_config(config)  # once: a pipe has one end
    try:
        planned = plan(given, many=yes, **asked)
    except ManyRuns as error:
        if not sys.stdin.isatty() or not typer.confirm(f"{error.lines[0].partition(';')[0]}. Make them?", err=True):
            raise
        planned = plan(given, many=True, **asked)
    idle = [file for file in plugin or () if not registered_by(file)]
    print_notes([f'plugin "{file}" registers nothing, so no run executes it' for file in idle])
    print_notes(planned.notes)
    file = find_config(config)
    a_file = file.is_file()  # else a pipe, which nobody can read again
    with _as_options():
        session = Session(
            planned,
            out if out is not None else Path("runs") / config.stem,
            config=file if a_file else None,
            jobs=jobs,
            plugins=tuple(plugin or ()),
            timeout=timeout,
            checkpoint_every=checkpoint_every,
            device=device,
            data_dir=data_dir,
            retry=retry,
            keep_weights=keep_weights,
            trackers=tuple(tracker or ()),
            loader_workers=loader_workers,
        )
    folder, names, todo = session.folder, session.names, session.status.todo
    if out is None:
        for line in status.shared_folder(folder, file.resolve() if a_file else file):
            print(line, file=sys.stderr)
    if dry_run:
        print_lines(status.describe(session.status, names))
        print_lines(status.failed_before(session.status, names))
        print_lines(status.dry_summary(session.status, session.jobs, session.left()))
        return 0
    print_lines(status.left_out(planned))
    with _as_options():
        unstored = session.begin()
    for line in unstored:
        print(f"not stored: {line}", file=sys.stderr)
    print_notes(session.notes)
    if session.restated:
        print(f"budget: restated as {planned.budget} in {session.restated} records that were made before")
    progress = Progress(todo, names, session.headlines, session.remaining, folder, session.begun)
    counts: Counter[str] = Counter()
    if todo:
        print(
            f"{len(todo)} runs to do, {session.jobs} at a time, {planned.threads} thread(s) each -> "
            f"{shlex.quote(str(folder))}",
            flush=True,
        )
        try:
            with as_interrupts(), display(progress) as tell:
                counts = session.make(tell)
        except KeyboardInterrupt:
            print(f"\n{shown(progress.stopped_line())}", file=sys.stderr)
            return 130
    failed = session.status.failed + counts["failed"]
    try:
        df, files = show_tables(folder, ("csv", "latex", "markdown"))
        print(f"{len(files)} files of tables (CSV, LaTeX, Markdown) in {shlex.quote(str(folder / 'tables'))}")
        if a_file and not (tasks or norms or seeds is not None or settings):  # else the plan is smaller on purpose
            others = int((~df["key"].isin(session.keys)).sum())
            print_lines(status.not_of_config(others, folder, config, _plan_options(plugin, data_dir)))
    except (ValueError, OSError) as error:
        if not counts["stopped"] or any(record_files(folder)):  # else there is nothing to tabulate yet
            fail(str(error))
    except Exception as error:  # noqa: BLE001 - a mistake of ours; the runs are made, and the exit code tells of them
        fail(
            f"no tables: {type(error).__name__}: {error}\n"
            f"`python run_suite.py tables {shlex.quote(str(folder))}` shows where; the records are complete"
        )
    print_lines(status.failed_before(session.status, names))
    if keep_weights:
        print_notes([*status.without_weights(session.status)])
    print_lines(status.summary(session.status, counts, failed))
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

    with _as_options():
        check_device(device)
    with terminal.as_they_are():
        own = load_plugins(plugin or ())
        plan = planned(config, _split("--norm", norm), _split("--task", task), seed, settings or (), own, data_dir)
        runner = Runner(
            device, plan.threads, data_dir.resolve(), (*(plugin or ()), *plan.plugins), folders=plan.folders
        )
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
    own = load_plugins(plugin)  # their metrics count without --config, too
    keys = None
    if configs:
        export_threads(1)
        from suite.session import planned_keys

        keys = planned_keys(configs, own, data_dir)
    names = _split("--format", formats), _split("--metrics", metrics)
    df, _ = show_tables(folder, *names, select, _split("--sweep", sweep), keys)
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
        return check_one_task(task, given, norm, plugin, data_dir)
    if norm is not None:
        raise ValueError("--norm is for --task; norms to check are named without it")
    # what a user's file prints is no part of the document
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        chosen = norms_to_check(norms, all_norms, plugin)
        if len(chosen) != 1 and (given or like):
            option, those = "--option" if given else "--like", ", ".join(norms or ()) or f"{len(chosen)} norms"
            raise ValueError(f"{option} is for one norm; given {those}")
        with _as_options():
            check_device(device)
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
            print_lines(check_lines(f"{label}: {norm_info(name).source}", checks))
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

    load_plugins(plugin)
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

    load_plugins(plugin)
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

    load_plugins(plugin)
    for name in task_names():
        task = get_task(name)
        print(f"{name}: {', '.join(task.metrics)}")
        rows = [
            (f"  {key}", f"= {field.get_default(call_default_factory=True)!r}", _annotation(field.annotation))
            for key, field in task.options.model_fields.items()
        ]
        print_lines(columns(rows))


@list_app.command("datasets")
def list_datasets(data_dir: DataDir = Path("data"), plugin: Plugins = None) -> None:
    """Data sets, and whether they are prepared."""
    data_list(data_dir, plugin)


@list_app.command("metrics")
def list_metrics(plugin: Plugins = None) -> None:
    """Metrics: unit, direction, meaning."""
    from results import metrics
    from suite.progress import columns

    load_plugins(plugin)
    rows = [("name", "unit", "better", "meaning")]
    for name in metrics.METRICS:
        metric = metrics.METRICS[name]
        better = {True: "higher", False: "lower", None: "-"}[metric.higher_is_better]
        rows.append((name, metric.unit or "-", better, metric.description))
    print_lines(columns(rows))


@data_app.command("list")
def data_list(data_dir: DataDir = Path("data"), plugin: Plugins = None) -> None:
    """Data sets, and whether they are prepared."""
    from suite.progress import columns
    from tasks import data

    load_plugins(plugin)
    rows = [("name", "here", "what"), *((each.name, each.here, each.what) for each in data.listed(data_dir))]
    print_lines(columns(rows))


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="A data set, see `data list`.")],
    data_dir: DataDir = Path("data"),
    source: Annotated[
        Path | None, typer.Option(help="A folder with the images (imagenet) or the archives that it is read from.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of a folder's images in pixels.")] = None,
    force: Annotated[bool, typer.Option(help="Make it again; what is prepared stays until that is complete.")] = False,
    plugin: Plugins = None,
) -> None:
    """Download and decode a data set: the only command that downloads anything."""
    from tasks import data

    load_plugins(plugin)
    done = data.prepare(name, data_dir, source=source, size=size, force=force)
    if done.layout:
        print(f"note: {done.layout}", file=sys.stderr)
    for note in done.notes:
        print(f"warning: {note}", file=sys.stderr)
    if done.made:
        print(f"{name} is prepared in {data_dir}")
    elif data.dataset_info(name).builtin:
        print(f"{name} is built in: nothing to do")
    elif not data.is_prepared(name, data_dir):
        raise ValueError(f'data set "{name}" is not here, and its source prepares nothing')
    else:
        print(f"{name} is prepared already in {data_dir}: nothing to do")


def _plan_options(plugin: Sequence[Path] | None, data_dir: Path) -> list[str]:
    """The command-line options that a plan of the same runs needs beside the config."""
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


def _fact(check: Check) -> dict[str, Any]:
    """A check in a JSON document, without the norm that it stands under."""
    return {key: value for key, value in asdict(check).items() if key != "norm"}


@contextlib.contextmanager
def _as_options() -> Iterator[None]:
    """Mistakes about an argument of a function are mistakes about the option of that name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def _innermost(error: BaseException) -> str:
    """The line of code at which an exception arose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "a user's file" if trace is None else f'"{trace.tb_frame.f_code.co_filename}", line {trace.tb_lineno}'


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
