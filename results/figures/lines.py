"""Lines of norms over a numeric axis: the panels of a figure, means, bands, thin lines of seeds, holes and names.

Up to `PER_PANEL` norms share a panel, with their names at the right end. More are spread over several panels, each with
the reference norm and all others in grey behind; where that makes too many panels, each shows the reference and the
norms that end highest and lowest, and the others in grey.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from results.figures import style
from results.figures.asked import MOST_PANELS
from results.figures.labels import FLOOR, End, label_ends
from results.figures.style import COLUMN, PAGE, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_PANEL = 9
"""Norms of one panel; their names fit beside it."""
SEED_LINES = 5
"""Thin lines of single seeds are drawn for at most so many seeds,"""
NORM_LINES = 9
"""and so many norms."""
EXTREMES = 4
"""Norms at either end that are named where all are too many."""
PALE = "#cccccc"
_ONE_COLUMN = 4  # panels above each other in a column; more stand in two columns across the page


@dataclass(frozen=True)
class Line:
    """One norm in one panel, in printed units.

    Attributes:
        label: the norm's, whole.
        x: ascending.
        mean, std, n: one for each x; mean is None where no run ended well, std where n < 2.
        hole: one for each x: what is missing there; "" for nothing.
        seeds: seed -> one value for each x, or None.
        stops: (x, y) where a run ended early, with its points before: [(x, y), ...] each.
    """

    label: str
    x: tuple[float, ...]
    mean: tuple[float | None, ...]
    std: tuple[float | None, ...]
    n: tuple[int, ...]
    hole: tuple[str, ...] = ()
    seeds: Mapping[int, tuple[float | None, ...]] = field(default_factory=dict)
    stops: tuple[tuple[tuple[float, float], ...], ...] = ()

    @property
    def end(self) -> tuple[float, float | None] | None:
        """Its last point that is drawn; without a height where it has holes only."""
        drawn = [(x, y) for x, y in zip(self.x, self.mean, strict=True) if y is not None]
        if drawn or self.stops:
            return drawn[-1] if drawn else self.stops[0][-1]
        return (self.x[-1], None) if self.x else None


@dataclass(frozen=True)
class Panel:
    """One panel: its title ("" for none), its lines, the text of the y axis."""

    title: str
    lines: tuple[Line, ...]
    heading: str


def draw_panels(
    panels: Sequence[Panel],
    looks: Mapping[str, Look],
    names: Mapping[str, str],
    reference: str | None,
    x_title: str,
    scale: Mapping[str, Any],
    ticks: Sequence[float] | None,
    thin: bool,
    foot: str,
) -> Figure:
    """The panels as one figure. Call inside `style.style`.

    Args:
        panels: at most MOST_PANELS.
        looks, names: by label.
        reference: the label that stands in every part of a panel that is split.
        x_title: of the x axis.
        scale: keyword arguments of `set_xscale`, with "value" for its name.
        ticks: of the x axis; None: matplotlib's.
        thin: draw the lines of single seeds, where they are few.
        foot: n, seeds and what marks mean.
    """
    parts = [(panel, *part) for panel in panels for part in _parts(panel, reference)]
    if len(parts) > MOST_PANELS:
        parts = [(panel, *_extremes(panel, reference)) for panel in panels]
        foot += f"; named: {EXTREMES} highest and lowest at the right end; grey: other norms"
    elif len(parts) > len(panels):
        foot += "; grey: other norms"
    figure, grid = _grid(len(parts), style.more_lines(panel.title for panel in panels))
    for number, (axes, (panel, lines, context)) in enumerate(zip(grid, parts, strict=False)):
        _draw(axes, lines, context, looks, thin)
        for key in ("top", "right"):
            axes.spines[key].set_visible(False)
        if panel.title:
            style.heading(axes, panel.title)
        _x_axis(axes, scale, ticks, panel.lines)
        columns = 1 if len(parts) <= _ONE_COLUMN else 2
        last = number + columns >= len(parts)
        axes.set_xlabel(x_title if last else "")
        axes.tick_params(labelbottom=last)
        if number % columns == 0 or panel.heading != panels[0].heading or len({p.heading for p in panels}) > 1:
            axes.set_ylabel(panel.heading)
    style.note(figure, foot)
    _share_y(grid, [panel.heading for panel, _, _ in parts])
    ends: dict[Axes, list[End]] = {}
    for axes, (_, lines, _) in zip(grid, parts, strict=False):
        ends[axes] = [
            End(names[line.label], *line.end, looks[line.label].colour) for line in lines if line.end is not None
        ]
    label_ends(figure, ends)
    return figure


def number_scale(values: Sequence[float]) -> tuple[dict[str, Any], str]:
    """The scale of an axis that holds these values, and what must be said of it ("" for nothing).

    Logarithmic where they are positive and span a factor of 8 or more over at least three values; to the base 2 where
    all are powers of 2 times the smallest. A zero among such values stands left of the smallest, at no true place.
    """
    positive = sorted({v for v in values if v > 0})
    if min(values) < 0 or len(positive) < 2 or positive[-1] / positive[0] < 8 or len(set(values)) < 3:
        return {"value": "linear"}, ""
    powers = all(abs(math.log2(v / positive[0]) - round(math.log2(v / positive[0]))) < 1e-9 for v in positive)
    base = 2 if powers else 10
    if min(values) > 0:
        return {"value": "log", "base": base}, ""
    steps = math.log(positive[-1] / positive[0], base) / (len(positive) - 1)
    return (
        {"value": "symlog", "base": base, "linthresh": positive[0], "linscale": max(0.5, steps)},
        "The axis is logarithmic; 0, which such an axis lacks, stands left of the smallest value.",
    )


def number_text(value: float) -> str:
    """A number as a tick has it."""
    return f"{value:g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2g}"


def _parts(panel: Panel, reference: str | None) -> list[tuple[tuple[Line, ...], tuple[Line, ...]]]:
    """(lines, grey lines behind) of each part of a panel."""
    if len(panel.lines) <= PER_PANEL:
        return [(panel.lines, ())]
    first = tuple(line for line in panel.lines if line.label == reference)
    rest = [line for line in panel.lines if line.label != reference]
    size = PER_PANEL - len(first) - 1
    count = math.ceil(len(rest) / size)
    size = math.ceil(len(rest) / count)
    found = []
    for start in range(0, len(rest), size):
        own = (*first, *rest[start : start + size])
        found.append((own, tuple(line for line in panel.lines if line not in own)))
    return found


def _grid(count: int, more: float) -> tuple[Figure, list[Axes]]:
    """more: inches that each row needs besides, for its title."""
    columns = 1 if count <= _ONE_COLUMN else 2
    rows = math.ceil(count / columns)
    height = (2.3 if rows == 1 else 0.5 + 1.5 * rows) + more * rows
    figure, axes = style.new_figure(
        COLUMN if columns == 1 else PAGE, height, nrows=rows, ncols=columns, squeeze=False, sharex="col"
    )
    flat = [a for row in axes for a in row]
    for empty in flat[count:]:
        empty.set_axis_off()
    return figure, flat[:count]


def _draw(axes: Axes, lines: Sequence[Line], context: Sequence[Line], looks: Mapping[str, Look], thin: bool) -> None:
    for line in context:
        axes.plot(line.x, _nan(line.mean), color=PALE, lw=0.7, zorder=1, label="context")
    thin = thin and len(lines) <= NORM_LINES
    # artists are told apart by labels, which no file holds: ids would be names of people's norms, in SVG
    crosses: Counter[float] = Counter()
    for line in lines:
        look = looks[line.label]
        several = max(line.n, default=0) > 1
        if several and any(s is not None for s in line.std):
            low = [math.nan if m is None or s is None else m - s for m, s in zip(line.mean, line.std, strict=True)]
            high = [math.nan if m is None or s is None else m + s for m, s in zip(line.mean, line.std, strict=True)]
            axes.fill_between(
                line.x, low, high, color=look.colour, alpha=0.1, lw=0, zorder=2, label=f"band {line.label}"
            )
        if several and thin and len(line.seeds) <= SEED_LINES:
            for seed, values in sorted(line.seeds.items()):
                name = f"seed {seed} {line.label}"
                axes.plot(line.x, _nan(values), color=look.colour, lw=0.4, alpha=0.6, zorder=2.5, label=name)
        every = max(1, len(line.x) // 8)
        axes.plot(line.x, _nan(line.mean), **look.plot, zorder=3, label=f"mean {line.label}", markevery=every)
        for x, y, hole in zip(line.x, line.mean, line.hole, strict=False):
            if hole and y is not None:
                axes.plot([x], [y], look.marker, mfc="white", mec=look.colour, mew=0.9, zorder=4, label="hollow")
            elif hole:
                where, height = axes.get_xaxis_transform(), FLOOR + 0.055 * crosses[x]
                crosses[x] += 1
                axes.plot(
                    [x], [height], "x", color=look.colour, ms=4.5, mew=1.2, transform=where, zorder=4, label="none"
                )
        for stop in line.stops:
            axes.plot(*zip(*stop, strict=True), color=look.colour, ls=":", lw=0.9, zorder=2.6, label="stopped")
            axes.plot(*stop[-1], "x", color=look.colour, ms=5, mew=1.3, zorder=4, label="stop")


def _x_axis(axes: Axes, scale: Mapping[str, Any], ticks: Sequence[float] | None, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

    axes.set_xscale(**scale)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(ScalarFormatter(useMathText=False))
    axes.xaxis.set_minor_locator(NullLocator())
    if ticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        shown = _few(ticks, 8)
        axes.xaxis.set_major_locator(FixedLocator(list(shown)))
        axes.set_xticks(list(shown), [number_text(v) for v in shown])
    if not any(y is not None for line in lines for y in line.mean) and not any(line.stops for line in lines):
        axes.set_yticks([])  # crosses only: no height means anything


def _few(ticks: Sequence[float], most: int) -> list[float]:
    """At most so many ticks, the first and the last among them."""
    if len(ticks) <= most:
        return list(ticks)
    return [ticks[round(i * (len(ticks) - 1) / (most - 1))] for i in range(most)]


def _extremes(panel: Panel, reference: str | None) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """The reference and the norms that end highest and lowest; the others."""
    order = [line for line in panel.lines if line.label != reference and line.end is not None]
    order.sort(key=lambda line: -math.inf if line.end is None or line.end[1] is None else line.end[1])
    kept = {line.label for line in (*order[:EXTREMES], *order[-EXTREMES:])} | {reference}
    if len(panel.lines) <= PER_PANEL:
        return panel.lines, ()
    return (
        tuple(line for line in panel.lines if line.label in kept),
        tuple(line for line in panel.lines if line.label not in kept),
    )


def _share_y(grid: Sequence[Axes], headings: Sequence[str]) -> None:
    """The same limits for all axes of one quantity, so that panels can be compared."""
    for heading in set(headings):
        own = [axes for axes, found in zip(grid, headings, strict=True) if found == heading]
        limits = [axes.get_ylim() for axes in own if axes.get_yticks().size]
        if limits:
            low, high = min(low for low, _ in limits), max(high for _, high in limits)
            for axes in own:
                axes.set_ylim(low, high)


def _nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]
