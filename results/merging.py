"""Several folders of results made into one.

A run is its key, so the same run in two folders has one place. Of records that say the same, one is kept. Else a
finished one is taken before an unfinished one (ok, diverged, failed, skipped), and of equal ones that which finished
last; where finished records differ in their numbers, the report says how many do.

A run is copied under its locks, its record last and in one step: a reader, and a merge that was killed, find a run with
all its files or none. What is there already is not written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from filelock import SoftFileLease, Timeout

from results import files
from results.asked import AskedNotes
from results.claims import CLAIM, folder_lock, is_held
from results.escape import cut
from results.frame import finished_at
from results.metrics import is_cost, nearest
from results.record import DONE, LARGEST, RECORD, RecordError, RunRecord, parse_record
from results.store import (
    VERSIONS,
    Versions,
    asked_notes,
    join_versions,
    read_norms,
    read_tasks,
    read_versions,
    run_folders,
    set_aside,
    write_asked,
    write_norms,
    write_tasks,
)

_RANK = {"ok": 0, "diverged": 1, "failed": 2, "skipped": 3}
_PASSING = ("checkpoint.pt", "checkpoint.before.pt", "history.jsonl")
"""Files of a run that is not finished."""
_NOTES: tuple[tuple[Callable[[Path], Any], Callable[[Path, Any], list[str]]], ...] = (
    (read_tasks, write_tasks),
    (read_norms, write_norms),
)
"""Readers and writers of the notes that later ones follow."""


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        copied: runs that were written to the new folder; replaced: those of them that took another record's place.
        there: runs whose record was there already.
        same: records that another folder has, too, with the same content or the same numbers.
        differing: a line per run of which finished records differ in status or numbers, with the one that was kept.
        busy, unfinished: folders of runs that are being made, or have no record; they are left out.
        damaged: a line per record or file that was left out.
        versions: a line per norm, task, part or data set that was planned with several versions.
        notes: lines about notes that could not be read.
    """

    copied: int = 0
    replaced: int = 0
    there: int = 0
    same: int = 0
    differing: list[str] = field(default_factory=list)
    busy: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """A record of one of the folders, by what decides which is kept."""

    source: int  # number of its folder; the new folder itself is the last
    folder: Path
    status: str
    numbers: str
    content: str
    finished: datetime
    example: dict[str, float]


def merge(sources: Sequence[str | Path], out: str | Path, prefer: str | Path | None = None) -> Merged:
    """Copy the runs and the notes of several folders of results into one.

    Args:
        sources: folders of results; nothing in them is changed.
        out: the new folder; what it holds already counts as one more folder.
        prefer: one of the folders, whose finished records are taken whatever the others hold, and whose versions count
            as planned last.

    Raises:
        ValueError: a source is no folder of results or is given twice; `out` is one of them, lies in one, or one lies
            in it; `prefer` is none of them.
        OSError: `out` can not be written.
    """
    folders, out = [Path(source) for source in sources], Path(out)
    _check(folders, out)
    preferred = _preferred(prefer, [*folders, out])
    merged = Merged()
    places: dict[tuple[str, ...], list[_Found]] = {}
    for number, folder in enumerate([*folders, out]):
        for record in _records(number, folder, merged, own=number == len(folders)):
            places.setdefault(record.folder.parts[-3:], []).append(record)
    out.mkdir(parents=True, exist_ok=True)
    _merge_notes(folders, out, preferred, merged)
    for place, found in sorted(places.items()):
        kept = min(found, key=lambda each: _order(each, preferred, len(folders)))
        _compare(place, found, kept, merged, [*folders, out])
        own = next((each for each in found if each.source == len(folders)), None)
        if own is not None and own.content == kept.content:
            merged.there += 1
        else:
            _copy(kept.folder, out.joinpath("runs", *place), merged, own)
    return merged


