"""Statistics that compare norms, as pure functions of numbers: no frames, no figures.

Over blocks (a block is a task in one setting; each norm has one number in it)
    compare_ranks             average ranks, Friedman's test, Nemenyi's critical difference (Demšar 2006, JMLR 7)
    ratios_to_best, profile   performance profiles (Dolan & Moré 2002, Math. Program. 91)
Over seeds
    rope_probabilities        Bayesian t-test with a region of practical equivalence (Benavoli et al. 2017, JMLR 18)

Deliberate differences: ranks come from `results.statistics.rank`, which puts diverged runs behind all others, and are
not computed here. Seeds are independent given a data set, so the correlation of Benavoli's test is 0 unless it is
given; for cross validation it is 1 / folds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from results.statistics import summarize

LEAST_BLOCKS = 5
"""Blocks that a test of ranks needs. Friedman's and Nemenyi's distributions hold for many blocks. With five and three
norms or more, both together raise false alarms no more often than alpha (simulated for 3 to 31 norms, alpha 0.01 to
0.1); with four, Friedman's test alone does for three norms."""
LEAST_NORMS = 3
"""Norms that a test of ranks needs; two are compared by their paired differences."""
ALPHAS = (0.01, 0.1)
"""The range of alpha for which LEAST_BLOCKS was simulated."""
LEAST_PAIRS = 6
"""Pairs of seeds from which probabilities are given. With fewer the sign-flip test, which assumes no distribution,
can not fall below 0.05 (2 / 2^5 = 0.0625), so a probability of 95 % would be the work of the normal assumption."""


@dataclass(frozen=True)
class Ranking:
    """Norms compared by their ranks.

    Attributes:
        average: norm -> its average rank, the best (smallest) first.
        blocks: over how many blocks.
        alpha: of both tests.
        chi_square, p: Friedman's statistic, corrected for ties, and its p value of "all norms are alike".
        critical_difference: two norms differ by Nemenyi's test if their average ranks differ by more.
        pairs: (norm, norm) -> Nemenyi's p value, each pair in the order of `average`.
        groups: the longest runs of norms, in the order of `average`, of which no two differ; a single norm is no
            group. All norms are one group if Friedman's test finds no difference.
    """

    average: dict[str, float]
    blocks: int
    alpha: float
    chi_square: float
    p: float
    critical_difference: float
    pairs: dict[tuple[str, str], float]
    groups: tuple[tuple[str, ...], ...]

    def differ(self, one: str, other: str) -> bool:
        """Whether both tests say so."""
        return self.p < self.alpha and not any(one in group and other in group for group in self.groups)


def compare_ranks(ranks: Mapping[str, Sequence[float]], alpha: float = 0.05) -> Ranking:
    """Friedman's test over all norms, and Nemenyi's over every pair.

    Args:
        ranks: norm -> its rank in each block, 1 is best, equal ones share the mean of their ranks.
        alpha: between 0.01 and 0.1.

    Raises:
        ValueError: fewer than LEAST_NORMS norms or LEAST_BLOCKS blocks; norms with different numbers of blocks, or
            ranks that are none; alpha outside of ALPHAS.
    """
    lowest, highest = ALPHAS
    if not lowest <= alpha <= highest:
        raise ValueError(f"alpha={alpha:g}: between {lowest:g} and {highest:g}, where these tests were tried")
    counts = {len(values) for values in ranks.values()}
    if len(counts) > 1:
        raise ValueError(f"ranks of {min(counts)} to {max(counts)} blocks: every norm needs a rank in every block")
    k, n = len(ranks), max(counts, default=0)
    if k < LEAST_NORMS:
        raise ValueError(
            f"ranks of {_count(k, 'norm')}: a test of ranks needs {LEAST_NORMS} or more; two norms are compared by "
            "their paired differences"
        )
    if n < LEAST_BLOCKS:
        raise ValueError(
            f"ranks in {_count(n, 'block')}: a test of ranks needs {LEAST_BLOCKS} or more, since its distributions "
            "are those of many blocks"
        )
    matrix = np.array(list(ranks.values()), dtype=float).T  # (blocks, norms)
    if not np.allclose(matrix.sum(axis=1), k * (k + 1) / 2):
        raise ValueError(f"these are no ranks of {k} norms: those of a block sum to {k * (k + 1) / 2:g}")
    average = {name: summarize(values)[0] or 0.0 for name, values in ranks.items()}
    average = dict(sorted(average.items(), key=lambda item: item[1]))
    chi_square, p = _friedman(matrix)
    difference = critical_difference(k, n, alpha)
    names = list(average)
    alike = [_last_alike(names, average, i, difference) for i in range(k)]
    # a run that ends where the one before it ends lies within it
    groups = [tuple(names[i : j + 1]) for i, j in enumerate(alike) if j > i and (i == 0 or j > alike[i - 1])]
    if p >= alpha:
        groups = [tuple(names)]
    return Ranking(average, n, alpha, chi_square, p, difference, _nemenyi(matrix, list(ranks), names), tuple(groups))


