"""results.figures.curves: the points of an option curve are the frame's, and nothing else is claimed."""

import itertools
import math

import matplotlib as mpl
import pytest
from matplotlib.text import Text
from parts.drawn_runs import drawn, frame, inches, points, run, said, sweep, texts

from results.figures.curves import option_curve
from results.figures.lines import PER_PANEL
from results.figures.style import COLUMN, PAGE
from results.norm_batches import in_every_norm_batch


@pytest.fixture(scope="module")
def swept():
    """Two mixing norms over three norm batches, and one that does not mix samples, run once."""
    flat = [run("ln", seed, 0.6 + 0.02 * seed, norm_batch_size=None) for seed in range(3)]
    df = frame([*sweep(("bn", "gn")), *flat])
    return df, option_curve(df)


def grouped(df, option="norm_batch_size"):
    """(norm, value) -> mean, std, count of top-1 in percent, by pandas alone."""
    columns = in_every_norm_batch(df).groupby(["norm_label", f"option.{option}"])["top1"]
    table = (columns.agg(["mean", "std", "count"])).reset_index()
    return {
        (r["norm_label"], r[f"option.{option}"]): (100 * r["mean"], 100 * r["std"], r["count"])
        for r in table.to_dict("records")
    }


def test_the_data_are_those_of_a_groupby(swept):
    df, drawing = swept
    found = {(m["norm"], m["norm_batch_size"]): (m["mean"], m["std"], m["n"]) for m in drawing.data}
    expected = grouped(df)
    assert found.keys() == expected.keys()
    for place, numbers in expected.items():
        assert found[place] == pytest.approx(numbers)


def test_the_lines_that_are_drawn_are_those_of_a_groupby(swept):
    df, drawing = swept
    expected = grouped(df)
    lines = {line.get_label().removeprefix("mean "): points(line) for line in drawn(drawing.figure, "mean")}
    assert lines.keys() == {"bn", "gn", "ln"}
    assert {(norm, x): y for norm, line in lines.items() for x, y in line.items()} == pytest.approx(
        {place: mean for place, (mean, _, _) in expected.items()}
    )
    bands = drawn(drawing.figure, "band")
    assert len(bands) == 3
    for band in bands:
        norm = band.get_label().removeprefix("band ")
        corners = {tuple(v) for v in band.get_paths()[0].vertices.round(6)}
        for (label, x), (mean, std, _) in expected.items():
            if label == norm:
                assert {(x, round(mean - std, 6)), (x, round(mean + std, 6))} <= corners


def test_thin_lines_pair_the_seeds(swept):
    df, drawing = swept
    for line in drawn(drawing.figure, "seed"):
        _, seed, norm = line.get_label().split(" ")
        part = df[(df["norm_label"] == norm) & (df["seed"] == int(seed))]
        values = dict(zip(part["option.norm_batch_size"], 100 * part["top1"], strict=True))
        expected = values if None not in values else dict.fromkeys((1, 4, 16), values[None])
        assert points(line) == pytest.approx(expected)
    assert len(drawn(drawing.figure, "seed")) == 9


def test_a_norm_that_does_not_mix_samples_is_flat_over_all_norm_batches(swept):
    _, drawing = swept
    (line,) = [line for line in drawn(drawing.figure, "mean") if line.get_label() == "mean ln"]
    assert points(line) == pytest.approx(dict.fromkeys((1.0, 4.0, 16.0), 62.0))
    assert any("flat lines" in sentence for sentence in drawing.caption)


def test_the_picture_says_n_and_seeds_and_what_the_band_is(swept):
    _, drawing = swept
    assert "n = 3 (seeds 0-2); band: mean ± sample std" in said(drawing.figure)
    assert "sample standard deviation" in " ".join(drawing.caption)


def test_texts_are_at_least_7_pt_in_a_figure_of_one_column(swept, tmp_path):
    _, drawing = swept
    assert min(t.get_fontsize() for t in texts(drawing.figure)) >= 7
    drawing.write(tmp_path / "curve.svg")
    width = float((tmp_path / "curve.svg").read_text().split('width="')[1].split("pt")[0])
    assert width <= COLUMN * 72 + 3


