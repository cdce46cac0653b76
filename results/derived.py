"""Metrics that need several runs, as functions over the frame: the gain over source-only, and the numbers of a task
that holds out one domain after the other.

How such a metric ended is not how a single run ended, so it has a column of its own, `status.<metric>`: "ok",
"diverged", "failed", "skipped", "missing" (a run that it needs was not made), or None where it does not apply.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from results.frame import ENDED, HELD_OUT, METHOD, NORM_BATCH, metric_columns, natural
from results.metrics import PER_DOMAIN
from results.statistics import summarize
from results.tables.pivot import Run, current, option_columns, plain_records, value_text

SOURCE_ONLY = "source_only"
OF_METHODS = frozenset({"forward", "trade_off", "discriminator_width", "mcd_steps"})
"""Options that belong to a method of adaptation: null for source-only, and no part of what it must agree in."""
TARGET, GAIN, WORST = "target_top1", "gain", "worst_domain_top1"
LARGEST = ("composition_shift", "peak_memory_mb")
"""Metrics whose largest value over the held-out domains counts; of all others the mean does."""

_METHOD, _HELD_OUT, _BATCH = (f"option.{name}" for name in (METHOD, HELD_OUT, NORM_BATCH))
_WORST_FIRST = ("failed", "diverged", "skipped")


def with_gain(df: pd.DataFrame) -> pd.DataFrame:
    """The current runs, with what adaptation gained in each.

    A run's gain is its target top-1 less that of the source-only run of the same task, row and seed which agrees in
    every option but the method and those in OF_METHODS; of several the newest.

    Args:
        df: from `results.load`, or a part of it.

    Returns:
        The runs with the columns `gain` (NaN unless both runs ended well) and `status.gain`: as the run ended, else as
        its source-only run did ("missing" if there is none), and None for source-only itself. Unchanged if no run is
        source-only.
    """
    df = current(df)
    if _METHOD not in df.columns or TARGET not in df.columns or not df[_METHOD].eq(SOURCE_ONLY).any():
        return df
    options = [c for c in option_columns(df) if c != _METHOD and c.removeprefix("option.") not in OF_METHODS]
    runs = plain_records(df, ["task", "row", "seed", "status", "key", "finished", _METHOD, TARGET, *options])
    baselines = {_place(run, options): run for run in sorted(runs, key=_age) if run[_METHOD] == SOURCE_ONLY}
    adapting = {run["task"] for run in baselines.values()}
    gains: list[tuple[float | None, str | None]] = []
    for run in runs:
        if run[_METHOD] == SOURCE_ONLY or run["task"] not in adapting:
            gains.append((None, None))
        else:
            gains.append(_gain(run, baselines.get(_place(run, options))))
    return df.assign(
        **{
            GAIN: pd.Series([gain for gain, _ in gains], df.index, "float64"),
            f"{ENDED}{GAIN}": pd.Series([status for _, status in gains], df.index, object),
        }
    )


def _gain(run: Run, baseline: Run | None) -> tuple[float | None, str]:
    """A run's gain over its source-only run, and how it ended."""
    if run["status"] != "ok" or baseline is None:
        return None, run["status"] if run["status"] != "ok" else "missing"
    if baseline["status"] != "ok" or run[TARGET] is None or baseline[TARGET] is None:
        return None, baseline["status"]
    gain = run[TARGET] - baseline[TARGET]
    return gain if math.isfinite(gain) else None, "ok"


