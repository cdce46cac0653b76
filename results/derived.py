"""Metrics that need several runs, as functions over the frame: the gain over source-only, and the numbers of a task
that holds out one domain after the other.

How such a metric ended is not how a single run ended, so it has a column of its own, `status.<metric>`: "ok",
"diverged", "failed", "skipped", "missing" (a run that it needs was not made), or None where it does not apply.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from results.facts import Facts, every_task
from results.frame import BASELINE, ENDED, METHOD, NORM_BATCH, metric_columns
from results.metrics import GAIN
from results.rows import Run, current, natural, option_columns, plain_records, value_text
from results.statistics import summarize

SOURCE_ONLY = "source_only"
OF_METHODS = frozenset({"forward", "trade_off", "discriminator_width", "mcd_steps"})
"""Where a folder does not name baselines, as all older ones: options that are null in a run with the method
SOURCE_ONLY, and no part of what it must agree in. A folder of today names each run's baseline by its key."""
LARGEST = ("composition_shift", "peak_memory_mb")
"""Metrics whose largest value over the held-out domains counts; of all others the mean does."""

_METHOD, _BATCH = (f"option.{name}" for name in (METHOD, NORM_BATCH))
_WORST_FIRST = ("failed", "diverged", "skipped")


def with_derived(df: pd.DataFrame, fold: bool = True) -> pd.DataFrame:
    """The current runs with every metric that needs several of them; after any selection, which works on single runs.

    Args:
        df: from `results.load`, or a part of it.
        fold: one row for the runs of all held-out domains (`fold_held_out`).
    """
    df = with_gain(df)
    return fold_held_out(df) if fold else df


def with_gain(df: pd.DataFrame) -> pd.DataFrame:
    """The current runs, with what each gained over its baseline.

    A run's gain is its task's headline metric less that of the run that it is compared with: of the same task, row and
    seed, and named by its key (BASELINE). Where the folder does not say which that is, it is the source-only run that
    agrees in every option but the method and those in OF_METHODS; of several the newest.

    Args:
        df: from `results.load`, or a part of it.

    Returns:
        The runs with the columns `gain` (NaN unless both runs ended well) and `status.gain`: as the run ended, else as
        its baseline did ("missing" if there is none), and None for a run that has no baseline. Unchanged if no run is
        a baseline, by key or by method.
    """
    df = current(df)
    facts = every_task(df)
    options = [c for c in option_columns(df) if c != _METHOD and c.removeprefix("option.") not in OF_METHODS]
    ends = f"{ENDED}{GAIN}"
    extra = [c for c in (_METHOD, BASELINE, GAIN, ends) if c in df.columns]
    subjects = [found.subject for found in facts.values() if found.subject in df.columns]
    columns = dict.fromkeys([*extra, *subjects, *options])
    runs = plain_records(df, ["task", "row", "seed", "status", "key", "finished", *columns])
    ages = sorted(runs, key=_age)
    by_key = {_keyed(run, run["key"]): run for run in ages}
    by_place = {_place(run, options): run for run in ages if run.get(_METHOD) == SOURCE_ONLY}
    comparing = {run["task"] for run in runs if _keyed(run, run.get(BASELINE)) in by_key}
    adapting = {run["task"] for run in by_place.values()}
    gains: list[tuple[float | None, str | None]] = []
    for run in runs:
        found, key = facts[run["task"]], run.get(BASELINE)
        if found.task not in comparing | adapting or found.subject not in columns:  # it may measure a gain of its own
            gains.append((run.get(GAIN), run.get(ends, run["status"] if GAIN in found.present else None)))
        elif key == "" or (key is None and (run.get(_METHOD) == SOURCE_ONLY or found.task not in adapting)):
            gains.append((None, None))
        else:
            baseline = by_place.get(_place(run, options)) if key is None else by_key.get(_keyed(run, key))
            gains.append(_gain(run, baseline, found.subject))
    if not comparing | adapting or not subjects:
        return df
    return df.assign(
        **{
            GAIN: pd.Series([gain for gain, _ in gains], df.index, "float64"),
            ends: pd.Series([status for _, status in gains], df.index, object),
        }
    )


