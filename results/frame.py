"""Run files -> one tidy pandas DataFrame.

Reading changes nothing on the disk: a damaged record is named in `df.attrs["damaged"]` and left where it is (the next
`run` sets it aside and repeats the run).

Versions and data are never mixed (results.versions); records of others are left out and counted in `df.attrs["stale"]`.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from results.declared import NormNotes, TaskNotes
from results.doubles import newest, told_apart
from results.metrics import GAIN, METRICS
from results.record import RecordError, RunRecord, RunSpec
from results.rows import natural
from results.store import (
    RECORD,
    Versions,
    asked_notes,
    read_norms,
    read_record,
    read_tasks,
    read_versions,
    record_files,
)
from results.versions import NORM_BATCH, mark_stale

IDENTITY = ("task", "norm", "norm_label", "row", "seed", "status", "reason", "key")
VERSIONS = ("norm_version", "task_version", "data_checksum")
EVIDENCE = ("data", "budget", "selection", "equals")
ENVIRONMENT = ("commit", "torch", "device", "device_name", "threads", "kernels")
"""Named without prefix, since tables say when cells differ in them; every other entry is `environment.<name>`."""
MADE_IN = ("torch", "device", "device_name", "cpu", "threads", "kernels")
"""What parts of a run may differ in, so that a table has to say it: numbers depend on these in their last digits."""
FIXED = (*IDENTITY, *VERSIONS, *EVIDENCE, *ENVIRONMENT, "seconds", "finished", "repeats", "stale", "file")
ENDED = "status."
"""`status.<metric>`: how a metric of several runs ended (results.derived), since they may have ended differently."""
PREFIXES = ("option.", "norm.", "evidence.", "environment.", "selected.", "baseline.", ENDED)

METHOD = "method"
HELD_OUT = "held_out"
BASELINE = "baseline.key"
"""The column with the key of the run that a run's gain is over; "" where the plan says that it has none."""
_YEARS = range(1970, 2262)  # beyond these, nanoseconds since 1970 leave 64 bits
_GIVE = "give the --out folder of a run"
_SHOWN = 5  # names in a message
_SETTING_FIELDS = (NORM_BATCH, "num_domains", "image_shape")
"""Norm options that a run's setting fills in, where the folder does not name them; they do not make another row of a
table."""


def load(
    folder: str | Path, strict: bool = False, stale: bool = False, keys: Collection[str] | None = None
) -> pd.DataFrame:
    """One row per run record below `folder`, ordered by task, row, options and seed.

    Args:
        folder: an output folder of `run` (the one that holds `runs/`).
        strict: raise for damaged records instead of naming them in `df.attrs["damaged"]`.
        stale: keep records of other versions and data too (marked in the column `stale`).
        keys: only the runs with these keys (`RunSpec.key`), as of a plan that `suite.plan` made; None: all.

    Returns:
        A frame with the columns
        - task, norm, norm_label, seed, status ("ok" | "diverged" | "failed" | "skipped"), reason, key;
        - row: the identity of a table's row, the norm and its options without those that the run's setting fills in;
        - `option.<name>` and `norm.<name>`: task and norm options, mappings with a label by it, others and sequences as
          JSON text, None where a task or norm has no such option; of a record that is older than an option
          (`RunSpec.newer`) what the run did without it;
        - one column per metric under its own name, in base units and full precision (NaN unless status is "ok"); those
          that need several runs are added by results.derived;
        - data, budget, selection, equals (from the record's evidence), `evidence.<name>` for the rest of it;
        - commit, torch, device, device_name, threads, kernels (of a run that was made in parts those of its last one),
          `environment.<name>` for the rest of the environment;
        - environment.parts: how many processes made the run, one after the other (None: one); environment.parts_differ:
          what their surroundings differ in, of MADE_IN, separated by commas; "" where in nothing;
        - norm_version, task_version, data_checksum, seconds, file;
        - finished: the time in UTC, without a time zone (Excel knows none);
        - baseline.key: key of the run that a gain is over, "" for a run that has none, None where the folder does not
          say; without the column it says so of no run;
        - repeats: the run has no norm batch, since its norm does not mix samples, and serves every norm batch;
        - stale: of another version, or other data.
        `df.attrs`: "folder"; "records": rows; "damaged": [one line per unreadable file]; "doubles": [one line per
        record, left out, of a key that has another]; "stale": {"task / norm": n}, and those of them that only their
        data make so in "other_data"; "not_asked": {task: n}, left out by `keys`;
        "tasks": {task: what the folder says of it}, "norms": {norm: what the folder says of the version that takes part
        (results.declared.NormNotes.of)}; "asked": the commands and configs that made it, the newest last
        (results.store.read_asked); "unread": why it says nothing, where a file that should can not be read. The last
        four are there only where there is something to say.

    Raises:
        ValueError: `folder` is missing or holds no `runs`; with `strict`, damaged records, one per line.
    """
    return frame(read_folder(folder, strict, keys), stale)


