"""Where a folder of results stands: what is planned, done, being made and failed, from any machine that sees it; and of
arrays that were submitted for it, what Slurm's queue says. Needs neither torch nor Slurm.

What is planned is known where an array was submitted (its `runs.txt`; of several the newest counts); else only what is
there can be said.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from results.claims import LEASE, Holder, holder
from results.escape import cut, one_line, visible
from results.record import RECORD, RecordError, RunSpec
from results.store import read_asked, read_record, run_folders
from suite.launch.slurm_programs import Element
from suite.launch.submissions import SUBMISSIONS, Submission, find_lost, look_up, planned_runs, submissions
from suite.live import where
from suite.progress import Names, columns, duration
from suite.watch import Seen, Watch, cells

MOST_FAILED = 20
"""Failed runs whose reasons are shown."""
_LONGEST = 80  # characters of a host's name in a row
_REASON = 200
_STATES = ("ok", "diverged", "failed", "skipped", "damaged")
_WORDS = {
    "RUNNING": "running",
    "PENDING": "waiting",
    "COMPLETING": "ending",
    "CONFIGURING": "starting",
    "SUSPENDED": "suspended",
}

Place = tuple[str, str, str]
"""task, norm, key"""


@dataclass(frozen=True)
class Standing:
    """A folder at one moment.

    Attributes:
        folder: of results.
        planned: the runs of the newest submission; None: not known.
        statuses: of the records.
        runs: that are being made or were left; see suite.watch. One whose claim is renewed is being made, whatever
            else is known of it.
        starting: runs whose claim is held and that have written nothing yet.
        failed: (where, spec or None, reason) of failed runs, the first MOST_FAILED.
        submitted: number -> submission.
        elements: number -> its elements in the queue; None: what Slurm's queue holds is not known.
        notes: lines about what could not be read.
    """

    folder: Path
    planned: frozenset[Place] | None
    statuses: Mapping[Place, str]
    runs: tuple[Seen, ...]
    starting: Mapping[Place, Holder]
    failed: tuple[tuple[Place, RunSpec | None, str], ...]
    submitted: Mapping[int, Submission]
    elements: Mapping[int, list[Element]] | None
    notes: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def waiting(self) -> int | None:
        """Planned runs without a record that nobody makes; None: not known."""
        if self.planned is None:
            return None
        done = {place for place, status in self.statuses.items() if status != "damaged"}
        made = {seen.place for seen in self.runs if seen.state == "runs"}
        return len(self.planned - done - made - self.starting.keys())


def standing(folder: Path) -> Standing:
    """Look at a folder. Raises ValueError where it is none."""
    watch = Watch(folder)
    notes: list[str] = []
    submitted = submissions(folder, notes)
    elements: Mapping[int, list[Element]] | None = {}
    if submitted:
        try:
            for number_, each in submitted.items():
                if not each.job:
                    submitted[number_] = find_lost(folder / SUBMISSIONS / str(number_), each)
            elements = look_up(submitted)
        except ValueError as error:
            elements = None
            notes.append(f"what Slurm's queue holds is not known: {error}")
    counts = watch.statuses()
    statuses = watch.places()
    planned = planned_runs(folder, max(submitted)) if submitted else []
    claims = _claims(folder, statuses)
    runs = [replace(seen, state="runs") if seen.place in claims else seen for seen in watch.runs()]
    return Standing(
        folder=folder,
        planned=frozenset(tuple(line.split("/")) for line in planned) if planned else None,  # type: ignore[misc]
        statuses=statuses,
        runs=tuple(sorted(runs, key=lambda seen: seen.place)),
        starting={place: claims[place] for place in sorted(claims.keys() - {seen.place for seen in runs})},
        failed=tuple(_failed(folder, statuses)),
        submitted=submitted,
        elements=elements,
        notes=tuple(notes),
        counts=counts,
    )


def lines(now: Standing) -> Iterator[str]:
    """A standing in words."""
    specs = [seen.spec for seen in now.runs] + [spec for _, spec, _ in now.failed]
    names = Names([spec for spec in specs if spec is not None])
    rows = [_row(seen, names) for seen in now.runs]
    rows += [(visible(" ".join(place)), visible(held.host), "starts", *"----") for place, held in now.starting.items()]
    if rows:
        yield from columns([("run", "host", "where", "steps", "last epoch", "its age", "left"), *rows])
    for place, spec, reason in now.failed:
        name = names.run(spec) if spec is not None else " ".join(place)
        yield f"failed: {visible(name)}: {cut(one_line(reason), _REASON)}"
    if (more := now.counts["failed"] - len(now.failed)) > 0:
        yield f"{more} more failed"
    for number_, each in now.submitted.items():
        yield _submission(number_, each, now.elements)
    yield _summary(now)


def document(now: Standing) -> dict[str, Any]:
    """A standing as JSON has it: {"schema": 1, "planned": null where it is not known, ...}."""
    return {
        "schema": 1,
        "folder": str(now.folder),
        "planned": None if now.planned is None else len(now.planned),
        "waiting": now.waiting,
        "records": {state: now.counts[state] for state in _STATES},
        "runs": [_seen(seen) for seen in now.runs],
        "starting": [
            {"task": task, "norm": norm, "key": key, "host": held.host}
            for (task, norm, key), held in now.starting.items()
        ],
        "failed": [
            {"task": task, "norm": norm, "key": key, "reason": cut(one_line(reason), _REASON)}
            for (task, norm, key), _, reason in now.failed
        ],
        "slurm": [
            {
                "number": number_,
                **each.model_dump(mode="json", by_alias=False, exclude={"schema_"}),
                "queue": None
                if now.elements is None
                else [
                    {
                        "element": element.index,
                        "state": element.state,
                        "reason": element.reason,
                        "node": element.node,
                        "elapsed": element.elapsed,
                        "start": element.start,
                        "restarts": element.restarts,
                    }
                    for element in now.elements[number_]
                ],
            }
            for number_, each in now.submitted.items()
        ],
        "notes": list(now.notes),
    }


def _claims(folder: Path, statuses: Mapping[Place, str]) -> dict[Place, Holder]:
    """The claims to runs that are not done, of those that were renewed lately."""
    claims: dict[Place, Holder] = {}
    for run in run_folders(folder):
        task, norm, key = run.parts[-3:]
        if statuses.get((task, norm, key)) not in ("ok", "diverged", "skipped"):
            held = holder(run)
            if held is not None and held.age < LEASE:
                claims[task, norm, key] = held
    return claims


def _failed(folder: Path, statuses: Mapping[Place, str]) -> Iterator[tuple[Place, RunSpec | None, str]]:
    failed = sorted(place for place, status in statuses.items() if status == "failed")
    for place in failed[:MOST_FAILED]:
        try:
            record = read_record(folder.joinpath("runs", *place, RECORD))
        except RecordError as error:
            yield place, None, str(error)
        else:
            yield place, record.spec, record.reason


def _row(seen: Seen, names: Names) -> tuple[str, ...]:
    place, epoch = where(seen.at), seen.row.get("epoch")
    if "of" not in seen.at and epoch is not None:  # positions are told every ten seconds, epochs when they end
        place = f"after epoch {epoch:.0f}"
    if seen.state != "runs":
        word = "left, to go on with" if seen.state == "left" else f"no sign for {duration(seen.sign_age)}"
        place = f"{word}{', ' + place if place else ''}"
    name, *rest = cells(seen, names, place)
    return name, cut(visible(seen.host or "-"), _LONGEST), *rest


def _seen(seen: Seen) -> dict[str, Any]:
    task, norm, key = seen.place
    return {
        "task": task,
        "norm": norm,
        "key": key,
        "seed": None if seen.spec is None else seen.spec.seed,
        "state": seen.state,
        "host": seen.host or None,
        "at": dict(seen.at),
        "last_epoch": dict(seen.row),
        "last_epoch_age": seen.row_age,
        "sign_age": seen.sign_age,
        "left": seen.left,
    }


def _submission(number_: int, each: Submission, elements: Mapping[int, list[Element]] | None) -> str:
    """A line about one submission."""
    count = f"{each.elements} element{'s' if each.elements > 1 else ''}"
    of = f"slurm/{number_}: {f'job {each.job}' if each.job else 'no number of a job'}, {count}"
    if elements is None:
        return of
    found = elements[number_]
    if not found:
        return f"{of}: none in the queue" if each.job else f"{of}: squeue knows none; never submitted, or ended"
    parts = []
    for state in dict.fromkeys(element.state for element in sorted(found, key=lambda e: e.state != "RUNNING")):
        same = [element for element in found if element.state == state]
        parts.append(f"{len(same)} {_WORDS.get(state, state.lower())}{_why(state, same)}")
    if (again := sum(element.restarts > 0 for element in found)) > 0:
        parts.append(f"{again} of them begun again")
    if (ended := each.elements - len(found)) > 0:
        parts.append(f"{ended} ended")
    return f"{of}: {', '.join(parts)}"


def _why(state: str, same: list[Element]) -> str:
    """Of elements that run their nodes, of others Slurm's reasons, the most frequent ones."""
    words = [element.node if state in ("RUNNING", "COMPLETING") else element.reason for element in same]
    counts = Counter(word for word in words if word and word != "None")
    said = []
    for word, count in counts.most_common(3):
        start = min((e.start for e in same if e.reason == word and e.start != "N/A"), default="")
        begin = f" {start}" if word == "BeginTime" and start else ""
        said.append(f"{word}{begin}" + (f" x{count}" if len(counts) > 1 else ""))
    more = ["..."] if len(counts) > 3 else []
    return f" ({', '.join(said + more)})" if said else ""