def _keyed(run: Run, key: str | None) -> tuple[Any, ...]:
    """Where a run that others are compared with is found: a gain is of one row and seed."""
    return (run["task"], run["row"], run["seed"], key)


def _gain(run: Run, baseline: Run | None, subject: str) -> tuple[float | None, str]:
    """A run's gain over its baseline, and how it ended."""
    if run["status"] != "ok" or baseline is None:
        return None, run["status"] if run["status"] != "ok" else "missing"
    if baseline["status"] != "ok" or run[subject] is None or baseline[subject] is None:
        return None, baseline["status"]
    gain = run[subject] - baseline[subject]
    return gain if math.isfinite(gain) else None, "ok"


def fold_held_out(df: pd.DataFrame) -> pd.DataFrame:
    """The current runs, those of tasks that hold out one domain after the other folded over the option that says which.

    One row stands for the runs of a row and seed that agree in all other options, one run for each domain of the
    setting: each that any norm has there (runs that stand in every norm batch count in each). Its metrics are means
    over the domains, or the largest for those in LARGEST, and exist only if all of these runs ended well and measured
    them: never a mean over fewer. Of the task's headline metric it also has the worst over the domains
    (`worst_domain_top1` of `target_top1`), and one column `<metric>/<domain>` per domain, which exists wherever that
    run ended well.

    Args:
        df: from `results.load`, or a part of it.

    Returns:
        A frame without that option. A folded row is "failed" if any of its runs failed, else "diverged", else
        "skipped", else "ok", with the reason of such runs, or saying which run is missing; `status.<metric>` says so
        for every metric. It has the identity, options, norm options, `data` and `equals` of its runs, the newest run's
        time and the sum of their seconds; environment and evidence stay with the runs. `attrs["surplus"]`: task -> runs
        that a newer one of the same place replaced. Unchanged if no run has such an option.
    """
    df = current(df)
    surplus: dict[str, int] = {}
    for facts in every_task(df).values():
        column = f"option.{facts.folds_over}"
        if column in df.columns and df[column][df["task"] == facts.task].notna().any():
            df, surplus[facts.task] = _fold_task(df, facts, column)
            df.attrs["surplus"] = dict(surplus)
    return df


def _fold_task(df: pd.DataFrame, facts: Facts, column: str) -> tuple[pd.DataFrame, int]:
    """The runs, those of one task folded over a column, and how many of these a newer one replaced."""
    options = [c for c in option_columns(df) if c != column]
    runs = plain_records(df, list(map(str, df.columns)))
    singles = [run for run in runs if run["task"] == facts.task]
    metrics = [m for m in metric_columns(df) if any(run[m] is not None for run in singles)]
    parts: dict[tuple[Any, ...], dict[str, Run]] = defaultdict(dict)
    surplus = 0
    for run in sorted(singles, key=_age):
        place, domain = _place(run, options), value_text(facts.folds_over, run[column])
        surplus += domain in parts[place]
        parts[place][domain] = run
    homes = [(run, domain) for found in parts.values() for domain, run in found.items()]
    expected = _expected(homes, options)
    places = dict.fromkeys(_place(run, options) for run in singles)  # in the frame's order, which ages have not
    folded = [_folded(parts[place], expected[place], metrics, facts) for place in places]
    rows = [*(run for run in runs if run["task"] != facts.task), *folded]
    if all(row.get(column) is None for row in rows):
        names = dict.fromkeys(str(c) for c in df.columns if c != column)
    else:
        names = dict.fromkeys(map(str, df.columns))
    for row in folded:
        names.update(dict.fromkeys(row))
    single = f"{facts.subject}/"
    numbers = {*metric_columns(df), facts.worst, *(n for n in names if n.startswith(single)), "seconds"}
    # object first: a missing option must not turn the integers of others into floats
    columns = {n: pd.Series([row.get(n) for row in rows], dtype="float64" if n in numbers else object) for n in names}
    result = pd.DataFrame({n: c if c.isna().any() else c.infer_objects() for n, c in columns.items()})
    result.attrs = dict(df.attrs)
    return result, surplus