def from_records(records: Iterable[RunRecord], stale: bool = False, told: TaskNotes | None = None) -> pd.DataFrame:
    """The frame of `load`, of records in memory; where they do not name their end, the last given counts as newest. Of
    several records of one key the newest stays, and `df.attrs["doubles"]` names the others.

    Args:
        records: of one folder, or as if they were.
        stale: as `load`.
        told: what the folder would say of its tasks.
    """
    kept, doubles = newest(records, lambda given, number: finished_at(given, None, number))
    found = [(None, *item) for item in kept.items()]
    return frame(Read(found, {"damaged": [], "doubles": doubles}, None, told or TaskNotes()), stale)


@dataclass(frozen=True)
class Read:
    """A folder's records as they were read, and what it says besides.

    Attributes:
        records: (file, key, record) of those asked for; None for the file of a record in memory.
        attrs: entries of `df.attrs`.
        planned: what was planned last; None where keys say which records count.
        told, norms: of the tasks and norms.
    """

    records: Sequence[tuple[Path | None, str, RunRecord]]
    attrs: dict[str, Any]
    planned: Versions | None = None
    told: TaskNotes = field(default_factory=TaskNotes)
    norms: NormNotes = field(default_factory=NormNotes)


def metric_columns(df: pd.DataFrame) -> list[str]:
    """The columns of a frame that hold metrics: those that are neither fixed nor prefixed."""
    return [str(c) for c in df.columns if c not in FIXED and not str(c).startswith(PREFIXES)]


def read_folder(folder: str | Path, strict: bool = False, keys: Collection[str] | None = None) -> Read:
    """Everything below a folder that frames are made of, read once. Arguments and errors as `load`."""
    records, attrs = _read(folder, strict)
    told, trouble = read_tasks(folder)
    norms, of_norms = read_norms(folder)
    plans, of_plans = asked_notes(folder)
    if plans.plans:
        attrs["asked"] = plans.plain()
    if troubles := [text for text in (trouble, of_norms, of_plans) if text]:
        attrs["unread"] = "; ".join(troubles)
    if keys is None:
        return Read(records, attrs | {"not_asked": {}}, read_versions(folder), told, norms)
    others = Counter(record.spec.task for _, key, record in records if key not in keys)
    return Read([r for r in records if r[1] in keys], attrs | {"not_asked": dict(others)}, None, told, norms)


def frame(read: Read, stale: bool = False) -> pd.DataFrame:
    """The frame of `load`, of what was read."""
    df = _frame(read.records, read.planned, read.told)
    attrs = dict(read.attrs)
    attrs["stale"] = dict(Counter((df["task"] + " / " + df["norm"])[df["stale"]])) if len(df) else {}
    taking_part = df[~df["stale"]]
    versions = dict(zip(taking_part["norm"].tolist(), taking_part["norm_version"].tolist(), strict=True))
    if norms := read.norms.of(versions):
        attrs["norms"] = _Shared(norms)
    if tasks := df.attrs.get("tasks"):
        attrs["tasks"] = _Shared(tasks)
    if plans := attrs.get("asked"):
        attrs["asked"] = [_Shared(plan) for plan in plans]
    if not stale:
        df = taking_part.reset_index(drop=True)
    df.attrs.update(attrs, records=len(df))
    return df


class _Shared(dict[str, Any]):
    """A mapping that pandas does not copy with every part of a frame: definitions and facts are long."""

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


