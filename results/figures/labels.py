"""Labels beside what they name, without overlaps: at the right end of lines, around points.

Positions are found in pixels of a drawn figure and stored as fractions of the axes, or as offsets in points, so they
hold in every format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = 1.18
"""Height of a line of text, in text sizes."""
TEXT = 7.0
"""Points of labels."""


@dataclass(frozen=True)
class End:
    """The right end of a line: its name, where it ends (data coordinates), its colour."""

    text: str
    x: float
    y: float
    colour: str


def room(axes_height: float) -> int:
    """How many labels stand above each other beside axes of this height (inches)."""
    return int(axes_height * 72 / (TEXT * LINE))


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


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write each line's name right of the axes, at the height of its end or as near as the others allow, with a hair
    line to the end. The figure must have its final limits; call it inside `style.style`."""
    if not ends:
        return
    notes = [
        axes.annotate(
            end.text,
            xy=(end.x, end.y),
            xycoords="data",
            xytext=(1.06, 0.5),
            textcoords="axes fraction",
            ha="left",
            va="center",
            fontsize=TEXT,
            color=end.colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": end.colour, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)},
        )
        for end in ends
    ]
    figure = axes.figure.get_figure(root=True)
    for _ in range(2):  # the labels take room, which moves the axes
        figure.draw_without_rendering()
        height = axes.get_window_extent().height
        wanted = [axes.transAxes.inverted().transform(axes.transData.transform((end.x, end.y)))[1] for end in ends]
        gap = TEXT * LINE * figure.dpi / 72 / height
        for note, y in zip(notes, spread(wanted, gap, 0.0, 1.0), strict=True):
            note.set_position((1.06, y))


def label_points(axes: Axes, points: Sequence[End]) -> None:
    """Write each point's name beside it: the first of the places around it, nearest first, that covers no point, no
    other name and no border; a hair line leads there where it is far."""
    figure = axes.figure.get_figure(root=True)
    figure.draw_without_rendering()
    pixel = figure.dpi / 72
    inside = axes.get_window_extent()
    marks = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [(x - 3 * pixel, y - 3 * pixel, x + 3 * pixel, y + 3 * pixel) for x, y in marks]
    order = sorted(range(len(points)), key=lambda i: -marks[i][1])
    for i in order:
        probe = axes.text(0, 0, points[i].text, fontsize=TEXT)
        box = probe.get_window_extent()
        probe.remove()
        width, height = box.width, TEXT * LINE * pixel
        best: tuple[float, float, float] | None = None
        for far in (5.0, 9.0, 14.0, 20.0, 28.0, 38.0, 50.0):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                x = marks[i][0] + dx * far * pixel - (width if dx < 0 else width / 2 if dx == 0 else 0)
                y = marks[i][1] + dy * far * pixel - height / 2
                place = (x, y, x + width, y + height)
                fits = x >= inside.x0 and place[2] <= inside.x1 and y >= inside.y0 and place[3] <= inside.y1
                if fits and not any(_overlap(place, other) for other in taken):
                    best = (x, y, far)
                    break
            if best is not None:
                break
        if best is None:  # nothing is free: right of it, over others
            best = (marks[i][0] + 5 * pixel, marks[i][1] - height / 2, 5.0)
        x, y, far = best
        taken.append((x, y, x + width, y + height))
        left = 0.0 if x > marks[i][0] else 1.0 if x + width < marks[i][0] else 0.5
        away = {"arrowstyle": "-", "lw": 0.4, "color": points[i].colour, "shrinkA": 0, "shrinkB": 2, "relpos": (left, 0.5)}
        axes.annotate(
            points[i].text,
            xy=(points[i].x, points[i].y),
            xytext=((x - marks[i][0]) / pixel, (y + height / 2 - marks[i][1]) / pixel),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=TEXT,
            color=points[i].colour,
            arrowprops=away if far > 9 else None,
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
