"""Paired differences: the numbers are those of tables, intervals and probabilities stand only where n carries them."""

import itertools

import pytest
from parts.drawn_runs import inches
from parts.planted_records import frame, planted, texts

from results.comparing import rope_probabilities
from results.figures.differences import paired_differences
from results.figures.style import COLUMN
from results.statistics import summarize
from results.tables.build import task_table

SIX = {"bn": [0.5, 0.52, 0.51, 0.49, 0.5, 0.53], "gn": [0.55, 0.56, 0.57, 0.54, 0.56, 0.55]}
NASTY = "$x_1$ <script>alert(1)</script> & \u202eevil" + "z" * 80


def means(drawing):
    return {mark["norm"]: mark for mark in drawing.data if mark["mark"] == "mean"}


def test_means_are_those_of_the_table_and_probabilities_those_of_the_posterior():
    df = frame(planted(SIX))
    drawing = paired_differences(df, rope=0.02)
    mark = means(drawing)["gn"]
    (cell,) = [row.cells[0] for row in task_table(df).rows if row.label == "gn"]
    assert mark["difference"] == pytest.approx(100 * cell.difference)
    differences = [100 * (a - b) for a, b in zip(SIX["gn"], SIX["bn"], strict=True)]
    assert mark["high"] - mark["difference"] == pytest.approx(summarize(differences)[3])
    assert (mark["p_below"], mark["p_within"], mark["p_above"]) == pytest.approx(rope_probabilities(differences, 2.0))
    points = {m["seed"]: m["difference"] for m in drawing.data if m["mark"] == "seed"}
    assert points == pytest.approx(dict(enumerate(differences)))
    text = texts(drawing)
    assert "n = 6 (seeds 0-5), paired; 95 % t-interval; grey: ±2 points" in text
    assert "P below, within," in text
    assert "Of 1 intervals 1 lie wholly above 2 points" in drawing.alt


def test_with_five_seeds_there_are_intervals_but_no_probabilities():
    drawing = paired_differences(frame(planted({norm: values[:5] for norm, values in SIX.items()})))
    mark = means(drawing)["gn"]
    assert mark["low"] is not None
    assert mark["p_within"] is None
    assert "P below" not in texts(drawing)
    assert any("Probabilities need 6 seeds" in sentence for sentence in drawing.caption)
    assert mark["low"] > 1  # outside of the region, which five seeds support only if differences are normal
    assert "lie wholly" not in " ".join((drawing.alt, *drawing.caption))
    assert "fewer than 6 seeds" in drawing.alt


def test_a_single_seed_is_a_point_without_interval_and_finds_nothing():
    drawing = paired_differences(frame(planted({"bn": [0.5], "gn": [0.6]})))
    mark = means(drawing)["gn"]
    assert (mark["difference"], mark["low"], mark["p_within"]) == (pytest.approx(10), None, None)
    assert "n = 1 (seed 0), paired; no interval" in texts(drawing)
    assert "nothing is found about differences to bn" in drawing.alt


@pytest.mark.parametrize("bad", ["diverged", "failed", None])
def test_survivors_have_no_mean(bad):
    drawing = paired_differences(frame(planted({**SIX, "gn": [*SIX["gn"][:5], bad]})))
    mark = means(drawing)["gn"]
    assert (mark["difference"], mark["low"], mark["p_within"]) == (None, None, None)
    assert mark["note"] == f"{bad or 'missing'} 1/6"
    assert mark["note"] in texts(drawing)
    assert sum(m["mark"] == "seed" for m in drawing.data) == 5


def test_a_hole_of_the_reference_is_told_as_its_own():
    drawing = paired_differences(frame(planted({**SIX, "bn": [*SIX["bn"][:5], "diverged"]})))
    assert means(drawing)["gn"]["note"] == "bn: diverged 1/6"


def test_equal_norms_differ_by_nothing():
    drawing = paired_differences(frame(planted({"bn": SIX["bn"], "twin": SIX["bn"]})))
    mark = means(drawing)["twin"]
    assert (mark["difference"], mark["low"], mark["high"]) == (0, 0, 0)
    assert (mark["p_below"], mark["p_within"], mark["p_above"]) == (0, 1, 0)
    assert "1 within" in drawing.alt


def test_settings_without_the_reference_and_those_without_room_are_named():
    many = {"bn": [0.5], **{f"n{i}": [0.5] for i in range(50)}}
    df = frame(planted(many, b=1), planted(many, b=2), planted({"n1": [0.5]}, b=3))
    drawing = paired_differences(df)
    (said,) = [s for s in drawing.caption if s.startswith("Not drawn")]
    assert "b=2 (no room)" in said
    assert "b=3 (no bn to compare with)" in said
    assert len(means(drawing)) == 50


def test_the_axis_points_to_the_better_side():
    losses = frame(planted({"bn": [0.5], "gn": [0.4]}, metric="test_loss"))
    assert "← better" in texts(paired_differences(losses, metric="test_loss"))
    assert "better →" in texts(paired_differences(frame(planted(SIX))))


def test_a_long_setting_stays_within_the_column():
    norms = {"bn": SIX["bn"], "group_whitening_2": SIX["gn"]}
    places = itertools.product(("fashion_mnist_mini", "glyphs"), (1, 2))
    drawing = paired_differences(frame(*(planted(norms, dataset=d, norm_batch_size=b) for d, b in places)))
    assert inches(drawing.figure) <= COLUMN


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"rope": -0.1}, "rope=-0.1"),
        ({"rope": float("nan")}, "rope=nan"),
        ({"task": "clasification"}, 'did you mean "classification"'),
        ({"metric": "top_1"}, 'did you mean "top1"'),
        ({"metric": "test_loss"}, 'no run measured "test_loss"; measured: top1'),
        ({"reference": "gnn"}, 'no single norm is the reference "gnn"; norms: bn, gn; did you mean "gn"'),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(more, reason):
    with pytest.raises(ValueError, match=reason):
        paired_differences(frame(planted(SIX)), **more)


def test_without_a_common_seed_or_a_chosen_task_nothing_is_drawn():
    with pytest.raises(ValueError, match="no seed in which bn and another norm both have top-1"):
        paired_differences(frame(planted({"bn": [0.5, None], "gn": [None, 0.5]})))
    with pytest.raises(ValueError, match="no run measured"):
        paired_differences(frame(planted({"bn": ["failed"], "gn": ["failed"]})))
    with pytest.raises(ValueError, match="choose one"):
        paired_differences(frame(planted(SIX), planted(SIX, task="other")))


def test_names_with_markup_stay_inert(tmp_path):
    drawing = paired_differences(frame(planted({**SIX, NASTY: SIX["gn"], "规": SIX["bn"]}, option=NASTY)))
    svg = drawing.svg("p")
    assert "<script" not in svg
    assert "\u202e" not in svg
    drawing.write(tmp_path / "d.png")
