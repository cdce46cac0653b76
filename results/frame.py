"""Run files -> one tidy pandas DataFrame.

Reading changes nothing on the disk: a damaged record is named in `df.attrs["damaged"]` and left where it is (the next
`run` sets it aside and repeats the run).

Versions are never mixed. The version of a norm and of a task that was planned last (`results.record.write_versions`;
where nothing says so, that of the record which finished last) and, within one setting, the newest data take part;
records of others are left out and counted in `df.attrs["stale"]`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from results.record import RecordError, RunRecord, read_record, read_versions, record_files

IDENTITY = ("task", "norm", "norm_label", "row", "seed", "status", "reason", "key")
VERSIONS = ("norm_version", "task_version", "data_checksum")
EVIDENCE = ("data", "budget", "selection", "equals")
ENVIRONMENT = ("commit", "torch", "device", "device_name", "threads")
"""Named without prefix, since tables say when cells differ in them; every other entry is `environment.<name>`."""
FIXED = (*IDENTITY, *VERSIONS, *EVIDENCE, *ENVIRONMENT, "seconds", "finished", "repeats", "stale", "file")
ENDED = "status."
"""`status.<metric>`: how a metric of several runs ended (results.derived), since they may have ended differently."""
PREFIXES = ("option.", "norm.", "evidence.", "environment.", "selected.", ENDED)

NORM_BATCH = "norm_batch_size"
DATASET = "dataset"
METHOD = "method"
HELD_OUT = "held_out"
_YEARS = range(1970, 2262)  # beyond these, nanoseconds since 1970 leave 64 bits
_SETTING_FIELDS = (NORM_BATCH, "num_domains", "image_shape")
"""Norm options that a run's setting fills in; they do not make another row of a table (norms.registry)."""


def load(folder: str | Path, strict: bool = False, stale: bool = False) -> pd.DataFrame:
    """One row per run record below `folder`, ordered by task, row, options and seed.

    Args:
        folder: an output folder of `run` (the one that holds `runs/`).
        strict: raise for damaged records instead of naming them in `df.attrs["damaged"]`.
        stale: keep records of other versions too (marked in the column `stale`).

    Returns:
        A frame with the columns
        - task, norm, norm_label, seed, status ("ok" | "diverged" | "failed" | "skipped"), reason, key;
        - row: the identity of a table's row, the norm and its options without those that the run's setting fills in;
        - `option.<name>` and `norm.<name>`: task and norm options, mappings with a label by it, others and sequences as
          JSON text, None where a task or norm has no such option;
        - one column per metric under its own name, in base units and full precision (NaN unless status is "ok"); those
          that need several runs are added by results.derived;
        - data, budget, selection, equals (from the record's evidence), `evidence.<name>` for the rest of it;
        - commit, torch, device, device_name, threads, `environment.<name>` for the rest of the environment;
        - norm_version, task_version, data_checksum, seconds, finished (UTC), file;
        - repeats: the run has no norm batch, since its norm does not mix samples, and serves every norm batch;
        - stale: of an older version.
        `df.attrs`: "folder"; "records": rows; "damaged": [one line per unreadable file]; "stale": {"task / norm": n}.

    Raises:
        ValueError: `folder` is missing or holds no `runs`; with `strict`, damaged records, one per line.
    """
    records, attrs = _read(folder, strict)
    return _current(_frame(records, read_versions(folder)), attrs, stale)


def from_records(records: Iterable[RunRecord], stale: bool = False) -> pd.DataFrame:
    """The frame of `load`, of records in memory; where they do not name their end, the last given counts as newest."""
    return _current(_frame([(None, record.spec.key, record) for record in records]), {"damaged": []}, stale)