def _read(folder: str | Path, strict: bool) -> tuple[list[tuple[Path, str, RunRecord]], dict[str, Any]]:
    folder = Path(folder)
    damaged: list[str] = []
    files = list(record_files(folder, damaged)) if folder.is_dir() else []
    if not files and (hint := _elsewhere(folder) or ("" if (folder / "runs").is_dir() else _GIVE)):
        raise ValueError(f'"{folder}" {"holds no runs" if folder.is_dir() else "is not a folder"}; {hint}')
    records: list[tuple[Path, str, RunRecord]] = []
    elsewhere: list[tuple[Path, RunSpec]] = []  # in a folder that is not its own
    for file in files:
        try:
            record = read_record(file)
            spec = record.spec
            if (spec.task, spec.norm, key := spec.key) != file.parts[-4:-1]:
                elsewhere.append((file, spec))
                continue
            taken = sorted(n for n in record.metrics if n in FIXED or n.startswith(PREFIXES))
            if taken:
                raise RecordError(f"{file}: a metric can not be named {', '.join(taken)}: a column has that name")
            records.append((file, key, record))
        except RecordError as error:
            damaged.append(str(error))
    doubles = told_apart(elsewhere, {key for _, key, _ in records}, damaged)
    if damaged and strict:
        raise ValueError("\n".join(damaged))
    return records, {"folder": str(folder), "damaged": damaged, "doubles": doubles}


def _elsewhere(folder: Path) -> str:
    """Which folder of results may have been meant: the one around this, one below it, one of a similar name; or ''."""
    above = next((p for p in folder.resolve().parents if _holds_records(p)), None)
    if above is not None and folder.exists():
        return f'did you mean "{above}"?'
    for pattern in ("*", "*/*"):
        below = [p for p in folder.glob(pattern) if _holds_records(p)]
        if below:
            return f"folders of results below it: {_named(sorted(below, key=lambda p: natural(str(p))))}"
    if folder.exists():
        return ""
    beside = {p.name: p for pattern in ("*/*", "*") for p in folder.parent.glob(pattern) if _holds_records(p)}
    near = difflib.get_close_matches(folder.name, beside, cutoff=0.5)
    return f"did you mean {_named([beside[name] for name in near])}?" if near else ""


def _holds_records(folder: Path) -> bool:
    return next(folder.glob(f"runs/*/*/*/{RECORD}"), None) is not None


def _named(folders: Sequence[Path]) -> str:
    more = f" and {len(folders) - _SHOWN} more" if len(folders) > _SHOWN else ""
    return ", ".join(f'"{folder}"' for folder in folders[:_SHOWN]) + more


def _frame(
    records: Sequence[tuple[Path | None, str, RunRecord]], planned: Versions | None, told: TaskNotes
) -> pd.DataFrame:
    before = _before([record.spec for _, _, record in records])
    rows = [_row(file, number, key, record, before, told) for number, (file, key, record) in enumerate(records)]
    other_data = mark_stale(rows, [record.spec for _, _, record in records], planned)
    names = dict.fromkeys(FIXED)
    for row in rows:
        names.update(dict.fromkeys(row))
    options = sorted(n for n in names if n.startswith(PREFIXES))
    metrics = sorted(n for n in names if n not in FIXED and not n.startswith(PREFIXES))
    ordering = [n for n in options if n != BASELINE]
    rows.sort(
        key=lambda r: (
            r["task"],
            natural(r["row"]),
            *(natural(r.get(o)) for o in ordering),
            r["seed"],
            r["key"],
        )
    )
    ordered = [*IDENTITY, *options, *metrics, *(n for n in FIXED if n not in IDENTITY)]
    columns: dict[str, Any] = {}
    for name in ordered:
        values = [row.get(name) for row in rows]
        if name in metrics or name == "seconds":
            columns[name] = pd.Series(values, dtype="float64")
        elif name == "finished":
            columns[name] = pd.to_datetime(pd.Series(values, dtype=object), utc=True).dt.tz_localize(None)
        else:
            # object first: a missing option must not turn the integers of others into floats
            series = pd.Series(values, dtype=object)
            columns[name] = series if any(v is None for v in values) else series.infer_objects()
    columns["stale"] = columns["stale"].astype(bool)
    columns["repeats"] = columns["repeats"].astype(bool)
    df = pd.DataFrame(columns)
    df.attrs["other_data"] = other_data
    if tasks := _declared(rows, told):
        df.attrs["tasks"] = tasks
    return df


def _declared(rows: Iterable[Mapping[str, Any]], told: TaskNotes) -> dict[str, Any]:
    """task -> what the version of it declares that takes part, as plain values.

    Without the metrics that the vocabulary knows itself: pandas copies what is here with every part of a frame. A
    gain stays, since it says that it is the task's own.
    """
    tasks = {}
    for task, version in dict.fromkeys((row["task"], row["task_version"]) for row in rows if not row["stale"]):
        found = told.declaration(task, version)
        own = {name: metric for name, metric in found.metrics.items() if name not in METRICS or name == GAIN}
        plain = found.model_copy(update={"metrics": own}).model_dump(mode="json", exclude_defaults=True)
        if plain:
            tasks[task] = plain
    return tasks


