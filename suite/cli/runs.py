"""The commands that make runs, and look at them while they go: run, debug, watch."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from results.escape import cut
from suite import terminal
from suite.cli import completing
from suite.cli.app import DataDir, Plugins, app, as_options, split_names
from suite.cli.array import print_script, submit
from suite.console import (
    display,
    documented,
    explain,
    fail,
    painted,
    painted_counts,
    print_document,
    print_lines,
    print_notes,
    report_line,
    say,
    screen,
    show_tables,
    shown,
    timed,
    voice,
)
from suite.environment import export_threads
from suite.launch.devices import check_device, slots_of


@app.command()
def run(
    config: Annotated[
        Path,
        typer.Argument(
            help="A config file; configs/NAME.yaml is the suite's own where there is none here.",
            autocompletion=completing.configs,
        ),
    ] = Path("configs/quick.yaml"),
    tasks: Annotated[
        str | None,
        typer.Option(help="Only these tasks of the config, separated by commas.", autocompletion=completing.tasks),
    ] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            help="Instead of the config's norms, separated by commas: a name or label selects the config's entries, "
            "another registered name is added with its defaults, and 'gn(num_groups=4)' with these options.",
            autocompletion=completing.norms,
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help='Instead of the config\'s seeds: "0-4", "0,2,5".')] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TASK.OPTION=VALUE", help="Change an option; a list is an axis (repeatable)."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at a time.  [default: cores // (threads x workers); what accelerators have room for]"),
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
    device: Annotated[
        str,
        typer.Option(
            help="Where runs compute: cpu; cuda: every visible accelerator, a run on each; cuda:0,2: these.",
            autocompletion=completing.devices,
        ),
    ] = "cpu",
    runs_per_device: Annotated[
        int | None, typer.Option(help="Runs that share an accelerator at a time.  [default: 1]")
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            help="Where runs are made: local; slurm:partition=gpu,time=4:00:00,gpus=1,array=32; ray, ray:ADDRESS; or a "
            "YAML file of such fields, as configs/on/slurm.yaml."
        ),
    ] = "local",
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Leave when only runs are left that other invocations make.")
    ] = False,
    data_dir: DataDir = Path("data"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the grid and what is done; run nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: one JSON document on stdout in the place of text.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Make failed runs again.")] = False,
    retry_before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Make failed runs again that ended before this time, as 2026-11-29T12:00:00 (UTC)."
        ),
    ] = None,
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
    from suite.config import ManyRuns, config_text, find_config, folder_of, parse_config
    from suite.engine import time_limit
    from suite.launch.places import Slurm, read_place
    from suite.leaving import as_interrupts
    from suite.progress import Progress
    from suite.session import Session, check_loader_workers, plan
    from suite.torchrun import torchrun_place
    from suite.trackers import check_trackers

    for option, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: 1 or more is needed")
    place = read_place(on)
    if no_wait and place.kind == "slurm":
        raise ValueError("--no-wait: nothing waits for the elements of an array")
    with as_options():
        time_limit(timeout)
        time_limit(checkpoint_every, "checkpoint-every")
        if place.kind == "local":
            slots_of(device)
        check_loader_workers(loader_workers)
    check_trackers(tracker or ())
    if as_json and not dry_run:
        raise ValueError("--json is for --dry-run; what runs gave is read by results.load, or from tables --format csv")
    asked: dict[str, Any] = {
        "tasks": split_names("--tasks", tasks),
        "norms": split_names("--norms", norms),
        "seeds": seeds,
        "settings": tuple(settings or ()),
        "plugins": tuple(plugin or ()),
        "threads": threads,
        "timeout": timeout,
        "data_dir": data_dir,
        "without_data": dry_run,
        "folder": folder_of(config),
    }
    text = config_text(config)  # once: a pipe has one end
    given = parse_config(text, config)
    try:
        with timed("planning"), documented(as_json):
            planned = plan(given, many=yes, **asked)
    except ManyRuns as error:
        if not sys.stdin.isatty() or not typer.confirm(f"{error.lines[0].partition(';')[0]}. Make them?", err=True):
            raise
        planned = plan(given, many=True, **asked)
    for each in planned.plugins:
        explain(
            f"plugin {each.file}: version {each.version}, {', '.join(f'{kind} {name}' for kind, name in each.names)}"
        )
    idle = [file for file in plugin or () if not registered_by(file)]
    notes = [f'plugin "{file}" registers nothing, so no run executes it' for file in idle]
    print_notes([*notes, *planned.notes])
    file = find_config(config)
    a_file = file.is_file()  # else a pipe, which nobody can read again
    with as_options(), timed("reading what is done"):
        session = Session(
            planned,
            out if out is not None else Path("runs") / config.stem,
            config=file if a_file else None,
            text=text,
            command=sys.argv[1:],
            jobs=jobs,
            plugins=tuple(plugin or ()),
            timeout=timeout,
            checkpoint_every=checkpoint_every,
            device=device,
            runs_per_device=runs_per_device,
            on=place,
            wait=not no_wait,
            data_dir=data_dir,
            retry=_time(retry_before) if retry_before is not None else retry,
            keep_weights=keep_weights,
            trackers=tuple(tracker or ()),
            loader_workers=loader_workers,
        )
    crew = torchrun_place()
    folder, names, todo = session.folder, session.names, session.status.todo
    if out is None and not voice.quiet:
        for line in status.shared_folder(folder, file.resolve() if a_file else file):
            print(line, file=sys.stderr)
    if crew is not None and crew.rank:  # this copy of the command takes part in what that of rank 0 makes
        if not dry_run:
            session.make()
        return 0
    if as_json:
        from suite.as_json import plan_document

        print_document(plan_document(session, notes))
        return 0
    if dry_run:
        print_lines(status.describe(session.status, names))
        print_lines(map(painted, status.failed_before(session.status, names)))
        print_lines(status.dry_summary(session.status, session.jobs, session.left()))
        if isinstance(place.options, Slurm):
            print_script(place.options, session, device)
        return 0
    if isinstance(place.options, Slurm):
        return submit(place.options, session, device)
    for line in status.left_out(planned):
        say(line)
    with as_options():
        unstored = session.begin()
    for line in unstored:
        print(f"not stored: {line}", file=sys.stderr)
    print_notes(session.notes)
    if session.restated:
        say(f"budget: restated as {planned.budget} in {session.restated} records that were made before")
    progress = Progress(todo, names, session.headlines, session.remaining, folder, session.begun)
    counts: Counter[str] = Counter()
    if crew is not None and not todo:
        session.make()  # so that the other copies hear of it
    if todo:
        say(
            f"{len(todo)} runs to do, {session.at_a_time}, {planned.threads} thread(s) each -> "
            f"{shlex.quote(str(folder))}"
        )
        try:
            with timed("the runs"), as_interrupts(), display(progress) as tell:
                counts = session.make(tell)
        except KeyboardInterrupt:
            print(f"\n{shown(progress.stopped_line())}", file=sys.stderr)
            return 130
    failed = session.status.failed + counts["failed"]
    try:
        with timed("the tables"):
            df, files = show_tables(folder, ("csv", "latex", "markdown"))
        say(f"{len(files)} files of tables (CSV, LaTeX, Markdown) in {shlex.quote(str(folder / 'tables'))}")
        if a_file and not (tasks or norms or seeds is not None or settings):  # else the plan is smaller on purpose
            others = int((~df["key"].isin(session.keys)).sum())
            for line in status.not_of_config(others, folder, config, _plan_options(plugin, data_dir)):
                say(line)
        with timed("the report"):
            say(shown(report_line(folder, len(df))))
    except (ValueError, OSError) as error:
        if not counts["stopped"] or any(record_files(folder)):  # else there is nothing to tabulate yet
            fail(str(error))
    except Exception as error:  # noqa: BLE001 - a mistake of ours; the runs are made, and the exit code tells of them
        fail(
            f"no tables: {type(error).__name__}: {error}\n"
            f"`python run_suite.py tables {shlex.quote(str(folder))}` shows where; the records are complete"
        )
    print_lines(map(painted, status.failed_before(session.status, names)))
    if keep_weights:
        print_notes([*status.without_weights(session.status)])
    print_lines(map(painted_counts, status.summary(session.status, counts, failed)))
    if counts["stopped"]:
        print(shown(progress.stopped_line()), file=sys.stderr)
        return 130
    return 1 if failed or unstored else 0


@app.command()
def debug(
    config: Annotated[
        Path, typer.Argument(help="A config file, as of `run`.", autocompletion=completing.configs)
    ] = Path("configs/quick.yaml"),
    norm: Annotated[
        str | None,
        typer.Option(
            help="Its norm, by name, label or as 'gn(num_groups=4)'.  [default: that of the plugin, else the config's]",
            autocompletion=completing.norm,
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Its task.  [default: the config's first]", autocompletion=completing.task)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Its seed.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="TASK.OPTION=VALUE", help="Change an option (repeatable).")
    ] = None,
    plugin: Plugins = None,
    device: Annotated[
        str, typer.Option(help="Where the run computes: cpu, cuda, cuda:1, ...", autocompletion=completing.devices)
    ] = "cpu",
    data_dir: DataDir = Path("data"),
) -> int:
    """Make one run of a config in this process, to look for a mistake: no record is written.

    No norm is tried before, prints appear where they are made, breakpoint() works, and an error shows its traceback
    (exit code 1). Where several runs are asked for, the first one is made.
    """
    from suite.debug import choose, load_plugins, make, planned
    from suite.runner import Runner

    with as_options():
        check_device(device)
    with terminal.as_they_are():
        own = load_plugins(plugin or ())
        plan = planned(
            config, split_names("--norm", norm), split_names("--task", task), seed, settings or (), own, data_dir
        )
        runner = Runner(
            device, plan.threads, data_dir.resolve(), (*(plugin or ()), *plan.plugins), folders=plan.folders
        )
        return make(*choose(plan.runs), runner)


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="A folder of results.", autocompletion=completing.results)],
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


def _time(text: str) -> datetime:
    """The time that --retry-before gives; without a zone it is UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f'--retry-before "{cut(text, 40)}": a time is needed, such as 2026-11-29T12:00:00') from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _plan_options(plugin: Sequence[Path] | None, data_dir: Path) -> list[str]:
    """The command-line options that a plan of the same runs needs beside the config."""
    given = [part for file in plugin or () for part in ("--plugin", str(file))]
    return given if data_dir == Path("data") else [*given, "--data-dir", str(data_dir)]
