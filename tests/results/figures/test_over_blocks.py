"""Critical-difference diagrams and performance profiles: which norms and blocks stand in them, and what they say."""

import math

import pytest
from parts.planted_records import frame, planted, texts

from results.comparing import compare_ranks
from results.figures.complete import complete_blocks
from results.figures.profiles import performance_profiles
from results.figures.ranks import critical_difference
from results.tables.build import overall_table

NASTY = "$x_1$ <script>alert(1)</script> & \u202eevil\x1b[31m" + "z" * 80


def clear(i):
    """Four norms in always the same order, two seeds each."""
    return {name: [0.9 - 0.1 * k - 0.01 * i, 0.91 - 0.1 * k] for k, name in enumerate(("bn", "gn", "ln", "in"))}


def marks(drawing, kind):
    return [mark for mark in drawing.data if mark["mark"] == kind]


def test_drawn_ranks_are_those_of_the_overall_table_and_of_the_tests():
    df = frame(*[planted(clear(i), batch_size=2**i) for i in range(8)])
    drawing = critical_difference(df)
    (table,) = [overall_table(df)]
    ranks = {mark["norm"]: mark["average_rank"] for mark in marks(drawing, "rank")}
    assert ranks == {row.label: row.cells[0].mean for row in table.rows}
    expected = compare_ranks({name: [k + 1.0] * 8 for k, name in enumerate(("bn", "gn", "ln", "in"))})
    (cd,) = marks(drawing, "critical_difference")
    assert (cd["critical_difference"], cd["friedman_p"]) == (expected.critical_difference, expected.p)
    assert tuple(mark["norms"] for mark in marks(drawing, "bar")) == expected.groups
    assert "bn has the best average rank, 1.00, and bn differs from ln and in." in drawing.alt
    assert "not independent" in drawing.alt
    text = texts(drawing)
    for said in (
        "8 blocks of 1 task, 2 seeds each",
        "blocks of one task are not independent",
        "Friedman p < 0.001",
        "Nemenyi",
        "0.05",
        f"CD = {cd['critical_difference']:.2f}",
    ):
        assert said in text.replace("\n", " ")
    assert "bn  1.00" in text


def test_a_diverged_norm_ranks_behind_and_the_caption_says_so():
    df = frame(*[planted({**clear(i), "bn": [0.99, "diverged"]}, batch_size=2**i) for i in range(6)])
    drawing = critical_difference(df)
    ranks = {mark["norm"]: mark["average_rank"] for mark in marks(drawing, "rank")}
    assert ranks["bn"] == 4
    assert any("6 cells have diverged or failed runs" in sentence for sentence in drawing.caption)


def test_norms_without_a_whole_result_in_a_block_are_left_out_and_named_in_the_picture():
    records = [planted({**clear(i), "pn": [0.5, 0.5 if i else None]}, batch_size=2**i) for i in range(7)]
    drawing = critical_difference(frame(*records))
    assert "pn" not in {mark["norm"] for mark in marks(drawing, "rank")}
    assert "left out, incomplete: pn" in texts(drawing).replace("\n", " ")
    assert any("pn (in 1 of 7)" in sentence for sentence in drawing.caption)


def test_a_task_that_few_norms_took_part_in_leaves_the_others_comparable():
    df = frame(
        *[planted(clear(i), batch_size=2**i) for i in range(6)], planted({"bn": [0.5], "own": [0.6]}, task="search")
    )
    complete = complete_blocks(df)
    assert complete.norms == ("bn", "gn", "in", "ln")
    assert len(complete.blocks) == 6
    assert complete.lacking == ("search",)
    assert complete.without == {"own": 6}


def test_failed_runs_only_are_no_result():
    df = frame(*[planted({**clear(i), "bn": ["failed", "failed"]}, batch_size=2**i) for i in range(6)])
    assert "bn" not in complete_blocks(df).norms
    with pytest.raises(ValueError, match="ranks of 0 norms"):
        critical_difference(frame(planted({"bn": ["failed"], "gn": ["failed"]})))


def test_all_ties_are_no_difference_and_the_picture_says_so():
    df = frame(*[planted({n: [0.5, 0.5] for n in ("bn", "gn", "in")}, batch_size=2**i) for i in range(6)])
    drawing = critical_difference(df)
    assert "no difference" in texts(drawing).replace("\n", " ")
    assert "bn, gn and in share the best average rank, 2.00, but Friedman's test finds no difference" in drawing.alt
    assert not any(mark["differ"] for mark in marks(drawing, "pair"))


