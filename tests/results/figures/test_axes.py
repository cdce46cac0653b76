"""Cubes of what shares a statistic: coloured cells against the axes' definition."""

import itertools

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from parts.drawn_runs import frame, run
from parts.planted_records import texts

from results.figures.axes import SIZES, axes_cubes

ALL = ["".join(parts) for parts in itertools.product(("", "N"), ("", "C"), ("", "HW"))]


@pytest.mark.parametrize("axes", ALL)
def test_as_many_cells_are_blue_as_the_axes_span(axes):
    (mark,) = axes_cubes({"own": {"axes": axes}}).data
    expected = 1
    for letters, size in SIZES.items():
        expected *= size if letters in axes else 1
    assert mark["cells"] == (expected if axes else 0)


def test_the_faces_show_the_cells():
    n, c, hw = SIZES.values()
    blue = {"": 0, "NHW": n * hw + hw + n, "CHW": c * hw + hw + c, "HW": hw + hw + 1, "NCHW": n * hw + c * hw + n * c}
    for axes, squares in blue.items():
        figure = axes_cubes({"own": {"axes": axes}}).figure
        (faces,) = figure.findobj(PolyCollection)
        colours = [to_hex(colour) for colour in faces.get_facecolor()]
        assert sum(int(c[5:], 16) - int(c[1:3], 16) > 60 for c in colours) == squares


def test_groups_of_channels_share_apart_and_a_single_group_is_all_channels():
    drawing = axes_cubes(
        {
            "gn": {"axes": "CHW", "options": {"num_groups": 8}},
            "bgn": {"axes": "NCHW", "options": {"num_groups": "auto"}},
            "one": {"axes": "CHW", "options": {"num_groups": 1}},
            "bn": {"axes": "NHW", "options": {"num_groups": 8}},
            "ln": {"axes": "CHW", "options": None},
        }
    )
    cells = {mark["norm"]: mark["cells"] for mark in drawing.data}
    assert cells["gn"] == cells["ln"] / 3
    assert cells["one"] == cells["ln"]
    assert {m["norm"]: m["num_groups"] for m in drawing.data} == {
        "gn": "8",
        "bgn": "auto",
        "one": "",
        "bn": "",
        "ln": "",
    }
    assert "8 groups" in texts(drawing)
    assert "Over C, HW in groups of channels: gn; over N, C, HW in groups of channels: bgn" in drawing.alt


def test_what_is_not_declared_is_said_and_colours_nothing():
    drawing = axes_cubes({"own": {"axes": None}, "older": {}})
    assert [(mark["axes"], mark["cells"]) for mark in drawing.data] == [(None, 0), (None, 0)]
    assert texts(drawing).count("not declared") == 2
    assert "Not declared: own, older" in drawing.alt


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r'norm "own": axes "NWH" are unknown; allowed: .*NHW'):
        axes_cubes({"own": {"axes": "NWH"}})
    with pytest.raises(ValueError, match="no norms are described"):
        axes_cubes({})
    with pytest.raises(ValueError, match="no norms are described"):
        axes_cubes(frame([run("bn")]))


def test_a_frame_is_drawn_by_what_its_folder_says_with_the_options_of_its_rows():
    df = frame([run("bn"), run("gn", label="gn(num_groups=4)")])
    df["norm.num_groups"] = [None, 4]
    df.attrs["norms"] = {"bn": {"axes": "NHW"}, "gn": {"axes": "CHW", "options": {"num_groups": 32}}}
    found = {m["norm"]: (m["axes"], m["num_groups"]) for m in axes_cubes(df).data}
    assert found == {"bn": ("NHW", ""), "gn(num_groups=4)": ("CHW", "4")}


def test_labels_of_many_norms_do_not_overlap_and_markup_is_inert():
    names = [*(f"norm_{i}" for i in range(29)), "gn(num_groups=8)", "$x$ <script>规" + "z" * 80]
    drawing = axes_cubes({name: {"axes": "NCHW", "options": {"num_groups": 4}} for name in names})
    drawing.figure.canvas.draw()
    found = [t for t in drawing.figure.axes[0].texts if t.get_text() not in ("N", "C", "HW")]
    # a line's box has room for accents above and for tails below, which may touch
    boxes = [t.get_window_extent().padded(0, -0.15 * t.get_window_extent().height) for t in found]
    pairs = [
        (found[i].get_text(), found[j].get_text())
        for i, j in itertools.combinations(range(len(found)), 2)
        if boxes[i].overlaps(boxes[j])
    ]
    assert pairs == []
    assert min(t.get_fontsize() for t in found) >= 7
    assert "<script" not in drawing.svg("p")
