"""`run_suite.py debug`: one run in this process, with its prints, its debugger and its traceback."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parts.fake_task import TASK

from suite import cli
from suite.environment import ROOT

NORM = """
import torch
from norms.registry import register

@register(name="debugged", source="mine", mixes_samples=False, keeps_stats=False)
class Mine(torch.nn.Module):
    def __init__(self, num_channels, *, scale: float = 1.0, affine: bool = True):
        super().__init__()
        {body}

    def forward(self, x):
        return x
"""
LOADED = 'raise LookupError("at import")\n'


@pytest.fixture
def suite(tmp_path, monkeypatch, capsys):
    """suite(*arguments) -> (exit code, stdout, stderr) of `debug` in tmp_path, with the fake task of test_cli; `body`
    is executed when a norm is built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)
    monkeypatch.setattr("suite.forked.fork", lambda *_: pytest.fail("a process was forked"))
    monkeypatch.setattr("suite.trial.fork", lambda *_: pytest.fail("a process was forked"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("faulthandler.enable", lambda: None)  # pytest has its own
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "grid.yaml").write_text("norms: [bn, in]\nseeds: 5\ntasks: {cli_fake: {learning_rate: [0.1, 0.2]}}\n")

    def call(*arguments, body="pass", norm=NORM):
        (tmp_path / "mine.py").write_text(norm.replace("{body}", body))
        given = ("debug", "grid.yaml", "--plugin", "task.py", "--plugin", "mine.py", "--data-dir", tmp_path, *arguments)
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *map(str, given)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


def test_one_run_is_made_and_nothing_stored(suite, tmp_path):
    code, out, err = suite(body='print("\\x1b[1mbuilt")')
    assert (code, err) == (0, "")
    name = "cli_fake debugged learning_rate=0.1 seed 0, the first of 2 runs (--set choose another)"
    assert out.splitlines()[0] == name
    assert out.splitlines()[1].startswith(f"no record is written; artifacts: {tmp_path}/normsuite-debug-")
    assert "\x1b[1mbuilt" in out, "prints come out as they are made"
    assert "top1       0.5" in out.splitlines()
    assert (tmp_path / "made").read_text() == "debugged 0\n"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"task.py", "mine.py", "grid.yaml", "made"}


def test_norm_task_seed_and_settings_choose_the_run(suite, tmp_path):
    code, out, _ = suite("--norm", "bn", "--task", "cli_fake", "--seed", 3, "--set", "cli_fake.learning_rate=0.3")
    assert (code, out.splitlines()[0]) == (0, "cli_fake bn seed 3")
    assert (tmp_path / "made").read_text() == "bn 3\n"
    assert "top1       0.8" in out.splitlines()
    code, out, _ = suite("--norm", "in")
    assert (code, "cli_fake in " in out) == (0, True), "a norm that a plan would skip is made all the same"


def test_a_failure_shows_all_of_its_traceback(suite):
    code, out, err = suite("--set", "cli_fake.learning_rate=0.3", body='raise KeyError("of mine")')
    assert code == 1
    lines = err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-2:] == ["KeyError: 'of mine'", "failed"]
    assert any(line.strip() == 'raise KeyError("of mine")' for line in lines), "the line of the user's file"
    assert "top1" not in out


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("raise SystemExit(0)", 1, "failed"),
        ("raise KeyboardInterrupt", 130, "stopped"),
        ('import tasks; raise tasks.Diverged("step 3")', 0, "diverged, which is a result"),
    ],
)
def test_every_other_end_has_its_traceback_and_its_code(suite, body, code, last):
    found, _, err = suite(body=body)
    assert (found, err.splitlines()[-1], "Traceback" in err) == (code, last, True)


def test_a_plugin_that_fails_at_its_import_shows_where(suite):
    code, _, err = suite(norm=LOADED)
    assert code == 2
    assert "raise LookupError" in err
    assert err.splitlines()[-1].startswith('error: plugin "mine.py": LookupError')


def test_mistakes_of_what_is_given_are_those_of_run(suite):
    code, _, err = suite("--norm", "bm")
    assert (code, 'did you mean "bn"' in err) == (2, True)
    code, _, err = suite("--set", "cli_fake.rate=1")
    assert (code, "Traceback" in err) == (2, False)


@pytest.fixture
def command(tmp_path):
    """The command of a run whose norm has a breakpoint where it is built, and the environment."""
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "mine.py").write_text(NORM.replace("{body}", "breakpoint()"))
    (tmp_path / "grid.yaml").write_text("norms: [bn]\nseeds: 0\ntasks: {cli_fake: {}}\n")
    plugins = ["--plugin", "task.py", "--plugin", "mine.py", "--data-dir", "."]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONBREAKPOINT"} | {"TERM": "dumb"}
    return [sys.executable, str(ROOT / "run_suite.py"), "debug", "grid.yaml", *plugins], environment


def test_the_debugger_reads_a_pipe(command, tmp_path):
    arguments, environment = command
    text = "p num_channels\nc\n"
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment, input=text, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "mine.py(9)__init__()" in done.stdout, "the place in the user's file"
    assert "(Pdb) 4\n(Pdb) top1       0.5\n" in done.stdout


def test_the_debugger_has_the_terminal_and_q_stops_the_run(command, tmp_path):
    import pty

    arguments, environment = command
    ours, theirs = pty.openpty()
    child = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen, asked, end = b"", 0, time.monotonic() + 120
    answers = [b"p num_channels * 1000\n", b"q\n"]
    with contextlib.suppress(OSError):  # the terminal of a process that is gone
        while time.monotonic() < end and (got := os.read(ours, 4096)):
            seen += got
            if seen.count(b"(Pdb) ") > asked and answers:
                asked += 1
                os.write(ours, answers.pop(0))
    os.close(ours)
    assert child.wait(timeout=60) == 130
    assert b"4000" in seen
    assert seen.rstrip().endswith(b"stopped")
    assert not Path(tmp_path / "runs").exists()
