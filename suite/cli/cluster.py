"""The commands about folders whose runs are made elsewhere: status, cancel."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from suite.cli import completing
from suite.cli.app import AsJson, app
from suite.console import painted, print_document, print_lines, print_notes, shown

Folder = Annotated[Path, typer.Argument(help="A folder of results.", autocompletion=completing.results)]


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show where a folder stands: runs that are done, being made (host, epoch), waiting and failed; and its Slurm jobs.

    From any machine that sees the folder; without Slurm only the folder is looked at. Nothing is changed and no run is
    held up. Exit 0 whatever is found.
    """
    from suite.launch import standing

    now = standing.standing(folder)
    if as_json:
        print_document(standing.document(now))
        return
    print_lines(painted(shown(line)) for line in standing.lines(now))
    print_notes([shown(note) for note in now.notes])


@app.command()
def cancel(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="End them without a question.")] = False,
) -> int:
    """End the Slurm jobs that were submitted for a folder. Their runs make checkpoints and leave.

    Finished runs stay, and the same `run` command goes on with the others. Processes that no Slurm job of this folder
    started are left alone.
    """
    from suite.launch.submissions import cancel as cancel_jobs
    from suite.launch.submissions import in_queue

    if not folder.is_dir():
        raise ValueError(f'"{folder}": {"is a file" if folder.exists() else "does not exist"}; a folder is needed')
    damaged: list[str] = []
    found = in_queue(folder, damaged)
    print_notes([f"{shown(line)}; whether a job of it goes on is not known" for line in damaged])
    if not found:
        print(f"nothing to end: no Slurm job of {shown(shlex.quote(str(folder)))} waits or runs")
        return 0
    lines = [
        f"slurm/{number}: job {job.job}, {sum(e.state == 'RUNNING' for e in elements)} elements running, "
        f"{sum(e.state != 'RUNNING' for e in elements)} waiting or ending"
        for number, (job, elements) in found.items()
    ]
    if not yes:
        if not sys.stdin.isatty():
            raise ValueError(f"{'; '.join(lines)}: these would be ended; --yes ends them without a question")
        print_lines(lines)
        if not typer.confirm("End them?", err=True):
            print("nothing is ended")
            return 0
    cancel_jobs(found)
    print_lines(f"ended: {line}" for line in lines)
    return 0
