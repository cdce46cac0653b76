"""Choosing an option's value per norm by validation, on seeds that no table then uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pandas as pd

from results.facts import Facts, present_metrics, task_facts
from results.frame import BASELINE
from results.metrics import Metric, metric, nearest
from results.rows import Run, current, distinct, natural, option_columns, plain_records
from results.statistics import summarize


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
        metric_name: None: the task's validation metric (results.facts).
        seeds: the selection seeds; None: the lower half of a task's seeds, at least one.

    Returns:
        A frame whose `option.<option>` is None where a choice was made, with `selected.<option>` instead (None where
        nothing could be chosen: the first value's runs then stand in), and `attrs["selected"]`: task -> option,
        metric, selection seeds and reported seeds.

    Raises:
        ValueError: unknown option or metric (with the nearest); an option that a task folds over; a task with
            fewer than two seeds, or with no seed left to choose or to report; a metric without direction.
    """
    df = current(df)
    column = f"option.{option}"
    known = [c.removeprefix("option.") for c in option_columns(df)]
    if option not in known:
        raise ValueError(f'unknown option "{option}"; options: {", ".join(known)}{nearest(option, known)}')
    kept = []
    stories: dict[str, dict[str, Any]] = {}
    for task in distinct(df["task"]):
        part = df[df["task"] == task].copy()
        facts = task_facts(part, task)
        if option == facts.folds_over and not part[column].isna().all():
            raise ValueError(
                f"{option} can not be selected: what counts are all of its values, not the one that does best"
            )
        if len(distinct(part[column])) < 2 or not present_metrics(part):
            kept.append(part)
            continue
        choosing, reported = _split(task, option, part["seed"].tolist(), seeds)
        subject = _subject(facts, metric_name)
        others = [c for c in option_columns(part) if c != column]
        places: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
        baseline = [BASELINE] if BASELINE in part.columns else []
        runs = plain_records(part, ["row", "seed", "status", "key", *others, column, subject.name, *baseline])
        for run in runs:
            places[_place(run, others)].append(run)
        chosen = {place: _choose(found, column, subject, choosing) for place, found in places.items()}
        values = [chosen[_place(run, others)] for run in runs]
        part[f"selected.{option}"] = pd.Series(
            [v if by_metric else None for v, by_metric in values], part.index, object
        )
        keep = [run["seed"] in reported and run[column] == v for run, (v, _) in zip(runs, values, strict=True)]
        part[column] = pd.Series([None] * len(part), part.index, object)  # chosen per norm: no setting any more
        if baseline:
            part[BASELINE] = pd.Series(_baselines(runs, keep, others), part.index, object)
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


def _baselines(runs: list[Run], keep: list[bool], others: list[str]) -> list[str | None]:
    """The baseline of each run: its own may not be among those that are kept, since another value was chosen there.

    It is then the kept run with its seed, in the place where the runs of its place have their baselines.
    """
    by_key = {run["key"]: run for run in runs}
    kept = {(_place(run, others), run["seed"]): str(run["key"]) for run, k in zip(runs, keep, strict=True) if k}
    places = {_place(run, others): _place(by_key[run[BASELINE]], others) for run in runs if run[BASELINE] in by_key}
    found = []
    for run in runs:
        home = places.get(_place(run, others))
        found.append(kept.get((home, run["seed"]), run[BASELINE]) if run[BASELINE] and home else run[BASELINE])
    return found


def _subject(facts: Facts, metric_name: str | None) -> Metric:
    task, name, measured = facts.task, metric_name or facts.validation, facts.in_order(facts.present)
    if name not in measured:
        if name not in facts.declared.metrics:
            metric(name)  # an unknown one is another mistake than one that no run here measured
        raise ValueError(f'task "{task}" can not select by "{name}": not measured; measured: {", ".join(measured)}')
    subject = facts.metric(name)
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
