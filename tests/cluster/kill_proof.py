"""A grid that is made while things are killed, and what is proved of its folder afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from results.claims import CLAIM, folder_lock
from results.record import RecordError, RunRecord, RunSpec
from results.store import RECORD, find_record, run_folder, run_folders
from suite.environment import ROOT
from tests.cluster.kill_log import PLUGIN, Attempt, Name, at_once, attempts
from tests.parts.resuming import TIMED

MARK = "NORMSUITE_KILL"
"""In the environment of every process that is started here."""

SMALL = {
    "dataset": "fashion_mnist_mini",
    "model": "resnet8",
    "width": 4,
    "epochs": 4,
    "batch_size": 16,
    "max_steps": 160,
    "recalibration_images": 64,
}
"""Options of the real task: some seconds, several checkpoints."""


class Grid:
    """A grid in a folder of its own: config, plugin, log, results.

    Args:
        number: of the grid.
        place: a folder; its own is made in it.
        nothing, small: runs of the two tasks; in every other grid the small ones are the first.

    Attributes:
        stored: run -> mark of the first record that was seen with the status ok: (inode, nanoseconds).
    """

    def __init__(self, number: int, place: Path, nothing: int, small: int):
        from suite import plan

        folder = place / f"grid-{number}"
        folder.mkdir(parents=True)
        self.number, self.out, self.log = number, folder / "out", place / "log"
        self.config, self.plugin = folder / "grid.yaml", place / "plugin.py"
        self.plugin.write_text(PLUGIN.format(log=str(self.log)))
        of_tasks = {"nothing": (nothing, {}), "small": (small, SMALL)}
        first = ["nothing", "small"] if number % 2 == 0 else ["small", "nothing"]
        tasks = {
            task: {"seeds": [*range(runs)], "grid": number, **options}
            for task, (runs, options) in ((task, of_tasks[task]) for task in first)
            if runs
        }
        self.config.write_text(json.dumps({"norms": ["bn"], "tasks": tasks}))
        specs = plan(self.config, plugins=[self.plugin]).runs
        self.specs: dict[Name, RunSpec] = {(number, spec.task, spec.seed): spec for spec in specs}
        self.stored: dict[Name, tuple[int, int]] = {}

    @property
    def made(self) -> list[Attempt]:
        return [attempt for attempt in attempts(self.log) if attempt.run[0] == self.number]

    @property
    def words(self) -> list[str]:
        """The command that is given again and again."""
        given = [str(self.config), "--plugin", str(self.plugin), "--out", str(self.out)]
        return ["-q", "run", *given, "--retry", "--checkpoint-every", "1s"]

    def look(self) -> int:
        """Note which records are ok now; returns how many runs have none."""
        for name, spec in self.specs.items():
            if name not in self.stored and (mark := _ok(self.out, spec)) is not None:
                self.stored[name] = mark
        return len(self.specs) - len(self.stored)

    def records(self) -> dict[Name, RunRecord | None]:
        """The record of each run, None for one without a readable one."""
        found: dict[Name, RunRecord | None] = {}
        for name, spec in self.specs.items():
            with contextlib.suppress(RecordError):
                found[name] = find_record(self.out, spec)
        return {name: found.get(name) for name in self.specs}


def _ok(out: Path, spec: RunSpec) -> tuple[int, int] | None:
    file = run_folder(out, spec) / RECORD
    try:
        found = file.lstat()
        record = find_record(out, spec)
    except (OSError, RecordError):
        return None
    return (found.st_ino, found.st_mtime_ns) if record is not None and record.status == "ok" else None


@dataclass
class Proof:
    """What is counted, over all grids of a campaign.

    Attributes:
        counts: of good and of bad things.
        bad: a line about each bad thing.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bad: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in CLAIMS})

    def look_at(self, grid: Grid, reference: Mapping[Name, RunRecord | None]) -> None:
        """Everything about a grid that is finished, and that nobody makes any more.

        Args:
            reference: records of the small runs, made undisturbed on this machine.
        """
        made = grid.made
        records = grid.records()
        self.counts["runs"] += len(records)
        self.counts["attempts"] += len(made)
        self.counts["cut off"] += sum(not attempt.ended for attempt in made)
        for name, record in records.items():
            if record is None or record.status != "ok":
                self._bad("lost", grid, name, "no record" if record is None else f"{record.status}: {record.reason}")
        self._look_at_work(grid, made)
        self._look_at_claims(grid)
        for name, record in records.items():
            if name[1] == "small" and record is not None:
                self.counts["compared"] += 1
                self.counts["in parts"] += len(record.environment.get("parts") or ()) > 1
                if (differ := difference(record, reference[0, *name[1:]])) is not None:
                    self._bad("unequal", grid, name, differ)

    def _look_at_work(self, grid: Grid, made: Sequence[Attempt]) -> None:
        for one, other in at_once(list(made)):
            seconds = one.last - other.first
            self._bad("at once", grid, one.run, f"processes {one.process}, {other.process}, for {seconds:.2f} s")
        for attempt in made:
            stored = grid.stored.get(attempt.run)
            if stored is not None and attempt.begun > stored[1] / 1e9:
                self._bad("doubled", grid, attempt.run, f"process {attempt.process} made it again")
        for name, mark in grid.stored.items():
            if _ok(grid.out, grid.specs[name]) != mark:
                self._bad("doubled", grid, name, "its record was replaced by another one")
        folders = Counter(folder.name for folder in run_folders(grid.out))
        for key, number in folders.items():
            if number > 1:
                self._bad("doubled", grid, None, f"{number} folders of {key}")

    def _look_at_claims(self, grid: Grid) -> None:
        for folder in run_folders(grid.out):
            if not os.path.lexists(folder / CLAIM):
                continue
            self.counts["claims left"] += 1
            try:
                with folder_lock(folder).acquire(timeout=0):
                    pass
            except (Timeout, OSError) as error:
                self._bad("stuck", grid, None, f"{folder}: {error}")

    def look_for_processes(self, whose: Sequence[str], made: Sequence[Attempt]) -> None:
        """Processes that are left of what was started here.

        Args:
            whose: values of MARK.
            made: attempts, none of which may live.
        """
        self.counts["processes"] += len({(attempt.process, attempt.born) for attempt in made})
        for attempt in made:
            if attempt.lives:
                self.bad["orphans"].append(f"process {attempt.process} of grid, task, seed {attempt.run}")
        for process, words in marked(whose):
            self.bad["orphans"].append(f"process {process}: {words}")

    def _bad(self, what: str, grid: Grid, name: Name | None, why: str) -> None:
        whose = "" if name is None else f"{name[1]} {name[2]}: "
        self.bad[what].append(f"grid {grid.number}: {whose}{why}")

    def lines(self) -> Iterator[str]:
        """One line per check, and up to ten about what is wrong."""
        for name, text in CLAIMS.items():
            found = self.bad[name]
            yield f"{'FALSE' if found else 'holds':6} {len(found)} {text.format(**self._numbers())}"
            yield from (f"         {line}" for line in found[:10])

    def _numbers(self) -> dict[str, int]:
        names = ("runs", "attempts", "cut off", "claims left", "processes", "compared", "in parts")
        return {name.replace(" ", "_"): self.counts[name] for name in names}

    @property
    def holds(self) -> bool:
        return not any(self.bad.values())


