"""The SVG of a page has the marks and the texts of matplotlib's, in fewer letters."""

import io
import re
from xml.etree import ElementTree

import pandas as pd
import pytest

from results.figures import style
from results.figures.compact import compact
from results.figures.remembered import remembered, remembering

NAMES = ('a d="1.23456 7" url(#x) <b>', 'x id="b" style="fill: red; stroke: blue"', "rotate(0.123456 1 2)  two  blanks")


@pytest.fixture(scope="module")
def svg():
    with style.style({"svg.fonttype": "none", "svg.hashsalt": "x"}):
        figure, axes = style.new_figure()
        axes.plot([0, 0.123456, 1], [0, 2, 1.5], "o-", label=NAMES[0])
        axes.fill_between([0, 1], [0, 1], [1, 2], hatch="//", alpha=0.3)
        for place, name in enumerate(NAMES):
            axes.text(0.1, place / 2, name, rotation=30 * place)
        stream = io.StringIO()
        figure.savefig(stream, format="svg")
    return stream.getvalue()


def drawn(svg):
    """The (kind, text) of each mark; all coordinates; the look of each path, which no mark has twice."""
    marks, places, looks = [], [], []
    for element in ElementTree.fromstring(svg).iter():
        kind = element.tag.rpartition("}")[2]
        if kind in ("path", "use", "text", "rect"):
            marks.append((kind, element.text or ""))
            numbers = (re.findall(r"-?[\d.]+", element.get(name, "")) for name in ("d", "x", "y"))
            places += [float(n) for found in numbers for n in found]
        if kind == "path":
            style_text = re.sub(r"#[ah]\w+\)", "#id)", element.get("style", ""))  # of a hatch; ids are other ones
            looks.append({tuple(re.split(r":\s*", entry)) for entry in re.split(r";\s*", style_text)})
    return marks, places, looks


def test_marks_looks_and_texts_are_those_of_matplotlib_in_half_of_the_letters(svg):
    small = compact(svg)
    marks, places, looks = drawn(small)
    whole = drawn(svg[svg.index("<svg") :])
    assert marks == whole[0]
    assert looks == whole[2]
    assert places == pytest.approx(whole[1], abs=0.0101)
    assert [text for _, text in marks if text in NAMES] == list(NAMES)
    assert len(small) < 0.55 * len(svg)


def test_what_is_referred_to_is_there_and_nothing_else_has_an_id(svg):
    small = compact(svg)
    ids = [e.get("id") for e in ElementTree.fromstring(small).iter() if e.get("id")]
    tags = "".join(re.findall("<[^>]*>", small))
    referred = re.findall(r'(?:xlink:href="|url\()#([^")]+)', tags)
    assert len(ids) == len(set(ids)) > 2
    assert set(ids) == set(referred)
    assert tags.count("DejaVu Sans") == 1


def test_a_frame_is_arranged_once_while_figures_are_drawn_and_anew_elsewhere():
    made = []

    @remembered
    def rows(df, of="x"):
        made.append(of)
        return df[of].tolist()

    one, two = (pd.DataFrame({"x": [n], "y": [n]}) for n in (1, 2))
    with remembering():
        assert rows(one) is rows(one)
        assert (rows(two), rows(one, "y")) == ([2], [1])
    assert made == ["x", "x", "y"]
    assert rows(one) is not rows(one)
