"""Which values share one statistic of a norm: a cube of N samples x C channels x HW positions for each norm.

The cube is a sketch, 3 x 6 x 3 cells whatever the real sizes. Its front corner is where all three axes begin, so the
coloured cells, which hold that corner, are always seen.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from results.escape import one_line
from results.figures.drawing import Drawing
from results.figures.style import COLUMN, GREY, new_figure, style
from results.figures.words import drawn, told
from results.rows import current, plain_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = {"N": 3, "C": 6, "HW": 3}
GROUP = 2
"""Channels of one group in the sketch."""
SHORT, LONG = 12, 16
"""Characters of a label's line where four and where three cubes stand side by side."""
_CELL = 0.074
"""Inches of a cell's edge."""
_CUBE = _CELL * (SIZES["HW"] + (SIZES["N"] + SIZES["C"]) / 2) + 0.16
_TEXT = 0.12
"""Inches from the top of a cube to its first line, and of a line."""
_RIGHT, _LEFT, _UP = (math.cos(math.pi / 6), 0.5), (-math.cos(math.pi / 6), 0.5), (0.0, 1.0)
"""Directions of C, N and HW on paper, from the front corner."""
_SHADES = {"top": "#56A7DA", "left": "#0072B2", "right": "#1F86C4"}
_BLANK = {"top": "#fbfbfb", "left": "#e9e9e9", "right": "#f2f2f2"}


@dataclass(frozen=True)
class _Shared:
    """axes: of "N", "C", "HW", in this order; None: not declared. groups: of channels; "" where there are none."""

    axes: tuple[str, ...] | None
    groups: str

    @property
    def channels(self) -> int:
        """How many of the sketch's channels share one statistic."""
        if self.axes is None or "C" not in self.axes:
            return 1
        return GROUP if self.groups else SIZES["C"]

    @property
    def text(self) -> str:
        """'N, HW'."""
        if self.axes is None:
            return "not declared"
        return ", ".join(self.axes) if self.axes else "nothing shared"


def axes_cubes(norms: pd.DataFrame | Mapping[str, Mapping[str, Any]]) -> Drawing:
    """Cubes with the cells coloured that share one statistic, one for each norm, in the order given.

    Args:
        norms: from `results.load`, or a part of it, whose rows are drawn of whose norms the folder says something; or
            label -> what is declared of a norm, as in `df.attrs["norms"]`. "axes": letters of "NCHW" along which a
            value's training output depends on other values, "" for none; None or absent: not declared. "options": a
            mapping; its "num_groups" (above 1, or a text such as "auto") says that channels share in groups. Further
            entries have no meaning here.

    Raises:
        ValueError: no norms, or axes that are none, with what is allowed.
    """
    declared = _declared(norms) if isinstance(norms, pd.DataFrame) else norms
    if not declared:
        raise ValueError("no norms are described, so there are no axes to draw")
    found = {label: _shared(label, facts) for label, facts in declared.items()}
    lines = {label: _lines(label) for label in found}
    wide = max(len(line) for each in lines.values() for line in each) > SHORT
    columns = 3 if wide else 4
    width = COLUMN / columns
    labels = list(found)
    rows = [labels[i : i + columns] for i in range(0, len(labels), columns)]
    texts = [max(len(lines[label]) + len(_about(found[label])) for label in row) for row in rows]
    height = sum(_CUBE + _TEXT * n + 0.1 for n in texts)
    with style():
        figure, axes = new_figure(COLUMN, height + 0.34)
        axes.set(xlim=(0, COLUMN), ylim=(-height - 0.34, 0))
        axes.set_axis_off()
        y = 0.0
        for row, n in zip(rows, texts, strict=True):
            for i, label in enumerate(row):
                _cube(axes, found[label], (i + 0.5) * width, y)
                _write(axes, found[label], lines[label], (i + 0.5) * width, y - _CUBE)
            y -= _CUBE + _TEXT * n + 0.1
        key = (
            "blue: values that share one statistic, as declared, one of\n"
            "many such sets; N samples, C channels, HW positions"
        )
        axes.text(0, y - 0.04, key, fontsize=7, color=GREY, va="top")
    finding = _finding(found)
    return Drawing(
        "axes",
        "Which values share one statistic",
        figure,
        f"Cubes of samples by channels by positions, one for each of {len(found)} norms. {finding}",
        (
            "Coloured: values that share one statistic in training, by the axes that a norm declares. N: samples of "
            "the norm batch, C: channels, HW: positions; sizes are those of a sketch. Where a norm joins several "
            "statistics, each of them spans less than what their axes span together.",
            *(["Darker lines part groups of channels."] if any(s.groups for s in found.values()) else []),
            finding,
        ),
        tuple(
            {
                "norm": label,
                "axes": None if shared.axes is None else "".join(shared.axes),
                "num_groups": shared.groups,
                "cells": sum(map(_inside(shared), _cells())),
            }
            for label, shared in found.items()
        ),
    )


