"""A metric against a numeric option of the task, one line per norm."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd

from results.escape import cut, one_line
from results.figures import style
from results.figures.asked import (
    arranged,
    check_panels,
    ends,
    is_number,
    setting_text,
    the_metric,
    the_option,
)
from results.figures.drawing import Drawing
from results.figures.lines import NORM_LINES, SEED_LINES, Line, Panel, draw_panels, number_scale
from results.figures.words import (
    drawn,
    drawn_names,
    finite,
    holes_lines,
    n_text,
    printed,
    seeds_of,
    seeds_text,
    sources,
    spread_words,
)
from results.metrics import Metric
from results.rows import natural, value_text
from results.tables.pivot import Block, Pivot, without


def option_curve(
    df: pd.DataFrame,
    option: str = "norm_batch_size",
    metric: str | None = None,
    task: str | None = None,
    reference: str = "bn",
) -> Drawing:
    """A metric against a numeric option of one task: mean over seeds, a band of one sample standard deviation.

    Nothing is averaged over settings: where other options vary, each of their combinations has a panel. A norm that
    does not mix samples is a flat line over all norm batches. Seeds are paired by thin lines where they are few. A
    mean over survivors (others diverged, failed or are missing) is a hollow mark, a place without any is a cross at
    the bottom. With one seed there are points and lines, and no band.

    Args:
        df: from `results.load`, or a part of it.
        option: a task option, without "option.".
        metric: None: the task's headline.
        task: None: the only one.
        reference: label or name of the norm that comes first.

    Raises:
        ValueError: nothing to draw; an unknown task, option or metric (with the nearest); an option that takes fewer
            than two numbers; more settings than a figure holds.
    """
    pivot, part = arranged(df, task, reference)
    subject = the_metric(pivot, metric)
    place = the_option(pivot, option)
    panels: dict[Block, set[float]] = defaultdict(set)
    others = 0
    for block in pivot.blocks:
        if is_number(block[place]) and pivot.applies(block, subject):
            panels[without(block, place)].add(float(block[place]))
        others += not is_number(block[place])
    shown = {rest: sorted(values) for rest, values in panels.items() if len(values) > 1}
    if not shown:
        raise ValueError(f"{pivot.task}: {option} takes no two numbers in one setting with {subject.name}")
    check_panels(len(shown), f"{pivot.task}, {option}")
    marks: list[dict[str, Any]] = []
    holes: list[tuple[str, Any]] = []
    drawings = []
    for rest in sorted(shown, key=lambda r: tuple(natural(v) for v in r)):
        full = (*rest[:place], None, *rest[place:])
        title = setting_text(pivot, full, (option,))
        lines = [
            found
            for row in pivot.rows
            if (found := _line(pivot, row, full, place, shown[rest], subject, option, title, marks, holes)) is not None
        ]
        drawings.append(Panel(drawn(title, style.TITLE), tuple(lines), subject.heading))
    values = sorted({v for found in shown.values() for v in found})
    scale, about_scale = number_scale(values)
    labels = [pivot.labels[row] for row in pivot.rows]
    counts = [mark["n"] for mark in marks if mark["n"]]
    if not counts and not any(mark["hole"] for mark in marks):
        raise ValueError(f"{pivot.task}: no run has a value of {subject.name} that can be drawn ({ends(pivot)})")
    thin = len(labels) <= NORM_LINES and 1 < max(counts, default=0) <= SEED_LINES
    seeds = {seed for mark in marks for seed in mark["seeds"]} or seeds_of(part)
    foot = f"{pivot.task}: {n_text(counts)} ({seeds_text(seeds)}); {spread_words(counts)}"
    foot += "; thin: single seeds" if thin else ""
    foot += "; hollow: fewer runs" if any(m["hole"] and m["mean"] is not None for m in marks) else ""
    foot += "; ×: no run has a value" if any(m["mean"] is None for m in marks) else ""
    with style.style():
        figure = draw_panels(
            drawings,
            style.looks(labels),
            drawn_names(labels),
            pivot.labels.get(pivot.reference or ""),
            drawn(option.replace("_", " "), 40),
            scale,
            values,
            thin,
            drawn(foot, 400),
        )
    caption = [
        f"{subject.title} against {one_line(option)}: mean over seeds ({n_text(counts)})"
        + (
            ", band: mean ± sample standard deviation." if max(counts, default=0) > 1 else "; one seed shows no spread."
        ),
    ]
    if others:
        caption.append(f"Not drawn: {others} setting{'s' * (others != 1)} in which {one_line(option)} is no number.")
    left = len({without(b, place) for b in pivot.blocks if is_number(b[place])}) - len(shown)
    if left:
        caption.append(f"Not drawn: {left} setting{'s' * (left != 1)} with a single value of {one_line(option)}.")
    if any(mark["repeated"] for mark in marks):
        caption.append("Norms that do not mix samples were run once; they are flat lines over all norm batches.")
    caption += [about_scale] * bool(about_scale)
    caption += [*holes_lines(holes), *sources(part, pivot)]
    return Drawing(
        name=f"{pivot.task}_{subject.name.replace('/', '_')}_by_{option}",
        title=f"{cut(one_line(pivot.task), 60)}: {subject.title} against {cut(one_line(option), 60)}",
        figure=figure,
        alt=_alt(pivot, subject, option, marks, counts),
        caption=tuple(caption),
        data=tuple(marks),
        task=pivot.task,
    )


def _line(
    pivot: Pivot,
    row: str,
    full: Block,
    place: int,
    values: list[float],
    subject: Metric,
    option: str,
    title: str,
    marks: list[dict[str, Any]],
    holes: list[tuple[str, Any]],
) -> Line | None:
    """The line of a row in one panel; None if it has no run there. Adds its points to `marks`, its holes to `holes`."""
    blocks = {
        float(b[place]): b for b in pivot.blocks if is_number(b[place]) and without(b, place) == without(full, place)
    }
    xs = [v for v in values if pivot.asked(row, blocks[v])]
    if not xs:
        return None
    points: list[tuple[float | None, float | None, int, str]] = []
    seeds: dict[int, dict[float, float | None]] = defaultdict(dict)
    for x in xs:
        cell, found = pivot.cell(row, blocks[x], subject), pivot.values(row, blocks[x], subject)
        mean, std, n = printed(subject, found.values())
        hole = cell.note if cell.holes else "" if mean is not None or not n else "not a finite number"
        points.append((mean, std, n, hole))
        for seed, value in found.items():
            seeds[seed][x] = finite(value * subject.scale)
        if cell.holes and (not cell.repeated or x == xs[0]):
            where = value_text(option, blocks[x][place])
            said = (
                f"{cut(one_line(pivot.labels[row]), 60)} at {one_line(option)}={where}{f', {title}' if title else ''}"
            )
            holes.append((said if not cell.repeated else cut(one_line(pivot.labels[row]), 60), cell))
        marks.append(
            {
                "norm": pivot.labels[row],
                "setting": title,
                option: blocks[x][place],
                "metric": subject.name,
                "mean": mean,
                "std": std,
                "n": n,
                "seeds": tuple(sorted(found)),
                "hole": hole,
                "repeated": cell.repeated,
            }
        )
    lines = {seed: tuple(found.get(x) for x in xs) for seed, found in seeds.items()}
    return Line(
        pivot.labels[row],
        tuple(xs),
        mean=tuple(mean for mean, _, _, _ in points),
        std=tuple(std for _, std, _, _ in points),
        n=tuple(n for _, _, n, _ in points),
        hole=tuple(hole for _, _, _, hole in points),
        seeds=lines,
    )


def _alt(pivot: Pivot, subject: Metric, option: str, marks: list[dict[str, Any]], counts: list[int]) -> str:
    """What the picture shows, in words: the highest and lowest mean, no claim beyond them."""
    found = [m for m in marks if m["mean"] is not None]
    text = (
        f"Line chart of {subject.title}{f' in {subject.unit}' if subject.unit else ''} against {one_line(option)} on "
        f"{one_line(pivot.task)}, one line for each of {len(pivot.rows)} norms, {n_text(counts)}."
    )
    if not found:
        return f"{text} No run ended with a value."
    top, low = max(found, key=lambda m: m["mean"]), min(found, key=lambda m: m["mean"])

    def said(mark: dict[str, Any]) -> str:
        value = subject.text(mark["mean"] / subject.scale)
        return f"{value} ({cut(one_line(mark['norm']), 60)} at {mark[option]})"

    return f"{text} Means lie between {said(low)} and {said(top)}."
