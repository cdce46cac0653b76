"""What a norm costs against what it reaches, and which norms no other one beats in both."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from results.escape import cut, one_line
from results.figures import style
from results.figures.asked import arranged, check_panels, setting_text, the_metric
from results.figures.drawing import Drawing
from results.figures.labels import End, label_points
from results.figures.lines import PALE
from results.figures.style import COLUMN, GREY, PAGE
from results.figures.words import (
    drawn,
    drawn_names,
    holes_lines,
    n_text,
    printed,
    seeds_of,
    seeds_text,
    sources,
    spread_words,
)
from results.metrics import Metric
from results.rows import distinct
from results.tables.pivot import Block, Pivot

_NAMED = 20
"""Norms of a panel whose points are all named; of more, those on the front and the reference are."""


def cost_against_accuracy(
    df: pd.DataFrame,
    task: str | None = None,
    cost: str = "step_seconds",
    metric: str | None = None,
    reference: str = "bn",
) -> Drawing:
    """A metric against a cost, one point per norm; the Pareto front of the means is marked.

    The cost is divided by the reference norm's mean in the same setting; it is in its own unit in all settings if that
    norm is missing or costs nothing in one of them. Bars are one sample standard deviation of either. On the front
    stand the norms with whole cells (no hole) that no other one beats in one mean and equals or beats in the other;
    noise is not taken into account.

    Args:
        df: from `results.load`, or a part of it.
        task: None: the only one.
        cost: a measured metric of which less is better, as step_seconds, peak_memory_mb, parameters, search_seconds.
        metric: None: the task's headline.
        reference: label or name of the norm that costs 1.

    Raises:
        ValueError: nothing to draw; an unknown task or metric (with the nearest); a cost of which more is better.
    """
    pivot, part = arranged(df, task, reference)
    subject, price = the_metric(pivot, metric), the_metric(pivot, cost)
    if price.higher_is_better:
        raise ValueError(f'{pivot.task}: more {price.title} is better, so "{cost}" is no cost')
    if price == subject:
        raise ValueError(f'{pivot.task}: "{cost}" is the metric itself; choose another cost')
    if subject.higher_is_better is None:
        raise ValueError(f'{pivot.task}: no direction of "{subject.name}" is better; choose a metric that has one')
    marks: list[dict[str, Any]] = []
    holes: list[tuple[str, Any]] = []
    blocks = [block for block in pivot.blocks if pivot.applies(block, subject) and pivot.applies(block, price)]
    bases = _bases(pivot, blocks, price)
    for block in blocks:
        found = _points(pivot, block, subject, price, bases.get(block), holes)
        if any(m["mean"] is not None and m["cost"] is not None for m in found):
            marks += found
    if not marks:
        raise ValueError(f"{pivot.task}: no run has both {subject.title} and {price.title}")
    settings = list(dict.fromkeys(m["setting"] for m in marks))
    check_panels(len(settings), f"{pivot.task}, cost")
    counts = [m["n"] for m in marks if m["n"]]
    relative = all(m["relative"] for m in marks)
    around = ("device", "device_name", "threads", "kernels")
    machines = [c for c in around if c in part and len(distinct(part[c].tolist())) > 1]
    foot = f"{pivot.task}: {n_text(counts)} ({seeds_text(seeds_of(part))}); {spread_words(counts, 'bars')}"
    foot += "; ringed: no norm is better in both means" if any(m["front"] for m in marks) else ""
    foot += "; hollow: fewer runs" if any(m["hole"] and m["mean"] is not None for m in marks) else ""
    foot += "; grey: other norms" if len(pivot.rows) > _NAMED else ""
    missing = len({m["norm"] for m in marks if m["mean"] is None or m["cost"] is None})
    foot += f"; {missing} norm{'s' * (missing != 1)} without a point" if missing else ""
    title = f"{price.title}, ratio to {drawn(reference, 20)}" if relative else price.heading.rstrip(" ↓")
    with style.style():
        figure = _draw(pivot, marks, settings, title, subject, drawn(foot, 400), reference if relative else None)
    unit = f"relative to {one_line(reference)}" if relative else f"in {price.unit}" if price.unit else ""
    caption = [
        f"{subject.title} against {price.title} {unit}: means over seeds ({n_text(counts)})"
        + ("; bars: ± sample standard deviation." if max(counts) > 1 else "; one seed shows no spread."),
        "The line joins the Pareto front of the means, which noise may move; norms with holes are not on it.",
    ]
    if machines:
        caption.append(f"Runs differ in {', '.join(machines)}, so their cost is not comparable.")
    caption += [*holes_lines(holes), *sources(part, pivot)]
    where = "Pareto front of the means"
    where += f", each in one or more of {len(settings)} settings" if len(settings) > 1 else ""
    front = ", ".join(dict.fromkeys(cut(one_line(m["norm"]), 60) for m in marks if m["front"]))
    return Drawing(
        name=f"{pivot.task}_cost_{cost}".replace("/", "_") + (f"_{subject.name}".replace("/", "_") if metric else ""),
        title=f"{cut(one_line(pivot.task), 60)}: {subject.title} against {price.title}",
        figure=figure,
        alt=f"Scatter chart of {subject.title} against {price.title} {unit} on {one_line(pivot.task)}, "
        f"{len(pivot.rows)} norms, {n_text(counts)}. {where}: {front or 'none'}.",
        caption=tuple(caption),
        data=tuple(marks),
        task=pivot.task,
    )


def pareto(points: list[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as good in both and better in one. points: (cost, value), of cost less and of
    value more is better."""
    return [not any(a <= cost and b >= value and (a < cost or b > value) for a, b in points) for cost, value in points]


