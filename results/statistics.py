"""The numbers in a cell: mean, spread, paired differences, marks and ranks. No frames, no text.

Every function is independent of the order in which runs were read.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from results.metrics import Metric
from results.tables.table import Cell

SIGNIFICANT = 0.05
MOST_FLIPS = 20
"""Up to this many pairs all 2^n signs are tried; with more, SAMPLED_FLIPS random ones."""
SAMPLED_FLIPS = 100_000


def summarize(values: Iterable[float]) -> tuple[float | None, float | None, int, float | None]:
    """Mean, sample standard deviation (n - 1), n, and half the width of the 95 % t-interval (None where undefined)."""
    values = list(values)
    n = len(values)
    if not n:
        return None, None, 0, None
    try:
        mean, std = _moments(values)
    except OverflowError:  # near 1.8e308: in units of the largest, the spread may still be infinite
        largest = max(map(abs, values))
        mean, std = _moments([v / largest for v in values])
        mean, std = mean * largest, None if std is None else std * largest
    return mean, std, n, None if std is None else _t_quantile(n - 1) * std / math.sqrt(n)


def _moments(values: Sequence[float]) -> tuple[float, float | None]:
    # fsum rounds once, whatever the order; the clamp keeps rounding from leaving the range of the values
    n = len(values)
    mean = min(max(math.fsum(values) / n, min(values)), max(values))
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Two-sided sign-flip p value of "the differences are symmetric around zero"; None for no differences.

    Up to MOST_FLIPS differences exact: the share of all 2^n sign patterns whose sum is at least as far from zero as the
    observed one, so never below 2 / 2^n. With more, of SAMPLED_FLIPS random patterns, the observed one counted among
    them (Phipson & Smyth 2010: (1 + hits) / (1 + flips)); equal differences in any order give the same patterns.
    """
    largest = max((abs(d) for d in differences), default=0.0)
    if not largest:
        return 1.0 if differences else None
    sizes = np.sort([abs(float(d)) / largest for d in differences])  # no sum of these overflows
    # sums that are equal on paper differ by rounding
    least = abs(math.fsum(float(d) / largest for d in differences)) - 1e-12 * math.fsum(sizes)
    if len(sizes) > MOST_FLIPS:
        return (1 + _sampled_hits(sizes, least)) / (1 + SAMPLED_FLIPS)
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums + size, sums - size])
    return float(np.count_nonzero(np.abs(sums) >= least) / sums.size)


def _sampled_hits(sizes: np.ndarray, least: float) -> int:
    """How many of SAMPLED_FLIPS sign patterns give a sum of at least `least`; drawn from the sizes' own digest."""
    seed = int.from_bytes(hashlib.sha256(sizes.astype("<f8").tobytes()).digest()[:16], "big")
    source = np.random.PCG64(seed)  # its raw stream is the same in every version of numpy
    words, hits, block = -(-sizes.size // 64), 0, 10_000
    for _ in range(SAMPLED_FLIPS // block):
        raw = source.random_raw(block * words).astype("<u8").view(np.uint8).reshape(block, -1)
        flipped = np.unpackbits(raw, axis=1, count=sizes.size).astype(bool)
        hits += int(np.count_nonzero(np.abs(np.where(flipped, -sizes, sizes).sum(axis=1)) >= least))
    return hits


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
    both = [(own[seed], reference[seed]) for seed in sorted(own.keys() & reference.keys())]
    differences = [mine - theirs for mine, theirs in both]
    if all(map(math.isfinite, differences)):
        mean, std, n, _ = summarize(differences)
    else:  # beyond what a float holds: signs and ratios are those of the halves
        differences = [mine / 2 - theirs / 2 for mine, theirs in both]
        mean, std, n = None, None, len(differences)
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
    """Mark the best and the second-best cells of one comparison. Equal means get equal marks.

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


def covers_its_seeds(cell: Cell) -> bool:
    """Whether every seed of the setting gave a value, diverged or failed: such a cell can be ranked."""
    return not (cell.missing or cell.unmeasured or cell.skipped)


def rank(cells: Mapping[str, Cell], metric: Metric) -> dict[str, float]:
    """Ranks from 1 (best); equal ones share the mean of their ranks.

    Cells with diverged or failed runs come behind all others, the more of them the further. Equally many tie: the means
    of what survived are over different seeds.
    """
    sign = -1.0 if metric.higher_is_better else 1.0

    def order(cell: Cell) -> tuple[float, float]:
        bad = cell.diverged + cell.failed
        return (
            bad / cell.seeds if bad else 0.0,
            math.inf if bad or cell.mean is None else sign * cell.mean,
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
