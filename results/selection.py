"""Choosing an option's value per norm by validation, on seeds that no table then uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pandas as pd

from results.frame import HELD_OUT, distinct, natural
from results.metrics import VALIDATION, Metric, metric, metric_or_plain, nearest
from results.statistics import summarize
from results.tables.pivot import Run, current, option_columns, plain_records, present_metrics


def select(
    df: pd.DataFrame, option: str, metric_name: str | None = None, seeds: Iterable[int] | None = None
) -> pd.DataFrame:
    """Each norm's own value of `option`, chosen by validation on seeds that the result does not contain.

    For each task, row and setting of the other options: of the values with the smallest share of diverged and failed
    runs on the selection seeds, the one with the best mean validation metric there (of equal ones the smaller value).
    Its runs on the other seeds are kept. A task in which the option does not vary, or without one good run, is left as
    it is.

    Args:
        df: from `results.load`.
        option: a task option, without prefix.
        metric_name: None: the task's validation metric (`metrics.VALIDATION`, else "val_top1").
        seeds: the selection seeds; None: the lower half of a task's seeds, at least one.

    Returns:
        A frame whose `option.<option>` is None where a choice was made, with `selected.<option>` instead (None where
        nothing could be chosen: the first value's runs then stand in), and `attrs["selected"]`: task -> option,
        metric, selection seeds and reported seeds.

    Raises:
        ValueError: unknown option or metric (with the nearest); `held_out`; a task with fewer than two seeds, or with
            no seed left to choose or to report; a metric without direction.
    """
    df = current(df)
    column = f"option.{option}"
    known = [c.removeprefix("option.") for c in option_columns(df)]
    if option not in known:
        raise ValueError(f'unknown option "{option}"; options: {", ".join(known)}{nearest(option, known)}')
    if option == HELD_OUT:
        raise ValueError(f"{option} can not be selected: what counts are all of its values, not the one that does best")
    kept = []
    stories: dict[str, dict[str, Any]] = {}
    for task in distinct(df["task"]):
        part = df[df["task"] == task].copy()
        if len(distinct(part[column])) < 2 or not present_metrics(part):
            kept.append(part)
            continue
        choosing, reported = _split(task, option, part["seed"].tolist(), seeds)
        subject = _subject(task, part, metric_name)
        others = [c for c in option_columns(part) if c != column]
        places: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
        runs = plain_records(part, ["row", "seed", "status", *others, column, subject.name])
        for run in runs:
            places[_place(run, others)].append(run)
        chosen = {place: _choose(found, column, subject, choosing) for place, found in places.items()}
        values = [chosen[_place(run, others)] for run in runs]
        part[f"selected.{option}"] = pd.Series(
            [v if by_metric else None for v, by_metric in values], part.index, object
        )
        keep = [run["seed"] in reported and run[column] == v for run, (v, _) in zip(runs, values, strict=True)]
        part[column] = pd.Series([None] * len(part), part.index, object)  # chosen per norm: no setting any more
        kept.append(part[keep])
        stories[task] = {"option": option, "metric": subject.name, "seeds": choosing, "reported": reported}
    result = pd.concat(kept, ignore_index=True)
    result.attrs = {**df.attrs, "selected": stories}
    return result


def _split(task: str, option: str, present: Iterable[Any], seeds: Iterable[int] | None) -> tuple[list[int], list[int]]:
    present = sorted({int(s) for s in present})
    if len(present) < 2:
        raise ValueError(
            f'selecting {option} in task "{task}" needs two seeds or more (some choose, the others are reported); '
            f"it has {present}"
        )
    choosing = present[: len(present) // 2] if seeds is None else [s for s in present if s in set(seeds)]
    reported = [s for s in present if s not in choosing]
    if not choosing or not reported:
        raise ValueError(
            f'selecting {option} in task "{task}": of its seeds {present}, {choosing or "none"} would choose and '
            f"{reported or 'none'} would be reported"
        )
    return choosing, reported


def _subject(task: str, part: pd.DataFrame, metric_name: str | None) -> Metric:
    name = metric_name or VALIDATION.get(task, "val_top1")
    measured = present_metrics(part)
    subject = metric_or_plain(name) if name in measured else metric(name)
    if name not in measured:
        raise ValueError(f'task "{task}" can not select by "{name}": not measured; measured: {", ".join(measured)}')
    if subject.higher_is_better is None:
        raise ValueError(f'task "{task}" can not select by "{name}": neither direction is better')
    return subject


def _place(run: Run, others: list[str]) -> tuple[Any, ...]:
    return (run["row"], *(run[o] for o in others))


def _choose(runs: list[Run], column: str, subject: Metric, choosing: list[int]) -> tuple[Any, bool]:
    """(value, chosen by the metric); not so where no selection run ended well or diverged."""
    candidates = []
    for value in distinct(run[column] for run in runs):
        tried = [r for r in runs if r[column] == value and r["seed"] in choosing]
        ended = [r for r in tried if r["status"] in ("ok", "diverged")]
        scores = [r[subject.name] for r in tried if r["status"] == "ok" and r[subject.name] is not None]
        mean, _, n, _ = summarize(scores)
        if ended:
            bad = 1 - n / len(tried)
            score = 0.0 if mean is None else -mean if subject.higher_is_better else mean
            candidates.append((bad, score, natural(value), value))
    if not candidates:
        return distinct(run[column] for run in runs)[0], False
    return min(candidates, key=lambda c: c[:3])[3], True
