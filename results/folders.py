"""The runs of a results folder as things: listed, chosen, removed.

Nothing here follows a link below `runs`: the folder of a run that is reached through one is listed and never removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from results.claims import CLAIM, LEASE, folder_lock, holder, is_held
from results.escape import cut, one_line, visible
from results.facts import task_facts
from results.frame import NORM_BATCH, load
from results.metrics import nearest
from results.record import DONE, RECORD
from results.rows import distinct, is_nothing, natural, option_columns, plain_records, value_text
from results.store import run_folders

STATUSES = ("ok", "diverged", "failed", "skipped", "damaged", "unfinished", "busy")
"""Of a record; "damaged": it can not be read; without one: "unfinished", or "busy" while a process makes the run."""

_SHORTEST = 6  # characters of a key that stand for the whole
_KEY = re.compile(r"[0-9a-f]+")
_LONGEST = 60  # characters of a name in a message


@dataclass(frozen=True)
class Stored:
    """The folder of one run.

    Attributes:
        folder: its path.
        task, norm, key: from its path; label: the norm with its options, as tables print it.
        setting: "learning_rate=0.1, ...": the options in which the folder's runs of this task differ.
        seed: None where no record says so.
        status: one of STATUSES.
        reason: why, for every status but "ok"; in one line.
        metric, value: the task's headline; "" and None where the run has none.
        seconds: of the run; finished: in UTC, without a time zone.
        size: bytes of its files on the disk.
        stale: of another version or other data than what tables show.
    """

    folder: Path
    task: str
    norm: str
    key: str
    label: str
    setting: str = ""
    seed: int | None = None
    status: str = "unfinished"
    reason: str = ""
    metric: str = ""
    value: float | None = None
    seconds: float | None = None
    finished: datetime | None = None
    size: int = 0
    stale: bool = False

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        time = None if self.finished is None else self.finished.isoformat() + "+00:00"
        return {
            **{name: getattr(self, name) for name in ("task", "norm", "label", "setting", "seed", "status", "reason")},
            **{name: getattr(self, name) for name in ("metric", "value", "seconds")},
            "finished": time,
            "key": self.key,
            "size": self.size,
            "stale": self.stale,
            "folder": str(self.folder),
        }


def list_runs(folder: str | Path) -> tuple[list[Stored], list[str]]:
    """Every run of a folder, by task, norm, setting and seed; of all versions and data.

    Returns:
        The runs, and a line about each thing that is none: a folder that can not be listed, a link that leads nowhere.

    Raises:
        ValueError: it is no folder of results.
    """
    df = load(folder, stale=True)
    options = option_columns(df)
    found: dict[Path, Stored] = {}
    for task in dict.fromkeys(df["task"]):
        part = df[df["task"] == task]
        headline = task_facts(part, task).headline
        varying = [o for o in options if len(distinct(part[o])) > 1]
        fields = ("norm", "norm_label", "key", "seed", "status", "reason", "seconds", "finished", "stale", "file")
        rows = plain_records(part, [*fields, "row", *varying, *([headline] if headline else [])])
        rows.sort(key=lambda row: (natural(row["row"]), *(natural(row[o]) for o in varying), row["seed"], row["key"]))
        for row in rows:
            value = row.get(headline) if headline else None
            at = Path(row["file"]).parent
            found[at] = Stored(
                folder=at,
                task=task,
                norm=row["norm"],
                key=row["key"],
                label=row["norm_label"],
                setting=_setting({o.partition(".")[2]: row[o] for o in varying}),
                seed=int(row["seed"]),
                status=row["status"],
                reason=one_line(row["reason"] or ""),
                metric=headline or "" if value is not None else "",
                value=value,
                seconds=row["seconds"],
                finished=None if row["finished"] is None else row["finished"].to_pydatetime(),
                stale=bool(row["stale"]),
            )
    lines: list[str] = []
    damaged = {
        line.partition(": ")[0]: line.partition(": ")[2] for line in (*df.attrs["damaged"], *df.attrs["doubles"])
    }
    for at in run_folders(folder, lines):
        if at not in found:
            why = damaged.get(visible(str(at / RECORD)), "")
            state = "damaged" if os.path.lexists(at / RECORD) else "unfinished"
            found[at] = Stored(
                at, at.parts[-3], at.parts[-2], at.name, at.parts[-2], status=state, reason=one_line(why)
            )
        run = found[at]
        if run.status not in DONE and is_held(at):
            run = replace(run, status="busy", reason="another process makes it now")
        found[at] = replace(run, size=size_of(at))
    return list(found.values()), lines


def choose(
    runs: Iterable[Stored],
    tasks: Collection[str] = (),
    norms: Collection[str] = (),
    statuses: Collection[str] = (),
    seeds: Collection[int] = (),
    keys: Sequence[str] = (),
) -> list[Stored]:
    """The runs that all of what is given allows.

    Args:
        runs: of `list_runs`.
        tasks, statuses, seeds: names and numbers; none: all.
        norms: names or labels.
        keys: of runs, or the first six characters and more.

    Raises:
        ValueError: a name, seed or key that no run has, or a beginning that several keys have; with the nearest.
    """
    runs = list(runs)
    mistakes = [
        *_unknown("task", tasks, {run.task for run in runs}),
        *_unknown("norm", norms, {run.norm for run in runs} | {run.label for run in runs}),
        *_unknown("status", statuses, STATUSES),
        *_unknown("seed", map(str, seeds), {str(run.seed) for run in runs if run.seed is not None}),
    ]
    wanted: set[str] = set()
    known = {run.key for run in runs}
    for key in keys:
        of_it = [k for k in known if k.startswith(key)] if len(key) >= _SHORTEST and _KEY.fullmatch(key) else []
        if len(of_it) == 1 or key in known:
            wanted.add(key if key in known else of_it[0])
        elif 0 < len(key) < _SHORTEST and any(k.startswith(key) for k in known):
            mistakes.append(f'key "{key}": too short; give its first {_SHORTEST} characters or more')
        elif of_it:
            mistakes.append(f'key "{key}": {len(of_it)} runs have keys that begin so; give more of it')
        else:
            mistakes.append(f'key "{cut(visible(key), _LONGEST)}": no run has it{nearest(key, known)}')
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return [
        run
        for run in runs
        if (not tasks or run.task in tasks)
        and (not norms or run.norm in norms or run.label in norms)
        and (not statuses or run.status in statuses)
        and (not seeds or run.seed in seeds)
        and (not keys or run.key in wanted)
    ]


def remove(out: str | Path, run: Stored) -> str:
    """Remove a run's folder with all that is in it.

    The record goes first: a removal that is interrupted leaves a run without a record, and never a record whose files
    are gone.

    Returns:
        "" or, where it stays, why: a process makes it, it is reached through a link, the disk refuses.
    """
    root = Path(out) / "runs"
    if run.folder.parent.parent.parent != root:
        return f"is not below {root}"
    for part in (root, run.folder.parent.parent, run.folder.parent, run.folder):
        try:
            kind = os.lstat(part).st_mode
        except FileNotFoundError:
            return ""
        if not stat.S_ISDIR(kind):
            return f"{part} is a link; nothing is removed through links"
    try:
        with folder_lock(run.folder).acquire(timeout=0):
            if (record := run.folder / RECORD).is_dir() and not record.is_symlink():
                shutil.rmtree(record)
            else:
                record.unlink(missing_ok=True)
            for name in sorted(os.listdir(run.folder)):  # the claim last: who waits for it finds a run to make
                if name != CLAIM:
                    _drop(run.folder / name)
        run.folder.rmdir()
    except Timeout:
        found = holder(run.folder)
        if found is None or found.age < LEASE:
            return "another process makes it now"
        return f"{visible(found.host)} claims it and has not renewed that for {found.age:.0f} s; {CLAIM} may be removed"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; a link counts as itself."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            with contextlib.suppress(OSError):
                real = entry.is_dir(follow_symlinks=False)
                total += size_of(Path(entry.path)) if real else entry.stat(follow_symlinks=False).st_size
    return total


def _drop(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # which follows no link
    else:
        path.unlink(missing_ok=True)


def _setting(options: dict[str, Any]) -> str:
    """Of a norm that takes no norm batch its size says nothing."""
    shown = {name: value for name, value in options.items() if name != NORM_BATCH or not is_nothing(value)}
    return ", ".join(f"{name}={value_text(name, value)}" for name, value in shown.items())


def _unknown(what: str, given: Iterable[str], there: Collection[str]) -> list[str]:
    names = sorted(there)
    few = ", ".join(cut(visible(name), _LONGEST) for name in names[:20]) + (" ..." if len(names) > 20 else "")
    tail = f"no run has it; there are: {few or 'none'}"
    return [
        f'{what} "{cut(visible(name), _LONGEST)}": {tail}{visible(nearest(name, names))}'
        for name in given
        if name not in there
    ]