@pytest.mark.parametrize(
    ("blocks", "names", "reason"),
    [
        (1, ("bn", "gn", "in"), "ranks in 1 block: a test of ranks needs 5 or more"),
        (4, ("bn", "gn", "in"), "ranks in 4 blocks"),
        (8, ("bn", "gn"), "ranks of 2 norms: a test of ranks needs 3 or more"),
    ],
)
def test_a_rank_diagram_that_its_blocks_can_not_carry_is_refused(blocks, names, reason):
    df = frame(*[planted({n: [0.5 + 0.1 * k] for k, n in enumerate(names)}, batch_size=2**i) for i in range(blocks)])
    with pytest.raises(ValueError, match=f"no critical-difference diagram: {reason}"):
        critical_difference(df)


def test_a_profile_draws_the_share_of_blocks_within_each_ratio():
    values = [{"bn": [0.8], "gn": [0.4]}, {"bn": [0.3], "gn": [0.6]}, {"bn": ["diverged"], "gn": [0.5]}]
    drawing = performance_profiles(frame(*[planted(v, batch_size=2**i) for i, v in enumerate(values)]))
    steps = {n: [(m["ratio"], m["share"]) for m in drawing.data if m["norm"] == n] for n in ("bn", "gn")}
    assert steps == {"bn": [(1, 1 / 3), (2, 2 / 3)], "gn": [(1, 2 / 3), (2, 1)]}
    (axes,) = drawing.figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["bn"].get_ydata())[:2] == [1 / 3, 2 / 3]
    assert list(lines["bn"].get_ydata())[-1] == 2 / 3  # the diverged run is never near the best
    assert "3 blocks, 1 seed each" in texts(drawing)
    assert "Most often best, or as good, is gn: in 2 of 3 blocks." in drawing.alt


def test_where_lower_is_better_the_ratio_turns_round():
    values = [{"bn": [1.0], "gn": [4.0]}, {"bn": [2.0], "gn": [1.0]}]
    df = frame(*[planted(v, metric="test_loss", batch_size=2**i) for i, v in enumerate(values)])
    ratios = {m["ratio"] for m in performance_profiles(df).data if m["norm"] == "gn"}
    assert ratios == {1, 4}


def test_blocks_without_ratios_are_named_and_too_few_blocks_refused():
    values = [{"bn": [0.5], "gn": [0.4]}, {"bn": [0.0], "gn": [0.0]}, {"bn": [0.5], "gn": [0.4]}]
    drawing = performance_profiles(frame(*[planted(v, batch_size=2**i) for i, v in enumerate(values)]))
    assert any("Blocks without ratios" in s and "batch_size=2" in s for s in drawing.caption)
    assert drawing.data[0]["blocks"] == 2
    for records in (planted({"bn": [0.5], "gn": [0.4]}), planted({"bn": ["failed"], "gn": ["failed"]})):
        with pytest.raises(ValueError, match="no performance profiles: 2 blocks and 2 norms or more are needed"):
            performance_profiles(frame(records))


def test_ties_in_every_block_draw_a_profile():
    drawing = performance_profiles(frame(*[planted({"bn": [0.5], "gn": [0.5]}, batch_size=i) for i in (1, 2)]))
    assert {(m["ratio"], m["share"]) for m in drawing.data} == {(1.0, 1.0)}
    assert "All norms are best, or as good, in 2 of 2 blocks." in drawing.alt


def test_names_with_markup_and_of_any_length_stay_inside_and_inert():
    values = {**clear(0), NASTY: [0.2, 0.3], "规范化": [0.1, 0.1]}
    df = frame(*[planted(values, batch_size=2**i) for i in range(6)])
    for drawing in (critical_difference(df), performance_profiles(df)):
        svg = drawing.svg("p")
        assert "<script" not in svg
        assert "\u202e" not in svg
        assert "\x1b" not in svg
        assert not any(c in "".join([drawing.alt, *drawing.caption]) for c in "\u202e\x1b")
        assert any(mark.get("norm") == NASTY for mark in drawing.data)


def test_labels_of_many_norms_do_not_overlap():
    names = ["bn", *(f"a_norm_of_a_long_name_{i}" for i in range(30))]
    df = frame(*[planted({n: [0.9 - 0.01 * k - 0.001 * i] for k, n in enumerate(names)}, b=i) for i in range(5)])
    drawing = critical_difference(df)
    figure = drawing.figure
    figure.canvas.draw()
    found = [t for t in figure.axes[0].texts if "  " in t.get_text().strip() and "CD" not in t.get_text()]
    boxes = [t.get_window_extent() for t in found]
    assert len(boxes) == 31
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert math.isclose(figure.get_figwidth(), 237 / 72.27)
    assert min(t.get_fontsize() for t in found) >= 7
