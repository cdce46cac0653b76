"""All figures that a frame supports, and why the others are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from results.facts import task_facts
from results.figures.asked import arranged, check_metric, numeric_options, the_task
from results.figures.axes import axes_cubes
from results.figures.cost import cost_against_accuracy
from results.figures.curves import option_curve
from results.figures.differences import paired_differences
from results.figures.domains import domain_heat_map
from results.figures.drawing import Drawing
from results.figures.learning import learning_curves
from results.figures.profiles import performance_profiles
from results.figures.ranks import critical_difference
from results.figures.remembered import remembering
from results.metrics import nearest
from results.rows import current, distinct, option_columns
from results.tables.build import REFERENCE

COSTS = ("step_seconds", "peak_memory_mb", "search_seconds")
"""The costs that are drawn, each where it was measured."""


@dataclass(frozen=True)
class Asked:
    """What figures are made of.

    Attributes:
        df: all runs that are drawn, of current versions.
        history: of `results.load_history`, or None.
        tasks: those to draw.
        option, metric: None for each figure's own choice.
        reference: the norm that others are compared with.
    """

    df: pd.DataFrame
    history: pd.DataFrame | None
    tasks: tuple[str, ...]
    option: str | None
    metric: str | None
    reference: str


Made = Iterator[tuple[str, Callable[[], Drawing]]]
"""(what it is about, how it is made) of each figure of a kind; making it may raise ValueError, with the reason."""


def _curves(asked: Asked) -> Made:
    for task in asked.tasks:
        options = [asked.option] if asked.option else numeric_options(arranged(asked.df, task, asked.reference)[0])
        if not options:
            yield task, partial(_refuse, f"{task}: no option takes two numbers while all others stay")
        for option in options:
            draw = partial(option_curve, asked.df, option, asked.metric, task, asked.reference)
            yield f"{task}, {option}", draw


def _learning(asked: Asked) -> Made:
    for task in asked.tasks:
        if asked.history is None:
            yield task, partial(_refuse, f"{task}: no history is given")
        elif task not in set(asked.history["task"]):
            yield task, partial(_refuse, f"{task}: no run recorded an epoch")
        else:
            yield task, partial(learning_curves, asked.history, None, task, asked.df, asked.reference)


def _costs(asked: Asked) -> Made:
    for task in asked.tasks:
        there = task_facts(asked.df, task).present
        for cost in [c for c in COSTS if c in there] or COSTS[:1]:
            draw = partial(cost_against_accuracy, asked.df, task, cost, asked.metric, asked.reference)
            yield f"{task}, {cost}", draw


def per_task(draw: Callable[[Asked, str], Drawing]) -> Callable[[Asked], Made]:
    """An entry of FIGURES: one figure for each task. draw: (what is asked for, the task)."""
    return lambda asked: ((task, partial(draw, asked, task)) for task in asked.tasks)


def whole(draw: Callable[[Asked], Drawing]) -> Callable[[Asked], Made]:
    """An entry of FIGURES: one figure for all tasks."""
    return lambda asked: iter([("", partial(draw, asked))])


FIGURES: tuple[tuple[str, Callable[[Asked], Made]], ...] = (
    ("option_curve", _curves),
    ("learning_curves", _learning),
    ("cost_against_accuracy", _costs),
    ("domain_heat_map", per_task(lambda asked, t: domain_heat_map(asked.df, t, asked.metric, asked.reference))),
    ("critical_difference", whole(lambda asked: critical_difference(asked.df, asked.reference))),
    ("performance_profiles", whole(lambda asked: performance_profiles(asked.df, asked.reference))),
    ("paired_differences", per_task(lambda asked, t: paired_differences(asked.df, t, asked.metric, asked.reference))),
    ("axes_cubes", whole(lambda asked: axes_cubes(asked.df))),
)
"""Name of a kind of figure -> the figures of that kind that are tried."""


def draw_all(
    df: pd.DataFrame,
    history: pd.DataFrame | None = None,
    *,
    only: Sequence[str] = (),
    option: str | None = None,
    metric: str | None = None,
    task: str | None = None,
    reference: str = "bn",
) -> tuple[list[Drawing], dict[str, str]]:
    """All figures that a frame supports, and those that it does not, with the reasons.

    Args:
        df: from `results.load`, or a part of it.
        history: from `results.load_history`, for learning curves.
        only: kinds of figures (names in FIGURES); none: all.
        option: of the option curves; None: every option that takes several numbers while others stay.
        metric: None: each task's headline.
        task: None: all.
        reference: label or name of the norm that others are compared with.

    Returns:
        The drawings, and "kind (task, option)" -> why there is none.

    Raises:
        ValueError: an unknown kind, task, option, metric or reference, with the nearest; no runs at all.
    """
    names = [name for name, _ in FIGURES]
    for name in only:
        if name not in names:
            raise ValueError(f'unknown figure "{name}"; figures: {", ".join(names)}{nearest(name, names)}')
    whole_df = current(df)
    if not len(whole_df):
        raise ValueError("no runs: there is nothing to draw")
    tasks = [the_task(whole_df, task)] if task is not None else distinct(whole_df["task"].tolist())
    if metric is not None:
        check_metric(whole_df, metric)
    if option is not None:
        known = [c.removeprefix("option.") for c in option_columns(whole_df)]
        if option not in known:
            raise ValueError(
                f'unknown option "{option}"; options: {", ".join(known) or "none"}{nearest(option, known)}'
            )
    norms = distinct([*whole_df["norm_label"], *whole_df["norm"]])
    if reference not in (*norms, REFERENCE):  # without that norm nothing is compared, as in tables
        raise ValueError(f'unknown reference "{reference}"; norms: {", ".join(norms)}{nearest(reference, norms)}')
    asked = Asked(whole_df, history, tuple(map(str, tasks)), option, metric, reference)
    drawings: list[Drawing] = []
    refused: dict[str, str] = {}
    with remembering():
        for kind, entries in FIGURES:
            if only and kind not in only:
                continue
            for about, make in entries(asked):
                try:
                    drawings.append(make())
                except ValueError as error:
                    refused[f"{kind} ({about})" if about else kind] = str(error)
    return drawings, refused


def _refuse(reason: str) -> Drawing:
    raise ValueError(reason)
