"""The files of runs: opened, locked, read and written here and nowhere else.

`<out>/tasks.json` says what tables have to know of the tasks, `<out>/norms.json` what reports say of the norms
(results.declared).
`<out>/versions.json` says which versions of norms and tasks, and which data, were planned last, and by which config.
`<out>/asked.json` says by which commands and configs the folder was made (results.asked).
A run lives in `<out>/runs/<task>/<norm>/<key>/`: `record.json`, artifacts, and `.claim`. A record is written to a
temporary name in that folder, fsynced and renamed while its writer holds the claim, so a reader sees none or all of it.
A damaged record is moved aside, never deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from filelock import SoftFileLease
from pydantic import ValidationError

from results import files
from results.asked import AskedNotes
from results.claims import PATIENCE, folder_lock, lease
from results.declared import NormNotes, TaskNotes
from results.escape import cut
from results.record import LARGEST, RECORD, RecordError, RunRecord, RunSpec, dataset_of, parse_record, record_text

VERSIONS = "versions.json"
TASKS = "tasks.json"
ASKED = "asked.json"
NORMS = "norms.json"
_KEY = re.compile(r"[0-9a-f]{24}")


def run_folder(out: str | Path, spec: RunSpec) -> Path:
    return Path(out) / "runs" / spec.task / spec.norm / spec.key


def run_lock(out: str | Path, spec: RunSpec, lost: Callable[[Any], None] | None = None) -> SoftFileLease:
    """The claim to a run's folder (made if missing), held by one process at a time; see results.claims.

    Args:
        lost: called, in a thread of its own, if a claim that is held is taken over.

    Raises:
        OSError: the folder can not be made, or `.claim` is a link or no file.
    """
    folder = run_folder(out, spec)
    folder.mkdir(parents=True, exist_ok=True)
    return folder_lock(folder, lost)


def write_record(out: str | Path, record: RunRecord) -> Path:
    """Store a record; the caller holds `run_lock(out, record.spec)`. Returns the file."""
    folder = run_folder(out, record.spec)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{RECORD}.*"):  # by a writer that was killed; nobody else writes while we hold the claim
        with contextlib.suppress(OSError):
            left.unlink()
    return files.write_text(folder / RECORD, record_text(record))


class Versions(TypedDict):
    """What was planned last.

    Keys:
        norm, task: name -> version.
        part: "option name" of a plugin's model or optimizer -> version.
        data: task -> data set -> checksums; of several where other options decide, too. A task without the option
            `dataset` has "" for its data set.
        config: path of the config file; "" where none was given.
    """

    norm: dict[str, str]
    task: dict[str, str]
    part: dict[str, str]
    data: dict[str, dict[str, list[str]]]
    config: str


def write_versions(out: str | Path, specs: Iterable[RunSpec], config: str = "") -> None:
    """Note which version of each norm and task, and which data, were planned last, so that tables show those.

    Without the note, a plugin whose edit was taken back would be shown with the edit's numbers, which finished later,
    and data that were changed and changed back with those of the change.

    Args:
        out: the folder of results.
        specs: of a whole plan, skipped ones included.
        config: path of the plan's file; "" leaves what is noted.

    Raises:
        OSError: the note, or its lock, can not be written.
    """
    with lease(Path(out) / ".versions.claim").acquire(timeout=PATIENCE):  # several invocations add to one note
        before, versions = read_versions(out), read_versions(out)
        data: dict[tuple[str, str], set[str]] = {}
        for spec in specs:
            versions["norm"][spec.norm] = spec.norm_version
            versions["task"][spec.task] = spec.task_version
            versions["norm"].update(spec.further_norms.values())
            versions["part"].update(spec.part_versions)
            data.setdefault((spec.task, dataset_of(spec)), set()).add(spec.data_checksum)
        for (task, dataset), checksums in data.items():
            versions["data"].setdefault(task, {})[dataset] = sorted(checksums)
        versions["config"] = config or versions["config"]
        if versions != before:
            files.write_text(Path(out) / VERSIONS, json.dumps(versions, sort_keys=True, indent=1))


def join_versions(out: str | Path, notes: Sequence[Versions | None]) -> None:
    """Note what several folders planned last, each after the ones before it; None stands for what is noted in `out`.

    Raises:
        OSError: the note, or its lock, can not be written.
    """
    with lease(Path(out) / ".versions.claim").acquire(timeout=PATIENCE):
        before = read_versions(out)
        joined = Versions(norm={}, task={}, part={}, data={}, config="")
        for versions in (before if each is None else each for each in notes):
            for kind in ("norm", "task", "part"):
                joined[kind].update(versions[kind])
            for task, sets in versions["data"].items():
                joined["data"].setdefault(task, {}).update(sets)
            joined["config"] = versions["config"] or joined["config"]
        if joined != before:
            files.write_text(Path(out) / VERSIONS, json.dumps(joined, sort_keys=True, indent=1))


def read_versions(out: str | Path) -> Versions:
    """What was planned last; empty parts where nothing readable says so (tables then show what finished last)."""
    try:
        found = json.loads(files.read_bytes(Path(out) / VERSIONS))
    except (OSError, ValueError, RecursionError):
        found = None
    found = found if isinstance(found, dict) else {}
    data = {
        task: {name: [s for s in sums if isinstance(s, str)] for name, sums in sets.items() if isinstance(sums, list)}
        for task, sets in _mapping(found.get("data")).items()
        if isinstance(sets, dict)
    }
    norm, task, part = (
        {k: str(v) for k, v in _mapping(found.get(kind)).items() if isinstance(v, str | int)}
        for kind in ("norm", "task", "part")
    )
    config = found.get("config")
    return Versions(norm=norm, task=task, part=part, data=data, config=config if isinstance(config, str) else "")


def write_tasks(out: str | Path, told: TaskNotes) -> list[str]:
    """Add what a plan says of its tasks to what earlier plans said.

    Returns:
        A line, where the file said nothing readable and was set aside.

    Raises:
        OSError: the file, or its lock, can not be written.
    """
    return _write_notes(Path(out) / TASKS, told)


def write_norms(out: str | Path, told: NormNotes) -> list[str]:
    """The same for what a plan, or a check, says of its norms."""
    return _write_notes(Path(out) / NORMS, told)


def read_tasks(out: str | Path) -> tuple[TaskNotes, str]:
    """The folder's notes on its tasks, and one line of reason if they can not be read."""
    return _read_notes(Path(out) / TASKS, TaskNotes)


