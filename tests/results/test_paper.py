"""The table of a paper: its numbers, what it refuses, its files, and that it fits a two-column page."""

import csv
import html
import io
import itertools
import re
import shutil
import sys
from dataclasses import replace

import pytest
from parts.two_columns import compiled

import results
from results.frame import from_records
from results.record import RunRecord, RunSpec
from results.tables.grid import grid
from results.tables.latex import to_latex
from results.tables.paper_latex import CAPTIONS, COLUMN_PT, NUMBERS, PAGE_PT, advice, fit, notes_of, paper_latex
from results.tables.paper_style import PaperStyle
from results.tables.styled import to_html

NASTY = "a^b~c<d>&_\\%$#{=1+1} é 中 \u202e \x1b[31m"


def run(norm, seed, value, task="classification", label="", **options):
    """A record; a text as value is a status, keywords beginning with norm_ are options of the norm."""
    own = {k.removeprefix("norm__"): options.pop(k) for k in list(options) if k.startswith("norm__")}
    ok = not isinstance(value, str)
    spec = RunSpec(
        task=task,
        norm=norm,
        norm_options=own,
        task_options=options,
        seed=seed,
        norm_version="1",
        task_version="1",
        data_checksum="d",
        norm_label=label or norm,
    )
    return RunRecord(spec=spec, status="ok" if ok else value, metrics={"top1": value, "val_top1": value} if ok else {})


def two_tasks(seeds=2, norms=("bn", "gn", "ln")):
    """Classification in two norm batches, another task in one setting; gn with other options in each."""
    records = []
    for (i, norm), seed in itertools.product(enumerate(norms), range(seeds)):
        told = {"norm__num_groups": 8, "label": "gn(num_groups=8)"} if norm == "gn" else {}
        for size in (2, 64):
            records.append(run(norm, seed, 0.5 + i / 16 + size / 1024 + seed / 64, norm_batch_size=size, **told))
        told = {"norm__num_groups": 2, "label": "gn(num_groups=2)"} if norm == "gn" else {}
        records.append(run(norm, seed, 0.25 + i / 16 + seed / 64, "few_shot", way=5, **told))
    return records


def table_of(records, **asked):
    return results.paper_table(from_records(records), **asked)


def test_each_cell_is_the_mean_of_its_runs_and_nothing_is_averaged_over_settings():
    records = two_tasks()
    df = from_records(records)
    table = results.paper_table(df)
    assert [(c.task, c.setting) for c in table.columns] == [
        ("classification", (("norm_batch_size", "2"),)),
        ("classification", (("norm_batch_size", "64"),)),
        ("few_shot", ()),
    ]
    assert [row.label for row in table.rows] == ["bn", "gn", "ln"]
    for row, (column, cell) in itertools.product(table.rows, [(c, i) for i, c in enumerate(table.columns)]):
        runs = df[(df["norm"] == row.norm) & (df["task"] == column.task)]
        for option, value in column.setting:
            runs = runs[runs[f"option.{option}"].astype(str) == value]
        assert row.cells[cell].mean == pytest.approx(runs["top1"].mean())
        assert (row.cells[cell].n, len(row.cells[cell].keys)) == (len(runs), 2)
        assert row.cells[cell].best == (row.norm == "ln")
        assert row.cells[cell].second == (row.norm == "gn")
    assert "classification (by norm_batch_size)" in table.short[0]
    assert "gn is gn(num_groups=8), in few_shot gn(num_groups=2)." in table.caption


def test_a_norm_with_two_rows_in_a_task_has_a_row_for_each():
    records = [run("bn", 0, 0.5), *(run("gn", 0, 0.5, label=f"gn({k})", norm__num_groups=k) for k in (2, 8))]
    assert [row.label for row in table_of(records).rows] == ["bn", "gn(2)", "gn(8)"]
    with pytest.raises(ValueError, match=r'rows "gn": 2 rows have this norm; name one: gn\(2\), gn\(8\)'):
        table_of(records, rows={"gn": "Ours"})


def test_names_orders_settings_and_digits_are_as_asked():
    table = table_of(
        two_tasks(),
        tasks=["few_shot", "classification"],
        rows={"gn": "Ours"},
        order=["Ours"],
        where={"classification.norm_batch_size": 64},
        digits=0,
        spread="none",
    )
    assert [c.task for c in table.columns] == ["few_shot", "classification"]
    assert [row.label for row in table.rows] == ["Ours", "bn", "ln"]
    assert "Ours is gn(num_groups=2), in classification gn(num_groups=8)." in table.caption
    assert "| Ours |" in re.sub(" +", " ", results.to_markdown(table))
    assert "±" not in results.to_markdown(table).partition("\n- ")[0]
    assert "<ins>32</ins>" in results.to_markdown(table)
    assert [row.label for row in table_of(two_tasks(), norms=["ln", "bn"]).rows] == ["ln", "bn"]


