"""Formats: what a table prints, to the last character, and labels that would break them."""

import csv
import io
import itertools
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from results import files as files_of_results
from results.escape import columns_of, escape_latex, escape_markdown, spell
from results.frame import from_records
from results.metrics import METRICS
from results.record import RunRecord, RunSpec
from results.tables import build as tables
from results.tables.csv import to_csv
from results.tables.latex import LATEX_ROWS
from results.tables.table import Cell, Column, Row, Table
from results.tables.text import NARROWEST, tables_text, to_text
from results.tables.writing import FORMATS

TOP1 = METRICS["top1"]


def run(norm, seed, value, label="", norm_options=None, task="classification", **options):
    """A record; a text as value is a status."""
    status = value if isinstance(value, str) else "ok"
    return RunRecord(
        spec=RunSpec(
            task=task,
            norm=norm,
            norm_options=norm_options or {},
            task_options=options,
            seed=seed,
            norm_version="1",
            task_version="1",
            data_checksum="d",
            norm_label=label,
        ),
        status=status,
        reason="" if status == "ok" else label,
        metrics={"top1": value} if status == "ok" else {},
    )


def small_grid():
    grid = itertools.product(("bn", "gn"), (0, 1), (0.1, 0.3))
    return [run(norm, seed, rate / 2 + seed / 10, learning_rate=rate) for norm, seed, rate in grid]


GOLDEN = Table(
    name="golden",
    title="made_up & more",
    columns=(Column(TOP1, "2", "batch", (("batch", "2"),)), Column(TOP1, "64", "batch", (("batch", "64"),))),
    rows=(
        Row(
            "bn",
            (Cell(mean=0.625, std=0.125, n=2, ci95=1.0), Cell(mean=0.75, n=1, diverged=1)),
            "bn",
            (("data", "a"),),
            "data=a",
        ),
        Row(
            "g_n|{8}",
            (
                Cell(mean=0.875, std=0.0, n=2, ci95=0.0, best=True, difference=0.25, difference_n=2, p=0.5),
                Cell(failed=2),
            ),
            "gn",
            (("data", "a"),),
            "data=a",
            ("100% repeated",),
            "bn",
        ),
        Row("bn", (Cell(mean=1 / 3, n=1, second=True, significant=True), None), "bn", (("data", "b"),), "data=b"),
    ),
    caption=("Values: mean ± deviation.", "n < 3."),
    task="made_up",
    short=("Values: mean ± deviation.",),
)

TIDY = """\
table,task,data,batch,norm,metric,mean,std,ci95,n,diverged,failed,skipped,missing,unmeasured,\
difference,difference_std,difference_n,p,best,second,repeated,equals
golden,made_up,a,2,bn,top1,0.625,0.125,1.0,2,0,0,0,0,0,,,0,,0,0,0,
golden,made_up,a,64,bn,top1,0.75,,,1,1,0,0,0,0,,,0,,0,0,0,
golden,made_up,a,2,g_n|{8},top1,0.875,0.0,0.0,2,0,0,0,0,0,0.25,,2,0.5,1,0,0,
golden,made_up,a,64,g_n|{8},top1,,,,0,0,2,0,0,0,,,0,,0,0,0,
golden,made_up,b,2,bn,top1,0.3333333333333333,,,1,0,0,0,0,0,,,0,,0,1,0,
"""

WIDE = """\
task,data,norm,top1 batch=2,top1 batch=2 std,top1 batch=2 n,top1 batch=64,top1 batch=64 std,top1 batch=64 n
made_up,a,bn,0.625,0.125,2,0.75,,1
made_up,a,g_n|{8},0.875,0.0,2,,,0
made_up,b,bn,0.3333333333333333,,1,,,
"""

MARKDOWN = r"""### made_up &amp; more

| norm                           |           batch: 2 |               64 |
| :----------------------------- | -----------------: | ---------------: |
| data=a                         |                    |                  |
| bn                             |        62.5 ± 12.5 | 75.0<sup>a</sup> |
| g_n\|{8} = bn<sup>b</sup>      |     **87.5 ± 0.0** |    —<sup>c</sup> |
| data=b                         |                    |                  |
| bn                             | <ins>33.3</ins>† (n=1) |                  |

- Values: mean ± deviation.
- n &lt; 3.
- <sup>a</sup> diverged 1/2
- <sup>b</sup> 100% repeated
- <sup>c</sup> failed 2/2
"""