def _summary(now: Standing) -> str:
    states = Counter(seen.state for seen in now.runs)
    states["runs"] += len(now.starting)
    shown = [f"{now.counts[state]} {state}" for state in _STATES if now.counts[state]]
    shown += [f"{states['runs']} being made"] if states["runs"] else []
    words = {"silent": "without a sign", "left": "left by its process, to go on with"}
    left = [f"{states[state]} {word}" for state, word in words.items() if states[state]]
    if now.planned is not None:
        planned = f"{len(now.planned)} runs planned: "
        ends = now.planned.intersection(now.statuses)
        beside = len(now.statuses) - len(ends) - now.counts["skipped"]
        shown.append(f"{now.waiting} wait" + (f" ({', '.join(left)})" if left else ""))
        rest = f"; {beside} records are not of this plan" if beside > 0 else ""
        return f"{planned}{', '.join(shown)} in {shlex.quote(visible(str(now.folder)))}{rest}"
    asked = read_asked(now.folder)
    command = asked[-1]["command"] if asked else []
    hint = ""
    if command and command[0] == "run":
        hint = f"; how many are planned: python run_suite.py {shlex.join([*map(visible, command), '--dry-run'])}"
    return f"{', '.join(shown + left) or 'no run'} in {shlex.quote(visible(str(now.folder)))}{hint}"
