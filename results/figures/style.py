"""The one look of all figures: readable at the width of a column of a two-column page, and told apart by the
colour-blind.

Colours are those of Okabe & Ito ("Color Universal Design", 2008) without yellow, which is too light for lines on
white; each has its marker and its line, so that no reader needs the colour.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 237 / 72.27, 492 / 72.27
"""Inches of one column and of both of a two-column page (237 and 492 pt)."""
SIZE = 7.5
"""Points of texts; none is below 7."""

TITLE, _TITLE_LINE = 80, 42
"""Characters of a panel's title, and of one line of it."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
LINES = ("-", "--", "-.", ":")
GREY = "#666666"

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "axes.titlesize": SIZE,
    "axes.labelsize": SIZE,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.dpi": 150,
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "savefig.dpi": 300,
    "savefig.transparent": False,
    "savefig.pad_inches": 0.02,  # a figure stays as wide as its column
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "text.usetex": False,
    "text.parse_math": False,  # a name with dollar signs is no formula
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """How one norm is drawn, everywhere in a figure."""

    colour: str
    marker: str
    line: str

    @property
    def plot(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """label -> its look. Every two of some hundred labels differ in colour, marker or line."""
    return {
        label: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)])
        for i, label in enumerate(dict.fromkeys(labels))
    }


@contextlib.contextmanager
def style(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """The look of all figures inside; matplotlib's settings are the caller's again afterwards."""
    import matplotlib as mpl

    settings: Any = {**_RC, **(more or {})}
    with mpl.rc_context(settings):
        yield


def new_figure(width: float = COLUMN, height: float = 2.2, **subplots: Any) -> tuple[Figure, Any]:
    """A figure and its axes, outside of pyplot: no window, no global list that keeps it alive.

    Args:
        width, height: inches.
        subplots: as of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def heading(axes: Axes, text: str) -> None:
    """The title of a panel, at its left, in lines that end within the panel and the names beside it.

    Args:
        text: at most TITLE characters.
    """
    axes.set_title("\n".join(_lines(text)), loc="left")


def more_lines(titles: Iterable[str]) -> float:
    """Inches that these titles need beyond one line each."""
    return 0.13 * max((len(_lines(title)) - 1 for title in titles if title), default=0)


def _lines(title: str) -> list[str]:
    return textwrap.wrap(title, _TITLE_LINE, break_on_hyphens=False)  # at spaces: an option stays with its value


def settle(figure: Figure) -> None:
    """Lay a figure out: its axes stay where they are from now on. Call it inside `style`: ticks are made here.

    Layout takes longer than drawing, and matplotlib repeats it with each.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        with in_print(figure):
            engine.execute(figure)
        figure.set_layout_engine(None)  # "none" would stand for an engine, for which each file is drawn twice


@contextlib.contextmanager
def in_print(figure: Figure) -> Iterator[None]:
    """Inside, texts are measured in the dots of print: in those of a screen they are some per cent wider."""
    dpi = figure.dpi
    figure.set_dpi(_RC["savefig.dpi"])
    try:
        yield
    finally:
        figure.set_dpi(dpi)


def say(axes: Axes, text: str) -> None:
    """A grey line below the axes: n and seeds stand in every figure."""
    axes.annotate(
        text, (1, 0), (0, -28), "axes fraction", "offset points", ha="right", va="top", fontsize=7, color=GREY
    )


def note(figure: Figure, text: str) -> None:
    """Grey lines at the foot of a figure, for which its layout makes room: n and seeds stand in every figure."""
    letters = int(figure.get_figwidth() * 72 / (7 * 0.56))  # of this font a letter is 0.56 em wide, on the average
    figure.supxlabel("\n".join(textwrap.wrap(text, letters)), x=0.99, ha="right", fontsize=7, color=GREY)
