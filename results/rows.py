"""The rows of a frame as plain mappings, and their values: their order, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from results.versions import NORM_BATCH

Run = dict[str, Any]
"""One row of a frame: column -> value, None for every kind of nothing."""


def current(df: pd.DataFrame) -> pd.DataFrame:
    """The rows of current versions."""
    return df[~df["stale"].astype(bool)] if "stale" in df.columns else df


def bare(df: pd.DataFrame) -> pd.DataFrame:
    """The same frame without `attrs`, for code that reads many columns: pandas copies `attrs` with every one."""
    return pd.DataFrame(df)


def option_columns(df: pd.DataFrame) -> list[str]:
    """The `option.<name>` columns that hold anything, in alphabetical order."""
    df = bare(df)
    return sorted(c for c in map(str, df.columns) if c.startswith("option.") and df[c].notna().any())


def plain_records(df: pd.DataFrame, columns: Sequence[str]) -> list[Run]:
    """The frame's rows as mappings, with None for every kind of nothing."""
    df = bare(df)
    lists = [df[c].tolist() for c in columns]
    for i, c in enumerate(columns):
        if df[c].isna().any():
            lists[i] = [None if is_nothing(v) else v for v in lists[i]]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def value_text(option: str, value: Any) -> str:
    """An option's value as printed in a heading."""
    if value is None:
        return "SGD batch" if option == NORM_BATCH else "none"
    return str(value)


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


def distinct(values: Iterable[Any]) -> list[Any]:
    """The different values in natural order, nothing (None, NaN) last."""
    return sorted({None if is_nothing(v) else v for v in set(values)}, key=natural)