def test_holes_are_counted_and_never_marked_and_marks_need_pairs():
    records = [run("bn", s, 0.5 + s / 100) for s in range(6)]
    records += [run("gn", s, "diverged" if s == 5 else 0.9) for s in range(6)]
    records += [run("ln", s, 0.7 + s / 100) for s in range(6)]
    cells = {row.label: row.cells[0] for row in table_of(records).rows}
    assert (cells["gn"].diverged, cells["gn"].best, cells["ln"].best, cells["ln"].significant) == (1, False, True, True)
    text = paper_latex(table_of(records))
    assert r"diverged 1/6" in text
    assert r"$\dagger$ differs from bn" in text
    few = table_of([r for r in records if r.spec.seed < 5])
    assert not any(cell.significant for row in few.rows for cell in row.cells)
    assert few.short[-1] == "Too few seeds to test against bn."


def test_a_single_seed_all_ties_and_only_failures_are_tables_that_say_so():
    one = table_of([run("bn", 0, 0.5), run("gn", 0, 0.6)])
    assert one.short[1] == "Mean over seeds: n = 1 (seed 0)."
    ties = table_of([run(norm, seed, 0.5) for norm in ("bn", "gn") for seed in (0, 1)])
    assert all(row.cells[0].best and not row.cells[0].second for row in ties.rows)
    failed = table_of([run("bn", 0, "failed"), run("gn", 0, "failed")])
    assert failed.short[1] == "No run here has a value: the footnotes say why."
    assert "failed 1/1" in paper_latex(failed)
    with pytest.raises(ValueError, match="no runs to tabulate"):
        results.paper_table(from_records([]))


