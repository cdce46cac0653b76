"""Labels beside what they name, without overlaps: at the right end of lines, around points.

Positions are found in pixels of a drawn figure and stored as fractions of the axes, or as offsets in points, so they
hold in every format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from results.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = 1.18
"""Height of a line of text, in text sizes."""
FLOOR = 0.04
"""Height of holes, as a fraction of the axes."""
TEXT = 7.0
"""Points of labels."""


@dataclass(frozen=True)
class End:
    """A point and its name: where it is (data coordinates), its colour. Without a height it is a hole, at FLOOR."""

    text: str
    x: float
    y: float | None
    colour: str


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the order of `wanted`, at least `gap` apart and within [low, high], each near the wanted one.

    Neighbours that are too close become one block around the mean of what they want (pool adjacent violators), so the
    sum of squared moves is the least possible. Where they do not fit at all, they are spaced evenly.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    if gap * (len(wanted) - 1) > high - low:
        gap = (high - low) / max(1, len(wanted) - 1)
    last = high - gap * (len(wanted) - 1)
    # without the gaps positions only have to ascend, between low and last
    blocks: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        blocks.append((min(max(wanted[i], low), high) - gap * place, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    flat = [min(max(mean, low), last) for mean, size in blocks for _ in range(size)]
    found = [0.0] * len(wanted)
    for place, i in enumerate(order):
        found[i] = flat[place] + gap * place
    return found


def label_ends(figure: Figure, ends: Mapping[Axes, Sequence[End]]) -> None:
    """Write each line's name right of its axes, at the height of its end or as near as the others allow, with a hair
    line to the end. Call it inside `style.style`, when the axes have their limits."""
    notes = {axes: [_end(axes, end) for end in found] for axes, found in ends.items() if found}
    style.settle(figure)  # the names take room: where they stand moves the axes no further
    for axes, own in notes.items():
        to_axes = axes.transData + axes.transAxes.inverted()
        heights = [(end.x, end.y) for end in ends[axes]]
        wanted = [FLOOR if y is None else float(to_axes.transform((x, y))[1]) for x, y in heights]
        gap = TEXT * LINE * figure.dpi / 72 / axes.get_window_extent().height
        for note, y in zip(own, spread(wanted, gap, 0.0, 1.0), strict=True):
            note.set_position((1.06, y))


def _end(axes: Axes, end: End) -> Any:
    line = {"arrowstyle": "-", "lw": 0.4, "color": end.colour, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
    return axes.annotate(
        end.text,
        xy=(end.x, FLOOR if end.y is None else end.y),
        xycoords=axes.get_xaxis_transform() if end.y is None else "data",
        xytext=(1.06, 0.5),
        textcoords="axes fraction",
        ha="left",
        va="center",
        fontsize=TEXT,
        color=end.colour,
        annotation_clip=False,
        arrowprops=line,
    )


def label_points(axes: Axes, points: Sequence[End], paths: Sequence[Sequence[tuple[float, float]]] = ()) -> None:
    """Write each point's name beside it: in the first of the places around it, nearest first, that covers no point, no
    other name, no path and no border; a hair line leads there where it is far. The figure must have been drawn.

    Args:
        axes: its limits stay.
        points: what is named.
        paths: lines that no name should cross, in data coordinates; they are crossed where nothing near is free.
    """
    pixel = axes.figure.dpi / 72
    inside = axes.get_window_extent()
    marks = [tuple(axes.transData.transform((p.x, 0.0 if p.y is None else p.y))) for p in points]
    taken = [_around(x, y, 4 * pixel) for x, y in marks]
    soft = [_around(x, y, pixel) for path in paths for x, y in _along(axes, path, 3 * pixel)]
    for i in sorted(range(len(points)), key=lambda i: -marks[i][1]):
        at_x, at_y = marks[i]
        probe = axes.text(0, 0, points[i].text, fontsize=TEXT)
        width, height = probe.get_window_extent().width, TEXT * LINE * pixel
        probe.remove()
        places = []
        for far in _DISTANCES:
            for dx, dy in _SIDES:
                x = at_x + dx * far * pixel - (width if dx < 0 else width / 2 if dx == 0 else 0)
                y = at_y + dy * far * pixel - height / 2
                if inside.x0 <= x and x + width <= inside.x1 and inside.y0 <= y and y + height <= inside.y1:
                    places.append((x, y, far))
        boxes = {place: (place[0], place[1], place[0] + width, place[1] + height) for place in places}
        free = [place for place in places if not any(_overlap(boxes[place], other) for other in taken)]
        costs = {place: place[2] + _CROSSING * any(_overlap(boxes[place], other) for other in soft) for place in free}
        x, y, far = min(
            free, key=lambda place: costs[place], default=(at_x + _DISTANCES[0] * pixel, at_y - height / 2, 0.0)
        )
        taken.append((x, y, x + width, y + height))
        side = 0.0 if x > at_x else 1.0 if x + width < at_x else 0.5
        line = {"arrowstyle": "-", "lw": 0.4, "color": points[i].colour, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            points[i].text,
            xy=(points[i].x, points[i].y),
            xytext=((x - at_x) / pixel, (y + height / 2 - at_y) / pixel),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=TEXT,
            color=points[i].colour,
            arrowprops={**line, "relpos": (side, 0.5)} if far > 10 else None,
        )


_DISTANCES = (6.0, 10.0, 14.0, 20.0, 28.0, 38.0, 50.0, 65.0)
"""Points between a mark and its name."""
_CROSSING = 20.0
"""Points further away that a name goes rather than cross a path."""
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def _around(x: float, y: float, half: float) -> tuple[float, float, float, float]:
    return (x - half, y - half, x + half, y + half)


def _along(axes: Axes, path: Sequence[tuple[float, float]], step: float) -> list[tuple[float, float]]:
    """Points of a path in pixels, one for each step."""
    ends = [tuple(axes.transData.transform(point)) for point in path]
    found = []
    for (a, b), (c, d) in pairwise(ends):
        count = min(400, max(1, int(((a - c) ** 2 + (b - d) ** 2) ** 0.5 / step)))
        found += [(a + (c - a) * k / count, b + (d - b) * k / count) for k in range(count + 1)]
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
