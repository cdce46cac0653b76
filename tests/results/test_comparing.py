"""Ranks, profiles and practical equivalence against the packages that people know, and against literal definitions."""

import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from results import comparing
from results.comparing import compare_ranks, critical_difference, profile, ratios_to_best, rope_probabilities
from results.metrics import METRICS
from results.statistics import rank, sign_flip_p, summarize
from results.tables.table import Cell

# AUC of C4.5 and of it with m, cf, and both tuned, on 14 data sets: Demšar 2006, table 6. Of two values printed as
# 0.975 the paper ranks that of C4.5+cf first, so it was a little larger.
DEMSAR = {
    "C4.5": [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1, 0.940, 0.619, 0.972, 0.957],
    "C4.5+m": [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1, 0.962, 0.666, 0.981, 0.978],
    "C4.5+cf": [0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1, 0.965, 0.614, 0.97501, 0.946],
    "C4.5+m+cf": [0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1, 0.962, 0.669, 0.975, 0.970],
}


def ranked(values):
    """norm -> value per block (higher is better) to norm -> rank per block, as tables rank."""
    blocks = range(len(next(iter(values.values()))))
    each = [rank({norm: Cell(mean=v[i], n=1) for norm, v in values.items()}, METRICS["top1"]) for i in blocks]
    return {norm: [ranks[norm] for ranks in each] for norm in values}


def drawn(norms, blocks, seed, ties=False):
    """Random values with an effect; with ties on a coarse grid."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(norms, blocks)) + 0.6 * np.arange(norms)[:, None]
    values = np.round(values) if ties else values
    return {f"norm {i}": row.tolist() for i, row in enumerate(values)}


def test_the_example_of_demsar_s_paper_comes_out_as_printed():
    found = compare_ranks(ranked(DEMSAR))
    assert {name: round(r, 3) for name, r in found.average.items()} == {
        "C4.5+m+cf": 1.964,
        "C4.5+m": 2.0,
        "C4.5+cf": 2.893,
        "C4.5": 3.143,
    }
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)
    assert critical_difference(4, 14, 0.1) == pytest.approx(1.12, abs=0.005)


def test_the_quantiles_of_nemenyi_s_test_are_those_of_demsar_s_table_5():
    printed = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    ours = [critical_difference(k, 1) / math.sqrt(k * (k + 1) / 6) for k in range(2, 11)]
    assert ours == pytest.approx(printed, abs=0.0011)


# effect sizes of autorank's, which nobody here asks for, divide by zero under ties
@pytest.mark.filterwarnings("ignore:.* encountered in scalar divide:RuntimeWarning")
@pytest.mark.parametrize(("norms", "blocks", "ties"), [(3, 5, False), (4, 8, True), (6, 12, False), (7, 30, True)])
def test_ranks_tests_and_critical_difference_equal_those_of_autorank_and_scikit_posthocs(norms, blocks, ties):
    import autorank
    import scikit_posthocs

    values = drawn(norms, blocks, seed=norms, ties=ties)
    found = compare_ranks(ranked(values))
    frame = pd.DataFrame(values)
    theirs = autorank.autorank(frame, force_mode="nonparametric", verbose=False)
    assert found.critical_difference == pytest.approx(theirs.cd, rel=1e-3)
    assert found.average == pytest.approx(theirs.rankdf["meanrank"].to_dict())
    assert (found.chi_square, found.p) == pytest.approx(stats.friedmanchisquare(*(-frame).to_numpy().T))
    pairs = scikit_posthocs.posthoc_nemenyi_friedman(-frame)
    assert found.pairs == pytest.approx({(a, b): min(1, pairs.loc[a, b]) for a, b in found.pairs})
    assert len(found.pairs) == norms * (norms - 1) / 2


@pytest.mark.parametrize("seed", range(4))
def test_a_bar_is_a_longest_run_of_norms_of_which_no_two_differ(seed):
    found = compare_ranks(ranked(drawn(7, 25, seed)))
    names = list(found.average)
    runs = [set(names[i:j]) for i, j in itertools.combinations(range(8), 2) if j - i > 1]
    alike = [
        run
        for run in runs
        if max(found.average[n] for n in run) - min(found.average[n] for n in run) <= found.critical_difference
    ]
    assert found.p < 0.05
    assert sorted(map(sorted, found.groups)) == sorted(
        sorted(r) for r in alike if not any(r < other for other in alike)
    )
    for (a, b), p in found.pairs.items():
        assert found.differ(a, b) == (p < 0.05)


def test_without_a_finding_of_friedman_s_test_no_two_norms_differ():
    found = compare_ranks({"a": [1, 2, 3, 1, 2, 3], "b": [2, 3, 1, 2, 3, 1], "c": [3, 1, 2, 3, 1, 2]})
    assert found.groups == (("a", "b", "c"),)
    assert not found.differ("a", "c")


def test_all_ties_are_no_difference():
    found = compare_ranks({name: [2.0] * 6 for name in "abc"})
    assert (found.chi_square, found.p) == (0.0, 1.0)
    assert set(found.pairs.values()) == {1.0}
    assert found.groups == (("a", "b", "c"),)


@pytest.mark.parametrize(
    ("ranks", "alpha", "reason"),
    [
        ({"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}, 0.05, "ranks in 4 blocks: .* needs 5 or more"),
        ({"a": [1.0] * 9, "b": [2.0] * 9}, 0.05, "ranks of 2 norms: .* needs 3 or more; .* paired differences"),
        ({}, 0.05, "ranks of 0 norms"),
        ({"a": [1.0] * 6, "b": [2.0] * 6, "c": [3.0] * 5}, 0.05, "every norm needs a rank in every block"),
        ({"a": [1.0] * 6, "b": [2.0] * 6, "c": [4.0] * 6}, 0.05, "no ranks of 3 norms"),
        ({"a": [1.0] * 6, "b": [2.0] * 6, "c": [3.0] * 6}, 0.5, "alpha=0.5: between 0.01 and 0.1"),
    ],
)
def test_what_a_test_of_ranks_can_not_do_is_refused_with_the_number_needed(ranks, alpha, reason):
    with pytest.raises(ValueError, match=reason):
        compare_ranks(ranks, alpha)


def false_alarms(norms, blocks, alpha):
    """Of all rankings without ties, the shares with a finding of Friedman's test, and of both tests."""
    orders = np.array(list(itertools.permutations(range(1, norms + 1))))
    sums = np.zeros((1, norms))
    for _ in range(blocks):
        sums = (sums[:, None] + orders[None]).reshape(-1, norms)
    average = sums / blocks
    chi_square = 12 * blocks / (norms * (norms + 1)) * ((average - (norms + 1) / 2) ** 2).sum(axis=1)
    friedman = stats.chi2.sf(chi_square, norms - 1) < alpha
    nemenyi = np.ptp(average, axis=1) > critical_difference(norms, blocks, alpha)
    return friedman.mean(), (friedman & nemenyi).mean()


