"""Processes that decode images: as many as asked, none left behind, and nothing of a run but its record's note shows
them."""

import os
import threading

import pytest
from parts.image_folders import make
from parts.watching import alive, until

from results.store import find_record
from suite.cli import main
from suite.engine import execute
from suite.planning import plan_config
from suite.processes import below
from suite.runner import Runner
from tasks.data import folders, prepare

OPTIONS = {
    "model": "resnet8",
    "width": 4,
    "epochs": 8,
    "batch_size": 8,
    "recalibration_images": 8,
    "augmentation": "resized_crop_flip",
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan of one run on images that are decoded while they are read, and the folder of its data."""
    place = tmp_path_factory.mktemp("place")
    root = make(place / "pets", *(f"{part}/{c}" for part in ("train", "test") for c in "ab"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 0)
        prepare(f"folder:{root}", place / "data", size=8)
    grid = {"norms": ["bn"], "seeds": [0], "tasks": {"classification": {**OPTIONS, "dataset": f"folder:{root}"}}}
    return plan_config(grid, data_dir=place / "data"), place / "data"


def test_workers_end_with_their_run_and_with_ctrl_c_and_change_only_what_a_record_says_of_them(planned, tmp_path):
    plan, data_dir = planned
    (spec,) = plan.runs
    seen, over = set(), threading.Event()

    def look():
        while not over.wait(0.005):
            seen.update(below(os.getpid()))

    def interrupt(event):
        if event.row is not None and event.row["epoch"] >= 4:
            raise KeyboardInterrupt

    def runner(workers):
        return Runner(data_dir=data_dir, folders=plan.folders, checkpoint_every=300, loader_workers=workers)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            execute([spec], runner(2), tmp_path, on_event=interrupt)
    finally:
        over.set()
        watcher.join()
    ours = {process for process in seen if process not in below(os.getpid())}
    assert len(ours) >= 3  # the run's and two that decode
    assert until(lambda: not any(alive(process) for process in ours), 10)
    assert execute([spec], runner(2), tmp_path) == {"ok": 1}
    assert execute([spec], runner(0), tmp_path / "whole") == {"ok": 1}
    stopped, whole = find_record(tmp_path, spec), find_record(tmp_path / "whole", spec)
    assert stopped.spec.key == whole.spec.key
    assert [row["train_loss"] for row in stopped.history] == [row["train_loss"] for row in whole.history]
    assert stopped.metrics["top1_recalibrated"] == whole.metrics["top1_recalibrated"]
    assert (stopped.environment["loader_workers"], whole.environment["loader_workers"]) == (2, 0)


@pytest.mark.parametrize("number", [-1, 257, 10**30])
def test_a_number_of_workers_that_makes_no_sense_is_one_line(monkeypatch, capsys, number):
    monkeypatch.setattr("sys.argv", ["run_suite.py", "run", "quick", "--loader-workers", str(number)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: --loader-workers {number}: 0 to 256 are allowed; 0 decodes in the run's own process"
    ]
