"""The claim to a run: who makes it, whether it is to be made at all, and the state of its folder before that."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from filelock import SoftFileLease, Timeout

from results.escape import cut
from results.record import DONE, RecordError, RunRecord, RunSpec
from results.store import RECORD, find_record, run_folder, run_lock, set_aside
from suite.checkpoints import BEFORE, NEWEST
from suite.runner import one_line

RunOne = Callable[[RunSpec, Path, Callable[[float], None]], RunRecord]
State = Literal["done", "failed", "todo", "damaged"]
Signature = tuple[int, int]


def look(out: str | Path, spec: RunSpec) -> tuple[State, RunRecord | None]:
    """The state of a stored run: "done" (ok or diverged), "failed", "damaged" (unreadable), else "todo"."""
    try:
        record = find_record(out, spec)
    except RecordError:
        return "damaged", None
    if record is None or record.status == "skipped":
        return "todo", record
    return ("done" if record.status in DONE else "failed"), record


def signature(out: Path, spec: RunSpec) -> Signature | None:
    """A mark that changes with every stored record: (inode, nanoseconds); None without a readable record."""
    try:
        stat = (run_folder(out, spec) / RECORD).lstat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def trouble(error: OSError) -> str:
    """The path and the reason of a disk's error, in one line."""
    file = error.filename2 or error.filename  # of a renaming the second is what people know
    path = cut(os.fsdecode(file), 200) if isinstance(file, str | bytes | os.PathLike) else ""
    return one_line(f"{path}: {error.strerror}" if path and error.strerror else error)


def take(
    out: Path,
    spec: RunSpec,
    before: Signature | None,
    tell: Callable[[Any, Any], None],
    lost: Callable[[Any], None] | None = None,
) -> SoftFileLease | None:
    """Take the claim to a run that is to be made; None where another invocation makes it, or has made it.

    Args:
        before: of the failed record that may be replaced.
        tell: hears "busy", "damaged", "note" and "started" (suite.launch.launcher.Kind).
        lost: called in a thread of its own if the claim is taken over, because it could not be renewed.

    Returns:
        The claim, to be released once the record is stored. No link is left in the run's folder, through which
        a run would write over what it points to.

    Raises:
        OSError: the folder can not be used.
    """
    claim = run_lock(out, spec, lost)
    try:
        claim.acquire(timeout=0)
    except Timeout:
        tell("busy", None)
        return None
    try:
        folder = run_folder(out, spec)
        state, _ = look(out, spec)
        if state == "damaged":
            tell("damaged", str(set_aside(folder / RECORD)))
        elif state == "done" or (state == "failed" and signature(out, spec) != before):
            claim.release()
            return None  # made meanwhile by another invocation
        for entry in list(os.scandir(folder)):
            if entry.is_symlink():
                os.unlink(entry.path)
                if entry.name in (NEWEST, BEFORE):
                    tell("note", f"{entry.path}: was a link, which is not followed, and is removed")
        tell("started", None)
    except BaseException:
        claim.release()
        raise
    return claim