def _check(folders: list[Path], out: Path) -> None:
    mistakes = []
    for folder in folders:
        if not (folder / "runs").is_dir():
            what = "holds no runs" if folder.is_dir() else "is not a folder"
            beside = folder.parent
            near = [str(p) for p in beside.iterdir() if (p / "runs").is_dir()] if beside.is_dir() else []
            mistakes.append(f'"{folder}" {what}; the --out folder of a run is needed{nearest(str(folder), near)}')
    if not folders:
        mistakes.append("no folder to merge is given")
    real = [folder.resolve() for folder in folders]
    for number, folder in enumerate(real):
        if folder in real[:number]:
            mistakes.append(f'"{folders[number]}" is given twice')
    target = out.resolve()
    if out.exists() and not out.is_dir():
        mistakes.append(f'out "{out}": is a file; a folder is needed')
    for folder, given in zip(real, folders, strict=True):
        if target == folder:
            mistakes.append(f'out "{out}": is one of the folders to merge; a folder of its own is needed')
        elif folder in target.parents or target in folder.parents:
            where = "lies in" if folder in target.parents else "is around"
            mistakes.append(f'out "{out}": {where} "{given}"; a folder of its own is needed')
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _preferred(prefer: str | Path | None, folders: Sequence[Path]) -> int | None:
    if prefer is None:
        return None
    real = [folder.resolve() for folder in folders]
    if (wanted := Path(prefer).resolve()) not in real:
        names = [str(folder) for folder in folders]
        raise ValueError(f'prefer "{prefer}": is none of {", ".join(names)}{nearest(str(prefer), names)}')
    return real.index(wanted)


def _records(number: int, folder: Path, merged: Merged, own: bool) -> Iterator[_Found]:
    """The readable records of a folder. `own`: it is the new folder, of which nothing is reported as left out."""
    if own and not (folder / "runs").is_dir():
        return
    damaged: list[str] = []
    for run in run_folders(folder, damaged):
        if not os.path.lexists(run / RECORD):
            if not own:
                (merged.busy if is_held(run) else merged.unfinished).append(run)
            continue
        try:
            content, record = _read(run)
        except RecordError as error:
            damaged.append(str(error))
            continue
        yield _Found(
            source=number,
            folder=run,
            status=record.status,
            numbers=_digest(f"{record.status} {sorted(_results(record).items())}".encode()),
            content=_digest(content),
            finished=finished_at(record.environment.get("finished"), run / RECORD),
            example=_results(record),
        )
    merged.damaged += damaged


def _read(run: Path) -> tuple[bytes, RunRecord]:
    """A run's record and its bytes. Raises RecordError for a damaged one, and for one of another run."""
    file = run / RECORD
    try:
        content = files.read_bytes(file, LARGEST)
    except OSError as error:
        raise RecordError(f"{file}: {error.strerror or error}") from error
    record = parse_record(file, content)
    if (record.spec.task, record.spec.norm, record.spec.key) != run.parts[-3:]:
        raise RecordError(f"{file}: holds the record of another run ({record.spec.key})")
    return content, record


def _results(record: RunRecord) -> dict[str, float]:
    """Its metrics without times and memory, which no two runs share."""
    return {name: value for name, value in record.metrics.items() if not is_cost(name)}


def _order(found: _Found, preferred: int | None, own: int) -> tuple[Any, ...]:
    """The least is kept; of records that tie in all, the one that is there already."""
    first = found.source == preferred and found.status in DONE
    return not first, _RANK[found.status], -found.finished.timestamp(), found.source != own, found.source


def _compare(
    place: tuple[str, ...], found: list[_Found], kept: _Found, merged: Merged, folders: Sequence[Path]
) -> None:
    others = [each for each in found if each is not kept]
    merged.same += sum(each.numbers == kept.numbers for each in others)
    for other in others:
        if other.numbers == kept.numbers or other.status not in DONE or kept.status not in DONE:
            continue
        names = (n for n in kept.example if n in other.example and kept.example[n] != other.example[n])
        said = next((f"{n} {kept.example[n]!r} and {other.example[n]!r}" for n in names), "")
        said = said if kept.status == other.status else f"{kept.status} and {other.status}"
        why = f"{folders[kept.source]} is kept, {folders[other.source]} is not"
        merged.differing.append(f"{'/'.join(place)}: {said or 'other metrics'}; {why}")


def _copy(source: Path, target: Path, merged: Merged, own: _Found | None) -> None:
    """One run, under both claims."""
    try:
        with contextlib.ExitStack() as locks:
            if (lock := _lock_of(source)) is not None:
                locks.enter_context(lock.acquire(timeout=0))
            target.mkdir(parents=True, exist_ok=True)
            locks.enter_context(folder_lock(target).acquire(timeout=0))
            content, _ = _read(source)
            if not _as_seen(target, own):
                raise RecordError(f"{target}: another process has made this run meanwhile; merge again")
            names = _artifacts(source, merged)
            staged = [_stage(source / name, target) for name in names]
            # the old record goes before its files do; from here to the last line the run counts as not made
            if own is not None:
                (target / RECORD).unlink()
                for name in _artifacts(target, merged):
                    (target / name).unlink()
            elif os.path.lexists(target / RECORD):
                set_aside(target / RECORD)  # a damaged one, that can be looked at
            for path, name in zip(staged, names, strict=True):
                os.replace(path, target / name)
            with files.replacing(target / RECORD) as stream:
                stream.write(content)
            times = os.lstat(source / RECORD)  # by it a record without a time is old or new
            os.utime(target / RECORD, ns=(times.st_atime_ns, times.st_mtime_ns))
    except Timeout:
        merged.busy.append(source)
    except (RecordError, OSError) as error:
        merged.damaged.append(
            str(error if isinstance(error, RecordError) else RecordError(f"{source}: {error.strerror or error}"))
        )
    else:
        merged.copied += 1
        merged.replaced += own is not None


