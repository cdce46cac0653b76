"""Aggregation and rendering: what a table says about hand-made records, to the last character."""

import csv
import io
import itertools
import math
import random
import re
import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from results import statistics as summary
from results.frame import from_records
from results.metrics import METRICS
from results.record import RunRecord, RunSpec
from results.tables import build as tables
from results.tables.table import Cell

TOP1, LOSS, SHIFT = METRICS["top1"], METRICS["test_loss"], METRICS["composition_shift"]


def run(norm="bn", seed=0, value=0.5, status="ok", label="", norm_options=None, task="classification", **more):
    """A record; keywords that are no option of the task: metrics, reason, equals, data, environment, version."""
    metrics = more.pop("metrics", {"top1": value})
    reason, equals, data = more.pop("reason", ""), more.pop("equals", None), more.pop("data", "real")
    evidence = more.pop("evidence", {})
    environment = {"commit": "c0ffee", "torch": "2", "device": "cpu", "threads": 1} | more.pop("environment", {})
    return RunRecord(
        spec=RunSpec(
            task=task,
            norm=norm,
            norm_options=norm_options or {},
            task_options=more,
            seed=seed,
            norm_version="1",
            task_version="1",
            data_checksum=more.get("dataset", "d"),
            norm_label=label,
        ),
        status=status,
        reason=reason,
        metrics=metrics if status == "ok" else {},
        environment=environment,
        evidence={"data": data, "budget": "reduced", "selection": "last epoch", "equals": equals} | evidence,
    )


def runs(norm, values, **more):
    """One record per value, seeds from 0; a text is a status, None is a run that was not made."""
    return [
        run(norm, seed, **({"status": v} if isinstance(v, str) else {"value": v}), **more)
        for seed, v in enumerate(values)
        if v is not None
    ]


def table_of(records, **more):
    return tables.task_table(from_records(records), **more)


def cells(table, column=0):
    """(group, label) -> cell of one column."""
    return {(row.group, row.label): row.cells[column] for row in table.rows}


def by_label(table, column=0):
    return {row.label: row.cells[column] for row in table.rows}


# --- the numbers ---------------------------------------------------------------------------------------------------

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(numbers)
def test_mean_deviation_and_interval_are_the_textbooks(values):
    mean, std, n, ci95 = summary.summarize(values)
    assert n == len(values)
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-12)
    assert min(values) <= mean <= max(values)
    if n == 1:
        assert std is None
        assert ci95 is None
    else:
        assert std == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-6)
        assert ci95 == pytest.approx(stats.t.ppf(0.975, n - 1) * std / math.sqrt(n), rel=1e-9)
    assert summary.summarize(values[::-1]) == (mean, std, n, ci95)
    assert summary.summarize([]) == (None, None, 0, None)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=7))
def test_the_sign_flip_p_is_the_share_of_all_sign_patterns(differences):
    at_least = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= abs(sum(differences))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    p = summary.sign_flip_p([d / 8 for d in differences])
    assert p == sum(at_least) / len(at_least)
    assert p >= 2 / 2 ** len(differences) or len(differences) == 1


def test_the_sign_flip_p_forgives_rounding_and_has_a_floor():
    assert summary.sign_flip_p([0.1, 0.2, 0.3]) == summary.sign_flip_p([0.3, 0.1, 0.2]) == 0.25
    assert summary.sign_flip_p([0.1 + 0.2, -0.3]) == 1.0
    assert summary.sign_flip_p([0.1] * summary.MOST_FLIPS) == 2 / 2**summary.MOST_FLIPS
    assert summary.sign_flip_p([]) is None
    assert summary.sign_flip_p([0.0] * 3) == summary.sign_flip_p([0.0] * 30) == 1.0


def test_more_pairs_than_can_be_tried_are_tested_by_sampled_flips(monkeypatch):
    """Close to the exact p, of which this is an estimate with a standard error of 0.0007 or less, and never zero."""
    draw = random.Random(1)
    differences = [draw.gauss(0.4, 1.0) for _ in range(summary.MOST_FLIPS)]
    exact = summary.sign_flip_p(differences)
    assert 0.01 < exact < 0.2
    monkeypatch.setattr(summary, "MOST_FLIPS", 5)
    sampled = summary.sign_flip_p(differences)
    assert sampled == pytest.approx(exact, abs=0.004)
    assert sampled != exact
    assert sampled == summary.sign_flip_p(draw.sample(differences, len(differences))), "the same data, the same p"
    assert sampled == summary.sign_flip_p([-d for d in differences])
    for n in (21, 64, 65, 200):
        assert summary.sign_flip_p([0.1] * n) == 1 / (1 + summary.SAMPLED_FLIPS)
        balanced = summary.sign_flip_p([0.1, -0.1] * n)
        assert balanced == 1.0