def test_five_blocks_keep_alpha_and_four_do_not():
    for alpha in (*comparing.ALPHAS, 0.05):
        assert false_alarms(3, comparing.LEAST_BLOCKS, alpha)[1] <= alpha
    assert false_alarms(3, comparing.LEAST_BLOCKS - 1, 0.05)[0] > 0.06


def test_a_profile_is_the_share_of_blocks_within_each_ratio():
    draw = random.Random(0)
    for higher in (True, False):
        blocks = [{n: draw.choice([None, *(draw.uniform(0.1, 1) for _ in range(5))]) for n in "abcd"} for _ in range(9)]
        blocks = [{**block, "a": 0.5} for block in blocks]
        ratios = [ratios_to_best(block, higher) for block in blocks]
        for norm in "abcd":
            steps = profile([r[norm] for r in ratios])
            for t in (1.0, 1.2, 2.0, 5.0, 1e9):
                within = 0
                for block in blocks:
                    known = [v for v in block.values() if v is not None]
                    v = block[norm]
                    if v is not None:
                        within += v * t >= max(known) if higher else v <= t * min(known)
                assert [share for at, share in steps if at <= t][-1] == within / 9


def test_a_block_without_ratios_is_refused_and_a_failure_is_infinitely_worse():
    assert ratios_to_best({"a": 0.5, "b": 0.25, "c": None, "d": 0.0}, True) == {
        "a": 1,
        "b": 2,
        "c": math.inf,
        "d": math.inf,
    }
    assert profile([math.inf, math.inf]) == [(1.0, 0.0)]
    for values in ({"a": None}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": -0.5}):
        with pytest.raises(ValueError, match="ratios need values of 0 or more"):
            ratios_to_best(values, True)
    with pytest.raises(ValueError, match="one block or more"):
        profile([])


@pytest.mark.parametrize(("n", "runs"), [(6, 1), (10, 1), (10, 2)])
@pytest.mark.parametrize("rope", [0.01, 0.5])
def test_probabilities_equal_those_of_baycomp(n, runs, rope):
    import baycomp

    draw = np.random.default_rng(n)
    theirs, ours = draw.normal(size=n), draw.normal(0.3, size=n)
    found = rope_probabilities(ours - theirs, rope, correlation=runs / n)
    assert found == pytest.approx(baycomp.two_on_single(theirs, ours, rope, runs), abs=1e-12)


@pytest.mark.parametrize("shift", [-0.25, 0.0, 0.125, 0.25])
def test_equal_differences_lie_where_they_are_as_baycomp_says(shift):
    import baycomp

    x = np.array([0.5, 0.25, 1.0, 2.0, 0.75, 0.125])
    assert rope_probabilities([shift] * 6, 0.125) == baycomp.two_on_single(x, x + shift, 0.125)


def test_the_posterior_s_interval_is_the_t_interval_of_tables():
    differences = [0.1, -0.2, 0.05, 0.3, -0.1, -0.15]
    mean, _, _, half = summarize(differences)
    assert mean == pytest.approx(0)
    below, within, above = rope_probabilities(differences, half)
    assert (below, within, above) == pytest.approx((0.025, 0.95, 0.025))


@pytest.mark.parametrize(
    ("differences", "more", "reason"),
    [
        ([0.1], {}, "1 difference: probabilities need two or more"),
        ([0.1, 0.2], {"rope": -1}, "rope=-1"),
        ([0.1, 0.2], {"correlation": 1}, "correlation=1"),
    ],
)
def test_probabilities_without_a_basis_are_refused(differences, more, reason):
    with pytest.raises(ValueError, match=reason):
        rope_probabilities(differences, **({"rope": 0.01} | more))


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, -0.2, 0.3],
        [0.0, 0.0, 0.1, -0.4],
        [0.5, 0.5, 0.5, 0.5, 0.5],
        [0.2, -0.2, 0.2, -0.2, 0.4, 0.0],
        [1.25, 0.5, -0.25, 2.0, 0.75, -1.5, 0.0, 0.5],
    ],
)
def test_the_sign_flip_p_equals_scipy_s_permutation_test(differences):
    theirs = stats.permutation_test(
        (np.array(differences),),
        lambda x, axis: np.abs(x.mean(axis=axis)),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="greater",
        vectorized=True,
    )
    assert sign_flip_p(differences) == pytest.approx(theirs.pvalue)
