"""Norms against domains: a heat map with the number in each cell."""

from __future__ import annotations

from typing import Any

import pandas as pd

from results.escape import cut, one_line
from results.figures import style
from results.figures.asked import arranged, setting_text, the_metric
from results.figures.drawing import Drawing
from results.figures.style import COLUMN, PAGE
from results.figures.words import drawn, drawn_names, holes_lines, n_text, printed, seeds_of, seeds_text, sources
from results.metrics import Metric, domain_of
from results.rows import distinct, natural, value_text
from results.tables.captions import domains_name
from results.tables.pivot import Block, Pivot

SOURCE, TARGET = "source", "target"
"""Options of a task that adapts from one domain to another."""
MOST_COLUMNS, MOST_CELLS = 18, 1200
_COLUMN_HOLDS = 6  # columns of numbers beside the names, at 237 pt
_NAME = 16


def domain_heat_map(
    df: pd.DataFrame, task: str | None = None, metric: str | None = None, reference: str = "bn"
) -> Drawing:
    """The mean of each norm on each domain, and for held-out domains the mean over all of them.

    Columns are the held-out domains of a task that holds out one after the other, else the pairs source → target. Each
    combination of the other options is a block of rows. Colours say what the numbers say: light is better. A cell
    without a number says why; a number with * is a mean over fewer seeds than were asked for.

    Args:
        df: from `results.load`, or a part of it.
        task: None: the only one.
        metric: None: the task's headline; of held-out domains only the metric that they are folded from.
        reference: label or name of the norm that comes first.

    Raises:
        ValueError: a task without domains; an unknown task or metric (with the nearest); more domains or rows than a
            figure holds.
    """
    pivot, part = arranged(df, task, reference)
    subject, columns, groups = _columns(pivot, metric)
    if len(columns) > MOST_COLUMNS:
        raise ValueError(
            f"{pivot.task}: {len(columns)} domains, at most {MOST_COLUMNS} are readable; draw a part of df"
        )
    marks: list[dict[str, Any]] = []
    holes: list[tuple[str, Any]] = []
    for setting, places in groups.items():
        for row in pivot.rows:
            line = [_mark(pivot, row, setting, name, *place, holes) for name, place in places.items()]
            marks += [mark for mark in line if mark is not None]
    if not any(m["mean"] is not None for m in marks):
        raise ValueError(f"{pivot.task}: no run has a value of {subject.title} on a domain")
    if len(marks) > MOST_CELLS:
        raise ValueError(f"{pivot.task}: {len(marks)} cells, at most {MOST_CELLS} are readable; draw a part of df")
    counts = [m["n"] for m in marks if m["n"]]
    foot = f"{pivot.task}: {n_text(counts)} ({seeds_text(seeds_of(part))}); means over seeds"
    foot += "; *: fewer seeds" if any(m["hole"] and m["mean"] is not None for m in marks) else ""
    with style.style():
        figure = _draw(pivot, marks, columns, list(groups), subject, drawn(foot, 400))
    over = domains_name(pivot) if pivot.of_domains else "pairs of source and target domain"
    caption = [f"{subject.title}{f' in {subject.unit}' if subject.unit else ''}: {over} as columns, {n_text(counts)}."]
    caption += [*holes_lines(holes), *sources(part, pivot)]
    found = [m for m in marks if m["mean"] is not None]
    low, high = min(found, key=lambda m: m["mean"]), max(found, key=lambda m: m["mean"])

    def said(mark: dict[str, Any]) -> str:
        value = subject.text(mark["mean"] / subject.scale)
        return f"{value} ({cut(one_line(mark['norm']), 60)} on {cut(one_line(mark['domain']), 60)})"

    return Drawing(
        name=f"{pivot.task}_domains" + (f"_{subject.name.replace('/', '_')}" if metric else ""),
        title=f"{cut(one_line(pivot.task), 60)}: {subject.title} by domain",
        figure=figure,
        alt=f"Heat map of {subject.title} on {one_line(pivot.task)}: {len(pivot.rows)} norms by "
        f"{len(columns)} columns, {n_text(counts)}. Means lie between {said(low)} and {said(high)}.",
        caption=tuple(caption),
        data=tuple(marks),
        task=pivot.task,
    )


