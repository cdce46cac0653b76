"""A plan beside the stored records: which runs are done and which are to do, and the words for it."""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from filelock import Timeout

from results.record import RecordError, RunRecord, RunSpec
from results.store import find_record, read_versions, run_folder, run_lock, write_record
from suite.blocks import BUDGETS
from suite.checkpoints import going_on
from suite.engine import look
from suite.estimate import Estimate
from suite.output import OUTPUT
from suite.planning import Plan
from suite.progress import Names, columns, duration, failed_line, seed_text
from tasks import get_task
from tasks.weights import WEIGHTS

_ENDS = {**{end: end for end in ("ok", "diverged", "failed", "stopped")}, "elsewhere": "being made elsewhere"}
MOST_ROWS = 100
"""Lines of a dry run."""
MOST_FAILED = 20
"""Failed runs of before whose reasons are shown; all of them stand in the tables and in the records."""


class Status:
    """Which runs of a plan are done.

    Args:
        plan: what is asked for.
        folder: of results; it need not exist.
        retry: failed runs are to do again; a time: those that ended before it.
    """

    def __init__(self, plan: Plan, folder: Path, retry: bool | datetime):
        self.plan, self.folder = plan, folder
        self.states: list[str] = []
        """Of each run of the plan: "ok", "diverged", "failed", "damaged" or "todo"."""
        self.records: list[RunRecord] = []
        stored = folder.exists()
        for spec in plan.runs:
            state, record = look(folder, spec) if stored else ("todo", None)
            if record is None or state == "todo":  # there may be a reason for an earlier skip
                self.states.append(state)
            else:
                self.states.append(record.status)
                self.records.append(record)
        again = {"todo", "damaged"}
        repeated = (
            {r.spec.key for r in self.records if r.status == "failed" and _is_again(r, retry)} if retry else set()
        )
        self.todo: list[RunSpec] = [
            spec
            for spec, state in zip(plan.runs, self.states, strict=True)
            if state in again or (state == "failed" and spec.key in repeated)
        ]
        self.going_on = going_on(folder, self.todo) if stored else {}
        """key -> "from epoch 12 of 90", of the runs to do that go on from a checkpoint."""
        self.done = sum(state in ("ok", "diverged") for state in self.states)
        self.failed = self.states.count("failed") - len(repeated)


def _is_again(record: RunRecord, retry: bool | datetime) -> bool:
    """Whether a failed run is to do again; one whose record does not say when it ended is an old one."""
    if isinstance(retry, bool):
        return retry
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return datetime.fromisoformat(record.environment["finished"]) < retry
    return True


