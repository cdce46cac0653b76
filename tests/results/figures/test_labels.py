"""results.figures.labels, .words, .lines: names do not overlap, are inert, and tell norms apart."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from scipy.optimize import minimize

from results.figures import style
from results.figures.labels import End, label_points, spread
from results.figures.lines import number_scale, number_text
from results.figures.words import drawn, drawn_names, n_text, seeds_text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1, 2), min_size=1, max_size=12), st.floats(0.001, 0.3))
def test_spread_keeps_order_bounds_and_a_gap(wanted, gap):
    found = spread(wanted, gap, 0.0, 1.0)
    gap = min(gap, 1.0 / max(1, len(wanted) - 1))
    assert min(found) >= -1e-9
    assert max(found) <= 1 + 1e-9
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    assert all(found[b] - found[a] >= gap - 1e-9 for a, b in itertools.pairwise(order))


def test_spread_moves_labels_as_little_as_an_optimizer_does():
    wanted = [0.1, 0.12, 0.5, 0.52, 0.55, 0.97, 0.99]
    found = spread(wanted, 0.1, 0.0, 1.0)
    gaps = [{"type": "ineq", "fun": lambda y, i=i: y[i + 1] - y[i] - 0.1} for i in range(len(wanted) - 1)]
    start = np.linspace(0, 1, len(wanted))
    best = minimize(lambda y: np.sum((y - wanted) ** 2), start, bounds=[(0, 1)] * len(wanted), constraints=gaps)
    assert found == pytest.approx(best.x, abs=1e-3)
    assert spread([0.9, 0.1], 0.1, 0, 1) == [0.9, 0.1]


def test_names_of_points_overlap_neither_each_other_nor_a_point():
    points = [End(f"norm number {i}", 0.5 + 0.01 * (i % 3), 0.5 + 0.01 * (i // 3), "black") for i in range(9)]
    with style.style():
        figure, axes = style.new_figure()
        axes.plot([p.x for p in points], [p.y for p in points], "o")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        figure.draw_without_rendering()
        label_points(axes, points)
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(note) for note in axes.texts]  # without hair lines
    assert len(boxes) == 9
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    marks = axes.transData.transform([(p.x, p.y) for p in points])
    assert not [(box, mark) for box in boxes for mark in marks if box.contains(*mark)]


def test_names_that_are_cut_alike_are_told_apart():
    long = "x" * 40
    names = drawn_names(["bn", f"{long}a{long}", f"{long}b{long}", f"{long}c{long}"])
    assert names["bn"] == "bn"
    assert len(set(names.values())) == 4
    assert max(map(len, names.values())) <= 22


@pytest.mark.parametrize(
    ("given_", "shown"),
    [("a\nb", "a b"), ("\u202eevil", "U+202Eevil"), ("归", "U+5F52"), ("$x^2$", "$x^2$"), ("<b>&amp;", "<b>&amp;")],
)
def test_a_name_is_one_line_of_glyphs_that_the_font_has(given_, shown):
    assert drawn(given_) == shown


def test_n_and_seeds_in_words():
    assert (n_text([3, 3]), n_text([2, 3, 2]), n_text([])) == ("n = 3", "n = 2 to 3", "n = 0")
    assert [seeds_text(s) for s in ([4], [1, 0], [2, 0, 1], [0, 2, 5])] == [
        *("seed 4", "seeds 0, 1", "seeds 0-2", "seeds 0, 2, 5")
    ]


@pytest.mark.parametrize(
    ("values", "scale", "base"),
    [
        ([1, 2, 4, 16, 64], "log", 2),
        ([3, 6, 24], "log", 2),
        ([0.03, 0.1, 0.3], "log", 10),
        ([1, 2, 3], "linear", None),
        ([1, 64], "linear", None),
        ([-1, 1, 100], "linear", None),
        ([0, 1e-4, 1e-3, 1e-2], "symlog", 10),
    ],
)
def test_an_axis_is_logarithmic_where_values_span_powers(values, scale, base):
    found, said = number_scale(values)
    assert (found["value"], found.get("base")) == (scale, base)
    assert bool(said) == (scale == "symlog")


def test_ticks_show_numbers_plainly():
    assert [number_text(v) for v in (0.0, 1.0, 0.03, 1e-4, 65536.0, 1e-7)] == [
        "0",
        "1",
        "0.03",
        "0.0001",
        "65536",
        "1e-07",
    ]
