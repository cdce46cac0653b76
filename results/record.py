"""One run, stored: what was asked (RunSpec), what came out (RunRecord), and the only reader and writer of run files.

`<out>/versions.json` says which versions of norms and tasks, and which data, were planned last, and by which config.
A run lives in `<out>/runs/<task>/<norm>/<key>/`: `record.json`, artifacts, and `.lock`. A record is written to a
temporary name in that folder, fsynced and renamed while its writer holds the lock, so a reader sees none or all of it.
A damaged record is moved aside, never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from filelock import FileLock
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from results import files
from results.escape import cut, visible

SCHEMA = 1
RECORD = "record.json"
VERSIONS = "versions.json"
LARGEST = 32 * 2**20
"""Bytes of the largest record: more than 50,000 epochs of ten quantities."""
MOST_ENTRIES = 2_000
"""Of a record's options, metrics, environment and evidence, and of an epoch: each of these is a column of a frame."""
DATASET = "dataset"
"""The task option that names the data, in tasks that have it."""
Status = Literal["ok", "diverged", "failed", "skipped"]
DONE: frozenset[str] = frozenset({"ok", "diverged"})
"""A non-finite loss is a result: neither of these is run again."""


_KEY = re.compile(r"[0-9a-f]{24}")
_LONGEST = 1000  # characters of a line about a damaged record


class RecordError(ValueError):
    """A file that is not a readable record of this schema; the message names the file and the reason, in one line that
    is safe to print."""

    def __init__(self, message: str):
        super().__init__(cut(visible(message), _LONGEST))


class RunSpec(BaseModel):
    """Everything that decides a run's numbers, complete after defaults, and nothing else.

    `norm_label` is for people (name and options that differ from the defaults) and takes no part in the key.

    `newer` names the task's options that came after records had been made, each with the default that means what runs
    did before it existed. An option that has this value is left out of the key: a record that lacks it, one that has
    it, and a plan of today share a key. `newer` itself takes no part in it.
    """

    # "constants": pydantic would else turn NaN and infinity into null, and two different specs would share a key
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    task: str
    norm: str
    norm_options: dict[str, Any]
    task_options: dict[str, Any]
    seed: int
    norm_version: str
    task_version: str
    data_checksum: str
    norm_label: str = ""
    newer: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an empty `newer`, so that older records are still written as they stand on disk."""
        found: dict[str, Any] = handler(self)
        if not self.newer:
            found.pop("newer", None)
        return found

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON, first 24 hexadecimal digits: 96 bits, so that paths stay short.

        Computed anew at each use: a cached one would survive `model_copy(update=...)` and name another run.

        Raises:
            ValueError: an option, or a default in `newer`, is NaN or infinite, for which JSON has no word.
        """
        content = self.model_dump(mode="json", exclude={"norm_label", "newer"})
        options = content["task_options"]
        for option, default in self.newer.items():
            if option in options and _canonical(options[option]) == _canonical(default):
                del options[option]
        text = _canonical(content)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def further_norms(self) -> dict[str, tuple[str, str]]:
        """option -> (name, version) of the norms that task options name (tasks.base.NormChoice)."""
        choices = {
            k: v for k, v in self.task_options.items() if isinstance(v, dict) and {"name", "version"} <= v.keys()
        }
        return {option: (str(choice["name"]), str(choice["version"])) for option, choice in choices.items()}


class RunRecord(BaseModel):
    """What one run left behind.

    Attributes:
        spec: what was run.
        status: "ok"; "diverged" (a non-finite loss, a result); "failed" (exception, crash, kill, time limit);
            "skipped" (this norm can not serve in this task).
        reason: why, for every status but "ok".
        metrics: name (up to 200 characters) -> value in full precision; all of the task's metrics when ok, none
            otherwise. A value that is not finite is refused here, since JSON has no word for it.
        history: one mapping per epoch; a non-finite number is stored as null.
        seconds: wall time of the run in its process, 0 to 1e10.
        environment: commit, versions, device, threads (not in the key; tables say when cells differ in them).
        evidence: how far the numbers reach: data "real" | "synthetic", budget "full" | "reduced", selection rule,
            whether every layer equals another norm, ... (printed under tables).
        artifacts: file names in the run's folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    spec: RunSpec
    status: Status
    reason: str = ""
    metrics: dict[Annotated[str, StringConstraints(max_length=200)], FiniteFloat] = Field(default_factory=dict)
    # the first mistake is enough: each of millions would be an object of its own
    history: Annotated[list[dict[str, float | None]], FailFast()] = Field(default_factory=list)
    seconds: FiniteFloat = Field(default=0.0, ge=0.0, le=1e10)
    environment: dict[str, Any] = Field(default_factory=dict)
    evidence: dict[str, Any] = Field(default_factory=dict)
    artifacts: Annotated[list[str], FailFast()] = Field(default_factory=list)
    schema_: int = Field(default=SCHEMA, alias="schema")

    @field_validator("history")
    @classmethod
    def _finite_or_null(
        cls, rows: list[dict[str, float | None]], info: ValidationInfo
    ) -> list[dict[str, float | None]]:
        if info.mode == "json":  # written by us, so done already; a grid's histories are most of what is read
            return rows
        return [{k: None if v is None or not math.isfinite(v) else v for k, v in row.items()} for row in rows]

    @field_validator("schema_")
    @classmethod
    def _known(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"schema {value}; this version reads {SCHEMA}")
        return value


def _canonical(value: Any) -> str:
    """JSON in which equal values, and only these, have equal texts: true is not 1."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_folder(out: str | Path, spec: RunSpec) -> Path:
    return Path(out) / "runs" / spec.task / spec.norm / spec.key


