"""Critical-difference diagram: average ranks of norms, and which of them do not differ (Demšar 2006, JMLR 7)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from results.comparing import Ranking, compare_ranks
from results.figures.complete import Complete, complete_blocks
from results.figures.drawing import Drawing
from results.figures.style import COLUMN, GREY, SIZE, looks, new_figure, note, style
from results.figures.words import drawn_names, told

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 18
"""Characters of a norm's label beside its line; data and caption have all."""
_LINE, _LETTER = 0.145, 0.06
"""Inches: of one line of labels, and of a character."""
_WIDTH = 54
"""Characters of 7 points in the width of a column."""
_NAMED = 6
"""Norms that are named one by one in the description for those who can not see the figure."""


def critical_difference(df: pd.DataFrame, reference: str = "bn", alpha: float = 0.05) -> Drawing:
    """Average ranks over task x setting blocks on an axis; a bar joins norms that do not differ.

    Norms are ranked in each block by their mean of the task's headline metric over seeds (`results.statistics.rank`:
    those with diverged or failed runs behind all others). Norms and blocks are those of `complete_blocks`; tests are
    those of `compare_ranks`.

    Args:
        df: from `results.load`, or a part of it.
        reference: label or name of the norm that stands first in lists.
        alpha: of Friedman's and Nemenyi's tests, 0.01 to 0.1.

    Raises:
        ValueError: too few blocks or norms for these tests, with the numbers needed and what was left out.
    """
    complete = complete_blocks(df, reference)
    each = [block.ranks(complete.norms) for block in complete.blocks]
    try:
        ranking = compare_ranks({norm: [ranks[norm] for ranks in each] for norm in complete.norms}, alpha)
    except ValueError as e:
        out = [f"left out: {', '.join(map(told, complete.without))}"] if complete.without else []
        lacking = [f"incomplete blocks: {len(complete.lacking)}"] if complete.lacking else []
        raise ValueError("; ".join(["no critical-difference diagram: " + str(e), *out, *lacking])) from None
    k = len(ranking.average)
    shown, margins = _labels(ranking)
    lines = 3.2 + 0.55 * len(ranking.groups) + math.ceil(k / 2)
    said = _said(ranking, complete)
    with style():
        figure, axes = new_figure(COLUMN, _LINE * lines + 0.14 * math.ceil(len(said) / _WIDTH))
        _draw(axes, ranking, shown, [m / COLUMN for m in margins], lines)
        note(figure, said)
    finding = _finding(ranking)
    caption = [
        f"Average rank of {k} norms over {ranking.blocks} task × setting blocks, 1 is best.",
        *complete.caption(),
        f"Friedman's test: chi-square {ranking.chi_square:.2f} with {k - 1} degrees of freedom, p = {ranking.p:.2g}.",
        f"Nemenyi's critical difference at alpha = {alpha:g}: {ranking.critical_difference:.2f}; bars join norms that "
        "these tests do not tell apart, which does not say that they are alike.",
        *(
            [f"{complete.behind} cells have diverged or failed runs and rank behind all others."]
            if complete.behind
            else []
        ),
        finding,
    ]
    return Drawing(
        "critical_difference",
        "Average ranks and critical difference",
        figure,
        f"Critical-difference diagram: average ranks of {k} norms over {complete.number}, {complete.seeds}. {finding}"
        + (" Blocks of one task are not independent." if complete.shared else ""),
        tuple(caption),
        _data(ranking),
    )


def _sides(ranking: Ranking) -> tuple[list[str], list[str]]:
    """The norms whose labels stand at the left, best first, and at the right, best first."""
    names = list(ranking.average)
    half = math.ceil(len(names) / 2)
    return names[:half], names[half:]


def _labels(ranking: Ranking) -> tuple[dict[str, str], list[float]]:
    """norm -> its label with its average rank, and inches of the labels at the left and right of the axis: names are
    cut until a third of the column is left for that."""
    for longest in range(LONGEST, 7, -1):
        names = drawn_names(ranking.average, longest)
        shown = {name: f"{names[name]}  {rank:.2f}" for name, rank in ranking.average.items()}
        margins = [max(len(shown[name]) for name in side) * _LETTER + 0.08 for side in _sides(ranking)]
        if sum(margins) <= 0.68 * COLUMN:
            break
    return shown, margins


def _said(ranking: Ranking, complete: Complete) -> str:
    """What stands in the picture: blocks, seeds, tests, what is left out."""
    friedman = "p < 0.001" if ranking.p < 0.001 else f"p = {ranking.p:.3f}"
    nothing = " (no difference)" if ranking.p >= ranking.alpha else ""
    said = (
        f"{complete.number}, {complete.seeds} each; Friedman {friedman}{nothing}; Nemenyi, "
        f"α\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{ranking.alpha:g}: bars join norms not told apart"
    )
    if complete.shared:
        said += "; blocks of one task are not independent, so differences look surer than they are"
    out = []
    if complete.without:
        names = ", ".join(drawn_names(complete.without, LONGEST).values())
        out.append(names if len(names) < 2 * _WIDTH else f"{len(complete.without)} norms")
    if complete.lacking:
        out.append(f"{len(complete.lacking)} block{'' if len(complete.lacking) == 1 else 's'}")
    return f"{said}; left out, incomplete: {' and '.join(out)}" if out else said