def test_the_caption_names_the_test_behind_the_marks():
    def caption(*sizes):
        def pair(n):
            return [*runs("bn", [0.5] * n, dataset=str(n)), *runs("gn", [0.6] * n, dataset=str(n))]

        table = table_of(itertools.chain.from_iterable(map(pair, sizes)))
        assert all(cell.significant for (_, label), cell in cells(table).items() if label == "gn")
        (line,) = [line for line in table.caption if line.startswith("†")]
        return line.partition(" paired by seed")[0].removeprefix("† differs from bn: ")

    assert caption(20) == "exact sign-flip test"
    assert caption(21) == "sign-flip test with 100,000 sampled flips (more than 20 pairs)"
    assert caption(20, 21) == "sign-flip test (exact up to 20 pairs, with 100,000 sampled flips beyond)"
    same = table_of([*runs("bn", [0.5] * 21), *runs("gn", [0.5] * 21)]).caption
    assert (
        "No cell differs from bn at p < 0.05 (sign-flip test with 100,000 sampled flips (more than 20 pairs), "
        "paired by seed)."
    ) in same


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.sampled_from([TOP1, LOSS]))
def test_ranks_are_those_of_scipy_and_marks_follow_distinct_means(means, metric):
    given_cells = [Cell(mean=float(m), n=1) for m in means]
    sign = -1 if metric.higher_is_better else 1
    ranks = summary.rank({str(i): c for i, c in enumerate(given_cells)}, metric)
    assert list(ranks.values()) == stats.rankdata([sign * m for m in means]).tolist()
    order = sorted({sign * m for m in means})
    for m, cell in zip(means, summary.mark(given_cells, metric), strict=True):
        assert cell.best == (len(means) > 1 and sign * m == order[0])
        assert cell.second == (len(order) > 1 and sign * m == order[1])


def test_diverged_and_failed_cells_rank_behind_and_are_never_marked():
    given_cells = {
        "whole": Cell(mean=0.1, n=3),
        "better": Cell(mean=0.2, n=3),
        "one diverged": Cell(mean=0.9, n=2, diverged=1),
        "two failed": Cell(mean=0.9, n=1, failed=2),
        "all diverged": Cell(diverged=3),
    }
    order = ["better", "whole", "one diverged", "two failed", "all diverged"]
    assert summary.rank(given_cells, TOP1) == {name: order.index(name) + 1.0 for name in given_cells}
    marked = dict(zip(given_cells, summary.mark(list(given_cells.values()), TOP1), strict=True))
    assert [name for name, c in marked.items() if c.best] == ["better"]
    assert [name for name, c in marked.items() if c.second] == ["whole"]


@pytest.mark.parametrize(
    ("given_cells", "metric"),
    [
        ([Cell(mean=0.1, n=1), Cell(mean=0.2, n=1)], SHIFT),
        ([Cell(mean=0.1, n=1), Cell(mean=0.2, n=1, diverged=1)], TOP1),
        ([Cell(mean=0.1, n=1), Cell(), None], TOP1),
    ],
    ids=["a metric without direction", "one whole cell", "one cell with a mean"],
)
def test_nothing_is_marked_where_nothing_was_won(given_cells, metric):
    assert summary.mark(given_cells, metric) == given_cells


# --- tables --------------------------------------------------------------------------------------------------------


def test_ties_tie_and_the_second_is_the_next_distinct_mean():
    marked = by_label(table_of([*runs("bn", [0.5]), *runs("gn", [0.5]), *runs("ln", [0.4]), *runs("in", [0.3])]))
    assert {name: (c.best, c.second) for name, c in marked.items()} == {
        "bn": (True, False),
        "gn": (True, False),
        "in": (False, False),
        "ln": (False, True),
    }


def test_the_best_loss_is_the_lowest():
    entries = [run(n, metrics={"test_loss": v, "composition_shift": v}) for n, v in (("bn", 1.0), ("gn", 2.0))]
    table = table_of(entries)
    assert [c.metric.name for c in table.columns] == ["test_loss", "composition_shift"]
    assert by_label(table)["bn"].best
    assert not any(c.best or c.second for c in by_label(table, 1).values()), "no direction, no mark"


def test_every_kind_of_hole_is_counted_apart():
    table = table_of(
        [
            *runs("bn", [0.5, 0.6, 0.7]),
            *runs("gn", [0.5, "diverged", "failed"]),
            *runs("in", ["skipped"] * 3, reason="1x1 maps"),
            *runs("ln", [0.5, None, 0.7]),
            *runs("pn", [0.9, 0.9]),
            run("pn", 2, metrics={"val_top1": 0.5}),
        ],
        metrics=["top1"],
    )
    found = by_label(table)
    assert {name: cell.holes for name, cell in found.items()} == {
        "bn": {},
        "gn": {"diverged": 1, "failed": 1},
        "in": {"skipped": 3},
        "ln": {"missing": 1},
        "pn": {"unmeasured": 1},
    }
    assert {name: cell.n for name, cell in found.items()} == {"bn": 3, "gn": 1, "in": 0, "ln": 2, "pn": 2}
    assert found["gn"].note == "diverged 1/3, failed 1/3"
    assert found["in"].note == "skipped 3/3 (1x1 maps)"
    assert found["pn"].note == "without this metric 1/3"
    assert "Runs: 15, of which 9 ok, 1 diverged, 1 failed, 3 skipped, 1 missing." in table.caption
    text = tables.to_text(table)
    assert re.search(r"^in +—\[b\]$", text, re.M)
    assert re.search(r"^gn +50.0\[a\]$", text, re.M), "no ± for one seed"
    assert "[a] diverged 1/3, failed 1/3" in text