def run_lock(out: str | Path, spec: RunSpec) -> FileLock:
    """The lock of a run's folder (made if missing). Held by one process at a time; freed when that process ends.

    Raises:
        OSError: the folder can not be made, or `.lock` is a link or no file.
    """
    folder = run_folder(out, spec)
    folder.mkdir(parents=True, exist_ok=True)
    return _lock(folder / ".lock")


def _lock(file: Path) -> FileLock:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(file).st_mode):  # some versions of filelock empty the file that a link points to
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
    return FileLock(file)


def write_record(out: str | Path, record: RunRecord) -> Path:
    """Store a record; the caller holds `run_lock(out, record.spec)`. Returns the file."""
    folder = run_folder(out, record.spec)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{RECORD}.*"):  # by a writer that was killed; nobody else writes while we hold the lock
        with contextlib.suppress(OSError):
            left.unlink()
    return files.write_text(folder / RECORD, record_text(record))


def record_text(record: RunRecord) -> str:
    """What `record.json` holds. Raises ValueError for a record that could not be read again: NaN among the options,
    too many metrics or epochs."""
    record.spec.key  # noqa: B018 - pydantic would write NaN as null
    text = _text(record)
    content = text.encode()
    if len(content) > LARGEST:
        raise ValueError(f"a record of {len(content) / 2**20:.0f} MiB; up to {LARGEST / 2**20:g} MiB are read")
    _parse(RECORD, content)
    return text


class Versions(TypedDict):
    """What was planned last.

    Keys:
        norm, task: name -> version.
        data: task -> data set -> checksums; of several where other options decide, too. A task without the option
            `dataset` has "" for its data set.
        config: path of the config file; "" where none was given.
    """

    norm: dict[str, str]
    task: dict[str, str]
    data: dict[str, dict[str, list[str]]]
    config: str


def dataset_of(spec: RunSpec) -> str:
    """The data set that a run names; "" where its task has no such option."""
    return str(spec.task_options.get(DATASET) or "")


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
    with _lock(Path(out) / ".versions.lock").acquire(timeout=30):  # several invocations add to one note
        before, versions = read_versions(out), read_versions(out)
        data: dict[tuple[str, str], set[str]] = {}
        for spec in specs:
            versions["norm"][spec.norm] = spec.norm_version
            versions["task"][spec.task] = spec.task_version
            versions["norm"].update(spec.further_norms.values())
            data.setdefault((spec.task, dataset_of(spec)), set()).add(spec.data_checksum)
        for (task, dataset), checksums in data.items():
            versions["data"].setdefault(task, {})[dataset] = sorted(checksums)
        versions["config"] = config or versions["config"]
        if versions != before:
            files.write_text(Path(out) / VERSIONS, json.dumps(versions, sort_keys=True, indent=1))


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
    norm, task = (
        {k: str(v) for k, v in _mapping(found.get(kind)).items() if isinstance(v, str | int)}
        for kind in ("norm", "task")
    )
    config = found.get("config")
    return Versions(norm=norm, task=task, data=data, config=config if isinstance(config, str) else "")


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def read_record(file: str | Path) -> RunRecord:
    """Read one record. Raises RecordError (file and reason in one line) for anything else than a record."""
    try:
        content = files.read_bytes(file, LARGEST)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise RecordError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    return _parse(file, content)


def _parse(file: str | Path, content: bytes) -> RunRecord:
    try:
        record = RunRecord.model_validate_json(content)
        record.spec.key  # noqa: B018 - what options can not be in JSON shows here
        if _text(record).encode() != content:  # not as we write it: it may say one thing twice
            json.loads(content.decode(), object_pairs_hook=_refuse_repeated)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = cut(".".join(str(part) for part in first["loc"]), 80)
        raise RecordError(f"{file}: not a run record ({where + ': ' if where else ''}{first['msg']})") from error
    except RecursionError as error:
        raise RecordError(f"{file}: not a run record (nested too deeply)") from error
    except ValueError as error:  # of json, and of the key
        raise RecordError(f"{file}: not a run record ({error})") from error
    spec = record.spec
    mappings = (spec.task_options, spec.newer, spec.norm_options, record.metrics, record.environment, record.evidence)
    most = max(map(len, (*mappings, *record.history)))
    if most > MOST_ENTRIES:
        raise RecordError(f"{file}: not a run record (a mapping of {most} entries; {MOST_ENTRIES} are allowed)")
    return record


def _text(record: RunRecord) -> str:
    return record.model_dump_json(by_alias=True, indent=1)


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    """Refuses a JSON object that has a name twice: readers differ in which one they take."""
    if len(dict(pairs)) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f'"{cut(twice, 80)}" is given twice')


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
    damaged = [] if damaged is None else damaged
    for task in _folders(Path(out) / "runs", damaged):
        for norm in _folders(task, damaged):
            for run in _folders(norm, damaged):
                if os.path.lexists(run / RECORD):
                    yield run / RECORD


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
    """Rename a damaged record so that its run is repeated and the file can be looked at. Returns the new name.

    The name is a free one, reserved before the renaming, so that nothing is ever overwritten.
    """
    file = Path(file)
    folder = stat.S_ISDIR(os.lstat(file).st_mode)  # a folder takes the place of an empty folder only
    for number in itertools.count(1):
        target = file.with_name(f"{RECORD}.damaged-{number}")
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