def _bases(pivot: Pivot, blocks: list[Block], price: Metric) -> dict[Block, float]:
    """The reference norm's mean cost of every block in which a norm has one; {} where any lacks it, since all panels
    have one unit."""
    found = {}
    for block in blocks:
        base = printed(price, pivot.values(str(pivot.reference), block, price).values())[0] if pivot.reference else None
        if base:
            found[block] = base
        elif any(pivot.values(row, block, price) for row in pivot.rows):
            return {}
    return found


def _points(
    pivot: Pivot, block: Block, subject: Metric, price: Metric, base: float | None, holes: list[tuple[str, Any]]
) -> list[dict[str, Any]]:
    setting = setting_text(pivot, block)
    found: list[dict[str, Any]] = []
    for row in pivot.rows:
        if not pivot.asked(row, block):
            continue
        cell, cost_cell = pivot.cell(row, block, subject), pivot.cell(row, block, price)
        mean, std, n = printed(subject, pivot.values(row, block, subject).values())
        cost, cost_std, _ = printed(price, pivot.values(row, block, price).values())
        if cell.holes or cost_cell.holes:
            name = cut(one_line(pivot.labels[row]), 60)
            holes.append((f"{name}{f' at {setting}' if setting else ''}", cell if cell.holes else cost_cell))
        found.append(
            {
                "norm": pivot.labels[row],
                "setting": setting,
                "metric": subject.name,
                "mean": mean,
                "std": std,
                "n": n,
                "cost_metric": price.name,
                "cost": cost / base if base and cost is not None else cost,
                "cost_std": cost_std / base if base and cost_std is not None else cost_std,
                "relative": bool(base),
                "hole": cell.note if cell.holes else cost_cell.note if cost_cell.holes else "",
                "front": False,
            }
        )
    whole = [m for m in found if m["mean"] is not None and m["cost"] is not None and not m["hole"]]
    sign = 1.0 if subject.higher_is_better else -1.0
    for mark, kept in zip(whole, pareto([(m["cost"], sign * m["mean"]) for m in whole]), strict=True):
        mark["front"] = kept and len(whole) > 1
    return found


def _draw(
    pivot: Pivot,
    marks: list[dict[str, Any]],
    settings: list[str],
    x_title: str,
    subject: Metric,
    foot: str,
    reference: str | None,
) -> Any:
    from matplotlib.ticker import MaxNLocator

    looks, names = style.looks(pivot.labels[r] for r in pivot.rows), drawn_names(pivot.labels[r] for r in pivot.rows)
    columns = 1 if len(settings) <= 3 else 2
    rows = math.ceil(len(settings) / columns)
    figure, grid = style.new_figure(
        COLUMN if columns == 1 else PAGE,
        0.6 + (2.1 + style.more_lines(settings)) * rows,
        nrows=rows,
        ncols=columns,
        squeeze=False,
    )
    flat = [a for line in grid for a in line]
    for empty in flat[len(settings) :]:
        empty.set_axis_off()
    chosen = pivot.labels.get(pivot.reference or "")
    for axes, setting in zip(flat, settings, strict=False):
        own = [m for m in marks if m["setting"] == setting and m["mean"] is not None and m["cost"] is not None]
        front = sorted((m for m in own if m["front"]), key=lambda m: (m["cost"], m["mean"]))
        axes.plot([m["cost"] for m in front], [m["mean"] for m in front], color=GREY, lw=0.8, zorder=2, label="front")
        named = _named_points(own, chosen)
        for m in own:
            if m not in named:
                axes.plot(m["cost"], m["mean"], "o", color=PALE, ms=3, zorder=1.5, label=f"point {m['norm']}")
                continue
            look = looks[m["norm"]]
            axes.errorbar(
                m["cost"],
                m["mean"],
                xerr=m["cost_std"],
                yerr=m["std"],
                fmt=look.marker,
                color=look.colour,
                mfc="white" if m["hole"] else look.colour,
                ms=4.5,
                elinewidth=0.5,
                zorder=3,
                label=f"point {m['norm']}",
            )
            if m["front"]:
                axes.plot([m["cost"]], [m["mean"]], "o", ms=8, mfc="none", mec=GREY, mew=0.8, zorder=2.9, label="ring")
        if reference is not None:
            axes.axvline(1, color=GREY, lw=0.5, ls=":", zorder=1)
        axes.margins(x=0.18, y=0.14)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_title)
        axes.set_ylabel(subject.heading)
        if setting:
            style.heading(axes, drawn(setting, style.TITLE))
    style.note(figure, foot)
    style.settle(figure)
    for axes, setting in zip(flat, settings, strict=False):
        own = [m for m in marks if m["setting"] == setting and m["mean"] is not None and m["cost"] is not None]
        named = _named_points(own, chosen)
        steps = sorted((m["cost"], m["mean"]) for m in own if m["front"])
        bars = [_bar(m, key) for m in own for key in ("std", "cost_std")]
        points = [End(names[m["norm"]], m["cost"], m["mean"], looks[m["norm"]].colour) for m in named]
        label_points(axes, points, [steps, *bars])
    return figure


def _named_points(own: list[dict[str, Any]], reference: str | None) -> list[dict[str, Any]]:
    return [m for m in own if len(own) <= _NAMED or m["front"] or m["norm"] == reference]


def _bar(mark: dict[str, Any], key: str) -> list[tuple[float, float]]:
    """The ends of an error bar."""
    x, y, half = mark["cost"], mark["mean"], mark[key] or 0.0
    return [(x, y - half), (x, y + half)] if key == "std" else [(x - half, y), (x + half, y)]
