"""The commands status and cancel, beside programs of Slurm that are scripts."""

import json
import os
import sys
import threading

import pytest
from parts import fake_slurm
from parts.fake_slurm import answers, queue_line
from parts.folders import plant, record, spec

from suite import cli
from suite.launch.places import Slurm
from suite.launch.submissions import submit

RUNS = [spec(seed=seed) for seed in range(3)]


@pytest.fixture
def suite(tmp_path, monkeypatch, capsys):
    """suite("status", ...) -> (exit code, stdout, stderr), in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Of a cluster that has one job for the folder `out`, with an element that runs and one that waits."""
    made = fake_slurm.on_path(tmp_path / "programs", monkeypatch)
    out = plant(tmp_path / "out", record(RUNS[0]))
    submit(Slurm(array="2"), ["run", "c.yaml"], out, RUNS, 2)
    rows = queue_line("NAME", "12_1"), queue_line("NAME", "12_2", "PENDING", "Priority", "")
    made.set(squeue=answers(out, *rows))
    return made


def test_status_says_what_the_folder_and_the_queue_hold(suite, programs):
    code, said, _ = suite("status", "out")
    assert (code, said.splitlines()) == (
        0,
        [
            "slurm/1: job 12, 2 elements: 1 running (n1), 1 waiting (Priority)",
            "3 runs planned: 1 ok, 2 wait in out",
        ],
    )
    code, said, _ = suite("status", "out", "--json")
    assert (code, json.loads(said)["waiting"], len(json.loads(said)["slurm"][0]["queue"])) == (0, 2, 2)


def test_without_slurm_status_shows_the_folder_and_says_what_is_missing(suite, programs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said, noted = suite("status", "out")
    assert (code, said.splitlines()[-1]) == (0, "3 runs planned: 1 ok, 2 wait in out")
    assert noted.startswith("note: what Slurm's queue holds is not known: squeue is not here: ")


def test_a_folder_that_is_none_is_a_mistake(suite, programs):
    for command in ("status", "cancel"):
        code, said, error = suite(command, "nowhere")
        assert (code, said) == (2, "")
        assert error == 'error: "nowhere": does not exist; a folder is needed\n'


def test_nothing_is_ended_without_a_word(suite, programs, monkeypatch):
    code, _, error = suite("cancel", "out")
    assert (code, programs.calls("scancel")) == (2, [])
    assert "slurm/1: job 12, 1 elements running, 1 waiting" in error
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert suite("cancel", "out")[1].endswith("nothing is ended\n")
    assert programs.calls("scancel") == []
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    assert "ended: slurm/1: job 12" in suite("cancel", "out")[1]
    assert programs.calls("scancel") == ["scancel 12"]


def test_cancel_says_where_there_is_nothing_to_end_and_where_slurm_says_no(suite, programs):
    programs.set(scancel="echo 'scancel: error: Access/permission denied' >&2; exit 1")
    code, _, error = suite("cancel", "out", "--yes")
    assert (code, error) == (2, "error: scancel ended with exit code 1: Access/permission denied\n")
    programs.set(squeue="")
    code, said, _ = suite("cancel", "out", "--yes")
    assert (code, said) == (0, "nothing to end: no Slurm job of out waits or runs\n")


def test_cancel_names_the_submissions_of_which_it_can_not_know(suite, programs, tmp_path):
    programs.set(squeue="exit 0")
    (tmp_path / "out" / "slurm" / "1" / "submission.json").write_text("{}")
    code, said, noted = suite("cancel", "out")
    assert (code, said) == (0, "nothing to end: no Slurm job of out waits or runs\n")
    assert "slurm/1/submission.json: not the note of a submission; whether a job of it goes on is not known" in noted


def test_a_pipe_is_refused_in_a_dry_run_too(suite, programs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = "norms: [bn]\nseeds: [0]\ntasks: {classification: {epochs: 1}}\n"
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,)).start()
    code, said, error = suite("run", "pipe", "--on", "slurm", "--dry-run")
    assert (code, error) == (2, "error: --on slurm: a config file is needed, which every element reads; given a pipe\n")
    assert "#SBATCH" not in said
