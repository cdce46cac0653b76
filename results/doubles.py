"""Several records of one run: one takes part, and the others are named.

A key has one folder, so a folder of results has one record of it. Others get in by hand (a copied folder), or are given
in memory. They are no second measurement: two records of one key are equal but for times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from pathlib import Path

from results.escape import visible
from results.record import RecordError, RunRecord, RunSpec

_KEY = re.compile(r"[0-9a-f]{24}")


def told_apart(elsewhere: Iterable[tuple[Path, RunSpec]], known: Collection[str], damaged: list[str]) -> list[str]:
    """A line about each double among records that are not in their runs' folders.

    A double is one more record of a run that has one in its place. In the folder of another run it is none: that run
    has a damaged record then, which is made again.

    Args:
        elsewhere: their files, and the runs that they say they are of.
        known: the keys of the records that are in their places.
        damaged: takes a line about each that is none.
    """
    doubles = []
    for file, spec in elsewhere:
        folder = file.parts[-2]
        if spec.key in known and (folder == spec.key or not _KEY.fullmatch(folder)):
            doubles.append(f"{visible(str(file))}: a double of the record in {_place(spec)}")
        else:
            damaged.append(str(RecordError(f"{file}: holds the record of another run ({_place(spec)})")))
    return doubles


def newest(
    records: Iterable[RunRecord], finished: Callable[[object, int], datetime]
) -> tuple[dict[str, RunRecord], list[str]]:
    """Of each key the record that finished last, of equal ones the last; and a line about each other one.

    Args:
        finished: the time of a record from its own word and its number.
    """
    kept: dict[str, tuple[datetime, RunRecord]] = {}
    doubles = []
    for number, record in enumerate(records):
        key, time = record.spec.key, finished(record.environment.get("finished"), number)
        if key in kept:
            doubles.append(f"{_place(record.spec)}: an older one of several records of this run")
        if key not in kept or time >= kept[key][0]:
            kept[key] = time, record
    return {key: record for key, (_, record) in kept.items()}, doubles


def _place(spec: RunSpec) -> str:
    """The folder of a run below `runs/`, in characters that can be shown."""
    return visible(f"{spec.task}/{spec.norm}/{spec.key}")