def test_norms_that_are_skipped_for_one_reason_share_its_note():
    reason = (
        "takes statistics from earlier iterations, and would take each of the 1024 norm batches of an update for one"
    )
    skipped = [r for n in ("cbn", "mbn", "dsbn") for r in runs(n, ["skipped"], reason=reason if n != "dsbn" else "x")]
    text = tables.to_text(table_of([*runs("bn", [0.5]), *skipped]))
    assert [line for line in text.splitlines() if line.startswith("[")] == [
        f"[a] skipped 1/1 ({reason})",
        "[b] skipped 1/1 (x)",
    ]
    assert re.search(r"^cbn +—\[a\]$", text, re.M)
    assert re.search(r"^mbn +—\[a\]$", text, re.M)


def test_a_norm_that_was_never_asked_for_in_a_setting_has_no_row_there_and_is_no_hole():
    """Three norms in one entry of a config, one of them and another in the other, as adversarial in all_norms.yaml."""
    trades = [*runs("bn", [0.5, None], method="trades"), *runs("dsbn", [0.75, 0.5], method="trades")]
    pgd = [r for n in ("bn", "gn", "in") for r in runs(n, [0.5, 0.75], method="pgd")]
    table = table_of([*pgd, *runs("dsbn", ["skipped", "skipped"], method="pgd", reason="needs domain"), *trades])
    assert {(group.partition("=")[2], label): cell.holes for (group, label), cell in cells(table).items()} == {
        ("pgd", "bn"): {},
        ("pgd", "dsbn"): {"skipped": 2},  # asked for: its skipped runs left records
        ("pgd", "gn"): {},
        ("pgd", "in"): {},
        ("trades", "bn"): {"missing": 1},  # asked for: one of its two runs is there
        ("trades", "dsbn"): {},
    }
    runs_line = table.caption.index("Runs: 12, of which 9 ok, 0 diverged, 0 failed, 2 skipped, 1 missing.")
    assert table.caption[runs_line + 1] == (
        "Left out, without a current record: 2 of 8 pairs of norm and setting (not asked for there, or not yet begun)."
    )
    sweep = tables.sweep_table(from_records([*pgd, *trades]), "method")
    assert [(row.label, [c is None for c in row.cells]) for row in sweep.rows] == [
        ("bn", [False, False]),
        ("dsbn", [True, False]),
        ("gn", [False, True]),
        ("in", [False, True]),
    ]
    assert re.search(r"^gn +\*62.5 ± 17.7\*$", tables.to_text(sweep), re.M), "a blank and no dash"


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["bn", "gn", "ln"]), st.sampled_from([1, 2]), st.integers(0, 2)),
        st.sampled_from(["ok", "diverged", "failed", "skipped"]),
        min_size=1,
    )
)
def test_every_run_that_was_asked_for_is_counted_once_in_every_format_and_no_other(made):
    assume("ok" in made.values())
    table = table_of([run(n, seed, status=status, rate=rate) for (n, rate, seed), status in made.items()])
    rates = {rate for _, rate, _ in made}
    places = {(f"rate={rate}" * (len(rates) > 1), n): (n, rate) for n, rate, _ in made}
    found = cells(table)
    assert found.keys() == places.keys()
    total = dict.fromkeys(("ok", "diverged", "failed", "skipped", "missing"), 0)
    for place, cell in found.items():
        n, rate = places[place]
        own = [status for (*where, _), status in made.items() if where == [n, rate]]
        wanted = {seed for _, r, seed in made if r == rate}
        shown = {"ok": cell.n, **{kind: getattr(cell, kind) for kind in list(total)[1:]}}
        assert shown == {kind: own.count(kind) for kind in total} | {"missing": len(wanted) - len(own)}
        total = {kind: total[kind] + shown[kind] for kind in total}
    line = ", ".join(f"{count} {kind}" for kind, count in total.items())
    assert f"Runs: {sum(total.values())}, of which {line}." in table.caption
    pairs = len({n for n, _, _ in made}) * len(rates)
    left_out = [text for text in table.caption if text.startswith("Left out, without a current record: ")]
    assert [text.split(": ")[1].split(" pairs")[0] for text in left_out] == (
        [f"{pairs - len(places)} of {pairs}"] if pairs > len(places) else []
    )
    tidy, wide = (list(csv.DictReader(io.StringIO(tables.to_csv(table, wide)))) for wide in (False, True))
    assert [line["norm"] for line in tidy] == [line["norm"] for line in wide] == [label for _, label in found]
    assert {kind: sum(int(line["n" if kind == "ok" else kind]) for line in tidy) for kind in total} == total
    for text, row in ((tables.to_markdown(table), r"^\| (bn|gn|ln) "), (tables.to_latex(table), r"^(bn|gn|ln) & ")):
        assert re.findall(row, text, re.M) == [label for _, label in found]


