"""Checkpoints on disk, and runs in processes that are told to leave or killed: the next one goes on from them."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from norms.registry import norm_info, resolve_norm_options
from results.record import RunSpec, read_record, record_files
from suite import checkpoints
from suite.checkpoints import BEFORE, NEWEST, Checkpoints, Unreadable, found, read, read_note
from suite.cli import app
from suite.live import Live
from suite.runner import Runner, run_one
from tasks import get_task, task_version
from tasks.journal import Interrupted, Position

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
TIMED = ("seconds", "step_seconds", "peak_memory_mb")
OPTIONS = {"model": "resnet8", "width": 4, "epochs": 4, "max_steps": 44, "batch_size": 100, "num_classes": 2}
CONFIG = f"norms: [bn]\nseeds: 0\ntasks:\n  classification: {json.dumps(OPTIONS | {'recalibration_images': 200})}\n"


def spec_of(**options):
    task = get_task("classification")
    model = task.options(**(OPTIONS | {"recalibration_images": 200} | options))
    return RunSpec(
        task="classification",
        norm="bn",
        norm_options=resolve_norm_options("bn", {}, {}),
        task_options=model.model_dump(mode="json"),
        seed=0,
        norm_version=str(norm_info("bn").version),
        task_version=task_version("classification"),
        data_checksum="0",
    )


def timeless(record):
    metrics = {k: v for k, v in record.metrics.items() if k not in TIMED}
    return record.status, metrics, [{k: v for k, v in row.items() if k not in TIMED} for row in record.history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of a run that nothing interrupts."""
    torch.set_num_threads(1)
    return run_one(spec_of(), tmp_path_factory.mktemp("whole"), lambda fraction: None, Runner())


class Telling(Live):
    """Tells its run to leave after some epochs, and keeps what the user is told."""

    def __init__(self, after=None):
        self.lines, self.after = [], after
        super().__init__(None, spec_of(), say=self.lines.append)

    def tell(self, position, row=None):
        super().tell(position, row)
        if row is not None and row["epoch"] == self.after:
            self.leave()


def stopped_in(folder, after=2, every=1e9):
    live = Telling(after)
    with pytest.raises(Interrupted):
        run_one(spec_of(), folder, live, Runner(checkpoint_every=every))
    return live


def made(folder):
    live = Telling()
    return run_one(spec_of(), folder, live, Runner(checkpoint_every=1e9)), live.lines


def test_a_run_that_was_told_to_leave_goes_on_and_says_where_it_was_made(tmp_path, whole):
    stopped_in(tmp_path)
    note = found(tmp_path, spec_of().key)
    assert note.text == "epoch 3 of 4"
    record, lines = made(tmp_path)
    assert timeless(record) == timeless(whole)
    assert lines == []
    assert [part["until"] for part in record.environment["parts"]] == ["epoch 3 of 4", "the end"]
    assert record.seconds == pytest.approx(sum(part["seconds"] for part in record.environment["parts"]), abs=0.5)
    assert "parts" not in whole.environment


def test_a_run_that_ends_sooner_writes_none(tmp_path):
    made(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == []


def damage(kind, file):
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("no checkpoint")
    elif kind == "link":
        file.rename(file.with_name("other"))
        file.symlink_to("other")
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "torch":
        file.unlink()
        torch.save({"weights": torch.ones(2)}, file)
    elif kind == "key":
        state, note = read(file, spec_of().key)
        checkpoints.write(file, state, checkpoints.Note(**(vars(note) | {"key": "0" * 24})))
    elif kind == "state":
        _, note = read(file, spec_of().key)
        checkpoints.write(file, {"rows": "none"}, note)
    elif kind == "shapes":
        state, note = read(file, spec_of().key)
        state["loops"]["training"]["keeps"]["net"] = {}
        checkpoints.write(file, state, note)
    elif kind == "code":

        class Evil:
            def __reduce__(self):
                return (Path(file.with_name("executed")).touch, ())

        _, note = read(file, spec_of().key)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"rows": Evil()}))
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/normsuite.json", json.dumps(vars(note)))


