"""Pages of Markdown: a command replaces its own block and nothing else; a page of findings says what it was made of."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import results
from results import pages
from results.record import RunRecord, RunSpec
from results.store import write_record, write_versions
from results.tables.page import findings, write_page

COMMAND = "python run_suite.py tables runs/a --page page.md"


def plant(folder, norms=("bn", "gn"), seeds=(0, 1), status="ok", config="", **around):
    specs = []
    for norm in norms:
        for seed in seeds:
            spec = RunSpec(
                task="classification",
                norm=norm if re.fullmatch("[a-z]+", norm) else "odd",
                norm_options={},
                task_options={"dataset": "made_up"},
                seed=seed,
                norm_version="1",
                task_version="1",
                data_checksum="d",
                norm_label=norm,
            )
            environment = {"commit": "c0ffee0123456789", "torch": "2", "device": "cpu", "device_name": "A machine"}
            environment |= {"threads": 1, "python": "3.11", "finished": "2026-01-02T03:04:05+00:00"} | around
            metrics = {"top1": 0.5 + 0.1 * seed} if status == "ok" else {}
            write_record(folder, RunRecord(spec=spec, status=status, metrics=metrics, environment=environment))
            specs.append(spec)
    write_versions(folder, specs, config)
    return results.load(folder)


def page_of(df, file, command=COMMAND, **more):
    write_page(df, results.render_all(df), file, command, **more)
    return file.read_text()


def test_a_block_is_replaced_and_every_other_line_stays():
    text = f"# A\n\nwords\n\n<!-- made by: {COMMAND} -->\nold\n<!-- end -->\n\nmore\n"
    text += "\n<!-- made by: x -->\ny\n<!-- end -->\n"
    new = pages.with_block(text, COMMAND, "new\n\nlines")
    assert new == text.replace("\nold\n", "\n\nnew\n\nlines\n\n")
    assert pages.with_block(new, COMMAND, "new\n\nlines") == new
    assert [block.content for block in pages.blocks(new)] == ["new\n\nlines", "y"]


def test_a_marker_in_fenced_code_is_a_text():
    text = f"```\n<!-- made by: {COMMAND} -->\n```\n\n~~~~\n<!-- end -->\n~~~\n<!-- end -->\n~~~~\n"
    assert pages.blocks(text) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n<!-- made by: x -->\nb\n", "line 2: the block has no end"),
        ("<!-- end -->\n", 'line 1: "<!-- end -->" ends no block'),
        ("<!-- made by: x -->\n<!-- made by: y -->\n<!-- end -->", "line 2: a block begins inside that of line 1"),
    ],
)
def test_markers_that_do_not_match_are_named_by_their_line(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        pages.blocks(text)


@given(st.text())
def test_any_command_is_one_marker_which_is_found_again(command):
    command = f"x{command}"
    page = pages.with_block("# A\n", command, "inside")
    assert [block.content for block in pages.blocks(page)] == ["inside"]
    assert pages.with_block(page, command, "inside") == page


def test_a_page_of_findings_says_what_it_was_made_of(tmp_path):
    df = plant(tmp_path / "a", config="/here/on/my/disk/configs/quick.yaml")
    text = page_of(df, tmp_path / "page.md")
    for part in (
        "# quick\n",
        "`python run_suite.py run configs/quick.yaml`",
        "4, of which 4 ok, 0 diverged, 0 failed, 0 skipped; seeds 0, 1.",
        "Commit: c0ffee012345.",
        "Machine: A machine.",
        "torch 2; Python 3.11; threads per run 1.",
        "Finished: 2026-01-02.",
        "No significance marks",
    ):
        assert part in text
    assert "/here" not in text
    assert str(tmp_path) not in text
    table = results.task_table(df)
    assert results.to_markdown(table) in text


def test_the_commands_that_a_folder_keeps_stand_on_its_page(tmp_path):
    df = plant(tmp_path / "a")
    words = ["run", "/home/me/configs/mine.yaml", "--seeds", "0-1", "--out=/home/me/x/y"]
    df.attrs["asked"] = [{"command": words}, {"command": words}, {"command": []}]
    assert findings(df, []).count("`python run_suite.py run configs/mine.yaml --seeds 0-1 --out=x/y`") == 1
    assert "/home" not in findings(df, [])


def test_what_people_wrote_on_a_page_is_kept_when_it_is_made_again(tmp_path):
    file = tmp_path / "deep" / "page.md"
    first = page_of(plant(tmp_path / "a"), file, title="First")
    ours = first.replace(f"{pages.TEXT}\n", f"{pages.TEXT}\nWhat it says.\n") + "\n## After\n"
    file.write_text(ours)
    again = page_of(plant(tmp_path / "a", seeds=(2,)), file, f"{COMMAND} --metrics top1", title="Second")
    assert again.startswith("# Second\n\n<!-- text -->\nWhat it says.\n<!-- end text -->\n")
    assert again.endswith("\n## After\n")
    assert "seeds 0, 1, 2." in again
    assert "6, of which 6 ok" in again
    assert again.count("<!-- made by") == 1
    assert page_of(plant(tmp_path / "a"), file).startswith("# Second\n")


def test_a_file_of_somebody_and_a_page_of_another_folder_are_not_touched(tmp_path):
    df, file = plant(tmp_path / "a"), tmp_path / "page.md"
    for text in ("# Mine\n", f"# Mine\n\n<!-- made by: {COMMAND.replace('runs/a', 'runs/b')} -->\n<!-- end -->\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="no part of it is made by such a command"):
            page_of(df, file)
        assert file.read_text() == text
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"page\.md"):
        page_of(df, file)


def test_some_tables_stand_before_the_facts_of_their_runs(tmp_path):
    df = plant(tmp_path / "a")
    text = page_of(df, tmp_path / "page.md", only=["classification"])
    assert text.index("### classification") < text.index("Runs: 4")
    assert "Overall" not in text
    with pytest.raises(ValueError, match=r'no table is named "clasification".*classification'):
        page_of(df, tmp_path / "other.md", only=["clasification"])
    assert not (tmp_path / "other.md").exists()


def test_names_with_markup_are_inert_on_a_page(tmp_path):
    hostile = "<script>|`\u202e[x](http://a)\n<!-- end -->"
    df = plant(tmp_path / "a", norms=("bn", hostile), device_name=hostile, config=f"/x/{hostile}/`a`.yaml")
    text = page_of(df, tmp_path / "page.md", title=hostile)
    assert len(pages.blocks(text)) == 1
    assert "\u202e" not in text
    assert "<script>" not in re.sub(r"(`+).*?\1", "", text)
    assert "\n<!-- end -->" in text
    assert text.count("\n<!-- end -->") == 1


def test_a_folder_of_failures_is_a_page_that_says_so(tmp_path):
    text = page_of(plant(tmp_path / "a", status="failed"), tmp_path / "page.md")
    assert "4, of which 0 ok, 0 diverged, 4 failed, 0 skipped" in text