def test_all_mistakes_in_names_are_told_at_once_with_the_nearest():
    with pytest.raises(ValueError, match="no run is of this task") as caught:
        table_of(
            two_tasks(),
            tasks=["few_shots"],
            norms=["bnn"],
            rows={"lnn": "x"},
            order=["gm"],
            metrics=["top2"],
            where={"wya": 5},
            reference="b n",
            digits=7,
            spread="sdt",
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 9
    for name in ("few_shot", "bn", "ln", "gn", "top1", "way", "std"):
        assert any(line.endswith(f'did you mean "{name}"?') for line in lines), name


def test_a_task_of_many_settings_names_the_options_to_choose_by():
    records = [run("bn", 0, 0.5, learning_rate=rate / 10) for rate in range(9)]
    with pytest.raises(
        ValueError, match=r"9 settings, 8 fit .*learning_rate \(0.0, 0.1, .*classification.learning_rate"
    ):
        table_of(records)
    assert len(table_of(records, where={"learning_rate": [0.1, 0.2]}).columns) == 2


def test_csv_html_and_excel_hold_the_numbers_of_the_table(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    table = table_of(two_tasks(), rows={"gn": "=1+1"})
    results.write_paper(table, tmp_path, ["csv", "html", "excel", "markdown"])
    lines = list(csv.DictReader(io.StringIO((tmp_path / "paper.csv").read_text())))
    means = [row.cells[i].mean for row in table.rows for i in range(3)]
    assert [float(line["mean"]) for line in lines] == means
    assert {line["task"] for line in lines} == {"classification", "few_shot"}
    page = (tmp_path / "paper.html").read_text()
    printed = [entry.mean for line in grid(table).entries for entry in line]
    assert re.findall(r"<td[^>]*>([\d.]+) ±", page) == printed
    book = openpyxl.load_workbook(tmp_path / "paper.xlsx")
    cells = [c for line in book["table"].iter_rows() for c in line]
    assert [c.value / 100 for c in cells if isinstance(c.value, float | int)] == pytest.approx(means)
    assert not any(c.data_type == "f" for sheet in book for line in sheet.iter_rows() for c in line)
    assert [c.value for c in cells if c.font.b and isinstance(c.value, float | int)] == pytest.approx(
        [100 * cell.mean for cell in table.rows[2].cells]
    )
    notes = (tmp_path / "paper.notes.md").read_text()
    assert notes.count("\n") == len(notes_of(table))


def test_without_openpyxl_the_command_that_installs_it_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match="pip install openpyxl"):
        results.write_paper(table_of(two_tasks()), tmp_path / "x", ["latex", "excel"])
    assert not (tmp_path / "x").exists()


def test_captions_are_short_full_or_none():
    table = table_of(two_tasks())
    short, full, none = (paper_latex(table, caption=caption) for caption in ("short", "full", "none"))
    assert len(short) < len(full)
    assert "Evidence" in full
    assert "Evidence" not in short
    assert r"\caption" not in none
    assert sum(map(len, table.short)) < 400
    many = replace(table, caption=(*table.short, *(f"Sentence {i} is here." for i in range(400))))
    for text in (paper_latex(many, caption="full"), to_latex(many, "full")):
        assert len(re.search(r"\\caption\[.*", text)[0]) < 2800  # TeX measures none of more than 16,384 pt
        assert text.count(" is here.") == 400
    with pytest.raises(ValueError, match=r'caption "ful": .*did you mean "full"') as caught:
        paper_latex(table, "tabel", "ful", "sinuitx")
    assert str(caught.value).count("\n") == 2
    assert set(CAPTIONS) == {"short", "full", "none"}


def test_names_with_markup_are_inert_in_every_format(tmp_path):
    records = [run("bn", 0, 0.5, method=NASTY), run("gn", 0, 0.6, label=NASTY, method=NASTY)]
    table = table_of([*records, run("bn", 0, 0.4, method="x")])
    page = to_html(table)
    assert "a^b~c&lt;d&gt;&amp;" in page
    assert not set("\u202e\x1b") & set(page + paper_latex(table))
    assert "<script" not in to_html(table_of(records, rows={"gn": "<script>x</script>"}))
    assert html.unescape(re.search(r"<title>(.*?)</title>", page)[1]) == "Norms in classification"
    assert r"a\textasciicircum{}b\textasciitilde{}c\textless{}d" in paper_latex(table)
    if shutil.which("pdflatex"):
        compiled([paper_latex(table, "table*", "full", numbers) for numbers in NUMBERS], tmp_path)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_tables_fit_their_place_and_are_as_wide_as_estimated(tmp_path):
    marked = [*(run("bn", s, 0.95 + s / 500) for s in range(6)), *(run("gn", s, 0.0987 + s / 99) for s in range(6))]
    marked += [run("ln", s, "diverged" if s == 1 else 0.5) for s in range(6)]
    tables = [table_of(two_tasks()), table_of(two_tasks(), transpose=True), table_of(marked)]
    asked = list(itertools.product(tables, (("table", COLUMN_PT), ("table*", PAGE_PT)), NUMBERS))
    texts = [paper_latex(table, environment, numbers=numbers) for table, (environment, _), numbers in asked]
    widths, overfull = compiled(texts, tmp_path)
    assert not overfull
    for width, (table, (environment, limit), numbers) in zip(widths, asked, strict=True):
        found = fit(table, environment, numbers)
        assert width <= limit
        assert 0.95 * found.width - 2 < width < found.width + 1, "an estimate errs to the safe side"
        assert not advice(table, environment, numbers)


def test_a_table_that_can_not_fit_says_how_wide_it_is_and_what_to_do(tmp_path):
    records = [run(n, s, 0.5 + s / 9, f"{n}_task", label=f"{n}{i}") for n in "abcdefgh" for s in (0, 1) for i in (0,)]
    records += [run("bn", s, 0.5 + s / 9, f"{n}_task") for n in "abcdefgh" for s in (0, 1)]
    table = table_of(records)
    assert re.match(r"paper: about \d+ pt wide at its narrowest, 237 pt are there; try .*table\*", advice(table))
    with pytest.warns(UserWarning, match="237 pt are there"):
        results.write_paper(table, tmp_path, ["latex"])
    assert "resizebox" not in (tmp_path / "paper.tex").read_text()
    assert not advice(table, "table*")


def test_a_style_is_checked_whole_and_options_go_over_it():
    with pytest.raises(ValueError, match="unknown key") as caught:
        PaperStyle.of({"taks": ["a"], "norms": 5, "digits": 9, "caption": "shor", "transpose": "yes"}, "s.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert all(line.startswith("s.yaml: ") for line in lines)
    assert any(line.endswith('did you mean "tasks"?') for line in lines)
    assert any(line.endswith('did you mean "short"?') for line in lines)
    file = PaperStyle.of({"norms": ["bn"], "digits": 2, "rows": {"a": "A"}}, "s.yaml")
    over = PaperStyle.of({"digits": 1, "rows": {"b": "B"}}, "options").over(file)
    assert (over.norms, over.digits, over.rows) == (("bn",), 1, {"a": "A", "b": "B"})


def test_a_spread_of_zero_is_printed_by_both_kinds_of_columns():
    table = table_of([run(norm, seed, value) for norm, value in (("bn", 0.5), ("gn", 0.25)) for seed in (0, 1)])
    for numbers in NUMBERS:
        rows = [line for line in paper_latex(table, numbers=numbers).splitlines() if line.startswith(("bn &", "gn &"))]
        assert len(rows) == 2
        assert all(r"$\pm$\,0.0" in row for row in rows)