KINDS = ["truncated", "flipped", "empty", "text", "link", "folder", "torch", "key", "state", "shapes", "code"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_costs_a_line_and_the_run_starts_anew(kind, tmp_path, whole):
    stopped_in(tmp_path)
    damage(kind, tmp_path / NEWEST)
    record, lines = made(tmp_path)
    assert timeless(record) == timeless(whole)
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "checkpoint" in lines[0]
    assert "parts" not in record.environment
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["truncated", "shapes"])
def test_behind_a_damaged_checkpoint_stands_the_one_before(kind, tmp_path, whole):
    stopped_in(tmp_path, 1)
    (tmp_path / NEWEST).rename(tmp_path / "first")
    stopped_in(tmp_path, 3)
    (tmp_path / "first").rename(tmp_path / BEFORE)
    damage(kind, tmp_path / NEWEST)
    record, lines = made(tmp_path)
    assert timeless(record) == timeless(whole)
    assert len(lines) == 1
    assert [part["until"] for part in record.environment["parts"]] == ["epoch 2 of 4", "the end"]


def test_the_newest_takes_its_place_in_one_step_and_the_one_before_stays(tmp_path):
    saved = Checkpoints(tmp_path, "k", {"torch": "2"}, print, lambda: 1.0)
    for number in (1, 2, 3):
        saved.save({"number": number}, Position("training", number, 9))
    states = [read(tmp_path / name, "k")[0]["number"] for name in (NEWEST, BEFORE)]
    assert states == [3, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == [BEFORE, NEWEST]
    with pytest.raises(Unreadable, match="of another run"):
        read_note(tmp_path / NEWEST, "other")


def test_a_full_disk_in_the_middle_of_a_checkpoint_costs_a_line_and_no_run(tmp_path, whole, monkeypatch):
    stopped_in(tmp_path, 1)
    before = (tmp_path / NEWEST).read_bytes()
    real = torch.save

    def full(state, stream):
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    live = stopped_in(tmp_path, 3)
    assert live.lines == [f"no checkpoint at epoch 4 of 4: {os.strerror(errno.ENOSPC)}"]
    assert (tmp_path / NEWEST).read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [NEWEST]
    monkeypatch.setattr(torch, "save", real)
    assert timeless(made(tmp_path)[0]) == timeless(whole)


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(CONFIG.replace('"max_steps": 44', '"max_steps": 150').replace('"epochs": 4', '"epochs": 15'))
    return file


def command(config, out, *more):
    return [sys.executable, str(ROOT / "run_suite.py"), "run", str(config), "--out", str(out), "--jobs", "1", *more]


def epochs_of(out):
    """Rows of the one run that goes on in a folder."""
    for file in out.glob("runs/*/*/*/history.jsonl"):
        return file.read_text().count('"row"')
    return 0


def started(config, out, *more):
    """A grid in a process of its own whose run has finished two epochs; its process, and the worker's number."""
    process = subprocess.Popen(
        command(config, out, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while epochs_of(out) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first = json.loads(next(iter(out.glob("runs/*/*/*/history.jsonl"))).read_text().splitlines()[0])
    return process, first["process"]


def only_record(out):
    (file,) = record_files(out)
    return read_record(file)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    subprocess.run(command(config, out), check=True, capture_output=True, cwd=ROOT, timeout=300)
    return timeless(only_record(out))


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("the driver", signal.SIGTERM),
        ("the worker", signal.SIGUSR1),
        pytest.param("the driver", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("the driver", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("the worker", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_grid_that_is_told_to_leave_goes_on_where_it_was(whom, number, config, uninterrupted, tmp_path):
    process, worker = started(config, tmp_path)
    os.kill(process.pid if whom == "the driver" else worker, number)
    told = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert whom == "the worker" or time.monotonic() - told < 20
    assert "stopped: classification bn seed 0, which goes on from epoch " in output
    assert not list(record_files(tmp_path))
    shown = CliRunner().invoke(app, ["run", str(config), "--out", str(tmp_path), "--dry-run"])
    assert "1 to do (from epoch " in shown.output
    again = subprocess.run(command(config, tmp_path), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on: classification bn seed 0 from epoch " in again.stdout
    record = only_record(tmp_path)
    assert timeless(record) == uninterrupted
    assert len(record.environment["parts"]) == 2
    assert not list(tmp_path.glob("runs/*/*/*/checkpoint*"))


def test_what_kill_9_stops_goes_on_from_the_last_checkpoint(config, uninterrupted, tmp_path):
    process, _ = started(config, tmp_path, "--checkpoint-every", "0.05s")
    process.kill()
    process.communicate()
    (folder,) = tmp_path.glob("runs/*/*/*")
    assert (folder / NEWEST).is_file()
    again = subprocess.run(command(config, tmp_path), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert "going on: " in again.stdout
    assert timeless(only_record(tmp_path)) == uninterrupted
    assert sorted(file.name for file in folder.iterdir()) == [".lock", "record.json"]