def _declared(df: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """label of each row -> what the results folder says of its norm, with the options of the row."""
    notes, found = df.attrs.get("norms", {}), {}
    options = [c for c in map(str, df.columns) if c.startswith("norm.")]
    for run in plain_records(current(df), ["norm", "norm_label", *options]):
        if run["norm"] in notes and run["norm_label"] not in found:
            own = {c.removeprefix("norm."): run[c] for c in options if run[c] is not None}
            note = notes[run["norm"]]
            found[run["norm_label"]] = {**note, "options": {**note.get("options", {}), **own}}
    return found


def _shared(label: str, facts: Mapping[str, Any]) -> _Shared:
    axes = facts.get("axes")
    allowed = ["".join(parts) for parts in itertools.product(("", "N"), ("", "C"), ("", "HW"))]
    if axes is None:
        return _Shared(None, "")
    if axes not in allowed:
        raise ValueError(f'norm "{label}": axes "{axes}" are unknown; allowed: {", ".join(allowed[1:])}, "" and None')
    letters = tuple(name for name in SIZES if name in axes)
    groups = (facts.get("options") or {}).get("num_groups")
    if "C" not in letters or groups in (None, 1, "1"):
        groups = ""
    if isinstance(groups, float) and groups.is_integer():
        groups = int(groups)  # of a column in which other rows have none
    return _Shared(letters, drawn(str(groups), 8))


def _lines(label: str) -> list[str]:
    """A label in one line or, parted before its options, in two."""
    name, bracket, options = one_line(label).partition("(")
    whole = [name + bracket + options] if len(label) <= SHORT or not name else [name, bracket + options]
    return [drawn(line, LONG) for line in whole if line]


def _cells() -> Iterator[tuple[int, int, int]]:
    """(n, c, hw) of every cell; hw counts from the top."""
    deep, wide, high = SIZES.values()
    return itertools.product(range(deep), range(wide), range(high))


def _inside(shared: _Shared) -> Any:
    """Whether a cell (n, c, hw) is one of the set that holds the front corner. An own statistic of each value, and
    axes that nobody declared, colour nothing."""

    def holds(cell: tuple[int, int, int]) -> bool:
        n, c, hw = cell
        if not shared.axes:
            return False
        return (n == 0 or "N" in shared.axes) and c < shared.channels and (hw == 0 or "HW" in shared.axes)

    return holds


def _cube(axes: Axes, shared: _Shared, x: float, y: float) -> None:
    """The three faces that are seen; (x, y) is the middle of the top of its place, in inches."""
    from matplotlib.collections import PolyCollection

    deep, wide, high = SIZES.values()
    holds = _inside(shared)
    # the front corner's foot, such that the cube stands in the middle
    x += (deep - wide) / 2 * _RIGHT[0] * _CELL
    y -= 0.04 + _CELL * (high + (deep + wide) / 2)

    def point(n: float, c: float, up: float) -> tuple[float, float]:
        return (
            x + _CELL * (n * _LEFT[0] + c * _RIGHT[0] + up * _UP[0]),
            y + _CELL * (n * _LEFT[1] + c * _RIGHT[1] + up * _UP[1]),
        )

    polygons, colours = [], []
    faces = {
        "left": [((n, 0, hw), ((n, 0), (n + 1, 0))) for n in range(deep) for hw in range(high)],
        "right": [((0, c, hw), ((0, c), (0, c + 1))) for c in range(wide) for hw in range(high)],
    }
    for face, squares in faces.items():
        for cell, (start, end) in squares:
            top = high - cell[2]
            polygons.append([point(*start, top), point(*end, top), point(*end, top - 1), point(*start, top - 1)])
            colours.append((_SHADES if holds(cell) else _BLANK)[face])
    for n, c in itertools.product(range(deep), range(wide)):
        corners = ((n, c), (n, c + 1), (n + 1, c + 1), (n + 1, c))
        polygons.append([point(*corner, high) for corner in corners])
        colours.append((_SHADES if holds((n, c, 0)) else _BLANK)["top"])
    unknown = shared.axes is None
    axes.add_collection(
        PolyCollection(
            polygons, facecolors="none" if unknown else colours, edgecolors="#9a9a9a" if unknown else "#555555",
            linewidths=0.35, linestyles=":" if unknown else "-",
        ),
        autolim=False,
    )  # fmt: skip
    if shared.groups:
        for c in range(GROUP, wide, GROUP):
            line = [point(0, c, 0), point(0, c, high), point(deep, c, high)]
            axes.plot(*zip(*line, strict=True), color="black", linewidth=1.0, solid_capstyle="butt")
    small: dict[str, Any] = {"fontsize": 7, "color": GREY}
    axes.text(*point(deep / 2, 0, -0.35), "N", ha="right", va="top", **small)
    axes.text(*point(0, wide / 2, -0.35), "C", ha="left", va="top", **small)
    axes.text(*point(0, wide + 0.35, high / 2), "HW", ha="left", va="center", **small)


def _about(shared: _Shared) -> list[str]:
    """The lines below a label."""
    return [shared.text, *([f"{shared.groups} groups"] if shared.groups else [])]


def _write(axes: Axes, shared: _Shared, lines: Sequence[str], x: float, y: float) -> None:
    for i, text in enumerate([*lines, *_about(shared)]):
        own = i < len(lines)
        axes.text(
            x,
            y - _TEXT * i,
            text,
            ha="center",
            va="top",
            fontsize=7,
            fontweight="bold" if own else "normal",
            color="black" if own else GREY,
        )


def _finding(found: Mapping[str, _Shared]) -> str:
    """The norms by what they share, in the order given."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for label, shared in found.items():
        what = f"over {shared.text}{' in groups of channels' if shared.groups else ''}"
        if not shared.axes:
            what = shared.text
        kinds[what].append(told(label))
    said = "; ".join(f"{what}: {', '.join(labels)}" for what, labels in kinds.items())
    return f"{said[:1].upper()}{said[1:]}."