def _before(specs: Iterable[RunSpec]) -> dict[tuple[str, str], dict[str, Any]]:
    """(task, version) -> the options that some of its records have and older ones lack, with what these did without.

    Two records that disagree about an option say nothing about it.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    unclear: set[tuple[str, str, str]] = set()
    for spec in specs:
        of_task = found.setdefault((spec.task, spec.task_version), {})
        for option, default in spec.newer.items():
            if _plain(of_task.setdefault(option, default)) != _plain(default):
                unclear.add((spec.task, spec.task_version, option))
    for task, version, option in unclear:
        del found[task, version][option]
    return found


def _row(
    file: Path | None,
    number: int,
    key: str,
    record: RunRecord,
    before: Mapping[tuple[str, str], Mapping[str, Any]],
    told: TaskNotes,
) -> dict[str, Any]:
    spec, environment, evidence = record.spec, dict(record.environment), dict(record.evidence)
    label = spec.norm_label or _label(spec.norm, spec.norm_options)
    # A setting field is part of the row only where a person gave it: the folder says so, or it shows in the label.
    filled = {*(told.setting_fields or _SETTING_FIELDS)} - {*told.given.get(key, ())}
    identity = {k: v for k, v in spec.norm_options.items() if k not in filled or f"{k}=" in label}
    return {
        "task": spec.task,
        "norm": spec.norm,
        "norm_label": label,
        "row": _label(spec.norm, identity),
        "seed": spec.seed,
        "status": record.status,
        "reason": record.reason,
        "key": key,
        **{name: getattr(spec, name) for name in VERSIONS},
        **{
            f"option.{k}": _plain(v)
            for k, v in ({**before.get((spec.task, spec.task_version), {}), **spec.task_options}).items()
        },
        **{f"norm.{k}": _plain(v) for k, v in spec.norm_options.items()},
        **({BASELINE: told.baselines[key] or ""} if key in told.baselines else {}),
        **(record.metrics if record.status == "ok" else {}),
        **{name: str(evidence.pop(name, None) or "") for name in EVIDENCE},
        **{f"evidence.{k}": _plain(v) for k, v in evidence.items()},
        "finished": finished_at(environment.pop("finished", None), file, number),
        **{name: _plain(environment.pop(name, None)) for name in ENVIRONMENT},
        **_parts(environment.pop("parts", None)),
        **{f"environment.{k}": _plain(v) for k, v in environment.items()},
        "seconds": record.seconds,
        "repeats": NORM_BATCH in spec.task_options
        and spec.task_options[NORM_BATCH] is None
        and record.evidence.get("mixes_samples") is not True,
        "stale": False,
        "file": str(file or ""),
    }


def _parts(given: Any) -> dict[str, Any]:
    """The columns of `environment.parts`, where a record has them."""
    parts = [part for part in given if isinstance(part, dict)] if isinstance(given, list) else []
    if not parts:
        return {}
    differ = [name for name in MADE_IN if len({_plain(part.get(name)) for part in parts}) > 1]
    return {"environment.parts": len(parts), "environment.parts_differ": ", ".join(differ)}


def _label(norm: str, options: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{k}={_plain(v)}" for k, v in sorted(options.items()))
    return f"{norm}({inside})" if inside else norm


def _plain(value: Any) -> Any:
    """Numbers, texts, truth values and None as they are; anything else as one text (a column can then be grouped).

    That is its "label" where it is a mapping with one (a norm or genotype that an option names), else JSON.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict) and isinstance(value.get("label"), str):
        return value["label"]
    return json.dumps(value, sort_keys=True)


def finished_at(given: Any, file: Path | None, number: int = 0) -> datetime:
    """When the run ended: the record's own time where it is readable, else the file's, else by the record's number."""
    found: datetime | None = None
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if isinstance(given, str):
            time = datetime.fromisoformat(given)
            found = (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
        elif isinstance(given, int | float) and not isinstance(given, bool):
            found = datetime.fromtimestamp(given, UTC)
        elif file:
            found = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    if found is not None and _YEARS.start <= found.year < _YEARS.stop:
        return found
    # not a time: the file's own stands in, as for records that name none
    return datetime.fromtimestamp(number, UTC) if given is None else finished_at(None, file, number)
