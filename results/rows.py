"""The rows of a frame as plain mappings, and what an option's value is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from results.frame import NORM_BATCH, is_nothing

Run = dict[str, Any]
"""One row of a frame: column -> value, None for every kind of nothing."""


def current(df: pd.DataFrame) -> pd.DataFrame:
    """The rows of current versions."""
    return df[~df["stale"].astype(bool)] if "stale" in df.columns else df


def option_columns(df: pd.DataFrame) -> list[str]:
    """The `option.<name>` columns that hold anything, in alphabetical order."""
    return sorted(c for c in map(str, df.columns) if c.startswith("option.") and not df[c].isna().all())


def plain_records(df: pd.DataFrame, columns: Sequence[str]) -> list[Run]:
    """The frame's rows as mappings, with None for every kind of nothing."""
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