def fold_held_out(df: pd.DataFrame) -> pd.DataFrame:
    """The current runs, those of tasks with the option `held_out` folded over it.

    One row stands for the runs of a row and seed that agree in all other options, one run for each domain of the
    setting: each that any norm has there (runs that stand in every norm batch count in each). Its metrics are means
    over the domains, or the largest for those in LARGEST, and exist only if all of these runs ended well and measured
    them: never a mean over fewer. It also has `worst_domain_top1`, the lowest target top-1, and one column
    `target_top1/<domain>` per domain, which exists wherever that run ended well.

    Args:
        df: from `results.load`, or a part of it.

    Returns:
        A frame without `option.held_out`. A folded row is "failed" if any of its runs failed, else "diverged", else
        "skipped", else "ok", with the reason of such runs, or saying which run is missing; `status.<metric>` says so
        for every metric. It has the identity, options, norm options, `data` and `equals` of its runs, the newest run's
        time and the sum of their seconds; environment and evidence stay with the runs. `attrs["surplus"]`: task -> runs
        that a newer one of the same place replaced. Unchanged if no run has the option.
    """
    df = current(df)
    if _HELD_OUT not in df.columns or df[_HELD_OUT].isna().all():
        return df
    options = [c for c in option_columns(df) if c != _HELD_OUT]
    runs = plain_records(df, list(map(str, df.columns)))
    tasks = {run["task"] for run in runs if run[_HELD_OUT] is not None}
    singles = [run for run in runs if run["task"] in tasks]
    metrics = [m for m in metric_columns(df) if any(run[m] is not None for run in singles)]
    parts: dict[tuple[Any, ...], dict[str, Run]] = defaultdict(dict)
    surplus: Counter[str] = Counter()
    for run in sorted(singles, key=_age):
        place, domain = _place(run, options), _domain(run)
        surplus[run["task"]] += domain in parts[place]
        parts[place][domain] = run
    expected = _expected([run for found in parts.values() for run in found.values()], options)
    places = dict.fromkeys(_place(run, options) for run in singles)  # in the frame's order, which ages have not
    folded = [_folded(parts[place], expected[place], metrics) for place in places]
    rows = [*(run for run in runs if run["task"] not in tasks), *folded]
    names = dict.fromkeys(str(c) for c in df.columns if c != _HELD_OUT)
    for row in folded:
        names.update(dict.fromkeys(row))
    numbers = {*metric_columns(df), WORST, *(n for n in names if n.startswith(PER_DOMAIN)), "seconds"}
    # object first: a missing option must not turn the integers of others into floats
    columns = {n: pd.Series([row.get(n) for row in rows], dtype="float64" if n in numbers else object) for n in names}
    result = pd.DataFrame({n: c if c.isna().any() else c.infer_objects() for n, c in columns.items()})
    result.attrs = {**df.attrs, "surplus": dict(surplus)}
    return result


def _expected(runs: Sequence[Run], options: Sequence[str]) -> dict[tuple[Any, ...], list[str]]:
    """place of a folded row -> the domains that any norm holds out in its setting."""
    others = [o for o in options if o != _BATCH]
    domains: dict[tuple[Any, ...], dict[Any, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        batch = "every" if run["repeats"] else run.get(_BATCH)
        domains[_setting(run, others)][batch].add(_domain(run))
    found: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for run in runs:
        here = domains[_setting(run, others)]
        batches = list(here) if run["repeats"] else [run.get(_BATCH), "every"]
        found[_place(run, options)].update(*(here.get(b, set()) for b in batches))
    return {place: sorted(names, key=natural) for place, names in found.items()}


def _folded(parts: Mapping[str, Run], domains: Sequence[str], metrics: Iterable[str]) -> Run:
    """One row from the runs of a place, by held-out domain."""
    runs = [parts[d] for d in domains if d in parts]
    lacking = [d for d in domains if d not in parts]
    status = next((s for s in _WORST_FIRST if any(r["status"] == s for r in runs)), "ok")
    newest = max(runs, key=_age)
    kept = {k: v for k, v in newest.items() if k.startswith(("option.", "norm.")) and k != _HELD_OUT}
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
        row["reason"] = f"no run with {HELD_OUT}={', '.join(lacking)}"
    values: dict[str, list[float]] = {
        m: [r[m] for r in runs if r["status"] == "ok" and r[m] is not None] for m in metrics
    }
    whole = {m: found for m, found in values.items() if len(found) == len(domains)}
    row.update({m: max(found) if m in LARGEST else summarize(found)[0] for m, found in whole.items()})
    row[WORST] = min(whole[TARGET]) if TARGET in whole else None
    row.update({f"{ENDED}{m}": "missing" if status == "ok" and lacking else status for m in (*metrics, WORST)})
    for domain in domains:
        name = f"{PER_DOMAIN}{domain}"
        part = parts.get(domain)
        row[name] = part.get(TARGET) if part is not None and part["status"] == "ok" else None
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


def _domain(run: Run) -> str:
    return value_text(HELD_OUT, run[_HELD_OUT])


def _setting(run: Run, options: Iterable[str]) -> tuple[Any, ...]:
    return (run["task"], *(run[o] for o in options))


def _place(run: Run, options: Iterable[str]) -> tuple[Any, ...]:
    return (run["task"], run["row"], run["seed"], *(run[o] for o in options))