LATEX = r"""% needs \usepackage{booktabs,graphicx}
\begin{table}[htbp]
\centering
\caption[made\_up \& more]{made\_up \& more. Values: mean $\pm$ deviation.}
\label{tab:golden}
\par\medskip
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
\begin{tabular}{lrr}
\toprule
 & \multicolumn{2}{c}{batch} \\
\cmidrule(lr){2-3}
norm & 2 & 64 \\
\midrule
\multicolumn{3}{l}{\textit{data=a}} \\
bn & 62.5 $\pm$ 12.5 & 75.0\textsuperscript{a} \\
g\_n\textbar{}\{8\} = bn\textsuperscript{b} & \textbf{87.5 $\pm$ 0.0} & ---\textsuperscript{c} \\
\midrule
\multicolumn{3}{l}{\textit{data=b}} \\
bn & \underline{33.3}$\dagger$ (n=1) &  \\
\bottomrule
\end{tabular}}
\par\smallskip{\footnotesize \textsuperscript{a} diverged 1/2; \textsuperscript{b} 100\% repeated; """ + (
    r"""\textsuperscript{c} failed 2/2\par}
\par\smallskip{\footnotesize\raggedright n \textless{} 3.\par}
\end{table}
"""
)


def test_golden_tidy_csv():
    assert tables.to_csv(GOLDEN) == TIDY


def test_golden_wide_csv():
    assert tables.to_csv(GOLDEN, wide=True) == WIDE


def test_golden_markdown():
    squeeze = lambda text: re.sub(r"-{3,}", "---", re.sub(r" +", " ", text))  # noqa: E731 - column widths are no claim
    assert squeeze(tables.to_markdown(GOLDEN)) == squeeze(MARKDOWN)
    assert len({len(line) for line in tables.to_markdown(GOLDEN).splitlines() if line.startswith("|")}) == 1


def test_golden_latex():
    assert tables.to_latex(GOLDEN) == LATEX
    check_latex(LATEX)


def test_text_fits_the_width_and_repeats_the_labels():
    text = tables.to_text(GOLDEN, width=30)
    assert text.count("g_n|{8} = bn[b]") == 2
    assert max(map(len, text.split("Values:")[0].splitlines())) <= 30
    assert tables.to_text(GOLDEN).count("g_n|{8} = bn[b]") == 1


def test_csv_reads_back_to_the_last_digit():
    table = tables.task_table(from_records([run("bn", s, v) for s, v in enumerate((0.1, 0.2, 1 / 3))]))
    (line,) = csv.DictReader(io.StringIO(tables.to_csv(table)))
    cell = table.rows[0].cells[0]
    assert [float(line[name]) for name in ("mean", "std", "ci95", "n")] == [cell.mean, cell.std, cell.ci95, 3]


def check_latex(text):
    """Braces and environments close, and every row of a tabular has its number of columns."""
    bare = re.sub(r"\\[\\{}&%$#_]", "", re.sub(r"(?m)(?<!\\)%.*$", "", text))
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    count = 0
    for columns, body in re.findall(r"\\begin\{tabular\}\{(l?r*)\}\n(.*?)\\end\{tabular\}", text, re.S):
        for line in body.splitlines():
            if not line.endswith(r"\\"):
                assert re.fullmatch(r"\\(toprule|midrule|bottomrule)|(\\cmidrule\(lr\)\{\d+-\d+\})+", line), line
                continue
            wide = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + wide == len(columns), line
            count += 1
    return count


NASTY = (
    r"\ { } $ & # _ % ~ ^ < > | ' ` [x] * -- --- ?` !` é Å ñ ç ø ß ï σ Σ μ λ ± × ↑ — … 中 🙂 \\ \input{x} %"
    '" \x1b[31m \x00 a\nb'
)


def nasty_tables():
    records = [
        run(f"n{i}", seed, value, label, dataset=data)
        for i, label in enumerate((NASTY, "[1] first", "* star", "plain"))
        for data in ("a", NASTY)
        for seed, value in enumerate((0.1 + i / 10, "failed"))
    ]
    many = [run("bn", 0, 0.5, f"bn(k={k})", {"k": k}, "big", learning_rate=r) for k in range(60) for r in (1, 2)]
    return [
        *tables.render_all(from_records(records), sweep="dataset"),
        *tables.render_all(from_records(many))[:2],
    ]