def read_norms(out: str | Path) -> tuple[NormNotes, str]:
    """The folder's notes on its norms, and one line of reason if they can not be read."""
    return _read_notes(Path(out) / NORMS, NormNotes)


def write_asked(out: str | Path, told: AskedNotes) -> list[str]:
    """Add plans to those by which the folder was made. Returns and raises as `write_tasks`."""
    return _write_notes(Path(out) / ASKED, told)


def asked_notes(out: str | Path) -> tuple[AskedNotes, str]:
    """The plans by which the folder was made, and one line of reason if they can not be read."""
    return _read_notes(Path(out) / ASKED, AskedNotes)


def read_asked(out: str | Path) -> list[dict[str, Any]]:
    """The plans by which a folder was made, the newest last; none where nothing readable says so.

    Returns:
        Mappings with the keys time, command (a list), config, text, version, commit (results.asked.Asked).
    """
    return asked_notes(out)[0].plain()


_Notes = TypeVar("_Notes", TaskNotes, NormNotes, AskedNotes)
_ABOUT = {TaskNotes: "tasks", NormNotes: "norms", AskedNotes: "command and config"}


def _write_notes(file: Path, told: _Notes) -> list[str]:
    with lease(file.with_name(".versions.claim")).acquire(timeout=PATIENCE):
        before, trouble = _read_notes(file, type(told))
        after = before.followed_by(told)
        notes = [f"{trouble}; set aside as {set_aside(file).name}"] if trouble else []
        # equal mappings may differ in their order, and what was planned last stands last
        if (text := after.model_dump_json(by_alias=True)) != before.model_dump_json(by_alias=True):
            files.write_text(file, text)
    return notes


