"""A genotype as a picture: both cells as staircases, written as PNG and SVG.

Each state is a step: the two inputs, then the nodes. An operation leaves its state downwards, turns into a lane of its
own and enters its node from the left, with its name on the lane, where nothing else can lie. All nodes run into the
output at the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tasks.architecture_search.genotype import CONCAT, INPUTS, NODES, Gene, Genotype

COLOURS = {"max": "#b3541e", "avg": "#9a7400", "skip": "#6b6b6b", "sep": "#1f5fa8", "dil": "#23783f"}
"""By the first word of an operation."""
NAMES = ("c(k-2)", "c(k-1)", *(str(node) for node in range(NODES)))
WIDTH, HEIGHT = 0.8, 0.62
ACROSS, DOWN = 2.6, 1.05
"""From one step to the next."""
LANE = 0.17
"""Of a node's two lanes from its middle."""


def draw(genotype: Genotype, files: Sequence[Path]) -> None:
    """Write both cells into each file; its ending (png, svg, pdf) decides the format. Equal genotypes, equal bytes."""
    # text stays text in an SVG, and its element names come from a fixed salt instead of the clock
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "genotype", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11.5, 9.6))
        for axes, (title, genes) in zip(
            figure.subplots(2, 1),
            (
                ("normal cell", genotype.normal),
                ("reduction cell (operations on c(k-2) and c(k-1) have stride 2)", genotype.reduce),
            ),
            strict=True,
        ):
            _cell(axes, title, genes)
        figure.tight_layout()
        for file in files:
            dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
            figure.savefig(file, dpi=110, metadata=dates.get(file.suffix[1:], {}))


def _cell(axes: Axes, title: str, genes: Sequence[Gene]) -> None:
    places = [(ACROSS * step, -DOWN * step) for step in range(INPUTS + NODES)]
    right = ACROSS * (INPUTS + NODES) - 0.8
    for state, (name, (x, y)) in enumerate(zip(NAMES, places, strict=True)):
        given = state < INPUTS
        box = Rectangle(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, facecolor="#d8ead3" if given else "#d6e4f2", edgecolor="k"
        )
        axes.add_patch(box)
        axes.text(x, y, name, ha="center", va="center", fontsize=11)
        if state in CONCAT:
            axes.annotate("", (right, y), (x + WIDTH / 2, y), arrowprops={"arrowstyle": "-|>", "color": "#999999"})
    top, bottom = places[INPUTS][1], places[-1][1]
    axes.add_patch(
        Rectangle((right, bottom - HEIGHT), WIDTH, top - bottom + 2 * HEIGHT, facecolor="#f5e6c8", edgecolor="k")
    )
    axes.text(right + WIDTH / 2, (top + bottom) / 2, "c(k)", ha="center", va="center", fontsize=11)
    for x, y, bend, end, name in _lanes(genes, places):
        colour = COLOURS[name.partition("_")[0]]
        axes.plot([x, x], [y, bend], color=colour, linewidth=1.4, solid_capstyle="butt")
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (end, bend), (x, bend), arrowprops=arrow)
        axes.text(
            end - (ACROSS - WIDTH) / 2, bend, name, color=colour, ha="center", va="center", fontsize=9.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlim(-WIDTH, right + 1.5 * WIDTH)
    axes.set_ylim(bottom - 1.5 * HEIGHT, HEIGHT)
    axes.set_aspect("equal")
    axes.axis("off")


def _lanes(
    genes: Sequence[Gene], places: Sequence[tuple[float, float]]
) -> list[tuple[float, float, float, float, str]]:
    """(x of the way down, its start, y of the lane, its end, operation) of every gene."""
    lanes = []
    for node in range(NODES):
        x, y = places[INPUTS + node]
        # the later state has the upper lane, so that the two ways down do not cross
        pair = sorted(genes[2 * node : 2 * node + 2], key=lambda gene: -gene[1])
        lanes += [
            (state, y + side, x - WIDTH / 2, name) for side, (name, state) in zip((LANE, -LANE), pair, strict=True)
        ]
    found = []
    for state, (x, y) in enumerate(places):
        leaving = [lane for lane in lanes if lane[0] == state]  # from the upper to the lower one
        for number, (_, bend, end, name) in enumerate(leaving):
            # lower lanes leave further left, and so pass nothing on their way down
            at = x + WIDTH * (0.5 - (number + 1) / (len(leaving) + 1))
            found.append((at, y - HEIGHT / 2, bend, end, name))
    return found