def test_the_names_at_the_right_end_do_not_overlap(swept):
    _, drawing = swept
    (axes,) = drawing.figure.axes
    names = [t for t in axes.texts if t.get_text() in ("bn", "gn", "ln")]
    heights = sorted(axes.transAxes.transform(t.get_position())[1] for t in names)
    line = 7 * drawing.figure.dpi / 72
    assert len(names) == 3
    assert all(b - a >= line for a, b in itertools.pairwise(heights))


def test_one_seed_has_points_and_lines_but_no_band():
    drawing = option_curve(frame(sweep(seeds=1)))
    assert not drawn(drawing.figure, "band")
    assert not drawn(drawing.figure, "seed")
    assert len(drawn(drawing.figure, "mean")) == 3
    assert "n = 1 (seed 0); no band: one seed" in said(drawing.figure)
    assert all(mark["std"] is None for mark in drawing.data)
    assert "signific" not in " ".join((drawing.alt, *drawing.caption, said(drawing.figure)))


def test_holes_are_hollow_or_crossed_named_and_counted():
    records = [
        *sweep(("bn",)),
        *[run("gn", s, 0.5 + 0.1 * s, "diverged" if s == 1 else "ok", norm_batch_size=4) for s in range(3)],
        *[run("gn", s, status="diverged", norm_batch_size=16) for s in range(3)],
        *[run("pn", s, status="failed", reason="too wide", norm_batch_size=b) for s in range(3) for b in (1, 4)],
    ]
    drawing = option_curve(frame(records))
    marks = {(m["norm"], m["norm_batch_size"]): m for m in drawing.data}
    assert marks["gn", 4]["mean"] == pytest.approx(60.0)
    assert (marks["gn", 4]["n"], marks["gn", 4]["hole"]) == (2, "diverged 1/3")
    assert (marks["gn", 16]["mean"], marks["gn", 16]["hole"]) == (None, "diverged 3/3")
    hollow = [line.get_xydata()[0].tolist() for line in drawn(drawing.figure, "hollow")]
    assert hollow == [[4, pytest.approx(60.0)]]
    assert sorted(float(line.get_xdata()[0]) for line in drawn(drawing.figure, "none")) == [1, 4, 16]
    picture, caption = said(drawing.figure), " ".join(drawing.caption)
    assert "hollow: fewer runs; ×: no run has a value" in picture
    assert "pn" in [t.get_text() for t in drawing.figure.axes[0].texts]
    assert "gn at norm_batch_size=4: diverged 1/3" in caption
    assert "pn at norm_batch_size=1: failed 3/3 (too wide)" in caption


def test_other_options_have_a_panel_each_and_are_not_averaged():
    records = [*sweep(method="a"), *sweep(method="b", values=(1, 4))]
    drawing = option_curve(frame(records))
    assert [axes.get_title(loc="left") for axes in drawing.figure.axes] == ["method=a", "method=b"]
    assert {m["n"] for m in drawing.data} == {3}
    assert len(drawing.data) == 9 + 6
    assert len({axes.get_ylim() for axes in drawing.figure.axes}) == 1
    long = {"adaptation_method": "domain_adversarial", "discriminator_width": 128}
    records = [*sweep(**long), *sweep(**{**long, "adaptation_method": "source_only", "discriminator_width": 64})]
    wide = option_curve(frame(records)).figure
    titles = [axes.get_title(loc="left") for axes in wide.axes]
    assert "adaptation_method=domain_adversarial,\ndiscriminator_width=128" in titles
    assert inches(wide) <= COLUMN
    many = [r for i in range(13) for r in sweep(("bn",), 1, (1, 2), method=f"m{i}")]
    with pytest.raises(ValueError, match="13 panels, at most 12 are readable"):
        option_curve(frame(many))


