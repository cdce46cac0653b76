"""The report as text: what stands in it is what the content says, and nothing in a name is markup."""

import base64
import hashlib
import html.parser
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from parts import reports

from results.metrics import METRICS
from results.report import page as pages
from results.report.content import Card, Content
from results.report.page import packed, page, unpacked, visible_lines
from results.tables.csv import to_csv
from results.tables.html import short_caption, to_html
from results.tables.latex import to_latex
from results.tables.table import Cell, Column, Row, Table

VOID = {"meta", "link", "img", "input", "br", "hr", "wbr"}


class Read(html.parser.HTMLParser):
    """The elements of a page: (tag, attributes, text); a wrong end tag is an error."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e[0] == tag and attributes.items() <= e[1].items()]

    def one(self, tag, **attributes):
        (found,) = self.all(tag, **attributes)
        return found


@pytest.fixture(scope="module")
def plain():
    content = reports.report()
    return content, page(content)


@pytest.fixture(scope="module")
def odd():
    content = reports.report(reports.ODD, reports.EVIL)
    return content, page(content)


def cells_of(text):
    """The cells of rows, as (data-value, text), of each table of a page but a figure's numbers."""
    tables = re.findall(r"<table>\n<caption>.*?</table>", text, re.DOTALL)
    return [
        [
            (a.get("data-value"), t)
            for tag, a, t in Read(each.split("</thead>")[1].replace("</table>", "")).elements
            if tag == "td"
        ]
        for each in tables
    ]


def test_every_number_of_every_table_stands_in_the_page_in_full_precision(plain):
    content, text = plain
    found = cells_of(text)
    tables = [content.headline, *content.tables]
    assert len(found) == len(tables)
    for table, cells in zip(tables, found, strict=True):
        wanted = [
            (column.metric, cell) for row in table.rows for column, cell in zip(table.columns, row.cells, strict=True)
        ]
        assert [value for value, _ in cells] == [None if c.mean is None else repr(c.mean) for _, c in wanted]
        for (_, shown), (metric, cell) in zip(cells, wanted, strict=True):
            assert shown.startswith("—" if cell.mean is None else metric.text(cell.mean))
            assert ("†" in shown) == cell.significant
            assert bool(re.search("[a-z]$", shown)) == bool(cell.note)


def test_best_is_bold_and_second_is_underlined():
    top1 = METRICS["top1"]
    row = Row("bn", (Cell(mean=0.5, n=1, best=True), Cell(mean=0.25, n=1, second=True), Cell(mean=0.125, n=1), None))
    text = to_html(Table("t", "t", (Column(top1, "a"),) * 4, (row,)))
    assert re.findall("<td[^>]*>(.*?)</td>", text) == ["<strong>50.0</strong>", "<u>25.0</u>", "12.5", ""]


def test_a_table_alone_names_the_runs_of_its_cells_and_has_its_whole_caption(plain):
    table = plain[0].tables[0]
    text = to_html(table)
    keys = [" ".join(cell.keys) for row in table.rows for cell in row.cells[:1]]
    assert re.findall(r'<tr data-runs="(.*?)">', text) == keys
    swept = re.findall(r'<td[^>]* data-runs="(.*?)"', to_html(plain[0].tables[1]))
    assert swept == [" ".join(cell.keys) for row in plain[0].tables[1].rows for cell in row.cells]
    read = Read(text)
    said = read.one("caption")[2] + "".join(e[2] for e in read.all("li"))
    assert all(sentence in said for sentence in table.caption)
    assert short_caption(table) == table.caption[:2]
    assert [e[2] for e in read.all("th", scope="rowgroup")] == ["norm_batch_size=2", "norm_batch_size=64"]
    assert len(read.all("tbody")) == 2