def test_n_is_shown_where_a_footnote_does_not_say_it():
    records = [*runs("bn", [0.5, 0.6], dataset="a"), *runs("bn", [0.5, 0.6], dataset="b")]
    text = tables.to_text(table_of([*records, *runs("bn", [0.5] * 3, dataset="c")]))
    assert "; n = 2 unless given; seeds 0-2." in text
    assert text.count("(n=3)") == 1
    assert text.count("(n=2)") == 0
    text = tables.to_text(table_of([*records, *runs("gn", [0.5, "diverged"], dataset="a")]))
    assert "; n = 2, less the holes in footnotes; seeds 0, 1." in text
    assert "(n=" not in text


def test_a_norm_that_does_not_mix_samples_stands_in_every_norm_batch():
    records = [
        *itertools.chain.from_iterable(
            runs("bn", [b / 100, 0.5], norm_batch_size=b, rate=r) for b in (2, 64) for r in (1, 2)
        ),
        *runs("gn", [0.7, 0.8], norm_batch_size=None, rate=1),
        *runs("gn", [0.1, 0.2], norm_batch_size=None, rate=2),
    ]
    table = table_of(records)
    groups = [f"norm_batch_size={b}, rate={r}" for b in (2, 64) for r in (1, 2)]
    assert list(cells(table)) == [(g, n) for g in groups for n in ("bn", "gn")]
    assert [cells(table)[g, "gn"].mean for g in groups] == [0.75, pytest.approx(0.15)] * 2
    assert all(cells(table)[g, "gn"].repeated and not cells(table)[g, "bn"].repeated for g in groups)
    assert [bool(row.notes) for row in table.rows] == [False, True] * 4
    assert "Runs: 12, of which 12 ok, 0 diverged, 0 failed, 0 skipped, 0 missing." in table.caption
    sweep = tables.sweep_table(from_records(records), "norm_batch_size")
    assert [c.title for c in sweep.columns] == ["2", "64"]
    assert [c.mean for c in sweep.rows[1].cells] == [0.75, 0.75]
    assert tables.REPEATED in tables.to_markdown(sweep)


def test_a_repeated_norm_without_company_stands_in_the_norm_batches_of_the_others():
    records = [*runs("bn", [0.5], norm_batch_size=2, dataset="a"), *runs("bn", [0.5], norm_batch_size=64, dataset="a")]
    table = table_of([*records, *runs("gn", [0.7], norm_batch_size=None, dataset="b")])
    assert set(cells(table)) == {
        (f"dataset={d}, norm_batch_size={b}", n) for d, n in (("a", "bn"), ("b", "gn")) for b in (2, 64)
    }
    assert "Runs: 3, of which 3 ok, 0 diverged, 0 failed, 0 skipped, 0 missing." in table.caption


def test_an_unresolved_norm_batch_of_a_norm_that_has_others_is_not_repeated():
    table = table_of([*runs("bn", [0.5], norm_batch_size=2), *runs("bn", [0.6], norm_batch_size=None)])
    assert {g: c.mean for (g, _), c in cells(table).items()} == {
        "norm_batch_size=2": 0.5,
        "norm_batch_size=SGD batch": 0.6,
    }


def test_a_row_that_equals_another_norm_says_so():
    always = [*runs("bgn", [0.5], equals="bn", batch=1), *runs("bgn", [0.5], equals="bn", batch=2)]
    sometimes = [*runs("pn", [0.5], equals="bn", batch=1), *runs("pn", [0.6], batch=2)]
    itself = [*runs("bn", [0.5], equals="bn", batch=1), *runs("bn", [0.5], equals="bn", batch=2)]
    text = tables.to_text(table_of([*always, *sometimes, *itself]))
    lines = [line for line in text.splitlines() if line.startswith(("bn", "bgn", "pn"))]
    assert [re.sub(r"[\s*_]+", " ", line).strip() for line in lines] == [
        "bn 50.0",
        "bgn = bn 50.0",
        "pn 50.0 = bn",
        "bn 50.0",
        "bgn = bn 50.0",
        "pn 60.0",
    ]


def test_labels_tell_rows_apart_and_the_reference_comes_first():
    records = [run("bgn", norm_options={"num_groups": g}, label=f"bgn(num_groups={g})") for g in (16, 2)]
    records += [run("bn"), run("an"), run("bn", norm_options={"momentum": 0.5}, label="bn(momentum=0.5)")]
    records += [run("gn", norm_options={"k": k}, label="gn") for k in (1, 2)]
    assert [row.label for row in table_of(records).rows] == [
        "bn",
        "an",
        "bgn(num_groups=2)",
        "bgn(num_groups=16)",
        "bn(momentum=0.5)",
        "gn [gn(k=1)]",
        "gn [gn(k=2)]",
    ]


