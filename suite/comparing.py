"""Lists, merges and differences of results folders, in words. Pure: values in, lines out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.escape import cut, visible
from results.folders import STATUSES, Stored
from results.merging import Merged
from results.metrics import Metric, metric_or_plain
from results.rows import is_nothing
from suite.progress import columns, duration

if TYPE_CHECKING:
    from pandas import DataFrame

_MOST = 20  # lines of one kind
_LONGEST = 200  # characters of a name or reason in a line
_WORDS = {
    "equal": "equal",
    "reproduced": "reproduced",
    "inside": "inside its interval",
    "different": "different",
    "unjudged": "differs, no interval",
}


def run_lines(runs: Sequence[Stored]) -> Iterator[str]:
    """One line per run, and how many there are."""
    rows = [("task", "norm", "setting", "seed", "status", "result", "time", "finished (UTC)", "size", "key")]
    for run in runs:
        result = f"{run.metric} {_number(run.metric, run.value)}" if run.metric else "-"
        rows.append(
            (
                run.task,
                run.label,
                run.setting or "-",
                "-" if run.seed is None else str(run.seed),
                run.status + (", other version" if run.stale else ""),
                result,
                "-" if run.seconds is None else duration(run.seconds),
                "-" if run.finished is None else f"{run.finished:%Y-%m-%d %H:%M}",
                bytes_text(run.size),
                run.key,
            )
        )
    if runs:
        yield from columns([[cut(cell, _LONGEST) for cell in row] for row in rows])
    why = [f"{run.status}: {_place(run)}: {run.reason}" for run in runs if run.status == "damaged"]
    yield from _few(why)
    yield count_line(runs)


def count_line(runs: Sequence[Stored]) -> str:
    """ "92 runs (91 ok, 1 failed), 0.3 MB"."""
    counts = Counter(run.status for run in runs)
    words = {"busy": "being made", "unfinished": "without a record"}
    shown = [f"{counts[status]} {words.get(status, status)}" for status in STATUSES if counts[status]]
    stale = sum(run.stale for run in runs)
    shown += [f"{stale} of them of another version or other data"] if stale else []
    said = f" ({', '.join(shown)})" if shown else ""
    return f"{_runs(len(runs))}{said}, {bytes_text(sum(run.size for run in runs))}"


def merge_lines(merged: Merged, out: Path, stale: dict[str, int]) -> Iterator[str]:
    """What a merge did. stale: of the frame of `out`."""
    for line in merged.versions:
        yield visible(line)
    if merged.differing:
        yield f"{len(merged.differing)} finished records differ from the one that is kept (--prefer FOLDER chooses):"
        yield from _few(merged.differing)
    for folders, why in ((merged.busy, "is being made"), (merged.unfinished, "has no record")):
        yield from _few([f"left out: {folder} {why}" for folder in folders])
    yield from _few([f"left out: {line}" for line in merged.damaged])
    if stale:
        which = ", ".join(f"{number} of {name}" for name, number in sorted(stale.items())[:_MOST])
        yield visible(f"not shown in tables, of another version or other data than planned last: {which}")
    left = len(merged.busy) + len(merged.unfinished) + len(merged.damaged)
    parts = [
        f"{_runs(merged.copied)} copied"
        + (f" ({merged.replaced} in another record's place)" if merged.replaced else ""),
        f"{merged.there} there already",
        f"{merged.same} records the same in another folder",
        f"{left} left out",
    ]
    yield visible(f"{', '.join(parts)} -> {out}")


def diff_lines(found: DataFrame, a: str, b: str) -> Iterator[str]:
    """A frame of `results.diff`: counts per task and metric, every group that differs, and what the sides differ in."""
    attrs: dict[str, Any] = {str(name): value for name, value in found.attrs.items()}
    yield visible(f"a: {a}")
    yield visible(f"b: {b}")
    yield from _sides(attrs)
    yield from _few(attrs["options"])
    results = found[~found["cost"].astype(bool)]
    if len(results):
        yield ""
        yield from _all_equal(results)
        counts = list(_counts(results))
        yield from columns([_HEAD, *counts]) if counts else ()
        yield from _differing(results)
    if len(costs := found[found["cost"].astype(bool)]):
        yield ""
        yield from columns([*_costs(costs)])
    for title, lines in (
        ("ended differently", attrs["status"]),
        ("only in a", attrs["only_a"]),
        ("only in b", attrs["only_b"]),
    ):
        if lines:
            yield ""
            yield f"{title} ({len(lines)}):"
            yield from _few([f"  {line}" for line in lines])
    yield ""
    if not len(results):
        yield "no result to compare: no pair of runs has a metric on both sides"
    elif (results["verdict"] != "equal").any():
        yield (
            f"reproduced: within {attrs['tolerance']:g} of the value, or of 1 where that is larger; inside: the 95 % "
            "interval of the mean difference (of one pair: the metric's own) covers 0; p: sign-flip test, uncorrected"
        )
    verdicts = Counter(results["verdict"])
    said = ", ".join(f"{verdicts[name]} {word}" for name, word in _WORDS.items() if verdicts[name])
    yield f"{attrs['pairs']} pairs of runs" + (f"; of {len(results)} comparisons {said}" if said else "")


_HEAD = (
    "task",
    "metric",
    "norms x settings",
    "pairs",
    "equal",
    "reproduced",
    "inside",
    "different",
    "no interval",
    "largest",
)


def _sides(attrs: dict[str, Any]) -> Iterator[str]:
    for name, told in attrs["sides"].items():
        *few, last = (f"{_short(change)} ({number} pairs)" for change, number in told.most_common(3))
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        yield visible(f"differs in {cut(name, _LONGEST)}: {', '.join([*few, last])}{more}")


def _short(change: str) -> str:
    """Of a commit the first characters are enough."""
    return " -> ".join(cut(side if len(side) != 40 else side[:10], _LONGEST) for side in change.split(" -> "))


def _groups(found: DataFrame) -> Iterator[tuple[str, str, DataFrame]]:
    for head, part in found.groupby(["task", "metric"], sort=False):
        task, metric = map(str, head)
        yield task, metric, part


def _all_equal(results: DataFrame) -> Iterator[str]:
    """A line per task: the metrics that are the same everywhere."""
    for task, part in results.groupby("task", sort=False):
        same = [m for m, of_it in part.groupby("metric", sort=False) if (of_it["verdict"] == "equal").all()]
        total = part["metric"].nunique()
        which = "all" if len(same) == total else f"{len(same)} of"
        pairs = part.groupby("metric", sort=False)["pairs"].sum().max()
        names = "" if len(same) in (0, total) else f": {', '.join(map(str, same))}"
        yield visible(f"{task}: {which} {total} metrics are equal to the last bit in all of {pairs} pairs{names}")


def _counts(results: DataFrame) -> Iterator[tuple[str, ...]]:
    """A row for each metric that is not equal everywhere."""
    for task, metric, part in _groups(results):
        verdicts = Counter(part["verdict"])
        if set(verdicts) == {"equal"}:
            continue
        largest = part["largest"].max()
        yield (
            *(task, metric, str(len(part)), str(part["pairs"].sum()), str(part["equal"].sum())),
            str(part["reproduced"].sum() - part["equal"].sum()),
            *(str(verdicts[name]) for name in ("inside", "different", "unjudged")),
            _number(metric, largest) if largest else "0",
        )


def _differing(results: DataFrame) -> Iterator[str]:
    """The groups that are neither equal nor reproduced, those that differ most surely first."""
    worst = {"different": 0, "unjudged": 1, "inside": 2}
    rows = [row for row in results.to_dict("records") if row["verdict"] in worst]
    rows.sort(key=lambda row: worst[row["verdict"]])
    if not rows:
        return
    yield ""
    table = [("task", "norm", "setting", "metric", "a", "b", "b - a", "±95%", "n", "p (floor)", "")]
    for row in rows[: 2 * _MOST]:
        name = row["metric"]
        p = "-" if is_nothing(row["p"]) else f"{row['p']:.3g} ({row['p_floor']:.2g})"
        texts = (_number(name, row[key]) for key in ("mean_a", "mean_b", "difference", "half_width"))
        head = (row["task"], row["norm"], row["setting"] or "-", name)
        table.append((*head, *texts, str(row["pairs"]), p, _WORDS[row["verdict"]]))
    yield from columns([[cut(cell, _LONGEST) for cell in row] for row in table])
    if len(rows) > 2 * _MOST:
        yield f"{len(rows) - 2 * _MOST} more; --csv and --json have all"


def _costs(costs: DataFrame) -> Iterator[tuple[str, ...]]:
    yield "task", "time, memory (no result)", "norms x settings", "pairs", "a", "b", "b / a"
    for task, metric, part in _groups(costs):
        weights = part["pairs"] / part["pairs"].sum()
        a, b = ((part[key] * weights).sum() for key in ("mean_a", "mean_b"))
        ratio = f"{b / a:.2f}" if a else "-"
        counts = str(len(part)), str(part["pairs"].sum())
        unit = metric_or_plain(metric).unit if metric != "seconds" else "s"
        texts = (f"{_number(metric, value)} {unit}" for value in (a, b))
        yield (task, "whole run" if metric == "seconds" else metric, *counts, *texts, ratio)


def _number(metric: str, value: Any) -> str:
    """A value in base units with three more digits than tables show: a difference may be of one image."""
    if is_nothing(value):
        return "-"
    known = Metric(metric, metric, digits=1) if metric == "seconds" else metric_or_plain(metric)
    return f"{float(value) * known.scale:.6g}"


def _place(run: Stored) -> str:
    return f"{run.task}/{run.norm}/{run.key}"


def _runs(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def _few(lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    for line in lines[:_MOST]:
        yield cut(visible(line), 5 * _LONGEST)
    if len(lines) > _MOST:
        yield f"{len(lines) - _MOST} more"


def bytes_text(size: int) -> str:
    """ "812 B", "3.2 kB", "1.4 MB"."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
