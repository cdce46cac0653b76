"""A real Slurm on this machine: arrays that make a grid, are cancelled, begun again and told that time is over."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from parts.resuming import TIMED
from parts.watching import until
from PIL import Image

import results
import suite
from results.store import find_record, record_files, run_folder
from suite.environment import ROOT
from suite.launch import standing
from suite.launch.places import read_place
from suite.launch.submissions import in_queue, submit

pytestmark = pytest.mark.cluster

TASK = """
import time
from tasks import register_task, task_names
from tasks.base import Options, Outcome, Setting

class NapOptions(Options):
    seconds: float = 0.0

class Nap:
    name, version, options, metrics = "nap", 1, NapOptions, ("top1",)

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def run(self, norm, options, context):
        time.sleep(options.seconds)
        return Outcome({"top1": context.seed / 100}, evidence={"data": "synthetic"})

if "nap" not in task_names():
    register_task(Nap())
"""


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """Slurm, for all tests of this file; left out where nobody may start one."""
    if os.geteuid() != 0 or shutil.which("bash") is None:
        pytest.fail("a Slurm can be started by root alone; `make test` has the tests that need none")
    folder, recipe = tmp_path_factory.mktemp("slurm"), str(Path(__file__).parent / "slurm.sh")
    out = folder / "answer"  # no pipe, since Slurm's processes would hold it open
    with out.open("wb") as stream:
        subprocess.run(["bash", recipe, "start", str(folder)], stdout=stream, check=True, timeout=300)
    os.environ["SLURM_CONF"] = out.read_text().strip().rpartition("=")[2]
    yield
    subprocess.run(["bash", recipe, "stop", str(folder)], check=True, timeout=90)
    del os.environ["SLURM_CONF"]


class Grid:
    """A config in a folder of its own, which arrays make."""

    def __init__(self, folder, config, data_dir="data"):
        self.folder, self.out, self.data_dir = folder, folder / "out", data_dir
        (folder / "nap.py").write_text(TASK)
        (folder / "c.yaml").write_text(config)
        os.chdir(folder)
        self.plan = suite.plan("c.yaml", data_dir=data_dir)

    def submit(self, place="slurm:array=2"):
        """The number of the job."""
        done = {file.parent.name for file in record_files(self.out)} if self.out.exists() else set()
        left = sum(spec.key not in done for spec in self.plan.runs)
        words = ["run", "c.yaml", "--out", "out", "--data-dir", str(self.data_dir), "--on", place]
        _, noted, _ = submit(read_place(place).options, words, self.out, self.plan.runs, left)
        return noted.job

    def records(self, out=None):
        return [find_record(out or self.out, spec) for spec in self.plan.runs]

    def queue(self):
        return [element for _, elements in in_queue(self.out).values() for element in elements]

    def printed(self):
        return "".join(file.read_text() for file in sorted(self.out.glob("slurm/*/*.out")))

    def ended(self, seconds):
        """Wait until nothing of the folder is in the queue."""
        assert until(lambda: not self.queue(), seconds), self.printed()

    def running(self, elements=1):
        assert until(lambda: sum(e.state == "RUNNING" for e in self.queue()) == elements, 30), self.printed()


NAPS = 'norms: [bn, gn]\nseeds: "0-{last}"\nplugins: [nap.py]\ntasks: {{nap: {{seconds: {seconds}}}}}\n'


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Makes a grid of naps."""
    monkeypatch.chdir(tmp_path)
    return lambda last=2, seconds=0.2: Grid(tmp_path, NAPS.format(last=last, seconds=seconds))


def slurm(*arguments):
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout


def command(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "run_suite.py"), *words], capture_output=True, text=True, timeout=120, check=False
    )


def equal(here, there):
    """Two records, but for times and where they were made."""
    metrics = [{k: v for k, v in each.metrics.items() if k not in TIMED} for each in (here, there)]
    history = [[{k: v for k, v in row.items() if k not in TIMED} for row in each.history] for each in (here, there)]
    return (
        here.spec == there.spec
        and here.status == there.status
        and metrics[0] == metrics[1]
        and history[0] == history[1]
    )


def test_an_array_makes_the_grid_and_its_records_are_those_of_this_machine(grid):
    naps = grid()
    naps.submit()
    naps.ended(90)
    assert command("run", "c.yaml", "--out", "here").returncode == 0
    assert all(equal(a, b) for a, b in zip(naps.records(), naps.records(naps.folder / "here"), strict=True))
    found = standing.standing(naps.out)
    assert [*standing.lines(found)][-1].startswith("6 runs planned: 6 ok, 0 wait")
    assert naps.printed().count("leaves with exit code 0") == 2
    assert len(results.load(naps.out)) == 6