def _as_seen(target: Path, own: _Found | None) -> bool:
    """Whether the new folder's record is the one that was compared; a damaged one counts as none."""
    try:
        content, _ = _read(target)
    except RecordError:
        return own is None
    return own is not None and _digest(content) == own.content


def _lock_of(source: Path) -> SoftFileLease | None:
    """The claim to a run that is read; None where there is none, or this process may not take it."""
    file = source / CLAIM
    return folder_lock(source) if file.is_file() and os.access(file, os.W_OK) else None


def _artifacts(source: Path, merged: Merged) -> list[str]:
    """The files of a finished run beside its record."""
    names = []
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        passing = entry.name.startswith((".", RECORD)) or entry.name in _PASSING
        if passing:
            continue
        if stat.S_ISREG(os.lstat(entry.path).st_mode):
            names.append(entry.name)
        else:
            merged.damaged.append(str(RecordError(f"{entry.path}: is a link or no file, and left out")))
    return names


def _stage(file: Path, target: Path) -> Path:
    """A copy beside its later place; the next merge writes over one that was left by a merge that was killed."""
    path = target / f".{file.name}.merging"
    with files.replacing(path) as stream, file.open("rb") as content:
        shutil.copyfileobj(content, stream)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _merge_notes(folders: Sequence[Path], out: Path, preferred: int | None, merged: Merged) -> None:
    """The folders' notes one after the other, in the order in which they were planned."""
    everything = [*folders, out]
    order = sorted(
        range(len(everything)), key=lambda n: (n == preferred, _planned_at(everything[n]), n == len(folders))
    )
    planned = [(everything[n], read_versions(everything[n])) for n in order]
    join_versions(out, [None if folder == out else versions for folder, versions in planned])
    merged.versions += _several_versions(planned)
    for n in order:
        if everything[n] == out:
            continue
        for read, write in _NOTES:
            told, trouble = read(everything[n])
            merged.notes += [trouble] if trouble else []
            merged.notes += write(out, told)
        plans, trouble = asked_notes(everything[n])
        merged.notes += [trouble] if trouble else []
        if plans != AskedNotes():
            merged.notes += write_asked(out, plans)


def _planned_at(folder: Path) -> str:
    """When a folder was planned last: by asked.json, else by the age of its versions.json."""
    plans, _ = asked_notes(folder)
    if plans.plans:
        return plans.plans[-1].time
    try:
        return finished_at((folder / VERSIONS).stat().st_mtime, None).isoformat()
    except OSError:
        return ""


def _several_versions(planned: Sequence[tuple[Path, Versions]]) -> list[str]:
    lines: list[str] = []
    kinds: tuple[Literal["norm", "task", "part"], ...] = ("norm", "task", "part")
    for kind in kinds:
        found: dict[str, dict[str, Path]] = {}
        for folder, versions in planned:
            for name, version in versions[kind].items():
                of_name = found.setdefault(name, {})
                of_name.pop(version, None)
                of_name[version] = folder  # the last one stands last
        for name, of_name in found.items():
            if len(of_name) > 1:
                lines.append(_said_of(f"{kind} {name}", of_name))
    data: dict[tuple[str, str], dict[str, Path]] = {}
    for folder, versions in planned:
        for task, sets in versions["data"].items():
            for name, sums in sets.items():
                of_data = data.setdefault((task, name), {})
                of_data.pop(", ".join(sums), None)
                of_data[", ".join(sums)] = folder
    lines += [_said_of(f"data {name} of {task}", sums) for (task, name), sums in data.items() if len(sums) > 1]
    return lines


def _said_of(what: str, found: dict[str, Path]) -> str:
    *_, last = found
    shown = ", ".join(f"{cut(version, 40)} ({folder})" for version, folder in found.items())
    return f"{what}: planned as {shown}; tables show {cut(last, 40)}, planned last"


def left_out(merged: Merged) -> Counter[str]:
    """How many runs were left out, by the reason."""
    return Counter(busy=len(merged.busy), unfinished=len(merged.unfinished), damaged=len(merged.damaged))