def describe(status: Status, names: Names) -> Iterator[str]:
    """One line per norm and setting, with its seeds, and how many of them are in which state; of a plan with more than
    MOST_ROWS of these one line per task and norm, with its number of settings."""
    cells: dict[tuple[str, str, str], tuple[list[int], list[str]]] = {}

    def add(spec: RunSpec, state: str) -> None:
        cell = cells.setdefault((spec.task, names.setting(spec), spec.norm_label or spec.norm), ([], []))
        cell[0].append(spec.seed)
        origin = status.going_on.get(spec.key) if status.going_on else None
        cell[1].append(("to do" if state == "todo" else state) + (f" ({origin})" if origin else ""))

    for spec, state in zip(status.plan.runs, status.states, strict=True):
        add(spec, state)
    for spec, reason in status.plan.skipped:
        add(spec, f"skipped: {reason}")
    if len(cells) > MOST_ROWS:
        yield from _by_norm(cells)
        return
    rows = [("task", "setting", "norm", "seeds", "state")]
    for (task, setting, norm), (seeds, states) in cells.items():
        state = ", ".join(s if s.startswith("skipped") else f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        rows.append((task, setting or "-", norm, seed_text(seeds), state))
    yield from columns(rows)


def _by_norm(cells: Mapping[tuple[str, str, str], tuple[list[int], list[str]]]) -> Iterator[str]:
    """The lines of many cells, (task, setting, norm) -> seeds and states."""
    found: dict[tuple[str, str], tuple[list[int], Counter[str], list[str]]] = {}
    for (task, setting, norm), (seeds, states) in cells.items():
        of_norm = found.setdefault((task, norm), ([], Counter(), []))
        of_norm[0].extend(seeds)
        of_norm[1].update(state.partition(" (from ")[0] for state in states)
        of_norm[2].append(setting)
    rows = [("task", "settings", "norm", "seeds", "state")]
    for (task, norm), (seeds, counts, settings) in [*found.items()][:MOST_ROWS]:
        reasons = [state for state in counts if state.startswith("skipped")]
        if len(reasons) > 1:  # of many settings, many reasons
            counts[reasons[0].replace(":", ", such as:", 1)] = sum(counts.pop(reason) for reason in reasons)
        state = ", ".join(f"{number:,} {state}" for state, number in counts.items())
        rows.append((task, f"{len(settings):,}", norm, seed_text(seeds), state))
    yield from columns(rows)
    if len(found) > MOST_ROWS:
        yield f"and {len(found) - MOST_ROWS:,} more norms"
    yield f"{len(cells):,} settings of norms are summed up by norm; --json lists every run"


def failed_before(status: Status, names: Names) -> Iterator[str]:
    """The stored reasons of failed runs that are not made again, the first of them, each with what it left behind."""
    if not status.failed:
        return
    # the plan's spec, since an older record lacks options that may vary here
    stored = [
        spec for spec, state in zip(status.plan.runs, status.states, strict=True) if state not in ("todo", "damaged")
    ]
    failed = [pair for pair in zip(stored, status.records, strict=True) if pair[1].status == "failed"]
    for spec, record in failed[:MOST_FAILED]:
        yield from failed_line(names.run(spec), record, status.folder).split("\n")
    if len(failed) > MOST_FAILED:
        yield f"{len(failed) - MOST_FAILED} more failed before"


def restate_budget(status: Status) -> int:
    """Write the plan's budget into records that were made under another one; returns how many were changed.

    It decides no number and is no part of a run's key, so a config whose `budget` is corrected repeats nothing. What a
    task says itself in the place of the config ("machinery-only") stays. A record that another process holds, or that
    can not be written, stays too.
    """
    changed = 0
    for seen in status.records:
        if _restated(seen, status.plan.budget) is None:
            continue
        with contextlib.suppress(Timeout, OSError, RecordError), run_lock(status.folder, seen.spec).acquire(timeout=0):
            record = find_record(status.folder, seen.spec)
            if record is not None and (restated := _restated(record, status.plan.budget)) is not None:
                write_record(status.folder, restated)
                changed += 1
    return changed


def _restated(record: RunRecord, budget: str) -> RunRecord | None:
    given = record.evidence.get("budget")
    if given == budget or given not in BUDGETS:
        return None
    return record.model_copy(update={"evidence": {**record.evidence, "budget": budget}})


def shared_folder(folder: Path, config: Path) -> Iterator[str]:
    """A line where the folder's runs were last made for another file of the same name, and that one is still there.

    A pipe's name says nothing, so that it is another config each time.
    """
    if config.is_fifo():
        if folder.exists():
            yield f"note: {folder} holds the runs of an earlier pipe; --out FOLDER keeps these apart"
        return
    before = read_versions(folder)["config"]
    with contextlib.suppress(OSError):
        if before and Path(before).is_file() and Path(before).read_bytes() != config.read_bytes():
            yield f"note: {folder} holds the runs of {before}, another config; --out FOLDER keeps these apart"


def not_of_config(count: int, folder: Path, config: Path, options: Sequence[str]) -> Iterator[str]:
    """A line about records in tables that a config does not ask for. options: of the command that leaves them out."""
    if count:
        command = shlex.join(["python", "run_suite.py", "tables", str(folder), "--config", str(config), *options])
        yield f"{count} records in {folder} are not of {config}: `{command}` leaves them out"


def dry_summary(status: Status, jobs: int, left: Estimate | None) -> Iterator[str]:
    """The last lines of a dry run. left: the time that all runs to do will take, where it can be estimated."""
    skipped = f", {len(status.plan.skipped)} skipped" if status.plan.skipped else ""
    failed = f", {status.failed} failed (made again with --retry)" if status.failed else ""
    where = shlex.quote(str(status.folder))
    yield f"{len(status.plan.runs)} runs: {status.done} done, {len(status.todo)} to do{failed}{skipped} -> {where}"
    if status.todo and left is not None:
        least = "at least " if left.at_least else ""
        yield f"{least}about {duration(left.seconds)} with {jobs} jobs, by the runs that are finished"
    yield from left_out(status.plan)
    for line in status.plan.missing:
        yield f"missing, so that its runs count as not done: {line}"


def left_out(plan: Plan) -> Iterator[str]:
    """How many combinations of options make no setting, with the first of them; no line where there is none."""
    if plan.left_out:
        yield f"combinations left out: {len(plan.left_out)}, such as {plan.left_out[0]}"


def without_weights(status: Status) -> Iterator[str]:
    """Lines about the runs that are ok and have no weights beside their records, where weights were asked for."""
    of_tasks = dict.fromkeys(spec.task for spec in status.plan.runs)
    none = {name for name in of_tasks if not hasattr(get_task(name), "network")}
    for name in none:
        yield f'task "{name}" does not say how its network is built: its runs keep no weights'

    def bare(record: RunRecord | None) -> bool:
        return (
            record is not None
            and record.status == "ok"
            and record.spec.task not in none
            and not (run_folder(status.folder, record.spec) / WEIGHTS).is_file()
        )

    if before := sum(map(bare, status.records)):
        yield (
            f"done before, without --keep-weights, so that they have no {WEIGHTS}: {before} runs; another --out makes "
            "them again, --norms and --seeds only some of them"
        )
    if lost := [spec for spec in status.todo if bare(look(status.folder, spec)[1])]:
        where = shlex.quote(str(run_folder(status.folder, lost[0]) / OUTPUT))
        yield f"made now, without {WEIGHTS}: {len(lost)} runs; why stands in {where}"


def summary(status: Status, counts: Mapping[str, int], failed: int) -> Iterator[str]:
    """The last lines of `run`. counts: how many runs ended now in each status; failed: now and before."""
    new = [f"{counts[end]} {words}" for end, words in _ENDS.items() if counts.get(end)]
    parts = [*new, f"{len(status.plan.skipped)} skipped", f"{status.done} already done"]
    if status.failed:
        parts.append(f"{status.failed} failed before")
    yield ("" if status.todo else "nothing left to do: ") + ", ".join(parts)
    if failed:
        where = shlex.quote(f"{status.folder}/runs")
        yield f"failed runs: the reasons stand above and in {where}; --retry makes them again"
