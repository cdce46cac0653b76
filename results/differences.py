"""Two frames of results beside each other, run by run: before and after a change, a laptop and a cluster.

Runs are pairs if task, task options, norm, norm options and seed are the same; versions, data and everything of the
environment may differ, and `Difference.sides` says in what they do. An option that only one side knows (it came with a
newer version) does not part the runs of a task where it has one value.

Of each task, setting, norm and metric, over the seeds:

    equal         every pair has the same value, to the last bit
    reproduced    every pair differs by at most `tolerance` times the larger of 1 and both sizes: float's last digits
    inside        not all do, and the 95 % interval of the mean difference covers 0: Student's t over the pairs, and for
                  one pair the metric's own half widths, where it has them
    different     that interval does not cover 0
    unjudged      they differ, and there is no interval: one pair, runs that ended differently, or pairs that all differ
                  by the same amount (one test image, say), whose spread of 0 measures no noise

The p value is that of the sign-flip test, uncorrected, and can not fall below `p_floor` = 2 / 2^n of n pairs. It is
left out for one pair, and where a run of a pair has no value: survivors alone are not tested. Times and memory are
compared as ratios and are no difference of results.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from results import statistics
from results.frame import ENVIRONMENT, EVIDENCE, NORM_BATCH, VERSIONS, metric_columns
from results.metrics import METRICS, is_cost, nearest
from results.rows import current, distinct, is_nothing, natural, plain_records, value_text

TOLERANCE = 1e-6
"""Of a value: eight units in the last place of a 32-bit float."""
VERDICTS = ("equal", "reproduced", "inside", "different", "unjudged")
COLUMNS = (
    *("task", "setting", "norm", "metric", "cost", "pairs", "equal", "reproduced", "mean_a", "mean_b"),
    *("difference", "half_width", "largest", "p", "p_floor", "verdict"),
)
OWN_HALF_WIDTHS = {"acc_inductive": "ci95", "robust_top1": "robust_ci95"}
"""A metric -> the half width of its 95 % interval within one run."""
SECONDS = "seconds"

_NO_SPREAD = 1e-9
"""Of a difference: a half width below it is of 64-bit rounding."""
_UNSEEN = ("environment.clock", "environment.parts", "environment.parts_differ")
"""Of the environment: what differs between any two runs."""
Run = dict[str, Any]
Identity = tuple[Any, ...]


def diff(
    a: pd.DataFrame,
    b: pd.DataFrame,
    metrics: Collection[str] = (),
    tasks: Collection[str] = (),
    tolerance: float = TOLERANCE,
) -> pd.DataFrame:
    """Compare the runs that two frames share.

    Args:
        a, b: of `results.load`; the rows of current versions count.
        metrics, tasks: only these; none: all.
        tolerance: 0 to 1, as a share of a value; see the module's header.

    Returns:
        One row per task, setting, norm and metric, of COLUMNS:
        - task, norm (its label), metric; setting: the options in which the runs of the task differ;
        - cost: a time or memory, without a verdict;
        - pairs: with a value on both sides; equal, reproduced: how many of them are (equal ones count as both);
        - mean_a, mean_b, difference: of the pairs, in base units; difference is b - a, for a cost too;
        - half_width: of the difference's 95 % interval, NaN where there is none; largest: |difference| of a pair;
        - p, p_floor: NaN where there is no test; verdict: of VERDICTS, "" for a cost.
        `df.attrs`: "tolerance"; "pairs": runs that are pairs; "only_a", "only_b": [one line per run without a partner];
        "status": [one line per pair that ended differently]; "sides": {what: {"a -> b": pairs}}, in what the two
        sides of pairs differ; "options": [one line per option that only one side has]; "replaced": runs that a newer
        one of the same identity stood for.

    Raises:
        ValueError: an unknown metric or task (with the nearest), a tolerance out of range.
    """
    if not 0 <= tolerance <= 1:  # nan among them
        raise ValueError(f"tolerance {tolerance!r}: 0 to 1 are allowed, a share of a value")
    sides = [current(a), current(b)]
    present = {str(task) for df in sides for task in df["task"]}
    measured = {name for df in sides for name in [*metric_columns(df), SECONDS] if df[name].notna().any()}
    _check("tasks", tasks, present)
    _check("metrics", metrics, measured)
    shown = [name for name in _ordered(measured) if not metrics or name in metrics]
    result: list[Run] = []
    attrs: dict[str, Any] = {"tolerance": tolerance, "pairs": 0, "replaced": 0}
    attrs |= {"only_a": [], "only_b": [], "status": [], "options": [], "sides": {}}
    for task in sorted(present if not tasks else {*tasks}):
        result += _task(task, [_runs(df, task) for df in sides], shown, tolerance, attrs)
    df = pd.DataFrame(result, columns=list(COLUMNS))
    df.attrs.update(attrs)
    return df


def differs(found: pd.DataFrame) -> bool:
    """Whether a frame of `diff` holds anything but equal and reproduced pairs of runs: a result that differs, be it
    inside its interval, another status, a run on one side alone."""
    other = ~found["verdict"].isin(["", "equal", "reproduced"])
    return bool(other.any() or found.attrs["status"] or found.attrs["only_a"] or found.attrs["only_b"])


def _check(what: str, given: Collection[str], there: Collection[str]) -> None:
    names = sorted(there)
    lines = [
        f'{what} "{name}": neither folder has it; there are: {", ".join(names) or "none"}{nearest(name, names)}'
        for name in given
        if name not in there
    ]
    if lines:
        raise ValueError("\n".join(lines))


def _ordered(names: Iterable[str]) -> list[str]:
    place = {name: number for number, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: (name == SECONDS, place.get(name, len(place)), natural(name)))


def _runs(df: pd.DataFrame, task: str) -> list[Run]:
    """The runs of a task as mappings, without columns that hold nothing."""
    part = df[df["task"] == task]
    return plain_records(part, [str(c) for c in part.columns if part[c].notna().any()])


def _task(
    task: str, sides: list[list[Run]], metrics: Sequence[str], tolerance: float, attrs: dict[str, Any]
) -> list[Run]:
    options = [{c for run in runs for c in run if c.startswith("option.")} for runs in sides]
    apart = set.union(*options)
    if all(sides):
        for letter, own, other, runs in zip("ab", options, reversed(options), sides, strict=True):
            for option in sorted(own - other):
                values = distinct(run.get(option) for run in runs)
                if len(values) == 1:
                    apart.discard(option)
                name = option.partition(".")[2]
                said = ", ".join(value_text(name, value) for value in values[:5])
                attrs["options"].append(f"{task}: only {letter} has the option {name} ({said})")
    norms = _norm_options(sides)
    found: list[dict[Identity, Run]] = []
    for runs in sides:
        places: dict[Identity, Run] = {}
        for run in sorted(runs, key=lambda run: run["finished"]):
            identity = _identity(run, sorted(apart), norms)
            attrs["replaced"] += identity in places
            places[identity] = run
        found.append(places)
    varying = [o for o in sorted(apart) if len(distinct(run.get(o) for runs in sides for run in runs)) > 1]
    left, right = found
    attrs["only_a"] += [_line(run, varying) for identity, run in left.items() if identity not in right]
    attrs["only_b"] += [_line(run, varying) for identity, run in right.items() if identity not in left]
    groups: dict[Identity, list[tuple[Run, Run]]] = {}
    for identity, run in left.items():
        if identity in right:
            groups.setdefault(identity[:-1], []).append((run, right[identity]))
    result = []
    for pairs in groups.values():
        attrs["pairs"] += len(pairs)
        for pair in pairs:
            _note(*pair, varying, attrs)
        head = {"task": task, "setting": _setting(pairs[0][0], varying), "norm": pairs[0][0]["norm_label"]}
        result += [head | row for name in metrics if (row := _compared(name, pairs, tolerance)) is not None]
    return result


def _norm_options(sides: Sequence[Sequence[Run]]) -> dict[str, list[str]]:
    """norm -> those of its options that part runs: all but such as only one side has, with one value."""
    chosen: dict[str, list[str]] = {}
    for norm in {run["norm"] for runs in sides for run in runs}:
        own = [[run for run in runs if run["norm"] == norm] for runs in sides]
        names = [{c for run in runs for c, v in run.items() if c.startswith("norm.") and v is not None} for runs in own]
        apart = set.union(*names)
        if all(own):
            for mine, other, runs in zip(names, reversed(names), own, strict=True):
                apart -= {c for c in mine - other if len(distinct(run.get(c) for run in runs)) == 1}
        chosen[norm] = sorted(apart)
    return chosen


def _identity(run: Run, options: Sequence[str], norms: Mapping[str, Sequence[str]]) -> Identity:
    """What the two runs of a pair share; the seed is last."""
    values = (*(run.get(o) for o in options), run["norm"], *(run.get(o) for o in norms[run["norm"]]))
    return (*((type(v).__name__ if isinstance(v, bool) else "", v) for v in values), run["seed"])


def _setting(run: Run, varying: Sequence[str]) -> str:
    names = {o: o.partition(".")[2] for o in varying}
    shown = {o: n for o, n in names.items() if n != NORM_BATCH or not is_nothing(run.get(o))}
    return ", ".join(f"{n}={value_text(n, run.get(o))}" for o, n in shown.items())


def _line(run: Run, varying: Sequence[str]) -> str:
    parts = (run["task"], run["norm_label"], _setting(run, varying), f"seed {run['seed']}: {run['status']}")
    return " ".join(part for part in parts if part)


def _note(left: Run, right: Run, varying: Sequence[str], attrs: dict[str, Any]) -> None:
    """What the sides of a pair differ in, and how they ended."""
    if left["status"] != right["status"]:
        attrs["status"].append(f"{_line(left, varying)} -> {right['status']}")
    columns = {c for run in (left, right) for c in run if c.startswith("environment.") and c not in _UNSEEN}
    for column in (*VERSIONS, *EVIDENCE, *ENVIRONMENT, *sorted(columns)):
        if (before := left.get(column)) == (after := right.get(column)):
            continue
        if column in VERSIONS:
            of = left["norm"] if column == "norm_version" else left["task"]
            name = f"{column.replace('_', ' ')} of {of}"
        else:
            name = column.removeprefix("environment.")
        told = attrs["sides"].setdefault(name, Counter())
        told[f"{_said(before)} -> {_said(after)}"] += 1


def _said(value: Any) -> str:
    return "none" if is_nothing(value) or value == "" else str(value)


def _compared(metric: str, pairs: Sequence[tuple[Run, Run]], tolerance: float) -> Run | None:
    """A row of `diff` without its head; None where no pair has the metric on both sides."""
    both = [
        (left, right) for left, right in pairs if not (is_nothing(left.get(metric)) or is_nothing(right.get(metric)))
    ]
    if metric == SECONDS:
        both = [(left, right) for left, right in both if left["status"] == right["status"] == "ok"]
    if not both:
        return None
    values = [(float(left[metric]), float(right[metric])) for left, right in both]
    differences = [right - left for left, right in values]
    sizes = [abs(d) for d in differences]
    equal = sum(left == right for left, right in values)
    near = sum(
        size <= tolerance * max(1.0, abs(left), abs(right)) for size, (left, right) in zip(sizes, values, strict=True)
    )
    cost = metric == SECONDS or is_cost(metric)
    mean, _, n, half = statistics.summarize(differences)
    whole = len(both) == len(pairs)
    if n == 1 and (name := OWN_HALF_WIDTHS.get(metric)):
        own = [math.nan if is_nothing(run.get(name)) else float(run[name]) for run in both[0]]
        half = None if any(map(math.isnan, own)) else math.hypot(*own)
    elif half is not None and near < n and half <= _NO_SPREAD * max(sizes):
        half = None
    half = half if whole and not cost else None
    tested = n > 1 and whole and not cost
    if equal == n:
        verdict = "equal"
    elif near == n:
        verdict = "reproduced"
    elif half is None or mean is None:
        verdict = "unjudged"
    else:
        verdict = "inside" if abs(mean) <= half else "different"
    return {
        "metric": metric,
        "cost": cost,
        "pairs": n,
        "equal": equal,
        "reproduced": near,
        "mean_a": statistics.summarize(left for left, _ in values)[0],
        "mean_b": statistics.summarize(right for _, right in values)[0],
        "difference": mean,
        "half_width": math.nan if half is None else half,
        "largest": max(sizes),
        "p": statistics.sign_flip_p(differences) if tested else math.nan,
        "p_floor": floor_of_p(n) if tested else math.nan,
        "verdict": "" if cost else verdict,
    }


def floor_of_p(n: int) -> float:
    """The least p value that the sign-flip test of n pairs can give."""
    return 2 / 2**n if n <= statistics.MOST_FLIPS else 1 / (1 + statistics.SAMPLED_FLIPS)
