"""Tables of runs that are not complete: what is averaged, ranked and told apart where seeds, runs or values lack."""

import csv
import io
import random
import statistics

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import results
from results import statistics as summary
from results.frame import from_records
from results.metrics import METRICS
from results.record import RunRecord, RunSpec
from results.tables import build as tables
from results.tables.table import Cell

TOP1 = METRICS["top1"]


def run(norm="bn", seed=0, value=0.5, status="ok", reason="", task="classification", metrics=None, **options):
    return RunRecord(
        spec=RunSpec(
            task=task,
            norm=norm,
            norm_options={},
            task_options=options,
            seed=seed,
            norm_version="1",
            task_version="1",
            data_checksum="d",
            norm_label=norm,
        ),
        status=status,
        reason=reason,
        metrics=(metrics or {"top1": value}) if status == "ok" else {},
        environment={"finished": f"2026-01-01T00:00:{seed:02}+00:00"},
    )


def ranks(records, column=0):
    """label -> (mean, note, best) of the overall table."""
    table = tables.overall_table(from_records(records))
    found = {row.label: row.cells[column] for row in table.rows}
    return {label: (c.mean, c.note, c.best) if c else None for label, c in found.items()}


# --- missing seeds and ranks -----------------------------------------------------------------------------------------


def test_norms_with_other_seeds_are_not_ranked_against_each_other():
    records = [*(run("bn", s, 0.5) for s in (0, 1, 2)), *(run("gn", s, 0.6) for s in (3, 4, 5))]
    assert ranks(records) == dict.fromkeys(
        ("bn", "gn"), (None, "seeds missing, skipped or unmeasured in 1 of 1 settings", False)
    )


def test_a_norm_that_lacks_a_seed_is_out_and_the_others_are_ranked_without_it():
    """gn lacks the harder seed, and would lead by it."""
    records = [run(n, s, v) for n, pair in (("bn", (0.9, 0.5)), ("ln", (0.8, 0.4))) for s, v in enumerate(pair)]
    records.append(run("gn", 0, 0.85))
    assert ranks(records) == {
        "bn": (1.0, "", True),
        "gn": (None, "seeds missing, skipped or unmeasured in 1 of 1 settings", False),
        "ln": (2.0, "", False),
    }
    others = [run(n, s, 0.5, dataset="b") for n in ("bn", "gn", "ln") for s in (0, 1)]
    both = [
        *(r.model_copy(update={"spec": r.spec.model_copy(update={"task_options": {"dataset": "a"}})}) for r in records),
        *others,
    ]
    assert ranks(both)["gn"] == (None, "seeds missing, skipped or unmeasured in 1 of 2 settings", False)
    assert ranks(both)["bn"][0] == 1.25


@pytest.mark.parametrize(
    ("lacking", "note"),
    [
        (run("gn", 1, status="skipped", reason="x"), "seeds missing, skipped or unmeasured in 1 of 1 settings"),
        (run("gn", 1, metrics={"val_top1": 0.5}), "seeds missing, skipped or unmeasured in 1 of 1 settings"),
        (run("gn", 1, status="diverged"), ""),
        (run("gn", 1, status="failed"), ""),
    ],
    ids=["skipped", "without the metric", "diverged", "failed"],
)
def test_a_seed_without_a_value_keeps_a_norm_out_unless_it_ended_badly(lacking, note):
    records = [run("bn", s, 0.5) for s in (0, 1)] + [run("ln", s, 0.4) for s in (0, 1)] + [run("gn", 0, 0.9), lacking]
    mean, said, _ = ranks(records)["gn"]
    assert (mean, said) == ((None, note) if note else (3.0, ""))


def test_norms_of_which_equally_many_runs_diverged_tie():
    """The survivors' means are over different seeds."""
    records = [run("bn", s, 0.5) for s in (0, 1)]
    records += [run("gn", 0, 0.9), run("gn", 1, status="diverged"), run("ln", 1, 0.1), run("ln", 0, status="failed")]
    assert {label: mean for label, (mean, _, _) in ranks(records).items()} == {"bn": 1.0, "gn": 2.5, "ln": 2.5}


def test_where_one_norm_alone_is_complete_the_table_says_so():
    records = [*(run("bn", s, 0.5) for s in (0, 1)), run("gn", 0, 0.6)]
    assert ranks(records)["bn"] == (None, "no other norm has a result over all seeds in every setting", False)


