"""suite.torchrun: several machines make one run, and hear of it from each other alone."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from parts.team_task import TASK
from torch import distributed as dist

import results
import suite
from suite import ranks
from suite.environment import ROOT
from suite.runner import Runner
from suite.torchrun import Place, torchrun_place

GIVEN = {
    "TORCHELASTIC_RUN_ID": "id",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "node17",
    "MASTER_PORT": "29500",
}
FIRST = Place(0, 0, 2, "", 0, "")
SECOND = Place(1, 1, 2, "", 0, "")


@pytest.fixture
def store(monkeypatch):
    """One store for all places, within this process."""
    made = dist.HashStore()
    monkeypatch.setattr(Place, "store", lambda place: made)
    return made


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "team.py"
    file.write_text(TASK)
    return file


def planned(plugin, workers=2, **options):
    config = {"norms": ["none", "bn"], "seeds": [0], "tasks": {"team": {"workers": workers, **options}}}
    return suite.plan(config, plugins=[plugin]).runs


def test_the_place_is_torchruns_and_no_other_launchers():
    assert torchrun_place(GIVEN) == Place(5, 1, 8, "node17", 29500, "normsuite/id/1")
    assert torchrun_place({"RANK": "3", "WORLD_SIZE": "8"}) is None
    with pytest.raises(ValueError, match="torchrun's environment is damaged: 'MASTER_PORT'"):
        torchrun_place({name: value for name, value in GIVEN.items() if name != "MASTER_PORT"})


def test_runs_of_another_number_of_workers_are_refused_before_anything_starts(plugin):
    runs = planned(plugin)
    FIRST.check(runs)
    FIRST.check(runs, jobs=1)
    with pytest.raises(ValueError, match=r"has started 8 workers, and 2 of 2 runs .*: --set team\.workers=8 "):
        torchrun_place(GIVEN).check(runs)
    with pytest.raises(ValueError, match=r"1 of 3 runs ask for others \(workers: 1 in team\)"):
        FIRST.check([*runs, planned(plugin, 1)[0]])
    with pytest.raises(ValueError, match="--jobs 2: torchrun's workers make one run at a time"):
        FIRST.check(runs, jobs=2)


def test_the_others_hear_of_every_run_in_its_order_until_rank_0_has_made_all(store):
    with SECOND.leading():
        pass  # of another rank: nothing
    with contextlib.suppress(KeyError), FIRST.leading():
        assert [FIRST.announce("a"), FIRST.announce("b")] == [1, 2]
        raise KeyError
    assert list(SECOND.announced(lambda: pytest.fail("there is news"))) == [(1, "a"), (2, "b")]


def test_a_run_that_was_killed_before_it_could_say_its_key_holds_nobody_up(store, monkeypatch):
    monkeypatch.setattr("suite.torchrun._LOST", 0.1)
    store.add("runs", 1)
    with FIRST.leading():
        FIRST.announce("b")
    assert list(SECOND.announced(lambda: None)) == [(2, "b")]


def test_a_run_that_is_not_planned_here_ends_the_copy_with_the_reason(store, plugin):
    FIRST.announce("f" * 24)
    with pytest.raises(
        ValueError, match=r"worker 1 on .*: rank 0 makes run f{24}, which is not planned here; config, "
    ):
        ranks.take_part(SECOND, planned(plugin), Runner())


def test_a_copy_that_is_told_to_leave_waits_for_rank_0_first(store, plugin, monkeypatch):
    """torchrun tells all copies at once, and rank 0's run has to save."""
    runs = planned(plugin)

    def told(place):
        if place.rank:  # it has begun to listen
            os.kill(os.getpid(), signal.SIGTERM)
        return store

    monkeypatch.setattr(Place, "store", told)
    monkeypatch.setattr(ranks, "_STAY", 0.3)
    with pytest.raises(KeyboardInterrupt):
        ranks.take_part(SECOND, runs, Runner())
    monkeypatch.setattr(ranks, "_STAY", 60.0)
    with FIRST.leading():
        pass
    ranks.take_part(SECOND, runs, Runner())


COPY = """
import sys
from pathlib import Path

import suite
from suite.ranks import take_part
from suite.session import Session
from suite.torchrun import torchrun_place

if __name__ == "__main__":
    folder, place = Path(sys.argv[1]), torchrun_place()
    file = folder / "team.py"
    fails = ["", "1 raises", "1 dies", "0 dies"]
    config = {"norms": ["none"], "seeds": [0], "tasks": {"team": {"workers": 2, "fails": fails}}}
    planned = suite.plan(config, plugins=[file])
    place.check(planned.runs)
    session = Session(planned, folder / "out", plugins=[file], data_dir=folder, jobs=1)
    with place.leading():
        if place.rank:
            take_part(place, planned.runs, session.runner)
        else:
            session.begin()
            session.make()
    print("rank", place.rank, "ends", flush=True)
"""


@pytest.mark.slow
def test_torchruns_workers_make_runs_and_survive_those_that_are_lost(plugin, tmp_path):
    (tmp_path / "every_rank.py").write_text(COPY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "every_rank.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["rank 0 ends", "rank 1 ends"]
    df = results.load(tmp_path / "out").set_index("option.fails")
    assert dict(df["reason"]) == {
        "": "",
        "1 raises": "worker 1: RuntimeError: of worker 1",
        "1 dies": "worker 1 was killed by SIGKILL (out of memory, or killed by hand)",
        "0 dies": "killed by SIGKILL (out of memory, or killed by hand); see output.txt",
    }
    assert set(df["environment.workers"].dropna()) == {2}