def critical_difference(norms: int, blocks: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of average ranks: q sqrt(k (k + 1) / (6 N)) of k norms in N blocks, where q is the
    upper alpha quantile of the studentized range of k values, divided by sqrt(2)."""
    from scipy import stats

    q = float(stats.studentized_range.ppf(1 - alpha, norms, np.inf)) / math.sqrt(2)
    return q * math.sqrt(norms * (norms + 1) / (6 * blocks))


def _friedman(matrix: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    if (matrix == matrix[:, :1]).all():  # all alike in every block: the correction for ties would divide by zero
        return 0.0, 1.0
    result = stats.friedmanchisquare(*matrix.T)
    return float(result.statistic), float(result.pvalue)


def _nemenyi(matrix: np.ndarray, columns: Sequence[str], order: Sequence[str]) -> dict[tuple[str, str], float]:
    import scikit_posthocs  # brings seaborn and statsmodels: two seconds

    found = scikit_posthocs.posthoc_nemenyi_friedman(matrix).to_numpy()
    place = {name: i for i, name in enumerate(columns)}
    return {
        (one, other): min(1.0, float(found[place[one], place[other]]))
        for one, other in itertools.combinations(order, 2)
    }


def _last_alike(names: Sequence[str], average: Mapping[str, float], first: int, difference: float) -> int:
    """The place of the last norm that does not differ from the one at `first`."""
    near = [i for i in range(first, len(names)) if average[names[i]] - average[names[first]] <= difference + 1e-12]
    return near[-1]


def ratios_to_best(values: Mapping[str, float | None], higher_is_better: bool) -> dict[str, float]:
    """norm -> how many times worse than the best of the block, at least 1 (Dolan & Moré's performance ratio).

    value / best where lower is better, as theirs; best / value where higher is better. The ratio is of the metric
    itself and not of 1 - metric: only some metrics are shares of 1, and near 100 % a ratio of errors makes much of
    one image.

    Args:
        values: of one block. None: a run diverged or failed there. Its ratio is infinite.
        higher_is_better: direction of the metric.

    Raises:
        ValueError: no value, or a value below 0, or a best of 0: such a metric has no ratios.
    """
    known = [v for v in values.values() if v is not None]
    best = (max if higher_is_better else min)(known, default=0.0)
    if best <= 0 or min(known) < 0 or not math.isfinite(best):
        raise ValueError(f"the best of these values is {best:g}: ratios need values of 0 or more and a best above 0")
    ratios = {}
    for name, value in values.items():
        if value is None or (higher_is_better and value == 0):
            ratios[name] = math.inf
        else:
            ratios[name] = best / value if higher_is_better else value / best
    return ratios


def profile(ratios: Sequence[float]) -> list[tuple[float, float]]:
    """The performance profile of one norm: rho(t) = share of blocks whose ratio is at most t, a step function.

    Args:
        ratios: one for each block, of `ratios_to_best`.

    Returns:
        (t, rho(t)) where it steps, t rising from 1; an infinite ratio is no step, so rho stays below 1.

    Raises:
        ValueError: no ratio.
    """
    if not ratios:
        raise ValueError("a profile needs the ratios of one block or more")
    steps = sorted({1.0, *(r for r in ratios if math.isfinite(r))})
    return [(t, sum(r <= t for r in ratios) / len(ratios)) for t in steps]


def rope_probabilities(
    differences: Sequence[float], rope: float, correlation: float = 0.0
) -> tuple[float, float, float]:
    """P(below), P(within), P(above): where the expected difference lies, seen from the region of practical equivalence.

    The posterior of the expected difference is Student's t with n - 1 degrees of freedom around the mean, with the
    squared scale s^2 (1 / n + correlation / (1 - correlation)), s the sample standard deviation: the Bayesian
    correlated t-test of Benavoli et al., whose 95 % interval is the t-interval where correlation = 0. Differences that
    are all equal put all of it where they lie.

    Args:
        differences: one for each seed, two or more; fewer than LEAST_PAIRS do not support a claim, which is for the
            caller to see to.
        rope: the region is [-rope, rope]; in units of the differences, 0 or more.
        correlation: between the differences, from 0 to below 1.

    Raises:
        ValueError: fewer than two differences, a rope below 0, or a correlation outside of its range.
    """
    from scipy import special

    mean, std, n, _ = summarize(differences)
    if mean is None or std is None:
        raise ValueError(f"{_count(n, 'difference')}: probabilities need two or more")
    if not 0 <= rope < math.inf:
        raise ValueError(f"rope={rope:g}: a finite number, 0 or more")
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation={correlation:g}: from 0 to below 1")
    scale = std * math.sqrt(1 / n + correlation / (1 - correlation))
    if scale == 0:
        below, above = float(mean < -rope), float(mean > rope)
    else:
        below = float(special.stdtr(n - 1, (-rope - mean) / scale))
        above = float(special.stdtr(n - 1, (mean - rope) / scale))
    return below, max(0.0, 1 - below - above), above


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