def _expected(runs: Sequence[tuple[Run, str]], options: Sequence[str]) -> dict[tuple[Any, ...], list[str]]:
    """place of a folded row -> the domains that any norm holds out in its setting. runs: with the domain of each."""
    others = [o for o in options if o != _BATCH]
    domains: dict[tuple[Any, ...], dict[Any, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run, domain in runs:
        batch = "every" if run["repeats"] else run.get(_BATCH)
        domains[_setting(run, others)][batch].add(domain)
    found: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for run, _ in runs:
        here = domains[_setting(run, others)]
        batches = list(here) if run["repeats"] else [run.get(_BATCH), "every"]
        found[_place(run, options)].update(*(here.get(b, set()) for b in batches))
    return {place: sorted(names, key=natural) for place, names in found.items()}


def _folded(parts: Mapping[str, Run], domains: Sequence[str], metrics: Iterable[str], facts: Facts) -> Run:
    """One row from the runs of a place, by held-out domain."""
    subject, over = facts.subject, f"option.{facts.folds_over}"
    runs = [parts[d] for d in domains if d in parts]
    lacking = [d for d in domains if d not in parts]
    status = next((s for s in _WORST_FIRST if any(r["status"] == s for r in runs)), "ok")
    newest = max(runs, key=_age)
    kept = {k: v for k, v in newest.items() if k.startswith(("option.", "norm.")) and k != over}
    same = {str(r["equals"] or "") for r in runs}
    row: Run = {
        **{name: newest[name] for name in ("task", "norm", "norm_label", "row", "seed", "finished", "repeats")},
        **kept,
        "status": status,
        "reason": _reason([p for p in parts.items() if p[1]["status"] == status]) if status != "ok" else "",
        "key": "+".join(str(r["key"]) for r in runs),
        "data": " and ".join(sorted({str(r["data"]) for r in runs if r["data"]})),
        "equals": same.pop() if len(same) == 1 else "",
        "seconds": sum(r.get("seconds") or 0.0 for r in runs),
        "stale": False,
    }
    if status == "ok" and lacking:
        row["reason"] = f"no run with {facts.folds_over}={', '.join(lacking)}"
    values: dict[str, list[float]] = {
        m: [r[m] for r in runs if r["status"] == "ok" and r[m] is not None] for m in metrics
    }
    whole = {m: found for m, found in values.items() if len(found) == len(domains)}
    row.update({m: max(found) if m in LARGEST else summarize(found)[0] for m, found in whole.items()})
    derived: list[str] = []
    if facts.worst not in metrics:  # else it is one of the task's own
        derived = [facts.worst]
        worst = max if facts.metric(subject).higher_is_better is False else min
        row[facts.worst] = worst(whole[subject]) if subject in whole else None
    row.update({f"{ENDED}{m}": "missing" if status == "ok" and lacking else status for m in (*metrics, *derived)})
    for domain in domains:
        name = f"{subject}/{domain}"
        part = parts.get(domain)
        row[name] = part.get(subject) if part is not None and part["status"] == "ok" else None
        row[f"{ENDED}{name}"] = "missing" if part is None else part["status"]
    return row


def _reason(parts: Iterable[tuple[str, Run]]) -> str:
    """The common reason of runs, or each with the domains that it is about."""
    about: dict[str, list[str]] = defaultdict(list)
    for domain, run in sorted(parts, key=lambda part: natural(part[0])):
        about[str(run["reason"] or "")].append(domain)
    return next(iter(about)) if len(about) == 1 else "; ".join(f"{r} ({', '.join(d)})" for r, d in about.items())


def _age(run: Run) -> tuple[Any, str]:
    return run["finished"], str(run["key"])


def _setting(run: Run, options: Iterable[str]) -> tuple[Any, ...]:
    return (run["task"], *(run[o] for o in options))


def _place(run: Run, options: Iterable[str]) -> tuple[Any, ...]:
    return (run["task"], run["row"], run["seed"], *(run[o] for o in options))