def load_history(folder: str | Path, strict: bool = False, stale: bool = False) -> pd.DataFrame:
    """One row per run and epoch: task, norm, norm_label, row, seed, status, key, epoch (from 0, as stored in order) and
    one column per quantity of the history. Join with `load` on "key" for options. Arguments and errors as `load`."""
    records, attrs = _read(folder, strict)
    keep = ["task", "norm", "norm_label", "row", "seed", "status", "key"]
    df = _frame(records, read_versions(folder))
    if not stale:
        df = df[~df["stale"]]
    runs = df[keep].to_dict("records")
    history = {key: record.history for _, key, record in records}
    rows = [
        {
            **run,
            "epoch": _whole(entry.get("epoch", epoch)),
            **{k: v for k, v in entry.items() if k not in (*keep, "epoch")},
        }
        for run in runs
        for epoch, entry in enumerate(history[run["key"]])
    ]
    result = pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*keep, "epoch"])
    result.attrs.update(attrs)
    return result


def metric_columns(df: pd.DataFrame) -> list[str]:
    """The columns of a frame that hold metrics: those that are neither fixed nor prefixed."""
    return [str(c) for c in df.columns if c not in FIXED and not str(c).startswith(PREFIXES)]


def natural(value: Any) -> tuple[Any, ...]:
    """A sort key under which numbers come by size, texts with numbers in them as people count, and None last."""
    if is_nothing(value):
        return (2,)
    if isinstance(value, int | float):
        return (0, value, str(value))
    # of two numbers the one with more digits is larger; as int, one of thousands of digits could not be read
    parts = re.split(r"0*(\d+)", str(value), flags=re.ASCII)
    return (1, tuple((0, len(p), p) if i % 2 else (1, 0, p) for i, p in enumerate(parts)))