def _read_notes(file: Path, kind: type[_Notes]) -> tuple[_Notes, str]:
    said = f"not what a plan says of its {_ABOUT[kind]}"
    try:
        return kind.model_validate_json(files.read_bytes(file)), ""
    except FileNotFoundError:
        return kind(), ""
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = cut(".".join(map(str, first["loc"])), 80)
        why = f"{said} ({where + ': ' if where else ''}{first['msg']})"
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        why = f"{said} ({error})"
    return kind(), str(RecordError(f"{file}: {why}"))


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def read_record(file: str | Path) -> RunRecord:
    """Read one record. Raises RecordError (file and reason in one line) for anything else than a record."""
    try:
        content = files.read_bytes(file, LARGEST)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise RecordError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    return parse_record(file, content)


def find_record(out: str | Path, spec: RunSpec) -> RunRecord | None:
    """The stored record of a spec, or None. Raises RecordError for a damaged one, or one of another spec."""
    file = run_folder(out, spec) / RECORD
    try:
        os.lstat(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{file}: {error.strerror or error}") from error
    record = read_record(file)
    if record.spec.key != spec.key:
        raise RecordError(f"{file}: holds the record of another run ({record.spec.key})")
    return record


def record_files(out: str | Path, damaged: list[str] | None = None) -> Iterator[Path]:
    """Every record file below `out`, in a stable order, and what has its name without being one.

    Args:
        out: a folder of results.
        damaged: takes a line for each folder that can not be listed, and each run's folder that is none.
    """
    for run in run_folders(out, damaged):
        if os.path.lexists(run / RECORD):
            yield run / RECORD


def run_folders(out: str | Path, damaged: list[str] | None = None) -> Iterator[Path]:
    """Every run's folder below `out` in a stable order, with a record or without. Arguments as `record_files`."""
    damaged = [] if damaged is None else damaged
    for task in _folders(Path(out) / "runs", damaged):
        for norm in _folders(task, damaged):
            yield from _folders(norm, damaged)


def _folders(folder: Path, damaged: list[str]) -> Iterator[Path]:
    """The folders in a folder, links to folders among them. Other files are nobody's business, but for those that stand
    in a folder's place: links that lead nowhere, and files with a run's name."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_symlink()) for entry in found)
    except OSError as error:
        damaged.append(str(RecordError(f"{folder}: can not be listed: {error.strerror or error}")))
        return
    for name, link in entries:
        path = folder / name
        if path.is_dir():
            yield path
        elif link and not os.path.exists(path):
            damaged.append(str(RecordError(f"{path}: is a link that leads nowhere; a folder is needed")))
        elif _KEY.fullmatch(name):
            damaged.append(str(RecordError(f"{path}: is a file; the folder of a run is needed")))


def set_aside(file: str | Path) -> Path:
    """Rename a damaged record so that its run is repeated and the file can be looked at, or a damaged note of tasks.
    Returns the new name.

    The name is a free one, reserved before the renaming, so that nothing is ever overwritten.
    """
    file = Path(file)
    folder = stat.S_ISDIR(os.lstat(file).st_mode)  # a folder takes the place of an empty folder only
    for number in itertools.count(1):
        target = file.with_name(f"{file.name}.damaged-{number}")
        try:
            target.mkdir() if folder else target.touch(exist_ok=False)
        except FileExistsError:
            continue
        break
    try:
        os.replace(file, target)
    except OSError:
        target.rmdir() if folder else target.unlink()
        raise
    return target