def test_differences_are_paired_by_seed_and_marked_only_where_n_supports_it():
    def compare(n, **more):
        bn = [0.5 + s / 100 for s in range(n)]
        table = table_of([*runs("bn", bn), *runs("gn", [v + 0.1 for v in bn], **more)])
        return by_label(table)["gn"], table

    five, table = compare(5)
    assert five.difference == pytest.approx(0.1)
    assert five.difference_std == pytest.approx(0, abs=1e-12)
    assert (five.difference_n, five.p, five.significant) == (5, 2 / 2**5, False)
    assert any("5 paired seeds" in line and "0.0625" in line for line in table.caption)
    six, table = compare(6)
    assert (six.p, six.significant) == (2 / 2**6, True)
    assert re.search(r"gn +\*62.5 ± 1.9\*†", tables.to_text(table))
    assert any("not corrected" in line for line in table.caption)
    assert not by_label(table)["bn"].significant


def test_a_difference_between_survivors_is_not_tested():
    values = [0.5 + s / 100 for s in range(7)]
    table = table_of([*runs("bn", values), *runs("gn", [*(v + 0.1 for v in values[:6]), "diverged"])])
    assert by_label(table)["gn"].difference_n == 6
    assert by_label(table)["gn"].p is None
    assert not by_label(table)["gn"].significant
    assert "No test against bn: a run of either diverged or failed." in table.caption
    assert not [line for line in table.caption if "No cell differs" in line]


def test_a_caption_says_which_cells_have_too_few_seeds_for_a_mark():
    def records(data, n):
        bn = [0.5 + s / 100 for s in range(n)]
        return [*runs("bn", bn, dataset=data), *runs("gn", [v + 0.1 for v in bn], dataset=data)]

    caption = table_of([*records("a", 6), *records("b", 3)]).caption
    assert "Fewer than 6 pairs (here 3 in some cells) can not reach that p." in caption
    assert not [line for line in table_of(records("a", 6)).caption if "Fewer than" in line]
    shift = [run(n, s, metrics={"composition_shift": 0.1 * s}) for n in ("bn", "gn") for s in range(6)]
    assert not [line for line in table_of(shift).caption if "test" in line], "a metric without direction is not tested"


def test_a_mean_over_other_seeds_is_not_marked_best():
    """bn is better in both seeds; gn lacks the harder one."""
    found = by_label(table_of([*runs("bn", [0.9, 0.5]), *runs("gn", [0.8, None]), *runs("ln", [0.3, 0.2])]))
    assert (found["gn"].best, found["gn"].second) == (False, False)
    assert (found["bn"].best, found["ln"].second) == (True, True)


def test_what_the_data_set_decides_stands_in_the_caption_and_is_no_sweep():
    records = [
        run(norm, dataset=data, learning_rate=rate, model=model, norm_batch_size=b)
        for data, rate, model in (("a", 0.1, "resnet8"), ("b", 0.05, "resnet20"))
        for b in (2, 64)
        for norm in ("bn", "gn")
    ]
    table, sweep, overall = tables.render_all(from_records(records))
    assert {row.group for row in table.rows} == {f"dataset={d}, norm_batch_size={b}" for d in "ab" for b in (2, 64)}
    assert "With dataset=a: learning_rate=0.1, model=resnet8." in table.caption
    assert "With dataset=b: learning_rate=0.05, model=resnet20." in table.caption
    assert [row.group for row in sweep.rows] == ["dataset=a"] * 2 + ["dataset=b"] * 2
    assert "classification,b,0.05,resnet20,64,gn,0.5," in tables.to_csv(table, wide=True)
    assert overall.name == "overall"
    by_data = tables.sweep_table(from_records(records), "dataset")
    assert {row.group for row in by_data.rows} == {
        f"learning_rate={r}, model={m}, norm_batch_size={b}"
        for r, m in ((0.1, "resnet8"), (0.05, "resnet20"))
        for b in (2, 64)
    }, "a heading never hides what tells its rows apart"


def test_a_caption_says_evidence_and_what_cells_differ_in():
    records = [*runs("bn", [0.5], dataset="a"), *runs("bn", [0.5], dataset="b", data="synthetic")]
    records += [run("gn", 0, dataset="a", environment={"threads": 2, "commit": "f" * 40 + "+changes"})]
    records += [run("ln", 0, status="skipped", dataset="a", environment={"torch": None})]
    table = table_of([*records, run("gn", 0, dataset="b", data="synthetic")])
    assert "Evidence: real and synthetic data, reduced budget; reported checkpoint: last epoch." in table.caption
    assert "Cells differ in: commit (c0ffee, fffffffff+changes); threads (1, 2)." in table.caption
    assert {row.group for row in table.rows} == {"dataset=a [real data]", "dataset=b [synthetic data]"}


