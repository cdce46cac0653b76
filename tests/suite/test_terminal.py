"""suite.terminal: streams that take every text and never stop a command."""

import errno
import io
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from results.escape import columns_of, cut, one_line, spell, visible
from results.record import RunRecord, RunSpec
from results.store import write_record
from suite.environment import ROOT
from suite.terminal import Output, steady

HIDDEN = "\x1b\x07\r\t\x00\x85\u200b\u200d\u202e\u2066\u2028\ufeff\u034f\u3164\ufe0f\U000e0101\ud800"


def printed(text, encoding="utf-8", escape=True):
    raw = io.BytesIO()
    output = Output(io.TextIOWrapper(raw, encoding, newline=""), escape)
    output.write(text)
    output.flush()
    assert output.lost is None
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("c", HIDDEN)
def test_what_does_not_show_is_printed_by_its_number(c):
    assert printed(f"a{c}b\n") == f"aU+{ord(c):04X}b\n" == f"{visible(f'a{c}b')}\n"


@given(st.text(), st.sampled_from(["utf-8", "latin-1", "cp1252", "ascii", "cp437", "utf-16"]))
def test_whatever_is_printed_in_whatever_encoding_only_what_shows_comes_out(text, encoding):
    out = printed(text, encoding)
    assert out.count("\n") == text.count("\n")
    assert out.replace("\n", "").isprintable()
    assert one_line(text).isprintable()


def test_a_symbol_that_an_encoding_lacks_has_a_substitute():
    assert printed("top-1 ↑ 0.5 ± 0.1† — é", "ascii") == "top-1 ^ 0.5 +- 0.1# - U+00E9"
    assert printed("top-1 ↑ 0.5 ± 0.1† — é", "latin-1") == "top-1 ^ 0.5 ± 0.1# - é"
    assert spell("±", "utf-8") == "±"


def test_what_moves_the_cursor_on_purpose_is_left_alone():
    assert printed("\x1b[2K±", "ascii", escape=False) == "\x1b[2K+-"


@given(st.text(max_size=40), st.integers(3, 30))
def test_a_cut_text_keeps_its_beginning_and_end(text, longest):
    short = cut(text, longest)
    assert len(short) <= longest
    if short != text:
        head, _, tail = short.partition("…") if "…" not in text else (short[:1], "", short[-1:])
        assert text.startswith(head)
        assert text.endswith(tail)


def test_columns_of_wide_and_combining_characters():
    assert [columns_of(t) for t in ("abc", "é", "e\u0301", "漢字", "")] == [3, 1, 1, 4, 0]


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(("make", "error"), [(broken_pipe, errno.EPIPE), (full_disk, errno.ENOSPC)])
def test_a_stream_that_nobody_takes_is_noted_and_nothing_else(make, error):
    with open(make(), "w", encoding="utf-8") as stream:
        output = Output(stream)
        for _ in range(3):
            output.write("x" * 100_000)
            output.flush()
        assert output.lost.errno == error
        output.leave()  # or closing it would raise, as Python's exit would


def test_a_stream_that_is_closed_or_none_takes_everything():
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        output = Output(stream)
        output.write("x")
        output.flush()
        output.leave()


def test_the_streams_are_put_back(capsys):
    before = sys.stdout
    with steady() as (out, err):
        assert (sys.stdout, sys.stderr) == (out, err)
        print("a\x1b")
    assert sys.stdout is before
    assert capsys.readouterr().out == "aU+001B\n"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    for norm, value in (("bn", 0.5), ("gn(名前)", 0.25)):
        for seed in (0, 1):
            spec = RunSpec(
                task="classification",
                norm=norm,
                norm_options={},
                task_options={"dataset": "a\x1b[2J"},
                seed=seed,
                norm_version="1",
                task_version="1",
                data_checksum="c",
            )
            write_record(folder, RunRecord(spec=spec, status="ok", metrics={"top1": value + seed / 8}))
    return folder


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        ('| (read line; cat >/dev/null; echo "$line")', 0, "classification"),
        ("| true", 0, ""),
        (">&-", 0, ""),
        (">/dev/full", 2, "error: standard output: No space left on device"),
    ],
)
def test_tables_end_by_themselves_wherever_they_are_printed_to(stored, redirect, code, said):
    command = f'"{sys.executable}" "{ROOT}/run_suite.py" tables "{stored}" {redirect}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr).strip() == said
