"""What a figure is asked for, found in a frame: the task, its arranged runs, the metric, the numeric option.

Every function raises ValueError with what there is and the nearest name; `results.figures.every` tells the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import pandas as pd

from results.escape import cut, one_line
from results.facts import present_metrics
from results.figures.remembered import remembered
from results.metrics import Metric, metric, nearest
from results.rows import current, distinct, option_columns, value_text
from results.tables.pivot import Block, Pivot, every_pivot

MOST_PANELS = 12
"""Panels of one figure; more settings are a choice to make."""
_MOST_NAMES = 40


def the_task(df: pd.DataFrame, task: str | None) -> str:
    """The task that is asked for; None: the only one.

    Raises:
        ValueError: no run, no such task, or several and none chosen.
    """
    there = distinct(current(df)["task"].tolist()) if len(df) else []
    if not there:
        raise ValueError("no runs: there is nothing to draw")
    if task is None and len(there) > 1:
        raise ValueError(f"runs of {len(there)} tasks; choose one: task={_named(there)}")
    if task is not None and task not in there:
        raise ValueError(f'unknown task "{task}"; tasks: {_named(there)}{nearest(task, there)}')
    return str(there[0] if task is None else task)


@remembered
def arranged(df: pd.DataFrame, task: str | None, reference: str) -> tuple[Pivot, pd.DataFrame]:
    """The pivot of one task, and its current runs, unfolded.

    Raises:
        ValueError: as `the_task`.
    """
    name = the_task(df, task)
    part = current(df)[current(df)["task"] == name]
    (pivot,) = every_pivot(part, reference)
    return pivot, part


def the_metric(pivot: Pivot, name: str | None) -> Metric:
    """The metric that is asked for; None: the task's headline.

    Raises:
        ValueError: an unknown metric, or one that no run measured.
    """
    if name is None and pivot.facts.headline is None:
        raise ValueError(f"{pivot.task}: no run measured a metric with a direction ({ends(pivot)})")
    measured = [m.name for m in pivot.metrics]
    asked = str(pivot.facts.headline if name is None else name)
    if asked not in measured:
        if asked not in pivot.facts.declared.metrics:
            metric(asked)  # an unknown metric is another mistake than one that is not measured
        raise ValueError(f'{pivot.task}: no run measured "{asked}"; measured: {_named(measured)}')
    return pivot.facts.metric(asked)


def check_metric(df: pd.DataFrame, name: str) -> None:
    """Raises ValueError unless some run of the frame measured the metric."""
    from results.derived import with_derived

    there = present_metrics(with_derived(df)) if len(df) else []
    if name not in there:
        metric(name)
        raise ValueError(f'no run here measured "{name}"; measured: {_named(there)}')


def the_option(pivot: Pivot, name: str) -> int:
    """The place of a varying numeric option in the pivot's blocks.

    Raises:
        ValueError: no such option, one value only, or values that are no numbers.
    """
    known = [name for name, _ in pivot.fixed] + [o.removeprefix("option.") for o in pivot.varying]
    if name not in known:
        raise ValueError(f'{pivot.task}: unknown option "{name}"; options: {_named(known)}{nearest(name, known)}')
    column = f"option.{name}"
    found = numbers(pivot, name) if column in pivot.varying else []
    if len(found) < 2:
        values = [block[pivot.varying.index(column)] for block in pivot.blocks] if column in pivot.varying else []
        texts = [value_text(name, v) for v in distinct(values)] or [dict(pivot.fixed).get(name, "?")]
        raise ValueError(f"{pivot.task}: {name} takes fewer than two numbers (values: {_named(texts)})")
    return pivot.varying.index(column)


def numeric_options(pivot: Pivot) -> list[str]:
    """The task options that take two or more numbers while all others stay."""
    names = [o.removeprefix("option.") for o in pivot.varying]
    return [name for name in names if len(numbers(pivot, name)) > 1 and pivot.sweeps(name)]


def numbers(pivot: Pivot, option: str) -> list[float]:
    """The numbers among the values of a varying option, ascending."""
    place = pivot.varying.index(f"option.{option}")
    return sorted({float(block[place]) for block in pivot.blocks if is_number(block[place])})


def is_number(value: object) -> bool:
    """A finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def setting_text(pivot: Pivot, block: Block, without: Sequence[str] = ()) -> str:
    """What tells one setting from the others: 'method=dann, shot=5'; "" where all have it.

    Args:
        block: values of pivot.varying.
        without: options that stand elsewhere, as on an axis.
    """
    implied = {name for found in pivot.implied.values() for name in found}
    parts = []
    for column, value in zip(pivot.varying, block, strict=True):
        name = column.removeprefix("option.")
        if name not in without and name not in implied:
            parts.append(f"{one_line(name)}={cut(one_line(value_text(name, value)), 30)}")
    return ", ".join(parts)


def ends(pivot: Pivot) -> str:
    """How the runs ended: '3 runs: 1 ok, 2 failed'."""
    count, total = pivot.holes()
    return f"{total} run{'s' * (total != 1)}: {', '.join(f'{n} {end}' for end, n in count.items() if n)}"


def check_panels(count: int, what: str) -> None:
    """Raises ValueError for more panels than one figure holds."""
    if count > MOST_PANELS:
        raise ValueError(
            f"{what}: {count} panels, at most {MOST_PANELS} are readable; draw a part of the frame, "
            'as df[df["option.<name>"] == value]'
        )


def varying_columns(df: pd.DataFrame) -> list[str]:
    """The option columns of one task's runs with more than one value."""
    return [c for c in option_columns(df) if len(distinct(df[c].tolist())) > 1]


def _named(names: Sequence[object]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(cut(str(n), 80) for n in names[:_MOST_NAMES]) + more or "none"