def test_31_norms_are_named_and_each_part_has_the_reference():
    norms = ["bn", *(f"norm{i:02}" for i in range(30))]
    drawing = option_curve(frame(sweep(norms, 1, (1, 4))))
    named = [[t.get_text() for t in axes.texts] for axes in drawing.figure.axes if axes.axison]
    assert {name for part in named for name in part} == set(norms)
    assert all("bn" in part and len(part) <= PER_PANEL for part in named)
    assert drawing.figure.get_figwidth() == pytest.approx(PAGE)
    assert "grey: other norms" in said(drawing.figure)
    width, height = drawing.figure.bbox.width, drawing.figure.bbox.height
    drawing.figure.draw_without_rendering()
    for text in texts(drawing.figure):
        box = Text.get_window_extent(text)  # of an annotation without its hair line
        assert min(box.x0, box.y0) >= -4
        assert max(box.x1 - width, box.y1 - height) <= 4  # 2 pt; files grow by it


def test_a_zero_on_a_logarithmic_axis_is_drawn_and_said():
    drawing = option_curve(frame(sweep(values=(0, 1e-4, 1e-2), option="weight_decay")), "weight_decay")
    (axes,) = drawing.figure.axes
    assert axes.get_xscale() == "symlog"
    at = [axes.transData.transform((x, 50))[0] for x in (0, 1e-4, 1e-2)]
    assert all(math.isfinite(x) for x in at)
    assert at == sorted(at)
    assert "0, which such an axis lacks" in " ".join(drawing.caption)


ODD = (
    "<b>&amp;</b><script>x</script>",
    "a$x^2$_{y} \\frac",
    "归一化",
    "\u202eevil\x1b[31m",
    "🙂",
    "x" * 80,
    "x" * 79 + "y",
)


def test_odd_names_are_inert_and_leave_the_layout(tmp_path):
    import xml.etree.ElementTree as ET

    records = [
        run(f"n{i}", s, 0.5 + 0.03 * i, label=name, width=w)
        for i, name in enumerate(ODD)
        for s in range(2)
        for w in (1, 2)
    ]
    drawing = option_curve(frame(records), "width")
    (axes,) = drawing.figure.axes
    assert axes.get_window_extent().width >= 0.35 * drawing.figure.bbox.width
    tree = ET.fromstring(drawing.svg("p"))
    assert not [e for e in tree.iter() if e.tag.endswith(("script", "image", "foreignObject"))]
    assert "\u202e" not in "".join(tree.itertext())
    shown = "".join(tree.itertext())
    assert "<b>&amp;</b>" in shown
    assert "a$x^2$_{y}" in shown
    drawing.write(tmp_path / "odd.pdf")
    assert {m["norm"] for m in drawing.data} == set(ODD)


def test_the_settings_of_matplotlib_are_the_callers_again():
    before = dict(mpl.rcParams)
    option_curve(frame(sweep(seeds=1)))
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"option": "norm_batch_siz"}, 'unknown option "norm_batch_siz".*did you mean "norm_batch_size"'),
        ({"metric": "top2"}, 'unknown metric "top2".*did you mean "top1"'),
        ({"metric": "robust_top1"}, 'no run measured "robust_top1"; measured: top1, step_seconds'),
        ({"task": "clasification"}, 'unknown task "clasification".*did you mean "classification"'),
        ({"option": "method"}, "method takes fewer than two numbers"),
        ({"option": "model"}, "model takes fewer than two numbers"),
    ],
)
def test_mistakes_name_the_nearest(asked, message):
    records = [*sweep(seeds=1, method="a", model="net"), *sweep(seeds=1, method="b", model="net")]
    with pytest.raises(ValueError, match=message):
        option_curve(frame(records), **asked)


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match=r"no run measured a metric.*6 runs: 2 diverged, 4 failed"):
        option_curve(
            frame(
                [
                    run(n, 0, status=s, width=w)
                    for n, s in [("bn", "failed"), ("gn", "failed"), ("ln", "diverged")]
                    for w in (1, 2)
                ]
            ),
            "width",
        )
    with pytest.raises(ValueError, match="no runs"):
        option_curve(frame([]))
    with pytest.raises(ValueError, match="runs of 2 tasks; choose one: task=a, b"):
        option_curve(frame([run(task="a"), run(task="b")]))
