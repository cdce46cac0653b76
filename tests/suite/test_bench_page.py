"""Timings as a page: each benchmark in its own block, with what it was measured on."""

import re

import pytest

from norms.kernels.native import kernels
from results.pages import blocks
from suite.bench import page, timings
from suite.cli.checks import bench

LINES = ["first (2, 3): forward", "  bn    1.00 ms    1.00 x BatchNorm2d"]


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    def first():
        """One thing beside another."""
        yield from LINES

    def second():
        """Another."""
        yield "second"

    monkeypatch.setattr(timings, "BENCHMARKS", {"first": first, "second": second})
    monkeypatch.setattr(page, "BENCHMARKS", timings.BENCHMARKS)


def test_each_benchmark_has_a_block_with_command_commit_machine_and_date(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench(None, page="docs/speed.md")
    assert capsys.readouterr().out.splitlines() == [f"kernels: {kernels()}", *LINES, "second"]
    text = (tmp_path / "docs" / "speed.md").read_text()
    assert text.startswith("# Speed\n")
    first, second = blocks(text)
    assert first.command == "python run_suite.py bench first --page docs/speed.md"
    assert "```\n" + "\n".join(LINES) + "\n```" in first.content
    assert "One thing beside another." in first.content
    for fact in (r"Commit: \S+\. Date: \d{4}-\d\d-\d\d", r"Machine: .+ cores", r"torch \d", f"kernels {kernels()}"):
        assert re.search(fact, first.content)
    assert "second" in second.content


def test_one_benchmark_that_is_measured_again_leaves_the_others_and_the_words(tmp_path, monkeypatch):
    file = tmp_path / "speed.md"
    bench(None, page=file)
    before = file.read_text().replace("# Speed\n", "# Speed\n\nOur words.\n")
    file.write_text(before)
    LINES.append("  gn    2.00 ms    2.00 x BatchNorm2d")
    try:
        bench(["first"], page=file)
        after = file.read_text()
        assert after == before.replace("1.00 x BatchNorm2d\n", "\n".join(["1.00 x BatchNorm2d", LINES[-1], ""]))
    finally:
        LINES.pop()


def test_a_file_of_somebody_is_not_touched(tmp_path):
    file = tmp_path / "mine.md"
    file.write_text("# Mine\n")
    with pytest.raises(ValueError, match="no part of it is made by such a command"):
        bench(["first"], page=file)
    assert file.read_text() == "# Mine\n"