def test_a_caption_says_where_cells_were_made_by_different_kernels():
    native, torch = ({"kernels": kernels} for kernels in ("native", "torch"))
    older = [run("bn", 0), run("gn", 0)]
    assert not any("kernels" in line for line in table_of(older).caption)
    mixed = [run("bn", 0, environment=native), run("gn", 0, environment=torch)]
    assert "Cells differ in: kernels (native, torch)." in table_of(mixed).caption
    assert "Cells differ in: kernels (native, not recorded)." in table_of([mixed[0], older[1]]).caption
    same = [run("bn", 0, environment=native), run("gn", 0, environment=native)]
    assert not any("kernels" in line for line in table_of(same).caption)


def test_a_caption_counts_runs_whose_parts_were_made_on_different_machines():
    here = {"torch": "2", "device": "cpu", "device_name": "fast", "cpu": "fast", "threads": 1, "until": "the end"}
    elsewhere, other = here | {"device_name": "slow", "cpu": "slow"}, here | {"threads": 2, "commit": "f" * 40}
    parts = [[here, here], [here, elsewhere, here], [here, here | {"seconds": 3.0, "until": "epoch 3 of 9"}]]
    records = [run("bn", seed, environment={"parts": given}) for seed, given in enumerate(parts)]
    records += [run("gn", 0), run("gn", 1)]
    assert (
        "1 run was made in parts on different machines (their parts differ in cpu, device_name)."
        in table_of(records).caption
    )
    line = "2 runs were made in parts on different machines (their parts differ in cpu, device_name, threads)."
    assert line in table_of([*records, run("gn", 2, environment={"parts": [here, other]})]).caption
    same = [*records[:1], *records[2:]]
    assert not any("in parts" in line for line in table_of(same).caption)


def test_what_the_method_decides_stands_in_the_caption_and_the_mode_of_crafting_never_does():
    maml = [r for shot in (1, 5) for r in runs("bn", [0.5], task="few_shot", method="maml", inner_steps=3, shot=shot)]
    others = [r for s in (1, 5) for r in runs("bn", [0.5], task="few_shot", method="plain", inner_steps=5, shot=s)]
    table = table_of([*maml, *others])
    assert {row.group for row in table.rows} == {f"method={m}, shot={s}" for m in ("maml", "plain") for s in (1, 5)}
    assert "With method=maml: inner_steps=3." in table.caption
    pair = [
        runs("bn", [0.5], task="adversarial", method=m, crafting_mode=c) for m, c in (("pgd", "eval"), ("x", "train"))
    ]
    assert {row.group for row in table_of([*pair[0], *pair[1]]).rows} == {
        "crafting_mode=eval, method=pgd",
        "crafting_mode=train, method=x",
    }


def test_a_caption_counts_the_runs_with_signs_of_gradient_masking():
    sign = "zero gradients at 3 of 9 correctly classified images"
    clean = runs("bn", [0.5, 0.6], task="adversarial", evidence={"masking": ""})
    masked = runs("gn", [0.5, 0.6], task="adversarial", evidence={"masking": sign})
    assert "No run shows one of the signs of gradient masking that its attacks can show." in table_of(clean).caption
    assert f"Runs with signs of gradient masking: gn 2; for example: {sign}." in table_of([*clean, *masked]).caption
    assert not any("masking" in line for line in table_of(runs("bn", [0.5])).caption)


def test_norms_that_mix_samples_at_test_time_are_flagged():
    records = [
        run("bn", 0, task="few_shot", metrics={"acc_inductive": 0.5, "composition_shift": 1e-5}),
        run("mine", 0, task="few_shot", metrics={"acc_inductive": 0.9, "composition_shift": 0.2}),
    ]
    flagged = [line for line in table_of(records).caption if "batch mates" in line]
    assert flagged == [
        "In evaluation an image's logits depend on its batch mates (composition shift above 0.001): mine."
    ]
    assert not any("batch mates" in line for line in table_of(records[:1]).caption)


def test_the_mode_of_crafting_stands_in_the_headings_even_with_one_value():
    records = runs("bn", [0.5], task="adversarial", crafting_mode="eval", epsilon=8.0)
    (row,) = table_of(records).rows
    assert row.group == "crafting_mode=eval"
    assert any("Common: epsilon=8" in line for line in table_of(records).caption)


def test_older_versions_and_damaged_records_are_mentioned():
    df = from_records([*runs("bn", [0.5]), *runs("gn", [0.5])])
    df.attrs.update(stale={"classification / bn": 2, "few_shot / bn": 9}, damaged=["x"])
    caption = tables.task_table(df).caption
    assert "Left out, of other versions: 2 records (classification / bn 2)." in caption
    assert "1 damaged record could not be read." in caption


def test_stale_rows_of_a_frame_are_not_tabulated():
    df = from_records([*runs("bn", [0.5, 0.7])], stale=True)
    df.loc[1, "stale"] = True
    assert by_label(tables.task_table(df))["bn"].mean == 0.5


