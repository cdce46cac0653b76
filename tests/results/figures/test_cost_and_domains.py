"""results.figures.cost and .domains: points, front and cells are those of the frame."""

import itertools
import random

import pytest
from parts.drawn_runs import drawn, frame, run, said

from results.figures.cost import cost_against_accuracy, pareto
from results.figures.domains import domain_heat_map

COST = {"bn": 0.02, "gn": 0.01, "ln": 0.03, "in": 0.04}
TOP = {"bn": 0.7, "gn": 0.5, "ln": 0.8, "in": 0.75}


def costly(norms=COST, seeds=3, **more):
    return [
        run(
            n,
            s,
            metrics={"top1": TOP[n] + 0.01 * s, "step_seconds": COST[n] * (1 + 0.1 * s), "peak_memory_mb": 0.0},
            **more,
        )
        for n in norms
        for s in range(seeds)
    ]


def test_cost_is_the_ratio_of_means_to_the_reference_and_the_front_is_marked():
    df = frame(costly())
    drawing = cost_against_accuracy(df)
    means = df.groupby("norm_label")[["top1", "step_seconds"]].mean()
    for mark in drawing.data:
        row = means.loc[mark["norm"]]
        assert mark["mean"] == pytest.approx(100 * row["top1"])
        assert mark["cost"] == pytest.approx(row["step_seconds"] / means.loc["bn", "step_seconds"])
    assert {m["norm"] for m in drawing.data if m["front"]} == {"gn", "bn", "ln"}
    (line,) = drawn(drawing.figure, "front")
    assert line.get_xdata().tolist() == pytest.approx([0.5, 1.0, 1.5])
    at = {a.get_label(): a.lines[0].get_xydata()[0].tolist() for a in drawn(drawing.figure, "point")}
    assert at["point in"] == pytest.approx([2.0, 76.0])
    assert "n = 3 (seeds 0-2); bars: mean ± sample std" in said(drawing.figure)


def test_the_front_is_that_of_its_definition():
    draw = random.Random(0)
    points = [(draw.randrange(6), draw.randrange(6)) for _ in range(40)]
    literal = [all(not ((a < c and b >= v) or (a <= c and b > v)) for a, b in points) for c, v in points]
    assert pareto(points) == literal
    assert pareto([(1.0, 1.0), (1.0, 1.0)]) == [True, True]


def test_a_norm_with_holes_is_hollow_and_not_on_the_front():
    records = [*costly(), run("gn", 3, status="diverged"), *(costly(("bn",), 4)[3:])]
    drawing = cost_against_accuracy(frame(records))
    marks = {m["norm"]: m for m in drawing.data}
    assert (marks["gn"]["front"], marks["gn"]["hole"]) == (False, "diverged 1/4")
    assert "hollow: fewer runs" in said(drawing.figure)
    assert "gn: diverged 1/4" in " ".join(drawing.caption)


def test_without_the_reference_or_its_cost_the_axis_is_in_units():
    drawing = cost_against_accuracy(frame(costly(("gn", "ln"))))
    assert {m["norm"]: m["cost"] for m in drawing.data} == pytest.approx({"gn": 11.0, "ln": 33.0})
    assert drawing.figure.axes[0].get_xlabel() == "step (ms)"
    free = cost_against_accuracy(frame(costly()), cost="peak_memory_mb")
    assert {m["cost"] for m in free.data} == {0.0}
    some = cost_against_accuracy(frame([*costly(batch_size=1), *costly(("gn", "ln"), batch_size=2)]))
    assert [m["cost"] for m in some.data if m["norm"] == "gn"] == pytest.approx([11.0, 11.0])
    assert {axes.get_xlabel() for axes in some.figure.axes} == {"step (ms)"}
    assert "in one or more of 2 settings: " in some.alt


def test_one_seed_has_no_bars():
    drawing = cost_against_accuracy(frame(costly(seeds=1)))
    assert {(m["std"], m["cost_std"]) for m in drawing.data} == {(None, None)}
    assert "no bars: one seed" in said(drawing.figure)


def test_a_cost_of_which_more_is_better_is_refused():
    with pytest.raises(ValueError, match="is no cost"):
        cost_against_accuracy(frame(costly()), cost="top1")
    with pytest.raises(ValueError, match=r'unknown metric "step_second".*did you mean "step_seconds"'):
        cost_against_accuracy(frame(costly()), cost="step_second")


DOMAINS = ("art", "photo", "sketch")


def held_out(holes=()):
    return [
        run(
            n,
            s,
            status="diverged" if (n, s, d) in holes else "ok",
            task="held",
            metrics={"target_top1": 0.3 + 0.1 * i + 0.05 * k + 0.02 * s},
            held_out=d,
        )
        for i, n in enumerate(("bn", "gn"))
        for s in range(2)
        for k, d in enumerate(DOMAINS)
    ]


def test_cells_of_held_out_domains_are_those_of_a_groupby():
    df = frame(held_out())
    drawing = domain_heat_map(df)
    expected = (100 * df.groupby(["norm_label", "option.held_out"])["target_top1"].mean()).to_dict()
    expected |= {(n, "mean"): 100 * v for n, v in df.groupby("norm_label")["target_top1"].mean().items()}
    assert {(m["norm"], m["domain"]): m["mean"] for m in drawing.data} == pytest.approx(expected)
    (axes,) = drawing.figure.axes
    columns = [t.get_text() for t in axes.get_xticklabels()]
    rows = [t.get_text() for t in axes.get_yticklabels()]
    seen = {
        (rows[round(t.get_position()[1])], columns[round(t.get_position()[0])]): float(t.get_text()) for t in axes.texts
    }
    assert seen == pytest.approx(expected, abs=0.051)
    assert "n = 2 (seeds 0, 1)" in said(drawing.figure)


def test_cells_with_holes_say_so():
    drawing = domain_heat_map(frame(held_out({("gn", 0, "art"), ("gn", 1, "photo"), ("gn", 0, "photo")})))
    cells = {(m["norm"], m["domain"]): m["text"] for m in drawing.data}
    assert cells["gn", "art"] == "42.0*"
    assert cells["gn", "photo"] == "diverged"
    assert cells["gn", "mean"] == "diverged"
    shown = [t.get_text() for t in drawing.figure.axes[0].texts]
    assert {"42.0*", "diverged"} <= set(shown)
    assert "*: fewer seeds" in said(drawing.figure)
    assert "gn on photo: diverged 2/2" in " ".join(drawing.caption)


def test_pairs_of_source_and_target_are_columns_and_methods_are_blocks():
    records = [
        run(n, 0, task="adapt", metrics={"target_top1": 0.5 + 0.1 * i}, source=a, target=b, method=m)
        for n in ("bn", "gn")
        for m in ("x", "y")
        for i, (a, b) in enumerate(itertools.permutations(DOMAINS, 2))
    ]
    drawing = domain_heat_map(frame(records))
    marks = {(m["norm"], m["setting"], m["domain"]): m["mean"] for m in drawing.data}
    assert len(marks) == 2 * 2 * 6
    assert marks["gn", "method=y", "art → sketch"] == pytest.approx(60.0)


def test_a_task_without_domains_is_refused():
    with pytest.raises(ValueError, match="no domains"):
        domain_heat_map(frame(costly()))
    with pytest.raises(ValueError, match='"target_top1" only, not "top1"'):
        domain_heat_map(frame(held_out()), metric="top1")