CLAIMS = {
    "lost": "lost: of {runs} planned runs, those without a readable record with the status ok",
    "doubled": (
        "doubled: runs whose work was begun again after an ok record of theirs was stored, or whose ok record was "
        "replaced, or that have two folders ({attempts} attempts, {cut_off} of them cut off)"
    ),
    "at once": "at once: pairs of processes that made one run at the same time, by the 50 ms lines of their log",
    "stuck": "stuck claims: claims that nobody can take ({claims_left} files of dead processes, all taken)",
    "orphans": "orphans: processes left of {processes} that made runs, and any other with our mark in its environment",
    "unequal": (
        "unequal: of {compared} real runs, {in_parts} of them made in several parts, those whose metrics, history or "
        "evidence differ in any bit from an undisturbed local run's, times and memory apart"
    ),
    "broken": "broken: commands that ended with a traceback, or with an exit code that nobody gave them",
}


def difference(record: RunRecord, whole: RunRecord | None) -> str | None:
    """What differs between a run and the undisturbed one; None for nothing."""
    if whole is None:
        return "the undisturbed run has no record"
    for what, one, other in (
        ("metrics", [record.metrics], [whole.metrics]),
        ("history", record.history, whole.history),
        ("evidence", [record.evidence], [whole.evidence]),
    ):
        plain = [[{k: v for k, v in row.items() if k not in TIMED} for row in rows] for rows in (one, other)]
        if plain[0] != plain[1]:
            return f"{what}: {plain[0]} and {plain[1]}"[:300]
    return None


def marked(values: Sequence[str]) -> list[tuple[int, str]]:
    """(process, its words) of every living process that has one of these values of MARK, but for this one."""
    wanted = {f"{MARK}={value}".encode() for value in values}
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted.intersection(Path(entry.path, "environ").read_bytes().split(b"\0")):
                words = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words:  # else it has ended already
                    found.append((int(entry.name), words[:120].strip()))
    return found


def command(words: Sequence[str]) -> list[str]:
    """The suite's command line with these words."""
    return [sys.executable, str(ROOT / "run_suite.py"), *words]