made = st.dictionaries(
    st.tuples(st.sampled_from(["bn", "gn", "ln"]), st.sampled_from([1, 2]), st.integers(0, 2)),
    st.one_of(st.sampled_from(["diverged", "failed", "skipped", "unmeasured"]), st.integers(0, 4)),
    min_size=1,
)


def records_of(drawn):
    return [
        run(n, seed, metrics={"val_top1": 0.5}, rate=rate)
        if v == "unmeasured"
        else run(n, seed, status=v, rate=rate)
        if isinstance(v, str)
        else run(n, seed, v / 4, rate=rate)
        for (n, rate, seed), v in drawn.items()
    ]


def incomplete_norms_have_no_rank(drawn):
    assume(any(isinstance(v, int) for v in drawn.values()))
    table = tables.overall_table(from_records(records_of(drawn)))
    rates = {rate for _, rate, _ in drawn}
    for row in table.rows:
        (cell,) = row.cells
        lacks = [
            (rate, seed)
            for rate in rates
            for seed in {s for _, r, s in drawn if r == rate}
            if drawn.get((row.label, rate, seed), "missing") in ("missing", "skipped", "unmeasured")
        ]
        assert not (lacks and cell.mean is not None)
        assert (cell.mean is None) == bool(cell.note)
    # what stands: the mean rank over settings of those that are complete
    shown = {row.label: row.cells[0].mean for row in table.rows if row.cells[0].mean is not None}
    for label, mean in shown.items():
        places = []
        for rate in rates:
            keys = {}
            for other in shown:
                own = [v for (n, r, _), v in drawn.items() if (n, r) == (other, rate)]
                good = [v for v in own if isinstance(v, int)]
                bad = 1 - len(good) / len(own)
                keys[other] = (bad, 0.0 if bad else -statistics.fmean(good))
            better = sum(k < keys[label] for k in keys.values())
            equal = sum(k == keys[label] for k in keys.values())
            places.append(better + (equal + 1) / 2)
        assert mean == pytest.approx(statistics.fmean(places))


@settings(deadline=None, max_examples=40)
@given(made)
def test_incomplete_norms_are_never_ranked(drawn):
    incomplete_norms_have_no_rank(drawn)


@pytest.mark.slow
@settings(deadline=None, max_examples=6_000)
@given(made)
def test_incomplete_norms_are_never_ranked_at_length(drawn):
    incomplete_norms_have_no_rank(drawn)


@settings(deadline=None, max_examples=25)
@given(made, st.randoms(use_true_random=False))
def test_neither_the_order_of_records_nor_a_double_changes_a_cell(drawn, draw):
    records = records_of(drawn)
    shuffled = draw.sample([*records, *records[:2]], len(records) + len(records[:2]))
    one, other = (tables.render_all(from_records(each)) for each in (records, shuffled))
    assert [(t.name, t.columns, t.rows) for t in one] == [(t.name, t.columns, t.rows) for t in other]


# --- tasks without one good run --------------------------------------------------------------------------------------


def test_a_task_without_one_good_run_has_rows_with_reasons():
    bad = [
        run("bn", 0, status="failed", reason="RuntimeError: no memory"),
        run("bn", 1, status="failed", reason="killed by SIGKILL"),
        run("gn", 0, status="failed", reason="RuntimeError: no memory"),
        run("in", 0, status="skipped", reason="1x1 maps"),
        run("ln", 0, status="diverged", reason="the loss is nan in epoch 2"),
    ]
    for records, metrics in ((bad, None), ([*bad, run("bn", task="few_shot")], ["top1"])):
        (table, *_) = tables.render_all(from_records(records), metrics=metrics)
        assert [column.title for column in table.columns] == ["outcome"]
        assert {row.label: row.cells[0].note for row in table.rows} == {
            "bn": "failed 2/2 (RuntimeError: no memory; killed by SIGKILL)",
            "gn": "failed 1/2, missing 1/2 (RuntimeError: no memory)",
            "in": "skipped 1/2, missing 1/2 (1x1 maps)",
            "ln": "diverged 1/2, missing 1/2 (the loss is nan in epoch 2)",
        }
        assert "No run here has a value: the footnotes say why; seeds 0, 1." in table.caption
        for text in (tables.to_text(table), tables.to_markdown(table), tables.to_latex(table)):
            assert "killed by SIGKILL" in text
        lines = list(csv.DictReader(io.StringIO(tables.to_csv(table))))
        assert [(line["norm"], line["failed"]) for line in lines] == [
            ("bn", "2"),
            ("gn", "1"),
            ("in", "0"),
            ("ln", "0"),
        ]


