"""suite.ranks: the workers of one run. They give what one process gives, and none outlives or holds up the run."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from parts.team_task import TASK, dies
from parts.watching import alive, until

import suite
from norms.workers import Workers
from results.store import find_record
from suite import meeting, ranks
from suite.checkpoints import Checkpoints
from suite.debug import choose
from suite.engine import execute
from suite.environment import ROOT
from suite.launch.devices import devices_of
from suite.live import Live
from suite.meeting import Failure, first_cause
from suite.runner import TRACEBACK, Runner, run_one
from suite.torchrun import workers_of
from tasks.journal import Position, Unusable


@pytest.fixture
def team(tmp_path):
    """team(workers, **options) -> (spec, runner) of a run that adds up numbers."""
    file = tmp_path / "team.py"
    file.write_text(TASK)

    def planned(workers, **options):
        config = {"norms": ["none"], "seeds": [0], "tasks": {"team": {"workers": workers, **options}}}
        (spec,) = suite.plan(config, plugins=[file]).runs
        return spec, Runner(plugins=(file,), data_dir=tmp_path, checkpoint_every=3600.0)

    return planned


def log(tmp_path, rank):
    """What a worker wrote down: process, threads, folder, and a line for each part."""
    file = tmp_path / f"worker {rank}"
    return file.read_text().splitlines() if file.exists() else []


def processes(tmp_path, size):
    return [int(log(tmp_path, rank)[0]) for rank in range(size)]


def alone(team, tmp_path, **options):
    folder = tmp_path / "alone"
    folder.mkdir()
    spec, runner = team(1, **options)
    return run_one(spec, folder, lambda fraction: None, runner)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_two_workers_make_the_run_of_one_and_nothing_stays(team, tmp_path, temporary, capfd):
    """From a checkpoint that neither can use, so that both pass it over."""
    spec, runner = team(2)
    folder, said = tmp_path / "run", []
    folder.mkdir()
    checkpoints = Checkpoints(folder, spec.key, {}, said.append, lambda: 0.0)
    checkpoints.save({"rows": [], "steps": 0, "loops": {}, "results": {"parts": {}}}, Position("parts", 1, 3))
    record = run_one(spec, folder, Live(None, spec, say=said.append), runner)
    out, err = capfd.readouterr()
    assert (record.status, record.reason) == ("ok", "")
    assert [line for line in said if "can not be used" in line and line.endswith("the run begins anew")] == said
    assert len(said) == 1
    assert (record.environment["workers"], len(record.environment["worker_hosts"])) == (2, 2)
    assert "worker 0 prints" in out
    assert "worker 1" not in out + err
    assert log(tmp_path, 0)[1:] == [str(torch.get_num_threads()), str(folder), "part 0", "part 1", "part 2"]
    assert log(tmp_path, 1)[1] == str(torch.get_num_threads())
    assert Path(log(tmp_path, 1)[2]).parent == temporary
    assert log(tmp_path, 1)[3:] == ["part 0", "part 1", "part 2"]
    assert not alive(processes(tmp_path, 2)[1])
    assert list(temporary.iterdir()) == []
    assert not torch.distributed.is_initialized()
    one = alone(team, tmp_path)
    assert record.metrics["top1"] == pytest.approx(one.metrics["top1"], abs=1e-15)
    assert "workers" not in one.environment


def test_an_error_of_one_worker_is_the_runs_reason(team, tmp_path, temporary):
    spec, runner = team(2, fails="1 raises")
    record = run_one(spec, tmp_path, lambda fraction: None, runner)
    assert (record.status, record.reason) == ("failed", "worker 1: RuntimeError: of worker 1")
    assert record.artifacts == [TRACEBACK]
    text = (tmp_path / TRACEBACK).read_text()
    assert 'raise RuntimeError(f"of worker {workers.rank}")' in text
    assert "Connection closed" not in text
    assert list(temporary.iterdir()) == []
    assert not alive(processes(tmp_path, 2)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "reason", "traced"),
    [
        ("2 raises", "worker 2: RuntimeError: of worker 2", True),
        ("1 dies", "worker 1 was killed by SIGKILL (out of memory, or killed by hand)", False),
        ("2 leaves", "worker 2 ended with exit code 3 before the run was finished", False),
        ("0 raises", "RuntimeError: of worker 0", True),
    ],
)
def test_of_three_workers_the_one_that_failed_first_is_named(team, tmp_path, fails, reason, traced):
    spec, runner = team(3, fails=fails)
    record = run_one(spec, tmp_path, lambda fraction: None, runner)
    assert (record.status, record.reason) == ("failed", reason)
    assert record.artifacts == ([TRACEBACK] if traced else [])
    assert (tmp_path / TRACEBACK).exists() is traced
    assert not any(map(alive, processes(tmp_path, 3)[1:]))


@pytest.mark.slow
def test_a_worker_that_does_not_come_as_far_as_the_others_is_named(team, tmp_path, monkeypatch):
    """Rank 0 does not wait for it until the time limit of the group."""
    spec, runner = team(2)
    monkeypatch.setattr(ranks, "_live", dies)
    record = run_one(spec, tmp_path, lambda fraction: None, runner)
    assert record.reason == "worker 1 ended with exit code 7 before the run was finished"
    assert not torch.distributed.is_initialized()


def test_of_failures_the_first_counts_and_a_process_that_said_nothing_before_all():
    closed, lost = Failure(1, "RuntimeError: Connection closed by peer", "..."), Failure(3, "was killed", silent=True)
    other = Failure(2, "ValueError: wrong", "...")
    assert first_cause([other, closed]) == (other, False)
    assert first_cause([closed, other, lost]) == (lost, True)
    assert [str(closed), str(lost)] == ["worker 1: RuntimeError: Connection closed by peer", "worker 3 was killed"]
    assert str(Failure(0, "ValueError: wrong", "...")) == "ValueError: wrong"


def test_a_state_that_one_worker_alone_can_not_use_fails_the_run(monkeypatch):
    monkeypatch.setattr(meeting, "_AGREE", 0.1)
    store, _ = meeting.host_store()
    error = Unusable("made by other code")
    with pytest.raises(RuntimeError, match=r"can be used by workers \[0\], and not by worker 1: made by other code"):
        meeting.pass_over(store, Workers(1, 2), error)
    meeting.pass_over(store, Workers(0, 2), error)  # both have come
    with pytest.raises(RuntimeError, match=r"workers \[1\], and not by worker 0"):
        meeting.pass_over(store, Workers(0, 2), error)


def test_every_worker_has_a_device_of_its_own(monkeypatch):
    assert devices_of("cpu", 3) == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cuda", 2) == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match="4 workers need a CUDA device each, and 2 are visible"):
        devices_of("cuda", 4)
    with pytest.raises(ValueError, match='"cuda:1" is one, and 2 workers need one each: device "cuda"'):
        devices_of("cuda:1", 2)
    with pytest.raises(ValueError, match="on cpu or cuda"):
        devices_of("meta", 2)


def test_a_debugger_has_one_process(team):
    spec, _ = team(2)
    assert workers_of(spec) == 2
    with pytest.raises(ValueError, match=r"--set team\.workers=1 makes the run in this one"):
        choose([spec])
    assert choose([team(1)[0]])[0].task == "team"


class Going:
    """A run that the engine makes in a thread."""

    def __init__(self, spec, runner, out):
        self.counts = None
        # a daemon: a test that fails meanwhile does not hold up pytest's end
        self.thread = threading.Thread(target=self._go, args=(spec, runner, out), daemon=True)
        self.thread.start()

    def _go(self, *given):
        spec, runner, out = given
        self.counts = execute([spec], runner, out)

    def end(self):
        self.thread.join(60)
        return dict(self.counts)


@pytest.mark.slow
def test_a_run_that_is_told_to_leave_goes_on_with_all_its_workers(team, tmp_path):
    """The whole group is told, as schedulers do."""
    spec, runner = team(2, parts=4, seconds=1.0)
    out = tmp_path / "out"
    going = Going(spec, runner, out)
    assert until(lambda: "part 2" in log(tmp_path, 1), 120)
    before = processes(tmp_path, 2)
    os.killpg(before[0], signal.SIGTERM)
    assert going.end() == {"stopped": 1}
    assert until(lambda: not any(map(alive, before)))
    assert execute([spec], runner, out) == {"ok": 1}
    for rank in (0, 1):
        assert log(tmp_path, rank)[3:] in (["part 2", "part 3"], ["part 3"]), "the checkpoint's parts are not repeated"
    record = find_record(out, spec)
    one = alone(team, tmp_path, parts=4)
    assert record.metrics["top1"] == pytest.approx(one.metrics["top1"], abs=1e-15)
    assert [part["workers"] for part in record.environment["parts"]] == [2, 2]


@pytest.mark.slow
def test_no_worker_outlives_a_run_that_is_killed(team, tmp_path):
    spec, runner = team(3, seconds=3600.0)
    going = Going(spec, runner, tmp_path / "out")
    assert until(lambda: all("part 0" in log(tmp_path, rank) for rank in range(3)), 120)
    before = processes(tmp_path, 3)
    os.kill(before[0], signal.SIGKILL)
    assert going.end() == {"failed": 1}
    assert until(lambda: not any(map(alive, before)), 5)


ALONE = """
import sys
from pathlib import Path

