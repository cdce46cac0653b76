"""Which records take part: versions and data are never mixed.

Of a norm, of a task, of a plugin's model or optimizer and of the data under one name that version takes part which was
planned last (`results.store.write_versions`), and where nothing says so, that of the record which finished last. In a
task without the option `dataset` any option may name the data; the rule then holds for each setting by itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from results.record import RunSpec, dataset_of
from results.store import Versions

NORM_BATCH = "norm_batch_size"


def mark_stale(rows: list[dict[str, Any]], specs: Sequence[RunSpec], planned: Versions | None) -> dict[str, int]:
    """Set `stale` in the rows of a frame that do not take part.

    Args:
        rows: of `results.frame`, none of them stale yet.
        specs: their runs.
        planned: what was planned last, if that is known.

    Returns:
        {"task / norm": rows that are stale for their data alone}.
    """
    _mark_versions(rows, specs, planned)
    return _mark_data(rows, specs, planned)


def _mark_versions(rows: list[dict[str, Any]], specs: Sequence[RunSpec], planned: Versions | None) -> None:
    """Of each task and each norm one version stays, see the module's header."""
    noted: list[tuple[dict[str, str], list[list[tuple[str, str]]]]] = [
        (planned["task"] if planned else {}, [[(s.task, s.task_version)] for s in specs]),
        # the norms that task options name are norms of the run like its own
        (planned["norm"] if planned else {}, [[(s.norm, s.norm_version), *s.further_norms.values()] for s in specs]),
        (planned["part"] if planned else {}, [[*s.part_versions.items()] for s in specs]),
    ]
    for last, found in noted:
        # per run (of what, version) pairs: it stays if it has the kept version of each
        fresh = [(row, pairs) for row, pairs in zip(rows, found, strict=True) if not row["stale"]]
        kept = _newest((place, version, row["finished"]) for row, pairs in fresh for place, version in pairs)
        kept.update(last)
        for row, pairs in fresh:
            row["stale"] = any(version != kept[place] for place, version in pairs)


def _mark_data(rows: list[dict[str, Any]], specs: Sequence[RunSpec], planned: Versions | None) -> dict[str, int]:
    """Of the data of one name those stay which were planned last, else the newest; returns {"task / norm": left out}.

    All settings have the same data then, those that were not planned last time, too. Without a name (see the module's
    header) each setting by itself has those planned last, if any of its runs has them.
    """
    places: dict[Hashable, list[tuple[dict[str, Any], RunSpec]]] = defaultdict(list)
    for row, spec in zip(rows, specs, strict=True):
        if not row["stale"]:
            name = dataset_of(spec)
            places[(spec.task, name) if name else _setting(row)].append((row, spec))
    left: Counter[str] = Counter()
    for found in places.values():
        spec = found[0][1]
        named = dataset_of(spec)
        kept = set(planned["data"].get(spec.task, {}).get(named, []) if planned else [])
        if not kept or not named:  # a setting has one data, whatever the others were planned with
            of_plan = [(row, spec) for row, spec in found if spec.data_checksum in kept]
            times = (("", spec.data_checksum, row["finished"]) for row, spec in of_plan or found)
            kept = set(_newest(times).values())
        for row, spec in found:
            row["stale"] = spec.data_checksum not in kept
            left[f"{spec.task} / {spec.norm}"] += row["stale"]
    return dict(+left)


def _newest(found: Iterable[tuple[str, str, datetime]]) -> dict[str, str]:
    """place -> the version of its record that finished last, from (place, version, time)."""
    newest: dict[str, tuple[datetime, str]] = {}
    for place, version, time in found:
        newest[place] = max(newest.get(place, (time, version)), (time, version))
    return {place: version for place, (_, version) in newest.items()}


def _setting(row: Mapping[str, Any]) -> Hashable:
    norm_batch = f"option.{NORM_BATCH}"
    return (row["task"], *sorted((k, str(v)) for k, v in row.items() if k.startswith("option.") and k != norm_batch))
