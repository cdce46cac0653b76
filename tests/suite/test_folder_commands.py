"""The commands about folders of results: runs list, runs rm, merge, diff; and what `run` keeps of its plan."""

import io
import json
import sys

import pytest
from parts.fake_task import TASK
from parts.folders import content, plant, record, spec

import results
import suite as package
from results.record import RECORD
from results.store import read_asked, run_folder, run_lock
from suite import cli
from suite.comparing import diff_lines, run_lines
from suite.environment import commit
from suite.session import Session


@pytest.fixture
def suite(tmp_path, monkeypatch, capsys):
    """suite("merge", ...) -> (exit code, lines of stdout, lines of stderr), in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out.splitlines(), captured.err.splitlines()

    return call


@pytest.fixture
def out(tmp_path):
    return plant(
        tmp_path / "out", *(record(spec(n, s)) for n in ("bn", "gn") for s in (0, 1)), record(spec("in"), "failed")
    )


def test_runs_are_listed_as_lines_and_as_json(suite, out):
    code, lines, err = suite("runs", "list", out, "--norms", "gn")
    assert (code, err) == (0, [])
    assert lines[0].split()[:4] == ["task", "norm", "setting", "seed"]
    assert [line.split()[-1] for line in lines[1:3]] == [spec("gn", s).key for s in (0, 1)]
    assert lines[3].startswith("2 runs (2 ok), ")
    _, lines, _ = suite("runs", "list", out, "--json", "--status", "failed")
    (run,) = json.loads("\n".join(lines))["runs"]
    assert (run["norm"], run["status"], run["reason"], run["value"]) == ("in", "failed", "it did", None)


def test_nothing_is_removed_without_a_word(suite, out, monkeypatch):
    before = content(out)
    assert suite("runs", "rm", out)[0] == 2
    assert suite("runs", "rm", out, "--all", "--norms", "gn")[0] == 2
    code, _, err = suite("runs", "rm", out, "--norms", "gn")  # standard input is no terminal
    assert (code, err[0].startswith("error: 2 runs (2 ok), ")) == (2, True)
    code, lines, _ = suite("runs", "rm", out, "--norms", "gn", "--dry-run", "--yes")
    assert (code, lines[-1]) == (0, "nothing is removed (--dry-run)")
    for answer, said in (("n", "nothing is removed"), ("y", "2 runs removed, ")):
        terminal = io.StringIO(f"{answer}\n")
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        assert content(out) == before
        code, lines, _ = suite("runs", "rm", out, "--norms", "gn")
        assert (code, lines[-1].strip().startswith(said)) == (0, True)


def test_runs_are_removed_but_those_that_are_made(suite, out):
    with run_lock(out, spec("gn", 1)):
        code, lines, err = suite("runs", "rm", out, spec("gn", 0).key[:9], spec("gn", 1).key, "--yes")
    assert (code, lines[0].startswith("1 run removed, "), len(err)) == (1, True, 1)
    assert err[0].endswith("another process makes it now")
    assert results.load(out)["norm"].tolist() == ["bn", "bn", "gn", "in"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "list", "out", "--tasks", "mino"], 'did you mean "mine"?'),
        (["runs", "list", "oot"], 'did you mean "out"?'),
        (["runs", "rm", "out", "--status", "oke", "--yes"], 'did you mean "ok"?'),
        (["merge", "out", "--out", "out"], "is one of the folders to merge"),
        (["merge", "oot", "--out", "c"], 'did you mean "out"?'),
        (["diff", "out", "oot"], 'did you mean "out"?'),
        (["diff", "out", "out", "--metrics", "topp1"], 'error: --metrics "topp1": neither folder has it'),
        (["diff", "out", "out", "--metrics", ""], 'error: --metrics "": a name is needed'),
        (["diff", "out", "out", "--tolerance", "2"], "--tolerance 2.0: 0 to 1"),
        (["diff", "out", "out", "--json", "--csv"], "one of them"),
    ],
)
def test_a_mistake_is_one_line(suite, out, arguments, message):
    code, lines, err = suite(*arguments)
    assert (code, lines, len(err)) == (2, [], 1)
    assert message in err[0]


def test_merge_says_what_it_did_and_is_done_the_second_time(suite, out, tmp_path):
    plant(tmp_path / "b", record(spec(), at=9, top1=0.75), record(spec("gn", version="2")))
    code, lines, err = suite("merge", "out", "b", "--out", "c")
    assert (code, err) == (0, [])
    assert any(line.startswith("norm gn: planned as 1 (out), 2 (b); tables show 2") for line in lines)
    assert "top1 0.75 and 0.5; b is kept, out is not" in "\n".join(lines)
    assert lines[-1].startswith("6 runs copied, 0 there already")
    assert suite("merge", "out", "b", "--out", "c")[1][-1].startswith("0 runs copied, 6 there already")


def test_diff_names_what_differs_and_exits_as_it_is_told(suite, out, tmp_path):
    plant(
        tmp_path / "b",
        *(record(spec("bn", s), top1=0.625 + s / 1000, commit="d") for s in (0, 1)),
        record(spec("gn"), "diverged"),
    )
    assert suite("diff", "out", "out", "--exit-code")[0] == 0
    code, lines, err = suite("diff", "out", "b", "--exit-code")
    assert (code, err) == (1, [])
    text = "\n".join(lines)
    assert "differs in commit: c -> d (2 pairs)" in text
    assert "mine gn seed 0: ok -> diverged" in text
    assert "  mine in seed 0: failed" in text
    (line,) = [line for line in lines if line.startswith("mine  bn")]
    assert line.split("  ")[-1] == "different"
    assert "0.5 (0.5)" in line  # p of two seeds, which can not be lower
    found = json.loads("\n".join(suite("diff", "out", "b", "--json")[1]))
    assert found["differs"]
    assert {r["metric"]: r["verdict"] for r in found["rows"] if not r["cost"]} == {
        "top1": "different",
        "test_loss": "equal",
    }
    assert suite("diff", "out", "b", "--csv")[1][0].startswith("task,setting,norm,metric,cost,pairs")


def test_odd_names_are_inert_on_a_terminal(tmp_path, capsys):
    odd = "\x1b[31mred\u202e"
    plant(tmp_path / "a", record(spec(norm=odd, where=odd)), record(spec(norm=odd, where="b"), **{odd: 1.0}))
    plant(tmp_path / "b", record(spec(norm=odd, where=odd), "failed"), record(spec(norm=odd, where="b"), **{odd: 2.0}))
    from results.folders import list_runs

    frames = [results.load(tmp_path / n) for n in "ab"]
    shown = [*run_lines(list_runs(tmp_path / "a")[0]), *diff_lines(results.diff(*frames), odd, "b")]
    assert all(line.isprintable() for line in shown)
    assert "U+001B[31mred" in "\n".join(shown)


def test_a_run_keeps_its_command_and_its_config(suite, tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    text = "# why: a try\nnorms: [bn]\nseeds: 0\ntasks: {cli_fake: {}}\n"
    (tmp_path / "grid.yaml").write_text(text)
    command = ["run", "grid.yaml", "--plugin", "task.py", "--data-dir", str(tmp_path), "--out", "o"]
    for _ in range(2):
        assert suite(*command)[0] == 0
    (plan,) = read_asked(tmp_path / "o")
    assert plan["command"] == command
    assert plan["config"] == str(tmp_path / "grid.yaml")
    assert (plan["text"], plan["commit"]) == (text, commit())
    suite("runs", "rm", "o", "--all", "--yes")
    assert "1 to do" in "\n".join(suite(*command, "--dry-run")[1])  # what was removed is made again


def test_from_python_the_mapping_is_kept(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    config = {"norms": ["bn"], "seeds": range(2), "tasks": {"cli_fake": {}}}
    planned = package.plan(config, plugins=[tmp_path / "task.py"], data_dir=tmp_path)
    Session(planned, tmp_path / "o", text=package.session.config_as_text(config)).begin()
    (plan,) = read_asked(tmp_path / "o")
    assert (plan["command"], plan["config"]) == ([], "")
    assert json.loads(plan["text"]) == {"norms": ["bn"], "seeds": [0, 1], "tasks": {"cli_fake": {}}}


def test_a_damaged_record_is_in_the_list_and_can_be_removed(suite, out):
    (run_folder(out, spec()) / RECORD).write_text("{")
    code, lines, err = suite("runs", "list", out)
    assert (code, err) == (0, [])
    assert any(line.startswith(f"damaged: mine/bn/{spec().key}: not a run record") for line in lines)
    assert suite("runs", "rm", out, "--status", "damaged", "--yes")[1][0].startswith("1 run removed")
    assert len(results.load(out)) == 4
