"""Performance profiles: in how many blocks a norm is near the best one (Dolan & Moré 2002, Math. Program. 91)."""

from __future__ import annotations

import math

import pandas as pd

from results.comparing import profile, ratios_to_best
from results.figures.complete import CompleteBlock, complete_blocks
from results.figures.drawing import Drawing
from results.figures.style import COLUMN, looks, new_figure, say, style
from results.figures.words import drawn_names, told

LEAST_BLOCKS = 2
"""Of a single block every share is 0 or 1."""
LARGEST_RATIO = 10.0
"""Where the axis ends at the latest; the caption says how many ratios lie beyond."""
LONGEST = 20
"""Characters of a label in the legend."""
_TICKS = (1, 1.5, 2, 3, 4, 5, 7, 10)


def performance_profiles(df: pd.DataFrame, reference: str = "bn") -> Drawing:
    """The share of task x setting blocks in which a norm is at most t times worse than the best norm there, against t.

    A block's number of a norm is its mean of the task's headline metric over seeds; its ratio is that of
    `results.comparing.ratios_to_best`, infinite where runs diverged or failed. rho(t) is the share of blocks with a
    ratio of at most t: at t = 1 the share in which the norm is the best, or as good. Norms and blocks are those of
    `complete_blocks`, less blocks whose metric has no ratios (a gain below 0).

    Args:
        df: from `results.load`, or a part of it.
        reference: label or name of the norm that stands first.

    Raises:
        ValueError: fewer than two norms, or fewer than LEAST_BLOCKS blocks, with what was left out.
    """
    complete = complete_blocks(df, reference)
    ratios, without = _ratios(complete.norms, complete.blocks)
    if len(ratios) < LEAST_BLOCKS or len(complete.norms) < 2:
        out = [f"left out: {', '.join(map(told, complete.without))}"] if complete.without else []
        no_ratio = [f"without ratios: {', '.join(without)}"] if without else []
        raise ValueError(
            "; ".join(
                [
                    f"no performance profiles: {LEAST_BLOCKS} blocks and 2 norms or more are needed, complete are "
                    f"{len(ratios)} and {len(complete.norms)}",
                    *out,
                    *no_ratio,
                ]
            )
        )
    steps = {norm: profile([block[norm] for block in ratios]) for norm in complete.norms}
    finite = [r for block in ratios for r in block.values() if math.isfinite(r)]
    beyond = sum(r > LARGEST_RATIO for r in finite)
    last = min(LARGEST_RATIO, max(finite))
    end = max(1 + 1.06 * (last - 1), 1.05)
    order = sorted(complete.norms, key=lambda norm: -_area(steps[norm], end))
    found, names = looks(complete.norms), drawn_names(complete.norms, LONGEST)
    columns = 2
    with style():
        figure, axes = new_figure(COLUMN, 2.05 + 0.135 * math.ceil(len(order) / columns))
        for norm in order:
            t, share = zip(*steps[norm], strict=True)
            axes.step(
                [*t, max(end, t[-1])],
                [*share, share[-1]],
                where="post",
                label=names[norm],
                markevery=range(len(t)),
                **{**found[norm].plot, "markersize": 2.6},
            )
        axes.set(xlim=(1 - 0.015 * (end - 1), end), ylim=(-0.03, 1.03), ylabel="share of blocks within t")
        axes.set_xlabel("times worse than the block's best norm (t)")
        if end > 3:
            axes.set_xscale("log")
            ticks = [t for t in _TICKS if t <= end]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        say(axes, f"{len(ratios)} blocks, {complete.seeds} each; higher is nearer to the best")
        figure.legend(loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.2, borderpad=0)
    finding = _finding({norm: steps[norm][0][1] for norm in complete.norms}, len(ratios))
    caption = [
        f"Performance profiles of {len(order)} norms over {len(ratios)} task × setting blocks: the share of blocks in "
        "which a norm is at most so many times worse than the best norm there.",
        "Times worse: best / value where higher is better, value / best where lower is; infinite where runs diverged "
        "or failed.",
        *complete.caption(),
        *(
            [f"Blocks without ratios, since a value is below 0 or none is above: {', '.join(without)}."]
            if without
            else []
        ),
        *([f"{beyond} ratios lie beyond {LARGEST_RATIO:g}."] if beyond else []),
        "A profile compares with the best of these norms: without that one, the order of the others may be another.",
        finding,
    ]
    data = [
        {"norm": norm, "ratio": t, "share": share, "blocks": len(ratios)}
        for norm in complete.norms
        for t, share in steps[norm]
    ]
    return Drawing(
        "performance_profiles",
        "Performance profiles",
        figure,
        f"Performance profiles: step curves of {len(order)} norms over {len(ratios)} blocks, {complete.seeds}; across, "
        f"how many times worse than the best norm of a block; up, the share of blocks. {finding}",
        tuple(caption),
        tuple(data),
    )


def _ratios(norms: tuple[str, ...], blocks: tuple[CompleteBlock, ...]) -> tuple[list[dict[str, float]], list[str]]:
    """Of each block norm -> ratio, and the names of blocks that have none."""
    found, without = [], []
    for block in blocks:
        cells = {norm: block.cells[norm] for norm in norms}
        values = {norm: None if c.diverged or c.failed else c.mean for norm, c in cells.items()}
        try:
            found.append(ratios_to_best(values, bool(block.metric.higher_is_better)))
        except ValueError:
            without.append(block.name)
    return found, without


def _area(steps: list[tuple[float, float]], end: float) -> float:
    """Under a profile from 1 to `end`: the order of the legend."""
    edges = [min(t, end) for t, _ in steps[1:]] + [end]
    return sum(share * max(0.0, edge - t) for (t, share), edge in zip(steps, edges, strict=True))


def _finding(firsts: dict[str, float], blocks: int) -> str:
    most = max(firsts.values())
    names = [norm for norm, share in firsts.items() if share == most]
    if len(names) == len(firsts):
        return f"All norms are best, or as good, in {round(most * blocks)} of {blocks} blocks."
    more = (
        f" (so do {len(names) - 1} others)"
        if len(names) > 2
        else f" (so does {told(names[1])})"
        if len(names) == 2
        else ""
    )
    return f"Most often best, or as good, is {told(names[0])}{more}: in {round(most * blocks)} of {blocks} blocks."
