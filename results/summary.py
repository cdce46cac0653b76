"""The numbers in a cell: mean, spread, paired differences, marks and ranks. No frames, no text.

Every function is independent of the order in which runs were read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from results.cells import Cell
from results.metrics import Metric

SIGNIFICANT = 0.05
MOST_FLIPS = 20
"""Up to this many pairs all 2^n signs are tried; with more the p value is not computed."""


def summarize(values: Iterable[float]) -> tuple[float | None, float | None, int, float | None]:
    """Mean, sample standard deviation (n - 1), n, and half the width of the 95 % t-interval (None where undefined)."""
    values = list(values)
    n = len(values)
    if not n:
        return None, None, 0, None
    # fsum rounds once, whatever the order; the clamp keeps rounding from leaving the range of the values
    mean = min(max(math.fsum(values) / n, min(values)), max(values))
    if n < 2:
        return mean, None, n, None
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, std, n, _t_quantile(n - 1) * std / math.sqrt(n)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Exact two-sided sign-flip p value of "the differences are symmetric around zero".

    The share of all 2^n sign patterns whose sum is at least as far from zero as the observed one, so never below
    2 / 2^n. None for no differences, or more than MOST_FLIPS.
    """
    if not 0 < len(differences) <= MOST_FLIPS:
        return None
    sums = np.zeros(1)
    for d in sorted(abs(float(d)) for d in differences):
        sums = np.concatenate([sums + d, sums - d])
    # sums that are equal on paper differ by rounding
    slack = 1e-12 * math.fsum(abs(d) for d in differences)
    return float(np.count_nonzero(np.abs(sums) >= abs(math.fsum(differences)) - slack) / sums.size)


def compare(
    cell: Cell, own: Mapping[int, float], reference: Mapping[int, float], metric: Metric, whole: bool = True
) -> Cell:
    """`cell` with its difference to the reference norm, over the seeds (keys) that both have.

    Args:
        cell: of the norm that is compared.
        own, reference: seed -> value of the two norms.
        metric: tested only where one direction is better.
        whole: no run of either norm diverged or failed; survivors alone are not tested.
    """
    differences = [own[seed] - reference[seed] for seed in sorted(own.keys() & reference.keys())]
    mean, std, n, _ = summarize(differences)
    p = sign_flip_p(differences) if whole and metric.higher_is_better is not None else None
    return replace(
        cell,
        difference=mean,
        difference_std=std,
        difference_n=n,
        p=p,
        significant=p is not None and p < SIGNIFICANT,
    )


def mark(cells: Sequence[Cell | None], metric: Metric) -> list[Cell | None]:
    """The cells that stand against each other, the best and the second by distinct mean marked; ties tie.

    Not eligible: a cell with holes, since its mean is that of the survivors, or over other seeds than the others'. No
    marks where the metric has no direction or fewer than two cells are eligible.
    """
    eligible = [c.mean for c in cells if c is not None and c.mean is not None and not c.holes]
    if metric.higher_is_better is None or len(eligible) < 2:
        return list(cells)
    order = sorted(set(eligible), reverse=metric.higher_is_better)
    return [
        cell
        if cell is None or cell.mean is None or cell.holes
        else replace(cell, best=cell.mean == order[0], second=len(order) > 1 and cell.mean == order[1])
        for cell in cells
    ]


def has_result(cell: Cell) -> bool:
    """At least one run ended well with a value, or diverged, which is a result too."""
    return cell.mean is not None or cell.diverged > 0


def rank(cells: Mapping[str, Cell], metric: Metric) -> dict[str, float]:
    """Ranks from 1 (best); equal ones share the mean of their ranks.

    Cells with diverged or failed runs come behind all others, the more of them the further; then the mean decides. A
    cell all of whose runs diverged comes last.
    """
    sign = -1.0 if metric.higher_is_better else 1.0

    def order(cell: Cell) -> tuple[float, float]:
        bad = cell.diverged + cell.failed
        return (
            bad / cell.seeds if bad else 0.0,
            math.inf if cell.mean is None else sign * cell.mean,
        )

    keys = {name: order(cell) for name, cell in cells.items()}
    return {
        name: 1 + sum(other < key for other in keys.values()) + (sum(other == key for other in keys.values()) - 1) / 2
        for name, key in keys.items()
    }


@functools.cache
def _t_quantile(freedom: int) -> float:
    from scipy import special  # slow to import, and needed by tables only

    return float(special.stdtrit(freedom, 0.975))