def _columns(pivot: Pivot, metric: str | None) -> tuple[Metric, list[str], dict[str, dict[str, tuple[Block, Metric]]]]:
    """The metric, the columns, and setting -> column -> (block, metric) of its cells."""
    if pivot.of_domains:
        subject = pivot.facts.metric(pivot.facts.subject)
        if metric not in (None, subject.name):
            raise ValueError(f'{pivot.task}: single domains have "{subject.name}" only, not "{metric}"')
        names = [domain_of(name) for name in pivot.of_domains]
        columns = [*sorted(names, key=natural), "mean"]
        groups: dict[str, dict[str, tuple[Block, Metric]]] = {}
        for block in pivot.blocks:
            parts = {n: (block, pivot.facts.metric(f"{subject.name}/{n}")) for n in columns[:-1]}
            groups[setting_text(pivot, block)] = {**parts, "mean": (block, subject)}
        return subject, columns, groups
    fixed = dict(pivot.fixed)
    options = [o.removeprefix("option.") for o in pivot.varying]
    if not all(name in fixed or name in options for name in (SOURCE, TARGET)):
        raise ValueError(f"{pivot.task}: no domains; it holds none out and has no options {SOURCE} and {TARGET}")
    subject = the_metric(pivot, metric)
    groups = {}
    pairs: dict[str, None] = {}
    for block in pivot.blocks:
        values = dict(zip(options, block, strict=True))
        ends = [value_text(n, values[n]) if n in values else fixed[n] for n in (SOURCE, TARGET)]
        if pivot.applies(block, subject):
            pairs[" → ".join(ends)] = None
            groups.setdefault(setting_text(pivot, block, (SOURCE, TARGET)), {})[" → ".join(ends)] = (block, subject)
    return subject, distinct(pairs), groups


def _mark(
    pivot: Pivot, row: str, setting: str, column: str, block: Block, metric: Metric, holes: list[tuple[str, Any]]
) -> dict[str, Any] | None:
    if not pivot.asked(row, block) or not pivot.applies(block, metric):
        return None
    cell = pivot.cell(row, block, metric)
    found = pivot.values(row, block, metric)
    mean, std, n = printed(metric, found.values())
    if cell.holes:
        where = f"{cut(one_line(pivot.labels[row]), 60)} on {cut(one_line(column), 60)}"
        holes.append((f"{where}{f' at {setting}' if setting else ''}", cell))
    text = metric.text(mean / metric.scale) if mean is not None else next(iter(cell.holes), "no number")
    return {
        "norm": pivot.labels[row],
        "setting": setting,
        "domain": column,
        "metric": metric.name,
        "mean": mean,
        "std": std,
        "n": n,
        "seeds": tuple(sorted(found)),
        "hole": cell.note if cell.holes else "",
        "text": text + ("*" if mean is not None and cell.holes else ""),
    }


def _draw(
    pivot: Pivot, marks: list[dict[str, Any]], columns: list[str], settings: list[str], subject: Metric, foot: str
) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    names = drawn_names(pivot.labels[r] for r in pivot.rows)
    titles = drawn_names(columns, _NAME)
    rows: list[tuple[str, str]] = []  # (setting, label), a heading where the label is ""
    for setting in settings:
        own = [
            pivot.labels[r]
            for r in pivot.rows
            if any(m["norm"] == pivot.labels[r] and m["setting"] == setting for m in marks)
        ]
        rows += [*([(setting, "")] if setting and own else []), *((setting, label) for label in own)]
    at = {place: number for number, place in enumerate(rows)}
    width = COLUMN if len(columns) <= _COLUMN_HOLDS else PAGE
    longest = max(map(len, titles.values())) * 0.06  # inches: 0.62 em a letter
    tall = longest * len(columns) > width - 0.06 * max(map(len, names.values())) - 0.1
    figure, axes = style.new_figure(width, 0.165 * len(rows) + 0.75 + (longest if tall else 0.12))
    values = [m["mean"] for m in marks if m["mean"] is not None]
    colours = colormaps["cividis" if subject.higher_is_better is not False else "cividis_r"]
    scale = Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1)
    for m in marks:
        x, y = columns.index(m["domain"]), at[m["setting"], m["norm"]]
        face = colours(scale(m["mean"])) if m["mean"] is not None else (1.0, 1.0, 1.0, 1.0)
        hatch = None if m["mean"] is not None else "////"
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, fc=face, ec="#cccccc" if hatch else "white", lw=0.6, hatch=hatch)
        )
        box = {"fc": "white", "ec": "none", "pad": 0.8} if hatch else None
        axes.text(x, y, m["text"], ha="center", va="center", fontsize=7, color=_ink(face), bbox=box)
    for (setting, label), y in at.items():
        if not label:
            axes.text(-0.5, y, drawn(setting, 60), ha="left", va="center", fontsize=7, style="italic")
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if columns[-1] == "mean" and pivot.of_domains:
        axes.axvline(len(columns) - 1.5, color="white", lw=3)
    axes.set_xticks(range(len(columns)), [titles[c] for c in columns], rotation=90 if tall else 0)
    axes.set_yticks([y for (_, label), y in at.items() if label], [names[label] for _, label in at if label])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(subject.heading)
    style.note(figure, foot)
    style.settle(figure)
    return figure


def _ink(face: tuple[float, ...]) -> str:
    """Black or white, by the larger contrast (WCAG 2: relative luminance of linear light)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in face[:3]]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "white"