def is_nothing(value: Any) -> bool:
    """None, NaN or NA: how a frame says that there is no value."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _current(df: pd.DataFrame, attrs: dict[str, Any], stale: bool) -> pd.DataFrame:
    attrs["stale"] = dict(Counter((df["task"] + " / " + df["norm"])[df["stale"]])) if len(df) else {}
    if not stale:
        df = df[~df["stale"]].reset_index(drop=True)
    df.attrs.update(attrs, records=len(df))
    return df


def _read(folder: str | Path, strict: bool) -> tuple[list[tuple[Path, str, RunRecord]], dict[str, Any]]:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f'"{folder}" is not a folder; give the --out folder of a run')
    if not (folder / "runs").is_dir():
        above = next((p for p in folder.resolve().parents if (p / "runs").is_dir()), None)
        hint = f'; did you mean "{above}"?' if above else "; give the --out folder of a run"
        raise ValueError(f'"{folder}" holds no runs{hint}')
    records: list[tuple[Path, str, RunRecord]] = []
    damaged: list[str] = []
    for file in record_files(folder, damaged):
        try:
            record = read_record(file)
            spec = record.spec
            key = spec.key
            if (spec.task, spec.norm, key) != file.parts[-4:-1]:
                raise RecordError(f"{file}: holds the record of another run ({spec.task}/{spec.norm}/{key})")
            taken = sorted(n for n in record.metrics if n in FIXED or n.startswith(PREFIXES))
            if taken:
                raise RecordError(f"{file}: a metric can not be named {', '.join(taken)}: a column has that name")
            records.append((file, key, record))
        except RecordError as error:
            damaged.append(str(error))
    if damaged and strict:
        raise ValueError("\n".join(damaged))
    return records, {"folder": str(folder), "damaged": damaged}


def _frame(
    records: Sequence[tuple[Path | None, str, RunRecord]], planned: Mapping[str, Mapping[str, str]] | None = None
) -> pd.DataFrame:
    rows = [_row(file, number, key, record) for number, (file, key, record) in enumerate(records)]
    _mark_stale(rows, [record for _, _, record in records], planned or {})
    names = dict.fromkeys(FIXED)
    for row in rows:
        names.update(dict.fromkeys(row))
    options = sorted(n for n in names if n.startswith(PREFIXES))
    metrics = sorted(n for n in names if n not in FIXED and not n.startswith(PREFIXES))
    rows.sort(key=lambda r: (r["task"], natural(r["row"]), *(natural(r.get(o)) for o in options), r["seed"], r["key"]))
    ordered = [*IDENTITY, *options, *metrics, *(n for n in FIXED if n not in IDENTITY)]
    columns: dict[str, Any] = {}
    for name in ordered:
        values = [row.get(name) for row in rows]
        if name in metrics or name == "seconds":
            columns[name] = pd.Series(values, dtype="float64")
        elif name == "finished":
            columns[name] = pd.to_datetime(pd.Series(values, dtype=object), utc=True)
        else:
            # object first: a missing option must not turn the integers of others into floats
            series = pd.Series(values, dtype=object)
            columns[name] = series if any(v is None for v in values) else series.infer_objects()
    columns["stale"] = columns["stale"].astype(bool)
    columns["repeats"] = columns["repeats"].astype(bool)
    return pd.DataFrame(columns)


def _row(file: Path | None, number: int, key: str, record: RunRecord) -> dict[str, Any]:
    spec, environment, evidence = record.spec, dict(record.environment), dict(record.evidence)
    label = spec.norm_label or _label(spec.norm, spec.norm_options)
    # A setting field counts as part of the row only where a person gave it, which shows in the label.
    identity = {k: v for k, v in spec.norm_options.items() if k not in _SETTING_FIELDS or f"{k}=" in label}
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
        **{f"option.{k}": _plain(v) for k, v in spec.task_options.items()},
        **{f"norm.{k}": _plain(v) for k, v in spec.norm_options.items()},
        **(record.metrics if record.status == "ok" else {}),
        **{name: str(evidence.pop(name, None) or "") for name in EVIDENCE},
        **{f"evidence.{k}": _plain(v) for k, v in evidence.items()},
        "finished": _finished(environment.pop("finished", None), file, number),
        **{name: _plain(environment.pop(name, None)) for name in ENVIRONMENT},
        **{f"environment.{k}": _plain(v) for k, v in environment.items()},
        "seconds": record.seconds,
        "repeats": NORM_BATCH in spec.task_options
        and spec.task_options[NORM_BATCH] is None
        and record.evidence.get("mixes_samples") is not True,
        "stale": False,
        "file": str(file or ""),
    }


def _mark_stale(
    rows: list[dict[str, Any]], records: Sequence[RunRecord], planned: Mapping[str, Mapping[str, str]]
) -> None:
    """A norm's version, a task's version and a setting's data: of each only one stays, see the module's header."""
    # per run (of what, version) pairs: it stays if it has the kept version of each
    steps: list[tuple[str, list[list[tuple[Hashable, str]]]]] = [
        ("task", [[(r["task"], r["task_version"])] for r in rows]),
        # the norms that task options name are norms of the run like its own
        ("norm", [[(s.norm, s.norm_version), *s.further_norms.values()] for s in (r.spec for r in records)]),
        ("data", [[(_setting(r), r["data_checksum"])] for r in rows]),
    ]
    for kind, found in steps:
        newest: dict[Hashable, tuple[datetime, str]] = {}
        fresh = [(row, versions) for row, versions in zip(rows, found, strict=True) if not row["stale"]]
        for row, versions in fresh:
            for place, version in versions:
                candidate = (row["finished"], version)
                newest[place] = max(newest.get(place, candidate), candidate)
        kept = {place: version for place, (_, version) in newest.items()}
        kept.update(planned.get(kind, {}))
        for row, versions in fresh:
            row["stale"] = any(version != kept[place] for place, version in versions)


def _setting(row: Mapping[str, Any]) -> Hashable:
    norm_batch = f"option.{NORM_BATCH}"
    return (row["task"], *sorted((k, str(v)) for k, v in row.items() if k.startswith("option.") and k != norm_batch))


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


def _whole(value: float | None) -> float | int | None:
    """Records store every number of a history as a float; epochs are counted."""
    return int(value) if value is not None and float(value).is_integer() else value


def _finished(given: Any, file: Path | None, number: int) -> datetime:
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
    return datetime.fromtimestamp(number, UTC) if given is None else _finished(None, file, number)


def distinct(values: Iterable[Any]) -> list[Any]:
    """The different values in natural order, nothing (None, NaN) last."""
    return sorted({None if is_nothing(v) else v for v in set(values)}, key=natural)
