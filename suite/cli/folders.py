"""The commands about folders of results as things: runs list, runs rm, merge, diff."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from results.escape import cut, escape_csv, visible
from suite.cli import completing
from suite.cli.app import SETTINGS, app, as_options, split_names
from suite.console import print_lines, shown

if TYPE_CHECKING:
    from results.folders import Stored

runs = typer.Typer(help="The runs of a folder of results: list them, remove them.", **SETTINGS)
app.add_typer(runs, name="runs")

Folder = Annotated[Path, typer.Argument(help="A folder of results.", autocompletion=completing.results)]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Only these tasks, separated by commas.")]
Norms = Annotated[str | None, typer.Option("--norms", help="Only these norms, by name or label.")]
Statuses = Annotated[
    str | None,
    typer.Option("--status", help="Only ok, diverged, failed, skipped, damaged, unfinished, busy (being made)."),
]
Seeds = Annotated[str | None, typer.Option("--seeds", help='Only these seeds: "0-4", "0,2,5".')]


@runs.command("list")
def list_(
    folder: Folder,
    task: Tasks = None,
    norm: Norms = None,
    status: Statuses = None,
    seed: Seeds = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show every run of a folder: task, norm, setting, seed, status, result, time, size, key.

    Runs of all versions are listed, also such as tables leave out; and runs without a readable record.
    """
    from suite.comparing import run_lines

    found, lines = _chosen(folder, task, norm, status, seed, ())
    if as_json:
        print(json.dumps({"runs": [_finite(run.plain()) for run in found], "damaged": lines}, indent=1))
        return
    print_lines(run_lines(found))
    for line in lines:
        print(f"damaged: {shown(line)}", file=sys.stderr)


@runs.command()
def rm(
    folder: Folder,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys of runs, or their first six characters.")
    ] = None,
    task: Tasks = None,
    norm: Norms = None,
    status: Statuses = None,
    seed: Seeds = None,
    everything: Annotated[bool, typer.Option("--all", help="Every run of the folder.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without a question.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")] = False,
) -> int:
    """Remove runs: their records and files. The next `run` makes them again.

    What is said of versions and tasks stays. A run that a process makes now is left alone, and so is one that is
    reached through a link; exit 1 when one stays.
    """
    from results.folders import remove
    from suite.comparing import bytes_text, count_line, run_lines

    given = (keys, task, norm, status, seed)
    if not any(value is not None and value != [] for value in given) and not everything:
        raise ValueError("nothing says which runs: give keys, --tasks, --norms, --status, --seeds, or --all")
    if everything and any(value is not None and value != [] for value in given):
        raise ValueError("--all means every run; give it without keys and filters")
    found, _ = _chosen(folder, task, norm, status, seed, tuple(keys or ()))
    if not found:
        print(f"no run to remove in {shown(shlex.quote(str(folder)))}")
        return 0
    if dry_run:
        print_lines(run_lines(found))
        print("nothing is removed (--dry-run)")
        return 0
    if not yes:
        if not sys.stdin.isatty():
            raise ValueError(f"{count_line(found)} would be removed; --yes removes without a question")
        print_lines(run_lines(found))
        if not typer.confirm("Remove them?", err=True):
            print("nothing is removed")
            return 0
    stay = []
    for run in found:
        if why := remove(folder, run):
            stay.append((run, why))
    for run, why in stay:
        print(shown(f"stays: {run.task} {run.label} {run.key}: {why}"), file=sys.stderr)
    gone = len(found) - len(stay)
    freed = bytes_text(sum(r.size for r in found) - sum(r.size for r, _ in stay))
    print(
        f"{gone} run{'' if gone == 1 else 's'} removed, {freed}"
        + (f"; {len(stay)} stay{'s' if len(stay) == 1 else ''}" if stay else "")
    )
    return 1 if stay else 0


@app.command()
def merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Folders of results.", autocompletion=completing.results)
    ],
    out: Annotated[Path, typer.Option(help="The folder that takes their runs; it may hold runs already.")],
    prefer: Annotated[
        Path | None, typer.Option(help="One of the folders: its finished records and its versions are taken.")
    ] = None,
) -> int:
    """Copy the runs of several folders into one; exit 1 when some had to be left out.

    A run that several folders have is taken once: a finished one before others, then the newest. How many finished
    records differ in their numbers is said. Runs that are being made and damaged records are left out and named. The
    same command goes on where it was interrupted.
    """
    import results
    from results.merging import left_out
    from results.merging import merge as merge_folders
    from suite.comparing import merge_lines

    merged = merge_folders(folders, out, prefer)
    stale = results.load(out).attrs["stale"]
    print_lines(merge_lines(merged, out, stale))
    for line in dict.fromkeys(merged.notes):
        print(f"note: {shown(line)}", file=sys.stderr)
    counts = left_out(merged)
    return 1 if counts["damaged"] or counts["busy"] else 0


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A folder of results.", autocompletion=completing.results)],
    b: Annotated[
        Path,
        typer.Argument(metavar="B", help="The folder that is compared with it.", autocompletion=completing.results),
    ],
    metric: Annotated[str | None, typer.Option("--metrics", help="Only these metrics, separated by commas.")] = None,
    task: Tasks = None,
    tolerance: Annotated[
        float, typer.Option(help="A difference up to this share of a value (or of 1) counts as reproduced.")
    ] = 1e-6,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line per task, setting, norm and metric.")] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit 1 when a result, a status or a run differs.")
    ] = False,
) -> int:
    """Compare two folders run by run: before and after a change, laptop and cluster.

    Runs with the same task, options, norm and seed are pairs, whatever their versions, data and machine. Per metric:
    how many pairs are equal to the last bit or reproduced, whether the difference is inside its 95 % interval, and p
    where several seeds allow one. Times and memory are shown as ratios and are no difference.
    """
    import results
    from results.differences import differs
    from suite.comparing import diff_lines

    if as_json and as_csv:
        raise ValueError("--json and --csv: one of them is needed")
    frames = []
    for folder in (a, b):
        df = results.load(folder)
        frames.append(df)
        for line in df.attrs["damaged"]:
            print(f"damaged, left out: {line}", file=sys.stderr)
        if number := sum(df.attrs["stale"].values()):
            print(
                f"note: {number} runs of other versions or data in {visible(str(folder))} are left out", file=sys.stderr
            )
    with as_options():
        found = results.diff(
            frames[0], frames[1], split_names("--metrics", metric), split_names("--tasks", task), tolerance
        )
    if as_json:
        rows = [_finite(row) for row in found.to_dict("records")]
        head = {"schema": 1, "a": str(a), "b": str(b), "differs": differs(found)}
        print(json.dumps({**head, **found.attrs, "rows": rows}, indent=1, default=str))
    elif as_csv:
        texts = found.map(lambda value: escape_csv(value) if isinstance(value, str) else value)
        print(texts.to_csv(index=False, lineterminator="\n"), end="")
    else:
        print_lines(diff_lines(found, str(a), str(b)))
    return int(exit_code and differs(found))


def _chosen(
    folder: Path, task: str | None, norm: str | None, status: str | None, seed: str | None, keys: tuple[str, ...]
) -> tuple[list[Stored], list[str]]:
    from results.folders import choose, list_runs
    from suite.config import parse_seeds

    names = split_names("--tasks", task), split_names("--norms", norm), split_names("--status", status)
    seeds = () if seed is None else parse_seeds(seed)
    found, lines = list_runs(folder)
    return choose(found, *names, seeds, keys), [cut(line, 1000) for line in lines]


def _finite(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Without NaN, for which JSON has no word."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
