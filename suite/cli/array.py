"""What `run --on slurm` does in the place of making runs: it shows, or submits, an array whose elements make them."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from suite.cli.app import as_options
from suite.console import print_notes, say

if TYPE_CHECKING:
    from suite.launch.places import Slurm
    from suite.session import Session


def print_script(options: Slurm, session: Session, device: str) -> None:
    """Show what `submit` would submit, where runs are to do."""
    from suite.launch.slurm import notes
    from suite.launch.submissions import preview

    todo = len(session.status.todo)
    print_notes(notes(options, device, todo))
    if todo:
        _check_file(session)
        words = [word for word in sys.argv[1:] if word != "--dry-run"]
        print(f"\n{preview(options, words, session.folder, todo, session.plan.threads)}", end="")


def submit(options: Slurm, session: Session, device: str) -> int:
    """Submit an array that makes the runs to do; nothing waits for it."""
    from suite.launch.slurm import notes
    from suite.launch.submissions import SUBMISSIONS
    from suite.launch.submissions import submit as submit_array
    from suite.planning import MOST_RUNS

    todo, where = len(session.status.todo), shlex.quote(str(session.folder))
    print_notes(notes(options, device, todo))
    if not todo:
        say(f"nothing left to do: {session.status.done} already done")
        return 0
    _check_file(session)
    with as_options():
        unstored = session.begin()
    words = [*sys.argv[1:], *(["--yes"] if todo > MOST_RUNS and "--yes" not in sys.argv else [])]
    number, made, said = submit_array(options, words, session.folder, session.plan.runs, todo, session.plan.threads)
    print_notes([*unstored, *session.notes])
    print_notes(said)
    elements = f"{made.elements} element{'s' if made.elements > 1 else ''}"
    say(f"job {made.job}: an array of {elements} for {todo} runs to do -> {where}/{SUBMISSIONS}/{number}")
    say(f"`python run_suite.py status {where}` shows where it stands, `cancel` ends it, `tables` makes the tables")
    return 0


def _check_file(session: Session) -> None:
    if session.config is None:
        raise ValueError("--on slurm: a config file is needed, which every element reads; given a pipe")