def test_runs_and_texts_are_read_back_as_they_were(plain):
    content, text = plain
    read = Read(text)
    assert unpacked(read.one("script", id="data-runs")[2]) == content.runs
    texts = list(unpacked(read.one("script", id="data-texts")[2]).values())
    assert texts == [[to_latex(table), to_csv(table)] for table in (content.headline, *content.tables)]
    places = [e[1]["data-runs"] for e in read.all("tr") if "data-runs" in e[1]]
    rows = [row for table in (content.headline, content.tables[0]) for row in table.rows if len(row.cells) > 1]
    assert [[content.runs["key"][int(i)] for i in place.split()] for place in places] == [
        list(row.cells[0].keys) for row in rows
    ]


def test_runs_folded_over_domains_are_each_found():
    runs = {"key": {"values": ["a", "b", "c"], "of": [2, 0, 1]}}
    row = Row("bn", (Cell(mean=0.5, n=2, keys=("a+b", "c+gone")), Cell(mean=0.5, n=1, keys=("gone",))), "bn")
    table = Table("t", "t", (Column(METRICS["top1"], "top-1"),) * 2, (row,))
    assert re.findall('data-runs="(.*?)"', page(Content("t", tables=(table,), runs=runs))) == ["1+2 0"]


@pytest.mark.parametrize("kind", ["plain", "odd"])
def test_a_page_is_well_formed_asks_for_nothing_and_runs_only_its_own_script(kind, request):
    _, text = request.getfixturevalue(kind)
    read = Read(text)
    scripts = [e for e in read.all("script") if "type" not in e[1]]
    digest = base64.b64encode(hashlib.sha256(scripts[0][2].encode()).digest()).decode()
    assert len(scripts) == 1
    assert (
        f"script-src 'sha256-{digest}'" in read.one("meta", **{"http-equiv": "Content-Security-Policy"})[1]["content"]
    )
    assert read.all("img") == []
    assert not [e for e in read.elements if any(name.startswith("on") for name in e[1])]
    ids = [e[1]["id"] for e in read.elements if "id" in e[1]]
    assert len(ids) == len(set(ids))
    targets = [e[1]["href"] for e in read.elements if e[1].get("href", "").startswith("#")]
    assert {target[1:] for target in targets} <= set(ids)
    assert {f"#{e[1]['id']}" for e in read.all("article")} <= set(targets)
    script = scripts[0][2]
    rest = re.sub(
        r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"|"http://www\.w3\.org/2000/svg"', "", text.replace(script, "")
    )
    rest = rest.replace("http-equiv", "").replace("xmlns='http://www.w3.org/2000/svg'", "")
    assert "http" not in rest
    assert re.findall("http[^\"']*", script) == ["http://www.w3.org/2000/svg"]
    assert "//" not in re.sub(r"[A-Za-z0-9+/=]{200,}", "", rest)
    assert [level for level, _ in zip(re.findall(r"<h([1-6])", text), range(2), strict=False)] == ["1", "2"]


def test_names_stand_in_the_page_as_people_wrote_them_but_for_what_does_not_show(odd):
    _, text = odd
    read = Read(text)
    labels = [e[2] for e in read.all("h3")]
    assert reports.EVIL in labels
    assert "$\\alpha_{1}$ & 50%" in labels
    assert "אבג U+202Eright to left" in labels
    assert "bellU+0007 U+001B[31m" in labels
    assert "<!-- --> {{ 7 * 7 }}" in labels
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert f"tasks:\n    - classification\n# {reports.EVIL}" in read.one("pre")[2]


def test_packed_data_is_letters_only_and_what_json_has_no_word_for_is_null():
    held = {"a\u202e": ["</script>", "\u2028", "<!--", "a\nb\x1b", float("nan"), 1.5, None, True, "\ud800"]}
    text = packed(held)
    assert re.fullmatch("[A-Za-z0-9+/]+=*", text)
    (values,) = unpacked(text).values()
    assert visible_lines("a\u00a0b\tc\u202e") == "a b    cU+202E"
    assert values == ["</script>", "U+2028", "<!--", "a\nbU+001B", None, 1.5, None, True, "U+D800"]