def test_latex_of_any_text_is_well_formed_and_compiles(tmp_path):
    made = nasty_tables()
    document = tables.latex_document(made)
    assert check_latex(document) > 2 * LATEX_ROWS
    assert "\x1b" not in document
    assert document.isascii()
    assert document.count(r"\begin{tabular}") > len(made), "long tables are split, so that each part fits a page"
    tables.write_tables(made, tmp_path, ["latex"])
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{overall}\end{document}"
    )
    if shutil.which("pdflatex"):
        for name in ("all_tables.tex", "paper.tex"):
            command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", name]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
            assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
        assert (tmp_path / "all_tables.pdf").stat().st_size > 1000


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=20))
def test_escaped_latex_is_plain_balanced_and_has_no_bare_special_character(text):
    escaped = escape_latex(text)
    assert escaped.isascii()
    assert "\n" not in escaped
    rest = re.sub(r"\\[{}$&#_%]", "", escaped)  # escaped characters
    rest = re.sub(r"\$(\\[A-Za-z]+|-)\$", "", rest)  # mathematics of ours
    rest = re.sub(r"\\[a-zA-Z`'^~=.\"]+\{(\\[ij]|[A-Za-z])?\}", "", rest)  # commands and accents of ours
    rest = re.sub(r"\{[][*]?\}", "", rest)
    assert not set(rest) & set("\\{}$&#_%~^<>|"), rest


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet=st.sampled_from("ab_|\\<>&*`[]~$\n\r\t é"), max_size=12))
def test_escaped_markdown_opens_no_cell_and_no_tag(text):
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert "<" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|*`\[\]]", escaped)
    back = re.sub(r"\\(.)", r"\1", escaped).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert back == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("50 % of a_b & {c}", r"50 \% of a\_b \& \{c\}"),
        ("a--b", "a-{}-b"),
        ("é ± σ Λ 中", r"\'{e} $\pm$ $\sigma$ $\Lambda$ U+4E2D"),
        ("\\x\n[y]", r"\textbackslash{}x {[}y{]}"),
    ],
)
def test_latex_prints_what_was_written(text, latex):
    assert escape_latex(text) == latex


def test_a_name_with_underscores_stays_readable_in_markdown():
    assert escape_markdown("norm_batch_size=2, _x_") == r"norm_batch_size=2, \_x\_"


def test_files_have_stable_names_and_nothing_else_is_left(tmp_path):
    made = tables.render_all(from_records(small_grid()))
    first = tables.write_tables(made, tmp_path / "new" / "folder")
    names = [t.name for t in made]
    expected = {f"{n}{end}" for n in names for end in (".csv", "_wide.csv", ".tex", ".md")}
    assert {p.name for p in first} == expected | {"all_tables.tex", "all_tables.md"}
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {p.name for p in first}
    before = {p.name: p.read_bytes() for p in first}
    assert tables.write_tables(made, tmp_path / "new" / "folder") == first
    assert {p.name: p.read_bytes() for p in first} == before
    assert {p.suffix for p in tables.write_tables(made, tmp_path / "md", ["markdown"])} == {".md"}
    assert "### classification" in (tmp_path / "md" / "all_tables.md").read_text()


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    tables.write_tables([GOLDEN], tmp_path, ["markdown"])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        tables.write_tables([replace(GOLDEN, title="new")], tmp_path, ["markdown"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_spreadsheet_takes_no_text_of_a_csv_for_a_formula_and_every_number_for_a_number():
    kept = ("-0.5", "+1e-5", "gn(8)", "", "'=1")
    changed = {"\t=1": "U+0009=1", "\x1b[2J": "U+001B[2J"}
    changed |= {text: f"'{text}" for text in ("=1+1", "+1+1", "-x", "@sum", " =1", "＝1", "-1e5x")}
    labels, written = [*kept, *changed], [*kept, *changed.values()]
    metric = replace(TOP1, name="=metric")
    rows = tuple(Row(label, (Cell(mean=-0.5, n=1),), setting=(("=option", label),)) for label in labels)
    table = Table("t", "t", (Column(metric, "c", setting=(("@at", "-1"),)),), rows, task="-task", heading="=norm")
    tidy, wide = (list(csv.reader(io.StringIO(to_csv(table, wide)))) for wide in (False, True))
    assert tidy[0][:5] == ["table", "task", "'=option", "'@at", "'=norm"]
    for lines in (tidy[1:], [["", *line] for line in wide[1:]]):
        assert [line[2] for line in lines] == written
        assert {line[1] for line in lines} == {"'-task"}
    assert [line[4] for line in tidy[1:]] == written
    assert {(line[5], line[6], line[3]) for line in tidy[1:]} == {("'=metric", "-0.5", "-1")}
    assert wide[0][3] == "'=metric @at=-1"


@pytest.mark.parametrize("style", [escape_latex, escape_markdown])
@pytest.mark.parametrize("c", "\x1b\r\u200b\u200d\u202e\u2066\u2069\ufeff\u034f\u3164\ufe0f\U000e0101")
def test_what_does_not_show_has_no_effect_in_latex_and_markdown(style, c):
    text = style(f"a{c}b")
    assert text in (f"aU+{ord(c):04X}b", "a b")
    assert text.isprintable()


def test_columns_stay_aligned_in_any_encoding_and_with_wide_characters():
    label = replace(GOLDEN.rows[0], label="漢字 e\u0301")
    table = replace(GOLDEN, rows=(label, *GOLDEN.rows[1:]))
    for encoding in ("utf-8", "latin-1", "ascii"):
        text = to_text(table, encoding=encoding)
        assert text == spell(text, encoding)
        lines = text.split("\n")
        rows = [line for line in lines if "62.5" in line or "87.5" in line or line.startswith("---")]
        ends = {columns_of(line[: line.index("12.5") + 4]) for line in rows if "12.5" in line}
        assert len(rows) == 3
        assert {columns_of(line.rstrip()) for line in rows[:2]} == {columns_of(rows[0])}
        assert len(ends) == 1


@pytest.mark.parametrize("width", [0, 1, -3])
def test_a_terminal_without_width_gets_lines_that_can_be_read(width):
    assert to_text(GOLDEN, width) == to_text(GOLDEN, NARROWEST)


def test_tables_that_would_be_one_file_are_told_apart_and_names_are_short(tmp_path):
    names = ["a b", "a_b", "A_B", "x" * 300, "x" * 300 + "y", "all_tables", "../../up", "\u202e"]
    files = tables.write_tables([replace(GOLDEN, name=n) for n in names], tmp_path, ["markdown"])
    assert len({file.name.casefold() for file in files}) == len(names) + 1
    assert {file.parent for file in files} == {tmp_path}
    assert files[0].name == "a_b.md"
    assert max(len(file.name) for file in files) < 200


def test_a_link_in_the_place_of_a_table_is_replaced_and_leftovers_of_killed_writers_go(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "tables").symlink_to(folder)  # a large disk, say
    (folder / "golden.csv").symlink_to(target)
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = files_of_results._host()
    left = folder / f".no_longer_written.csv.{host}.{dead.pid}.0123abcd"
    others = [folder / f".golden.csv.{host}.{os.getpid()}.0123abcd", folder / ".a.b.c.d", folder / ".notes.2024.01.txt"]
    for file in (left, *others):
        file.touch()
    for file in others[1:]:
        os.utime(file, (0, 0))
    tables.write_tables([GOLDEN], tmp_path / "tables", ["csv"])
    assert target.read_text() == "mine"
    assert not (folder / "golden.csv").is_symlink()
    assert not left.exists()
    assert all(file.exists() for file in others)


def test_unknown_formats_and_names_taken_twice_write_nothing(tmp_path):
    with pytest.raises(
        ValueError, match=r'unknown format "latx"; formats: csv, latex, markdown; did you mean "latex"\?'
    ):
        tables.write_tables([GOLDEN], tmp_path / "x", ["csv", "latx"])
    with pytest.raises(ValueError, match="several tables would be written to golden"):
        tables.write_tables([GOLDEN, GOLDEN], tmp_path / "x", FORMATS)
    assert not (tmp_path / "x").exists()


def test_in_a_terminal_what_stands_under_several_tables_is_printed_once():
    records = [run("bn", s, 0.5 + s / 10, dataset=d, rate=1) for s in (0, 1) for d in "ab"]
    records += [run("gn", s, 0.7, dataset="a", rate=1) for s in (0, 1)]
    every = tables.render_all(from_records(records), sweep="dataset")
    text = tables_text(every, 200)
    for sentence in {sentence for table in every for sentence in table.caption}:
        assert text.count(sentence) == 1
    assert "classification: Common: rate=1." in text
    assert "\nEvidence: unrecorded data" in text
    assert text.count("Here the best is") == 1
    assert all(line in text for table in every for line in to_text(table).splitlines() if line.startswith(("bn", "gn")))
    assert tables_text(every[:1], 200) == to_text(every[0], 200)
    assert max(map(len, tables_text(every, 60).splitlines())) <= 60