import suite
from suite.runner import Runner, run_one

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    {settings}
    file = folder / "team.py"
    config = {{"norms": ["none"], "seeds": [0], "tasks": {{"team": {{"workers": 2, {options}}}}}}}
    (spec,) = suite.plan(config, plugins=[file]).runs
    {run}
"""


def script(tmp_path, **text):
    file = tmp_path / "script.py"
    file.write_text(ALONE.format(**text))
    around = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(file), str(tmp_path)]
    return subprocess.Popen(command, env=around, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_no_worker_outlives_a_process_without_an_engine(team, tmp_path):
    made = script(
        tmp_path,
        settings="",
        options='"seconds": 3600.0',
        run="run_one(spec, folder, print, Runner(plugins=(file,), data_dir=folder))",
    )
    try:
        assert until(lambda: all("part 0" in log(tmp_path, rank) for rank in range(2)), 120)
        before = processes(tmp_path, 2)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(before[1], number)
        assert not until(lambda: not alive(before[1]), 0.5), "it does not leave by itself"
    finally:
        made.kill()
        made.communicate()
    assert until(lambda: not any(map(alive, before)), 5)


@pytest.mark.slow
def test_a_run_that_hangs_without_a_lost_worker_is_ended_with_the_reason(team, tmp_path):
    """Rank 0 sleeps in the place of a collective that would never end."""
    made = script(
        tmp_path,
        settings="from suite import ranks; from suite.live import Live; ranks._GRACE = 0.3",
        options='"fails": "0 hangs, 1 raises"',
        run="run_one(spec, folder, Live(None, spec, trouble=lambda reason: print(reason, flush=True)), "
        "Runner(plugins=(file,), data_dir=folder))",
    )
    out, _ = made.communicate(timeout=60)
    assert out.splitlines()[-1] == "worker 1: RuntimeError: of worker 1"
    assert made.returncode == 1
    assert "of worker" in (tmp_path / TRACEBACK).read_text()
    assert not alive(processes(tmp_path, 2)[1])