def test_nothing_to_rank_by_is_said_in_every_row():
    records = [run(n, status="failed", reason="x") for n in ("bn", "gn")]
    assert ranks(records) == dict.fromkeys(("bn", "gn"), (None, "nothing to rank by", False))
    assert all(table.columns and table.rows for table in tables.render_all(from_records(records)))


def test_a_task_without_one_good_run_stops_no_selection():
    good = [run("bn", s, metrics={"val_top1": 0.5, "top1": 0.5}, learning_rate=r) for s in (0, 1) for r in (0.1, 0.2)]
    bad = [run("bn", s, status="failed", task="few_shot", learning_rate=r) for s in (0, 1) for r in (0.1, 0.2)]
    names = [table.name for table in tables.render_all(from_records([*good, *bad]), select="learning_rate")]
    assert names == ["classification", "few_shot", "overall"]
    with pytest.raises(ValueError, match='task "few_shot": no run has a metric to tabulate'):
        tables.sweep_table(from_records(bad), "learning_rate")


# --- numbers near the end of what a float holds ----------------------------------------------------------------------

huge = st.sampled_from([1.7e308, -1.7e308, 1e308, -1e308, 5e-324, 0.0, 0.5])


@settings(deadline=None, max_examples=60)
@given(st.lists(huge, min_size=1, max_size=25))
def test_means_and_tests_of_huge_numbers_are_finite(values):
    mean, std, n, _ = summary.summarize(values)
    assert n == len(values)
    assert min(values) <= mean <= max(values)
    assert std is None or std >= 0
    assert summary.summarize(values[::-1])[0] == mean
    own, reference = dict(enumerate(values)), dict(enumerate(values[::-1]))
    cell = summary.compare(Cell(), own, reference, TOP1)
    assert cell.difference_n == n
    assert 0 < cell.p <= 1


@settings(deadline=None, max_examples=10)
@given(st.lists(huge, min_size=2, max_size=3), st.lists(huge, min_size=2, max_size=3))
def test_a_metric_near_the_largest_float_stops_no_table(bn, gn):
    records = [run(n, s, v) for n, values in (("bn", bn), ("gn", gn)) for s, v in enumerate(values)]
    records += [
        run("bn", s, metrics={"target_top1": v}, task="domain_adaptation", method=method)
        for method, values in (("source_only", bn), ("dann", gn))
        for s, v in enumerate(values)
    ]
    df = from_records(records)
    assert results.tables_text(tables.render_all(df))
    for table in tables.render_all(df):
        assert tables.to_csv(table)
        assert tables.to_latex(table)


# --- frames that are grouped by hand -------------------------------------------------------------------------------


def test_runs_without_a_norm_batch_stand_in_each_when_frames_are_grouped():
    records = [run("bn", s, b / 100, norm_batch_size=b, epochs=e) for s in (0, 1) for b, e in ((2, 1), (64, 1), (8, 2))]
    records += [run("gn", s, 0.7 + s / 10, norm_batch_size=None, epochs=e) for s in (0, 1) for e in (1, 2, 3)]
    records += [run("bn", task="few_shot", shots=5)]
    random.Random(0).shuffle(records)
    df = from_records(records)
    spread = results.in_every_norm_batch(df)
    part = spread[(spread["task"] == "classification") & (spread["option.epochs"] == 1)]
    means = part.groupby(["norm_label", "option.norm_batch_size"])["top1"].agg(["mean", "count"])
    assert means.to_dict("index") == {
        ("bn", 2): {"mean": 0.02, "count": 2},
        ("bn", 64): {"mean": 0.64, "count": 2},
        ("gn", 2): {"mean": 0.75, "count": 2},
        ("gn", 64): {"mean": 0.75, "count": 2},
    }
    assert means["mean"].unstack().notna().all(axis=None)
    batches = spread[spread["norm"] == "gn"].groupby("option.epochs")["option.norm_batch_size"].unique().map(sorted)
    assert batches.to_dict() == {1: [2, 64], 2: [8], 3: [2, 8, 64]}
    assert len(spread[spread["task"] == "few_shot"]) == 1
    assert spread.attrs == df.attrs
    pd.testing.assert_frame_equal(df, from_records(records))
    alone = from_records([run("gn", norm_batch_size=None)])
    pd.testing.assert_frame_equal(results.in_every_norm_batch(alone), alone)
    plain = from_records([run("gn")])
    pd.testing.assert_frame_equal(results.in_every_norm_batch(plain), plain)