def test_a_number_beside_a_failure_in_a_frame_is_not_used():
    df = from_records([*runs("bn", [0.5, "failed"])])
    df["top1"] = [0.5, 0.9]
    assert by_label(tables.task_table(df))["bn"].mean == 0.5


def test_a_norm_option_can_be_swept():
    records = [
        *itertools.chain.from_iterable(
            runs("bgn", [g / 100], norm_options={"num_groups": g, "eps": e}, label=f"bgn({g},{e})", norm_batch_size=b)
            for g in (2, 16, 4)
            for e in (1, 2)
            for b in (1, 2)
        ),
        *runs("bn", [0.5], norm_options={"momentum": 0.1}, norm_batch_size=1),
    ]
    table = tables.sweep_table(from_records(records), "num_groups")
    assert [c.title for c in table.columns] == ["2", "4", "16"]
    assert [(r.group, r.label) for r in table.rows] == [
        (f"norm_batch_size={b}", f"bgn(eps={e})") for b in (1, 2) for e in (1, 2)
    ]
    assert [c.mean for c in table.rows[0].cells] == [0.02, 0.04, 0.16]


def test_overall_ranks_average_blocks_and_leave_incomplete_norms_out():
    records = [
        *runs("bn", [0.9], dataset="a"),
        *runs("gn", [0.8], dataset="a"),
        *runs("ln", [0.8], dataset="a"),
        *runs("in", [0.99], dataset="a"),
        *runs("bn", [0.1], dataset="b"),
        *runs("gn", [0.8], dataset="b"),
        *runs("ln", ["diverged"], dataset="b"),
        *runs("in", ["failed"], dataset="b"),
        *runs("bn", [1.0], task="other_task"),
        *runs("gn", [0.8], task="other_task"),
        *runs("ln", [0.9], task="other_task"),
    ]
    table = tables.overall_table(from_records(records))
    assert [c.title for c in table.columns] == [
        "all tasks (3 settings)",
        "classification (2 settings)",
        "other_task (1 setting)",
    ]
    means = {row.label: [c and c.mean for c in row.cells] for row in table.rows}
    assert means == {
        "bn": [pytest.approx(4 / 3), 1.5, 1.0],
        "gn": [pytest.approx((2.5 + 1 + 3) / 3), 1.75, 3.0],
        "in": [None, None, None],
        "ln": [pytest.approx((2.5 + 3 + 2) / 3), 2.75, 2.0],
    }
    assert [c and c.note for c in {row.label: row for row in table.rows}["in"].cells] == [
        "no result in 1 and no record in 1 of 3 settings",
        "no result in 1 of 2 settings",
        None,
    ]
    assert "Blank: no record in any block of the column." in table.caption
    assert by_label(table)["bn"].best
    assert by_label(table)["gn"].second
    assert "top-1 in classification, top-1 in other_task" in " ".join(table.caption)


# --- selection -----------------------------------------------------------------------------------------------------


def selection_records():
    """Seed 0 says 0.1 is best for bn and 0.3 for gn; the other seeds would say the opposite."""
    best = {"bn": 0.1, "gn": 0.3}
    return [
        run(
            n,
            s,
            metrics={"val_top1": good if s == 0 else 1 - good, "top1": 0.5 + rate / 10 + s / 100},
            learning_rate=rate,
        )
        for n in best
        for rate in (0.03, 0.1, 0.3)
        for s in (0, 1, 2)
        for good in [0.9 if rate == best[n] else 0.2]
    ]


def test_selection_uses_no_reported_seed_and_says_what_it_chose():
    df = tables.select(from_records(selection_records()), "learning_rate")
    assert sorted(set(df["seed"])) == [1, 2]
    assert df.groupby("norm")["selected.learning_rate"].unique().map(list).to_dict() == {"bn": [0.1], "gn": [0.3]}
    table = tables.render_all(from_records(selection_records()), select="learning_rate")[0]
    assert by_label(table)["bn"].mean == pytest.approx(0.51 + 0.015)
    assert by_label(table)["gn"].mean == pytest.approx(0.53 + 0.015)
    assert by_label(table)["gn"].n == 2
    assert (
        "learning_rate selected per norm and setting by val_top1 on seed 0; reported on seeds 1, 2. "
        "Selected: bn: 0.1; gn: 0.3."
    ) in table.caption


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
def test_no_reported_number_can_change_the_selection(seed):
    draw = random.Random(seed)
    changed = [
        r if r.spec.seed == 0 else r.model_copy(update={"metrics": {"val_top1": draw.random(), "top1": draw.random()}})
        for r in selection_records()
    ]
    df = tables.select(from_records(changed), "learning_rate")
    assert df.groupby("norm")["selected.learning_rate"].unique().map(list).to_dict() == {"bn": [0.1], "gn": [0.3]}