def test_a_figure_has_its_alt_text_its_numbers_and_ids_of_its_own(odd):
    content, text = odd
    pictures = re.findall(r"<svg role=.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2
    ids = []
    for picture, drawing in zip(pictures, content.drawings, strict=True):
        root = ET.fromstring(picture)
        assert root.get("role") == "img"
        assert root.get("aria-label").startswith("Lines of </script>")
        ids += re.findall(r' id="(.*?)"', picture)
        assert not re.search(r"<g id=|rotate\(-?0 |\n\s*<", picture.partition(">")[2])  # nothing in vain
        assert len(drawing.data) in (15, 6)
    assert len(ids) == len(set(ids))
    rows = re.findall(r'<table class="plain"><thead><tr><th scope="col">norm</th>.*?</table>', text, re.DOTALL)
    numbers = re.findall(r"<td>([\d.]+)</td>(?=</tr>)", rows[0])
    assert [float(n) for n in numbers] == pytest.approx([mark["top-1 (%)"] for mark in content.drawings[0].data])


def test_many_cells_and_many_marks_are_cut_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(pages, "MOST_CELLS", 20)
    monkeypatch.setattr(pages, "MOST_MARKS", 5)
    content = reports.report([f"norm{i}" for i in range(12)])
    text = page(content)
    assert "The first 5 of 36 rows." in text
    assert "The first 2 of 24 rows; all are in the files classification.csv and classification.tex." in text
    assert sum(map(len, cells_of(text))) <= 20
    assert unpacked(Read(text).one("script", id="data-texts")[2]) == {}


def test_short_tables_are_whole_beside_a_long_one(monkeypatch):
    monkeypatch.setattr(pages, "MOST_CELLS", 40)
    content = reports.report([f"norm{i}" for i in range(12)])
    text = page(content)
    assert [len(cells) for cells in cells_of(text)] == [10, 10, 10, 10]
    monkeypatch.setattr(pages, "MOST_CELLS", 80)
    shown = [len(cells) for cells in cells_of(page(content))]
    assert shown == [12, 32, 24, 12]  # what the others leave of their shares
    texts = unpacked(Read(page(content)).one("script", id="data-texts")[2])
    assert list(texts) == ["table-headline", "table-by_batch", "table-overall"]


def test_a_row_of_several_options_of_a_norm_leads_to_its_first_card():
    table = Table("t", "t", (Column(METRICS["top1"], "top-1"),), (Row("gn", (Cell(mean=0.5, n=1),), "gn"),))
    text = page(Content("t", headline=table, cards=(Card("gn(num_groups=2)", "gn"), Card("gn(num_groups=8)", "gn"))))
    assert '<a href="#norm-gn-num_groups-2">gn</a>' in text


def test_norms_and_tables_of_one_name_have_anchors_of_their_own():
    table = Table(
        "t", "t", (Column(METRICS["top1"], "top-1"),), (Row("b n", (Cell(mean=0.5, n=1),)), Row("b/n", (None,)))
    )
    content = Content(
        "x", tables=(table, replace(table, title="second")), cards=(Card("b n", "a"), Card("b/n", "b"), Card("אב", "c"))
    )
    read = Read(page(content))
    assert [e[1]["id"] for e in read.all("article")] == ["norm-b-n", "norm-b-n-2", "norm-x"]
    links = [e[1]["href"] for e in read.all("a") if e[2] in ("b n", "b/n")]
    assert links == ["#norm-b-n", "#norm-b-n-2"] * 2
    assert [e[1]["data-table"] for e in read.all("div", **{"class": "block"})] == ["table-t", "table-t-2"]


def test_a_report_of_nothing_says_so():
    text = page(Content("empty", warnings=("All 4 runs failed.",)))
    assert "No run of this folder has a number to show." in Read(text).one("section", id="overview")[2]
    assert "All 4 runs failed." in text
    assert 'href="#norms"' not in text
