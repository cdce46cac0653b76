"""Paired differences to the reference norm, with intervals and a region of practical equivalence (ROPE)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from results.comparing import LEAST_PAIRS, rope_probabilities
from results.figures.asked import arranged, setting_text, the_metric
from results.figures.drawing import Drawing
from results.figures.style import COLOURS, COLUMN, GREY, new_figure, note, style
from results.figures.words import drawn, drawn_names, n_text, seeds_text, told
from results.metrics import Metric, nearest
from results.statistics import summarize
from results.tables.pivot import Block, Pivot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 60
"""Norms x settings that one figure holds; the first settings are drawn, and the others named."""
LONGEST = 18
"""Characters of a norm's label; data has all."""
_LONGEST_SETTING = 48
_HOLES = {"unmeasured": "without this metric"}


@dataclass(frozen=True)
class _Line:
    """One norm in one setting, in printed units.

    Attributes:
        differences: seed -> difference to the reference, of the seeds in which both ended well.
        mean, half: of them, and half the width of the 95 % t-interval; None where undefined.
        probabilities: below, within and above the ROPE; None where they are not given.
        note: why seeds have no pair: "diverged 1/3", "bn: failed 1/3".
    """

    setting: str
    norm: str
    differences: dict[int, float]
    mean: float | None
    half: float | None
    probabilities: tuple[float, float, float] | None
    note: str


def paired_differences(
    df: pd.DataFrame,
    task: str | None = None,
    metric: str | None = None,
    reference: str = "bn",
    rope: float = 0.01,
) -> Drawing:
    """Of each norm and setting the differences to the reference norm, seed by seed.

    A dot is the mean over the seeds that both norms have, its line the 95 % t-interval (two seeds or more), small
    circles are single seeds. Where a run of either norm diverged, failed or is missing, the circles of the others are
    drawn without mean and interval: survivors alone say nothing of the difference. Probabilities below, within and
    above the ROPE (`rope_probabilities`) stand at the right from LEAST_PAIRS seeds on.

    Args:
        df: from `results.load`, or a part of it.
        task: None: the frame's only one.
        metric: None: the task's headline.
        reference: label or name of the norm that others are compared with.
        rope: differences from -rope to rope make no practical difference; in the metric's base units, so 0.01 is one
            point of an accuracy (as in Benavoli et al.). 0 or more.

    Raises:
        ValueError: unknown task, metric or reference (with the nearest), several tasks and none named, a rope below 0,
            no seed that two norms have.
    """
    if not 0 <= rope < math.inf:
        raise ValueError(f"rope={rope:g}: a finite number in the metric's base units, 0 or more")
    pivot = _compared(df, task, reference)
    subject = the_metric(pivot, metric)
    lines, left_out = _lines(pivot, subject, rope)
    label = pivot.labels[str(pivot.reference)]
    reference = told(label)
    if not any(line.differences for line in lines):
        raise ValueError(
            f'task "{pivot.task}": no seed in which {reference} and another norm both have {subject.title}; nothing '
            "to compare"
        )
    unit = "points" if subject.unit == "%" else subject.unit
    limit = rope * subject.scale
    region = f"±{_amount(limit, unit)}"
    counts = sorted({len(line.differences) for line in lines if line.differences})
    pairs = {seed for line in lines for seed in line.differences}
    many = f"{n_text(counts)} ({seeds_text(pairs)})"
    with style():
        figure, axes = new_figure(COLUMN, 0.7 + 0.145 * (len(lines) + len({line.setting for line in lines})))
        _draw(axes, lines, limit)
        short = drawn(label, LONGEST)
        better = {True: ", better →", False: ", ← better", None: ""}[subject.higher_is_better]
        axes.set_xlabel(f"{drawn(subject.title, 24)} less {short}'s{f' ({unit})' if unit else ''}{better}", loc="right")
        interval = "95 % t-interval" + (" where n > 1" if counts[0] == 1 else "")
        note(figure, f"{many}, paired; {'no interval' if counts == [1] else interval}; grey: {region}")
    finding = _finding(lines, reference, unit, limit)
    caption = [
        f"{subject.title} of each norm less that of {reference}, paired by seed, {many}"
        f"{f', in {unit}' if unit else ''}; dots: means{'' if counts == [1] else ', lines: 95 % t-intervals'}, "
        "circles: single seeds.",
        f"Grey: the region of practical equivalence, {region}.",
        *_about_n(lines, counts),
        "Not corrected for the number of comparisons. Seeds share data sets: nothing is said of other data.",
        *([f"Not drawn: {', '.join(left_out)}."] if left_out else []),
        finding,
    ]
    return Drawing(
        f"differences_{pivot.task}_{subject.name}",
        f"{told(pivot.task)}: {subject.title}, paired differences to {reference}",
        figure,
        f"Dots with intervals: {subject.title} less that of {reference} for "
        f"{_many({x.norm for x in lines}, 'norm')} in "
        f"{_many({x.setting for x in lines}, 'setting')} of {told(pivot.task)}, {many}. {finding}",
        tuple(caption),
        tuple(mark for line in lines for mark in _marks(line, limit)),
        pivot.task,
    )