def test_selection_prefers_values_whose_runs_end_well():
    records = [
        *(run("bn", s, metrics={"val_top1": 0.5, "top1": 0.5}, learning_rate=0.1) for s in range(4)),
        run("bn", 0, metrics={"val_top1": 0.9, "top1": 0.9}, learning_rate=0.3),
        *(run("bn", s, status="diverged", learning_rate=0.3) for s in (1, 2, 3)),
        *(run("gn", s, status="failed", learning_rate=r) for s in range(4) for r in (0.1, 0.3)),
        *(run("ln", s, status="diverged", learning_rate=r) for s in range(4) for r in (0.1, 0.3)),
    ]
    df = tables.select(from_records(records), "learning_rate")
    assert df.groupby("norm")["selected.learning_rate"].unique().map(list).to_dict() == {
        "bn": [0.1],
        "gn": [None],
        "ln": [0.1],
    }
    table = tables.task_table(df)
    assert by_label(table)["gn"].holes == {"failed": 2}, "nothing to choose, yet the norm stays visible"
    assert "gn: nothing" in " ".join(table.caption)


def test_selection_refuses_what_it_can_not_do():
    df = from_records(selection_records())
    with pytest.raises(ValueError, match="needs two seeds or more"):
        tables.select(df[df["seed"] == 0], "learning_rate")
    with pytest.raises(ValueError, match=r'unknown option "learning_rat"; .*did you mean "learning_rate"\?'):
        tables.select(df, "learning_rat")
    with pytest.raises(ValueError, match=r'unknown metric "val_top"; .*did you mean "val_top1"\?'):
        tables.select(df, "learning_rate", "val_top")
    with pytest.raises(ValueError, match="not measured; measured: top1, val_top1"):
        tables.select(df, "learning_rate", "test_loss")
    with pytest.raises(ValueError, match="none would be reported"):
        tables.select(df, "learning_rate", seeds=[0, 1, 2])


def test_a_task_without_the_option_keeps_all_its_seeds():
    records = [*selection_records(), *runs("bn", [0.5, 0.6], task="other_task")]
    df = tables.select(from_records(records), "learning_rate")
    assert df[df["task"] == "other_task"]["seed"].tolist() == [0, 1]


# --- everything at once --------------------------------------------------------------------------------------------


def grid_records():
    draw = random.Random(1)
    records = []
    for norm, batches in (("bn", (2, 64)), ("gn", (None,)), ("bgn", (2, 64)), ("ln", (None,))):
        for batch, rate, seed in itertools.product(batches, (0.1, 0.3), range(3)):
            status = draw.choice(["ok"] * 6 + ["diverged", "failed", "skipped", None])
            if status is not None:
                numbers = {"top1": draw.random(), "val_top1": draw.random(), "test_loss": draw.random()}
                records.append(
                    run(norm, seed, status=status, metrics=numbers, learning_rate=rate, norm_batch_size=batch, epochs=3)
                )
    return records


@settings(deadline=None, max_examples=8)
@given(st.randoms(use_true_random=False))
def test_the_order_of_records_changes_no_table(draw):
    records = grid_records()
    expected = tables.render_all(from_records(records), sweep=["learning_rate", "norm_batch_size"])
    draw.shuffle(records)
    assert tables.render_all(from_records(records), sweep=["learning_rate", "norm_batch_size"]) == expected


def test_all_tables_of_a_grid():
    df = from_records(grid_records())
    names = [t.name for t in tables.render_all(df)]
    assert names == [
        "classification",
        "classification_by_norm_batch_size_top1",
        "classification_by_learning_rate_top1",
        "overall",
    ]
    assert [t.name for t in tables.render_all(df, metrics=["val_top1", "test_loss"], sweep="learning_rate")] == [
        "classification",
        "classification_by_learning_rate_val_top1",
        "classification_by_learning_rate_test_loss",
        "overall",
    ]
    assert [c.metric.name for c in tables.render_all(df, metrics=["test_loss"])[0].columns] == ["test_loss"]
    assert "classification_by_learning_rate_top1" not in [t.name for t in tables.render_all(df, select="learning_rate")]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"metrics": ["top2"]}, r'unknown metric "top2"; .*did you mean "top1"\?'),
        ({"metrics": ["step_seconds"]}, r'no run here measured "step_seconds"; measured: top1, val_top1, test_loss'),
        ({"sweep": "learning_rat"}, r'unknown option "learning_rat"; options: .*; did you mean "learning_rate"\?'),
        ({"select": "epoch"}, r'unknown option "epoch"; .*did you mean "epochs"\?'),
    ],
)
def test_mistakes_are_answered_in_one_line(more, line):
    with pytest.raises(ValueError, match=line) as caught:
        tables.render_all(from_records(grid_records()), **more)
    assert "\n" not in str(caught.value)


def test_no_runs_make_no_tables():
    df = from_records(grid_records()).iloc[:0]
    with pytest.raises(ValueError, match="no runs"):
        tables.render_all(df)
    with pytest.raises(ValueError, match="no runs"):
        tables.overall_table(df)
    with pytest.raises(ValueError, match="a frame of one task is needed; this one has a, b"):
        tables.task_table(from_records([run(task="a"), run(task="b")]))
