"""The epochs of runs: one row per run and epoch, alone or beside the frame of the runs, of one reading of a folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from results.frame import Read, frame, read_folder

_KEEP = ("task", "norm", "norm_label", "row", "seed", "status", "key")

Epochs = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Whole:
    """All that a folder holds of its runs.

    Attributes:
        df: of `results.load`.
        history: of `results.load_history`.
        epochs: key -> one mapping per epoch, as the record has them.
        artifacts: key -> names of files in the run's folder, of runs that have any.
    """

    df: pd.DataFrame
    history: pd.DataFrame
    epochs: Mapping[str, Epochs]
    artifacts: Mapping[str, tuple[str, ...]]


def load_history(
    folder: str | Path, strict: bool = False, stale: bool = False, keys: Collection[str] | None = None
) -> pd.DataFrame:
    """One row per run and epoch: task, norm, norm_label, row, seed, status, key, epoch and one column per quantity of
    the history. Join with `load` on "key" for options. Arguments and errors as `load`.

    Epochs count from 1. Where a task records none (its rows may be tenths of its steps), `epoch` numbers the
    rows in their order, from 1 too.
    """
    read = read_folder(folder, strict, keys)
    return _history(read, frame(read, stale))


def load_whole(
    folder: str | Path, strict: bool = False, stale: bool = False, keys: Collection[str] | None = None
) -> Whole:
    """The runs, their epochs and their files, in half the time of two readings. Arguments and errors as `load`."""
    read = read_folder(folder, strict, keys)
    df = frame(read, stale)
    epochs = {key: record.history for _, key, record in read.records}
    artifacts = {key: tuple(record.artifacts) for _, key, record in read.records if record.artifacts}
    return Whole(df, _history(read, df), epochs, artifacts)


def _history(read: Read, df: pd.DataFrame) -> pd.DataFrame:
    """The rows of the runs in a frame, in its order."""
    runs = df[list(_KEEP)].to_dict("records")
    epochs = {key: record.history for _, key, record in read.records}
    lengths = [len(epochs[run["key"]]) for run in runs]
    columns: dict[str, list[Any]] = {
        name: [run[name] for run, length in zip(runs, lengths, strict=True) for _ in range(length)] for name in _KEEP
    }
    total = sum(lengths)
    numbers: list[float | int | None] = []
    columns["epoch"] = numbers
    quantities: dict[str, list[float | None]] = defaultdict(lambda: [None] * total)
    for run in runs:
        for number, entry in enumerate(epochs[run["key"]], start=1):
            for name, value in entry.items():
                if name not in columns:
                    quantities[name][len(numbers)] = value
            numbers.append(_whole(entry.get("epoch", number)))
    result = pd.DataFrame({**columns, **{n: pd.Series(v, dtype="float64") for n, v in quantities.items()}})
    attrs = {name: value for name, value in df.attrs.items() if name not in ("records", "tasks", "norms", "other_data")}
    result.attrs.update(attrs)
    return result


def _whole(value: float | None) -> float | int | None:
    """Records store every number of a history as a float; epochs are counted."""
    return int(value) if value is not None and float(value).is_integer() else value
