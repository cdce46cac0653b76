"""What README.md and docs/ say of the code is what the code says now."""

import re

import pytest
import typer

from norms.layers import LAYERS
from norms.registry import norm_option_defaults
from results.metrics import METRICS
from suite.cli.docs import docs
from suite.documents import made
from suite.documents.docstrings import as_markdown, in_a_cell, parts_of
from suite.environment import ROOT
from tasks import get_task


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout of two pages; the command takes it for its own."""
    (tmp_path / "docs" / "below").mkdir(parents=True)
    monkeypatch.setitem(made.BLOCKS, "norms", lambda: "as it is now")
    monkeypatch.setattr("suite.cli.docs.ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# A\n")
    return tmp_path


def block(name, content="of before"):
    return f"words\n\n<!-- made by: {made.COMMAND}{name} -->\n{content}\n<!-- end -->\nmore\n"


def test_all_pages_are_up_to_date(monkeypatch):
    """`python run_suite.py docs` mends it."""
    monkeypatch.setenv("COLUMNS", "57")  # of this terminal; the pages are those of no terminal
    assert [str(file.relative_to(ROOT)) for file in made.remade(ROOT)] == []


def test_every_block_stands_on_some_page():
    there = "".join(file.read_text(encoding="utf-8") for file in made.page_files(ROOT))
    assert [name for name in made.BLOCKS if f"<!-- made by: {made.COMMAND}{name} -->" not in there] == []


def test_a_stale_page_is_named_then_rewritten_then_up_to_date(root, capsys):
    page = root / "docs" / "below" / "page.md"
    page.write_text(block("norms"))
    assert docs(check=True) == 1
    assert capsys.readouterr().out.startswith("not up to date: docs/below/page.md\n1 pages to rewrite")
    assert page.read_text() == block("norms")
    assert docs() == 0
    assert page.read_text() == block("norms", "\nas it is now\n")
    assert docs(check=True) == 0
    assert docs(["norms"]) == 0
    assert "rewritten: docs/below/page.md" in (out := capsys.readouterr().out)
    assert out.count("all pages are up to date") == 2


def test_blocks_of_other_commands_and_other_names_are_left(root):
    text = block("norms").replace(made.COMMAND + "norms", "python run_suite.py tables runs/a --page README.md")
    (root / "README.md").write_text(text)
    (root / "docs" / "a.md").write_text(block("norms"))
    assert made.remade(root, ["tasks"]) == {}
    assert list(made.remade(root)) == [root / "docs" / "a.md"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (block("norm"), r'README\.md: line 3: unknown block "norm".*norms'),
        (block("norms").replace("<!-- end -->", ""), r"README\.md: line 3: the block has no end"),
    ],
)
def test_a_marker_that_names_nothing_is_one_line_with_the_nearest_name(root, text, said):
    (root / "README.md").write_text(text)
    with pytest.raises(ValueError, match=said):
        made.remade(root)


def test_an_unknown_block_on_the_command_line_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r'unknown block "comands".*commands'):
        made.remade(ROOT, ["comands"])


def sections(text):
    return dict(re.findall(r"^## `(.+?)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def test_every_norm_has_a_section_with_a_definition_and_the_meaning_of_each_option():
    found = sections(made.BLOCKS["norms"]())
    assert list(found) == list(LAYERS)
    for name, text in found.items():
        rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", text, re.MULTILINE))
        assert list(rows) == list(norm_option_defaults(name)), name
        assert all(rows.values()), name
        source, definition, *_ = text.partition("- Statistics over")[0].strip().split("\n\n")
        assert source, name
        assert definition, name


OURS = [folder.name for folder in sorted((ROOT / "tasks").iterdir()) if (folder / "task.py").is_file()]
"""Other test modules may have registered tasks of theirs in this process."""


def test_every_task_has_a_section_with_the_meaning_of_each_option_and_metric():
    found = sections(made.BLOCKS["tasks"]())
    assert set(OURS) <= set(found)
    for name, text in found.items():
        task = get_task(name)
        rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*?) \|$", text, re.MULTILINE))
        assert list(rows) == [*task.metrics, *(o for o in task.options.model_fields if o not in task.metrics)], name
        assert all(rows.values()), name


def test_every_metric_and_every_command_has_its_place():
    assert all(f"| `{name}` |" in made.BLOCKS["metrics"]() for name in METRICS)
    from suite.cli.app import app

    found = sections(made.BLOCKS["commands"]())
    for command in typer.main.get_command(app).commands:
        assert f"Usage: run_suite.py {command}" in found[command]
    assert max(len(line) for text in found.values() for line in text.splitlines()) <= 100


def test_a_docstring_is_taken_apart():
    class Thing:
        """What it is.

            y = x * 2

        Args:
            a, b: two
                things.
            c: one.

        Raises:
            ValueError: always.

        And more.
        """

    parts = parts_of(Thing)
    assert parts.words == "What it is.\n\n    y = x * 2\n\nAnd more."
    assert parts.sections["Args"] == {"a": "two things.", "b": "two things.", "c": "one."}


def test_words_of_docstrings_are_no_markup():
    assert (
        in_a_cell("a_b | <i> x[k] `c|d` tasks.step.train_step")
        == r"`a_b` \| \<i\> x\[k\] `c\|d` `tasks.step.train_step`"
    )
    assert in_a_cell("D = C*H*W of (N, C, *), a * b; *not confirmed*, so") == (
        r"D = C\*H\*W of (N, C, \*), a \* b; *not confirmed*, so"
    )
    assert as_markdown("a_b\n\n    y = a_b * <x>") == "`a_b`\n\n    y = a_b * <x>"
