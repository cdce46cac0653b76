"""Runs without a norm batch, for frames that are grouped by hand; tables need no such step."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd

from results.frame import NORM_BATCH
from results.rows import distinct, is_nothing, option_columns, plain_records


def in_every_norm_batch(df: pd.DataFrame) -> pd.DataFrame:
    """The runs, those without a norm batch once for every norm batch.

    A norm that does not mix samples gives the same numbers for every norm batch, so its run is made once and has none
    (`repeats`, and None in `option.norm_batch_size`). Grouped by that option it would stand apart from the norms that
    it is compared with.

    Args:
        df: from `results.load`, or a part of it.

    Returns:
        A frame in which such a run stands once for every norm batch that other runs of its task have, those with the
        same other options if there are any; alike but for `option.norm_batch_size`. It stays as it is where no run of
        its task has a norm batch.
    """
    column = f"option.{NORM_BATCH}"
    if column not in df.columns:
        return df.copy()
    others = ["task", *(c for c in option_columns(df) if c != column)]
    runs = plain_records(df, [*others, column, "repeats"])
    batches: dict[tuple[Any, ...], set[Any]] = defaultdict(set)
    for run in runs:
        if not run["repeats"] and not is_nothing(run[column]):
            for place in (tuple(run[o] for o in others), (run["task"],)):
                batches[place].add(run[column])
    rows, values = [], []
    for row, run in enumerate(runs):
        place = tuple(run[o] for o in others)
        homes = batches[place] or batches[(run["task"],)] if run["repeats"] else set()
        for batch in distinct(homes) or [run[column]]:
            rows.append(row)
            values.append(batch)
    result = df.iloc[rows].reset_index(drop=True)
    column_of = pd.Series(values, result.index, object)
    result[column] = column_of if column_of.isna().any() else column_of.infer_objects()
    result.attrs = dict(df.attrs)
    return result