def _compared(df: pd.DataFrame, task: str | None, reference: str) -> Pivot:
    """The arranged runs of one task in which the reference is one row."""
    pivot, _ = arranged(df, task, reference)
    if pivot.reference is None:
        known = list(dict.fromkeys([*pivot.labels.values(), *pivot.norms.values()]))
        several = [pivot.labels[row] for row, norm in pivot.norms.items() if norm == reference]
        why = (
            f"name one of {', '.join(several)}" if several else f"norms: {', '.join(known)}{nearest(reference, known)}"
        )
        raise ValueError(f'{pivot.task}: no single norm is the reference "{reference}"; {why}')
    return pivot


def _lines(pivot: Pivot, subject: Metric, rope: float) -> tuple[list[_Line], list[str]]:
    """What is drawn, from the top, and the settings that are not."""
    lines: list[_Line] = []
    left_out = []
    for block in pivot.blocks:
        setting = setting_text(pivot, block)
        theirs = pivot.values(str(pivot.reference), block, subject)
        rows = [row for row in pivot.rows if row != pivot.reference and pivot.asked(row, block)]
        if not theirs or not rows:
            if rows:
                left_out.append(
                    f"{setting or pivot.task} (no {told(pivot.labels[str(pivot.reference)])} to compare with)"
                )
            continue
        if lines and len(lines) + len(rows) > MOST_ROWS:
            left_out.append(f"{setting} (no room)")
            continue
        seeds = len(pivot.seeds[block])
        for row in rows:
            own = pivot.values(row, block, subject)
            pairs = {s: (own[s] - theirs[s]) * subject.scale for s in sorted(own.keys() & theirs.keys())}
            pairs = {seed: d for seed, d in pairs.items() if math.isfinite(d)}
            whole = len(pairs) == seeds
            mean, _, n, half = summarize(pairs.values()) if whole else (None, None, len(pairs), None)
            probabilities = None
            if whole and n >= LEAST_PAIRS:
                probabilities = rope_probabilities(list(pairs.values()), rope * subject.scale)
            note = "" if whole else _holes(pivot, row, block, subject)
            lines.append(_Line(setting, pivot.labels[row], pairs, mean, half, probabilities, note))
    return lines, left_out


def _holes(pivot: Pivot, row: str, block: Block, subject: Metric) -> str:
    """Why some seeds give no difference: "diverged 1/3", "bn: missing 1/3", or both."""
    reference, seeds = str(pivot.reference), len(pivot.seeds[block])
    said = []
    for other, whose in ((row, ""), (reference, f"{drawn(pivot.labels[reference], LONGEST)}: ")):
        holes = pivot.cell(other, block, subject).holes
        if holes:
            said.append(whose + ", ".join(f"{_HOLES.get(kind, kind)} {n}/{seeds}" for kind, n in holes.items()))
    return "; ".join(said) or "beyond what a float holds"


def _draw(axes: Axes, lines: Sequence[_Line], limit: float) -> None:
    from matplotlib.transforms import blended_transform_factory

    low, high = _limits(lines, limit)
    axes.axvspan(-limit, limit, color="#e3e3e3", linewidth=0, zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.7)
    left_edge = blended_transform_factory(axes.figure.transFigure, axes.transData)
    y, places, labels = 0.0, [], []
    setting = None
    chances = any(line.probabilities for line in lines)
    names = drawn_names(dict.fromkeys(line.norm for line in lines), LONGEST)
    beside = functools.partial(axes.annotate, xytext=(3, 0), textcoords="offset points", fontsize=7)
    if chances:
        beside("P below, within,\nabove the grey", (1, 1), xycoords="axes fraction", va="bottom")
    for line in lines:
        if line.setting != setting:
            setting = line.setting
            if setting:
                text = drawn(setting, _LONGEST_SETTING)
                axes.text(
                    0.02, y, text, va="center", ha="left", fontsize=7, fontweight="bold", transform=left_edge,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                )  # fmt: skip
                y += 1
        places.append(y)
        labels.append(names[line.norm])
        found = list(line.differences.values())
        if len(found) > 1 or line.note:  # a single seed is its own mean
            places_y = [y + (0.28 if line.mean is not None else 0)] * len(found)
            axes.plot(found, places_y, "o", markersize=2.2, markerfacecolor="none", color=GREY, markeredgewidth=0.6)
        if line.mean is not None:
            axes.plot([line.mean], [y], "o", color=COLOURS[0], zorder=4)
        if line.mean is not None and line.half is not None:
            ends = [line.mean - line.half, line.mean + line.half]
            axes.plot([max(ends[0], low), min(ends[1], high)], [y, y], color=COLOURS[0])
            for x, marker, beyond in zip((low, high), "<>", (ends[0] < low, ends[1] > high), strict=True):
                if beyond:
                    axes.plot([x], [y], marker, color=COLOURS[0], clip_on=False)
        if line.note and not chances:
            # where there is more room
            left = sum(found) / len(found) > (low + high) / 2 if found else True
            where = (low, "left") if left else (high, "right")
            axes.text(where[0], y, f" {line.note} ", va="center", ha=where[1], fontsize=7, color=GREY)
        if chances:
            text = " ".join(map(_chance, line.probabilities)) if line.probabilities else drawn(line.note, 18)
            beside(text, (1, y), xycoords=("axes fraction", "data"), va="center")
        y += 1
    axes.set_yticks(places, labels)
    axes.set(xlim=(low, high), ylim=(y - 0.4, -0.6))
    axes.tick_params("y", length=0, pad=6)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _limits(lines: Sequence[_Line], limit: float) -> tuple[float, float]:
    """Of the axis: around all points, zero and the region. Intervals of two seeds are some ten times as wide as their
    points: those that leave the axis end in arrows there."""
    points = [d for line in lines for d in line.differences.values()]
    low, high = min(0.0, -limit, *points), max(0.0, limit, *points)
    room = 0.75 * (high - low) or 1.0
    whole = [(line.mean, line.half) for line in lines if line.mean is not None and line.half is not None]
    low, high = (
        max(low - room, min([low, *(mean - half for mean, half in whole)])),
        min(high + room, max([high, *(mean + half for mean, half in whole)])),
    )
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge


def _chance(p: float) -> str:
    """ ".03"; never a certainty that a sample does not give: "<.01", ">.99"."""
    return "<.01" if p < 0.01 else ">.99" if p > 0.99 else f"{p:.2f}".removeprefix("0")


def _many(names: set[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _amount(value: float, unit: str) -> str:
    """'1 point', '2 points', '0.01'."""
    return f"{value:.3g} {unit.removesuffix('s') if value == 1 and unit == 'points' else unit}".strip()


def _about_n(lines: Sequence[_Line], counts: Sequence[int]) -> list[str]:
    said = []
    if counts[0] == 1:
        said.append("Of a single seed there is no interval: a point says nothing of other seeds.")
    if any(line.probabilities for line in lines):
        said.append(
            "At the right: probabilities that the expected difference lies below, within and above the grey, by the "
            f"Bayesian t-test, from {LEAST_PAIRS} seeds on."
        )
    if counts[0] < LEAST_PAIRS:
        said.append(
            f"Probabilities need {LEAST_PAIRS} seeds: with fewer the sign-flip test can not fall below 0.05 either."
        )
    if any(line.note for line in lines):
        said.append(
            "Where a run diverged, failed or is missing, single seeds only: a mean over survivors would mislead."
        )
    return said


def _marks(line: _Line, limit: float) -> list[dict[str, Any]]:
    below, within, above = line.probabilities or (None, None, None)
    where = {"setting": line.setting, "norm": line.norm}
    whole = {
        "mark": "mean",
        **where,
        "difference": line.mean,
        "low": None if line.mean is None or line.half is None else line.mean - line.half,
        "high": None if line.mean is None or line.half is None else line.mean + line.half,
        "n": len(line.differences),
        "rope": limit,
        "p_below": below,
        "p_within": within,
        "p_above": above,
        "note": line.note,
    }
    return [whole, *({"mark": "seed", **where, "seed": s, "difference": d} for s, d in line.differences.items())]


def _finding(lines: Sequence[_Line], reference: str, unit: str, limit: float) -> str:
    """In a sentence: how many intervals lie outside, inside or across the region, of those over enough seeds."""
    there = [
        (line.mean, line.half, len(line.differences))
        for line in lines
        if line.mean is not None and line.half is not None
    ]
    if not there:
        return f"Without an interval at any norm nothing is found about differences to {reference}."
    whole = [(mean, half) for mean, half, n in there if n >= LEAST_PAIRS]
    if not whole:
        return (
            f"Intervals over fewer than {LEAST_PAIRS} seeds rest on the assumption of normal differences, so they find "
            f"nothing about differences to {reference}, wherever they lie."
        )
    few = f" over {LEAST_PAIRS} seeds or more" if len(whole) < len(there) else ""
    above = sum(mean - half > limit for mean, half in whole)
    below = sum(mean + half < -limit for mean, half in whole)
    inside = sum(-limit <= mean - half and mean + half <= limit for mean, half in whole)
    return (
        f"Of {len(whole)} intervals{few} {above} lie wholly above {_amount(limit, unit)}, {below} wholly "
        f"below {-limit:.3g}, {inside} within, and {len(whole) - above - below - inside} decide nothing."
    )
