"""results.differences: two frames beside each other, run by run."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.folders import record, spec

import results
from results.differences import COLUMNS, differs, floor_of_p
from results.frame import from_records
from results.statistics import sign_flip_p


def frame(*values, norm="bn", commit="c", **more):
    """Runs with these values of top1, of the seeds 0, 1, ...; a text is a status."""
    ended = [(v, {}) if isinstance(v, str) else ("ok", {"top1": v}) for v in values]
    return from_records(
        record(spec(norm, seed, **more), status, at=seed, commit=commit, **metrics)
        for seed, (status, metrics) in enumerate(ended)
    )


def row(found, metric="top1"):
    (only,) = found[found["metric"] == metric].to_dict("records")
    return only


NUMBERS = st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=4)


@settings(max_examples=10, deadline=None)
@given(NUMBERS)
def test_a_frame_and_itself_are_equal_to_the_last_bit(values):
    df = frame(*values)
    found = results.diff(df, df)
    of_results = found[~found["cost"].astype(bool)]
    assert set(of_results["verdict"]) == {"equal"}
    assert (of_results["equal"] == len(values)).all()
    assert (of_results["largest"] == 0).all()
    assert not differs(found)
    assert found.attrs["sides"] == {}


def test_one_changed_metric_is_found_and_no_other():
    a = frame(0.5, 0.5, 0.5)
    b = a.assign(test_loss=[1.0, 1.0, 1.5])
    found = results.diff(a, b)
    assert row(found)["verdict"] == "equal"
    changed = row(found, "test_loss")
    assert (changed["equal"], changed["largest"], changed["verdict"]) == (2, 0.5, "inside")
    assert changed["difference"] == pytest.approx(0.5 / 3)
    assert differs(found)
    assert [*found.columns] == [*COLUMNS]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.5, 0.5], [0.5, 0.5], "equal"),
        ([0.5, 0.5], [0.5 + 1e-7, 0.5], "reproduced"),
        ([0.5, 0.5], [0.5 + 1e-5, 0.5], "inside"),
        ([0.5, 0.5, 0.5], [0.6, 0.61, 0.6], "different"),
        ([0.5], [0.6], "unjudged"),
        ([0.5, 0.7], [0.4995, 0.6995], "unjudged"),  # one image of 2,000 in each seed
        (["diverged"], [0.6], None),
        ([0.5, 0.5, "diverged"], [0.6, 0.61, 0.6], "unjudged"),
    ],
)
def test_the_verdict_of_pairs(a, b, verdict):
    found = results.diff(frame(*a), frame(*b))
    assert set(found[found["metric"] == "top1"]["verdict"]) == ({verdict} if verdict else set())
    assert len(found.attrs["status"]) == ("diverged" in a)


def test_p_is_that_of_the_sign_flip_test_with_its_floor_and_none_for_one_pair():
    found = row(results.diff(frame(0.5, 0.5, 0.5, 0.5), frame(0.6, 0.7, 0.6, 0.7)))
    assert found["p"] == sign_flip_p([0.1, 0.2, 0.1, 0.2]) == found["p_floor"] == 0.125
    assert math.isnan(row(results.diff(frame(0.5), frame(0.6)))["p"])
    assert math.isnan(row(results.diff(frame(0.5, 0.5, "failed"), frame(0.6, 0.7, 0.6)))["p"])
    assert floor_of_p(21) == 1 / 100_001


def test_one_pair_is_judged_by_the_metric_s_own_interval():
    def one(value):
        return from_records([record(spec(), acc_inductive=value, ci95=0.03)])

    assert row(results.diff(one(0.5), one(0.54)), "acc_inductive")["verdict"] == "inside"
    assert row(results.diff(one(0.5), one(0.55)), "acc_inductive")["verdict"] == "different"


def test_times_are_no_difference():
    a = frame(0.5, 0.5)
    found = results.diff(a, a.assign(step_seconds=9.0, seconds=7.0))
    assert row(found, "step_seconds")["difference"] == pytest.approx(8.99)
    assert row(found, "seconds")["mean_b"] == 7.0
    assert not differs(found)


def test_what_the_sides_differ_in_is_counted():
    a = from_records([record(spec(version="1", seed=s), commit="old") for s in range(2)])
    b = from_records([record(spec(version="2", seed=s), commit="new") for s in range(3)])
    found = results.diff(a, b)
    assert found.attrs["sides"] == {"norm version of bn": {"1 -> 2": 2}, "commit": {"old -> new": 2}}
    assert found.attrs["pairs"] == 2
    assert found.attrs["only_b"] == ["mine bn seed 2: ok"]
    assert differs(found)


def test_an_option_that_only_one_side_knows_does_not_part_runs_where_it_has_one_value():
    found = results.diff(frame(0.5, 0.5), frame(0.5, 0.5, clip=1.0))
    assert (found.attrs["pairs"], found.attrs["options"]) == (2, ["mine: only b has the option clip (1.0)"])
    several = from_records([record(spec(clip=c)) for c in (1.0, 2.0)])
    found = results.diff(frame(0.5), several)
    assert found.attrs["pairs"] == 0
    assert len(found.attrs["only_b"]) == 2


def test_settings_are_compared_each_by_itself():
    def two(of_first, of_second):
        runs = zip((0.1, 0.01), (of_first, of_second), strict=True)
        return from_records([record(spec(learning_rate=rate), top1=v) for rate, v in runs])

    found = results.diff(two(0.5, 0.5), two(0.5, 0.6), metrics=["top1"])
    assert dict(zip(found["setting"], found["verdict"], strict=True)) == {
        "learning_rate=0.1": "equal",
        "learning_rate=0.01": "unjudged",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ["top2"]}, 'metrics "top2": neither folder has it; .*did you mean "top1"'),
        ({"tasks": ["mien"]}, 'did you mean "mine"'),
        ({"tolerance": -1}, "tolerance -1: 0 to 1"),
        ({"tolerance": math.nan}, "tolerance nan: 0 to 1"),
    ],
)
def test_what_neither_has_is_a_mistake(given, message):
    with pytest.raises(ValueError, match=message):
        results.diff(frame(0.5), frame(0.5), **given)


def test_failures_alone_are_pairs_without_a_number():
    found = results.diff(frame("failed"), frame("failed"))
    assert found[~found["cost"].astype(bool)].empty
    assert (found.attrs["pairs"], differs(found)) == (1, False)