def test_a_cancelled_element_costs_nothing_and_the_same_command_again_does_the_rest(grid):
    naps = grid(last=5, seconds=1.0)
    job = naps.submit()
    naps.running(2)
    assert until(lambda: len(list(record_files(naps.out))) > 1, 60), naps.printed()
    slurm("scancel", f"{job}_1")
    assert until(lambda: len(naps.queue()) == 1, 30)
    time.sleep(2)
    assert [e.index for e in naps.queue()] == [2]  # the cancelled one stays ended
    slurm("scancel", job)
    naps.ended(30)
    assert None in naps.records()
    again = naps.submit()
    assert again != job
    naps.ended(90)
    assert [record.status for record in naps.records()] == ["ok"] * 12
    assert len(list(record_files(naps.out))) == 12


def test_one_that_slurm_begins_again_goes_on(grid):
    naps = grid(last=2, seconds=1.0)
    job = naps.submit("slurm:array=1")
    naps.running()
    assert until(lambda: len(list(record_files(naps.out))) > 0, 60), naps.printed()
    slurm("scontrol", "requeue", f"{job}_1")
    assert until(lambda: [e.state for e in naps.queue()] == ["PENDING"], 30), naps.printed()
    assert naps.queue()[0].restarts == 1
    said = [*standing.lines(standing.standing(naps.out))]
    assert any("1 waiting (BeginTime 20" in line and "1 of them begun again" in line for line in said)
    slurm("scontrol", "update", f"jobid={job}_1", "StartTime=now")
    naps.ended(90)
    assert [record.status for record in naps.records()] == ["ok"] * 6


SMALL = "model: resnet8, width: 4, batch_size: 8, recalibration_images: 8, augmentation: crop_flip"


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A grid of one training of some twenty seconds."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / "pets" / part / label).mkdir(parents=True)
            for i in range(20):
                pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / label / f"{i}.png")
    from tasks.data import prepare

    prepare(f"folder:{tmp_path / 'pets'}", tmp_path / "data", size=8)
    options = f"{{{SMALL}, epochs: 150, dataset: 'folder:{tmp_path / 'pets'}'}}"
    return Grid(tmp_path, f"norms: [bn]\nseeds: [0]\ntasks: {{classification: {options}}}\n")


def test_a_notice_makes_a_checkpoint_and_the_element_goes_on_from_it(training):
    job = training.submit("slurm:array=1")
    (run,) = training.plan.runs
    history = run_folder(training.out, run) / "history.jsonl"
    assert until(lambda: history.exists() and history.read_text().count("\n") > 10, 90), training.printed()
    now = standing.standing(training.out)
    assert [(seen.state, bool(seen.host), seen.row["epoch"] > 5) for seen in now.runs] == [("runs", True, True)]
    assert "epoch " in next(line for line in standing.lines(now) if line.startswith("classification"))
    slurm("scancel", "--batch", "--signal=USR1", f"{job}_1")
    assert until(lambda: [e.state for e in training.queue()] == ["PENDING"], 40), training.printed()
    assert (run_folder(training.out, run) / "checkpoint.pt").exists()
    assert training.records() == [None]
    slurm("scontrol", "update", f"jobid={job}_1", "StartTime=now")
    training.ended(120)
    (record,) = training.records()
    assert record.status == "ok"
    assert len(record.environment["parts"]) == 2
    assert command("run", "c.yaml", "--out", "here").returncode == 0
    assert equal(record, training.records(training.folder / "here")[0])


def test_status_and_cancel_from_the_command_line(grid):
    naps = grid(last=9, seconds=5.0)
    naps.submit()
    naps.running(2)
    seen = command("status", "out")
    assert seen.returncode == 0
    assert "2 running (localhost)" in seen.stdout
    assert command("cancel", "out").returncode == 2  # nobody is there to be asked
    ended = command("cancel", "out", "--yes")
    assert (ended.returncode, ended.stdout.count("ended: slurm/1")) == (0, 1)
    naps.ended(40)
    assert "nothing to end" in command("cancel", "out", "--yes").stdout
    assert naps.records().count(None) > 10  # they wait for the same command again


def test_slurms_own_refusal_is_shown(grid):
    naps = grid()
    with pytest.raises(ValueError, match="sbatch refuses: invalid partition specified: nope"):
        naps.submit("slurm:partition=nope")
    assert standing.standing(naps.out).submitted == {}