def _draw(axes: Axes, ranking: Ranking, shown: dict[str, str], margins: list[float], lines: float) -> None:
    """In x the ranks, in y lines from the top: the critical difference, the axis, bars, labels."""
    k, left_of, names = len(ranking.average), margins[0], list(ranking.average)
    span = (k - 1) / (1 - sum(margins))
    low, high = 1 - span * left_of, k + span * margins[1]
    axes.set(xlim=(low, high), ylim=(lines, 0.4), xticks=[], yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(False)
    top = 2.6
    ink: dict[str, Any] = {"color": "black", "linewidth": 0.7, "clip_on": False, "solid_capstyle": "butt"}
    axes.plot([1, k], [top, top], **ink)
    step = 1 if k < 10 else math.ceil((k - 1) / 5)  # two digits need more room
    for tick in range(1, k + 1):
        large = (tick - 1) % step == 0
        axes.plot([tick, tick], [top - (0.35 if large else 0.2), top], **ink)
        if large:
            axes.text(tick, top - 0.45, str(tick), ha="center", va="bottom", fontsize=7)
    end = 1 + min(ranking.critical_difference, k - 1)
    axes.plot([1, end], [0.95, 0.95], **ink)
    for x in (1, end):
        axes.plot([x, x], [0.75, 1.15], **ink)
    text = f"CD = {ranking.critical_difference:.2f}"
    if ranking.critical_difference > k - 1:
        text += " (beyond the axis)"
    axes.text(end, 0.95, f"  {text}", ha="left", va="center", fontsize=7)
    for i, group in enumerate(ranking.groups):
        y, nudge = top + 0.5 + 0.55 * i, 0.012 * span
        ends = [ranking.average[group[0]] - nudge, ranking.average[group[-1]] + nudge]
        axes.plot(ends, [y, y], color=GREY, linewidth=2.6, solid_capstyle="round", zorder=3)
    first = top + 0.55 * len(ranking.groups) + 0.8
    found = looks(names)
    for side, left in zip(_sides(ranking), (True, False), strict=True):
        for i, name in enumerate(side if left else reversed(side)):
            rank, y, colour = ranking.average[name], first + i, found[name].colour
            edge = 1 - 0.015 * span if left else k + 0.015 * span
            axes.plot([rank, rank, edge], [top, y, y], color=colour, linewidth=0.8)
            axes.plot([rank], [top], color=colour, marker="o", markersize=2.5)
            x = edge - 0.01 * span if left else edge + 0.01 * span
            axes.text(x, y, shown[name], ha="right" if left else "left", va="center", fontsize=SIZE)


def _data(ranking: Ranking) -> tuple[dict[str, Any], ...]:
    marks: list[dict[str, Any]] = [
        {"mark": "rank", "norm": name, "average_rank": rank, "blocks": ranking.blocks}
        for name, rank in ranking.average.items()
    ]
    marks.append(
        {
            "mark": "critical_difference",
            "critical_difference": ranking.critical_difference,
            "alpha": ranking.alpha,
            "friedman_p": ranking.p,
            "chi_square": ranking.chi_square,
        }
    )
    marks += [{"mark": "bar", "norms": group} for group in ranking.groups]
    marks += [
        {"mark": "pair", "norm": one, "other": other, "p": p, "differ": ranking.differ(one, other)}
        for (one, other), p in ranking.pairs.items()
    ]
    return tuple(marks)


def _finding(ranking: Ranking) -> str:
    """In a sentence: who is first, and from whom it differs."""
    names = list(ranking.average)
    best = names[0]
    first = f"{told(best)} has the best average rank, {ranking.average[best]:.2f}"
    if ranking.average[names[1]] == ranking.average[best]:
        alike = [name for name in names if ranking.average[name] == ranking.average[best]]
        first = f"{_some(alike)} share the best average rank, {ranking.average[best]:.2f}"
    if ranking.p >= ranking.alpha:
        return f"{first}, but Friedman's test finds no difference between the {len(names)} norms."
    behind = [name for name in names if ranking.differ(best, name)]
    if not behind:
        return f"{first}, and Nemenyi's test tells it apart from no other norm."
    return f"{first}, and {told(best)} differs from {_some(behind)}."


def _some(names: list[str]) -> str:
    names = [told(name) for name in names]
    if len(names) > _NAMED:
        return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
