"""What a run tells while it goes: its file, its parent, trackers, and `watch`."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from results.record import RunRecord, RunSpec
from results.store import RECORD, find_record, run_folder, write_record
from suite import live, trackers
from suite.engine import execute
from suite.environment import ROOT
from suite.estimate import Remaining
from suite.live import HISTORY, Live, rows_of, telling, where
from suite.planning import plan_config
from suite.progress import Names, Progress
from suite.runner import Runner
from suite.watch import Watch
from tasks.journal import Journal, Position

ROWS = [{"epoch": float(n), "train_loss": 1 / n, "val_top1": n / 10, "seconds": 0.5} for n in (1, 2, 3, 4)]


def spec_of(seed=0, **options):
    return RunSpec(
        task="classification",
        norm="bn",
        norm_options={},
        task_options=options,
        seed=seed,
        norm_version="1",
        task_version="1",
        data_checksum="none",
        norm_label="bn",
    )


def begun(out, spec, rows=(), steps=40, **more):
    """The ears of a run that has made these rows."""
    state = {"rows": list(rows), "steps": 10 * len(rows), "loops": {}, "results": {}}
    ears = Live(out, spec, **more)
    journal = Journal(state, tell=ears.tell, steps=steps)
    run_folder(out, spec).mkdir(parents=True, exist_ok=True)
    ears.begin(journal, more.get("trackers", ()))
    return ears, journal


def made(journal, row):
    """An epoch of ten steps, as a loop tells of it."""
    done = len(journal.rows)
    journal.at(Position("training", done, 4, journal.steps_done, journal.total))
    journal.steps_done += 10
    journal.rows.append(row)
    journal.at(Position("training", done + 1, 4, journal.steps_done, journal.total), row)


# --- a run of the suite -----------------------------------------------------------------------------------------------


def plan_of(**options):
    tiny = {"width": 4, "num_classes": 2, "batch_size": 100, "max_steps": 40, "recalibration_images": 200}
    return plan_config(
        {"norms": ["bn"], "seeds": 0, "tasks": {"classification": {**tiny, "epochs": 4, **options}}}
    ).runs


def test_a_run_is_heard_watched_and_tracked_and_leaves_its_record_alone(tmp_path):
    (spec,) = plan_of()
    rows, positions, seen, lines = [], [], [], []

    def hear(event):
        if event.position is not None:
            positions.append(event.position)
        if event.row is not None:
            rows.append((event.row, event.clock))
            seen.append(rows_of(run_folder(tmp_path, spec)))
            lines.append(list(Watch(tmp_path).lines()))

    assert execute([spec], Runner(trackers=("tensorboard",)), tmp_path, on_event=hear) == {"ok": 1}
    record = find_record(tmp_path, spec)
    assert [row for row, _ in rows] == record.history
    assert len(record.history) == 4
    assert all(record.history[: len(found)] == found for found in seen)
    assert max(map(len, seen)) >= 1
    assert any(" train_loss " in line and "val_top1" in line and "/40" in line for ls in lines[1:] for line in ls)
    assert any("1 being made" in ls[-1] for ls in lines)
    assert {p["steps"] for p in positions} == {40}
    assert record.environment["clock"]["steps"] == record.environment["clock"]["total"] == rows[-1][1][0] == 40
    assert 0 < record.environment["clock"]["seconds"] < record.seconds
    left = {p.name for p in run_folder(tmp_path, spec).iterdir()}
    assert left <= {RECORD, ".claim"}
    assert list(Watch(tmp_path).lines()) == [f"1 ok in {tmp_path}"]
    scalars, texts = read_back(tmp_path, spec)
    columns = {name: [row[name] for row in record.history] for name in record.history[0]}
    for name, values in columns.items():
        assert scalars.pop(name) == [(n, torch.tensor(v).item()) for n, v in enumerate(values, 1)], name
    assert scalars == {f"metrics/{name}": [(4, torch.tensor(v).item())] for name, v in record.metrics.items()}
    assert "ok" in texts


def read_back(out, spec):
    """(tag -> [(step, value)], status) in TensorBoard's files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(out / "tracking/tensorboard/classification/bn" / spec.key))
    found.Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    texts = [
        str(make_ndarray(e.tensor_proto))
        for tag in found.Tags()["tensors"]
        if tag.startswith("status")
        for e in found.Tensors(tag)
    ]
    return scalars, " ".join(texts)


def test_the_record_of_a_killed_run_has_the_epochs_that_it_finished(tmp_path):
    (spec,) = plan_of(max_steps=4000, epochs=1000)
    rows = []

    def kill(event):
        if event.row is not None:
            rows.append(event.row)
        if event.row is not None and len(rows) == 1:
            first = json.loads((run_folder(tmp_path, spec) / HISTORY).read_bytes().partition(b"\n")[0])
            os.kill(first["process"], signal.SIGKILL)

    assert execute([spec], Runner(), tmp_path, on_event=kill) == {"failed": 1}
    record = find_record(tmp_path, spec)
    assert "SIGKILL" in record.reason
    assert record.history[: len(rows)] == rows
    assert not (run_folder(tmp_path, spec) / HISTORY).exists()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_begins_anew_with_the_rows_of_the_checkpoint(tmp_path):
    spec = spec_of()
    folder = run_folder(tmp_path, spec)
    _, journal = begun(tmp_path, spec)
    for row in ROWS[:3]:
        made(journal, row)
    assert rows_of(folder) == ROWS[:3]
    _, journal = begun(tmp_path, spec, ROWS[:1])  # the checkpoint was older
    assert rows_of(folder) == ROWS[:1]
    made(journal, {"epoch": 2.0, "train_loss": float("nan"), "val_top1": float("inf")})
    lines = (folder / HISTORY).read_text().splitlines()
    assert json.loads(lines[-1])["row"] == {"epoch": 2.0, "train_loss": None, "val_top1": None}
    assert "NaN" not in "".join(lines)
    assert rows_of(folder)[1] == {"epoch": 2.0, "train_loss": None, "val_top1": None}


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    spec, other = spec_of(), tmp_path / "other"
    other.write_text("mine")
    folder = run_folder(tmp_path, spec)
    folder.mkdir(parents=True)
    (folder / HISTORY).symlink_to(other)
    assert rows_of(folder) == []
    ears, journal = begun(tmp_path, spec)
    made(journal, ROWS[0])
    assert rows_of(folder) == ROWS[:1]
    (folder / HISTORY).unlink()
    (folder / HISTORY).symlink_to(other)
    made(journal, ROWS[1])
    ears.end(RunRecord(spec=spec, status="ok"))
    assert other.read_text() == "mine"
    assert not os.path.lexists(folder / HISTORY)


def test_a_full_disk_costs_one_line_and_the_file_comes_back_with_all_rows(tmp_path, monkeypatch):
    spec, said = spec_of(), []
    real = live.files.open_new
    _, journal = begun(tmp_path, spec, say=said.append)
    made(journal, ROWS[0])
    with monkeypatch.context() as patch:
        patch.setattr(live.files, "open_new", lambda file: Path("/dev/full").open("wb"))  # noqa: SIM115
        _, journal = begun(tmp_path, spec, say=said.append)
        made(journal, ROWS[0])
        made(journal, ROWS[1])
    assert said == [f"{HISTORY} can not be written: No space left on device"]
    assert live.files.open_new is real
    made(journal, ROWS[2])
    assert rows_of(run_folder(tmp_path, spec)) == ROWS[:3]


DAMAGED = [
    b"",
    b"\x00\xff\n{",
    b"[]\n[1]\n3\n",
    b'{"format": 1, "spec": 3, "host": 5, "process": "x", "at": [], "time": "now"}\n{"row": [1]}\n{"at": {"of": 0}}\n',
    b'{"row": {"a": "b"}}\n{"row": {"a": true}}\n{"row": {"a": 1e999}}\n{"row": {"a": 1' + b"0" * 400 + b"}}\n",
    b"[" * 100_000,
    b'{"format": 1, "process": 99999999999999999999, "host": HOST, "time": 1e300, "at": {"step": -1, "steps": 1e300}}\n'
    b'{"at": {"phase": "\x1b[2J", "done": 3, "of": 5, "unit": "epoch", "step": 1e300, "steps": 2}, "time": -1e300}\n'
    b'{"row": {"\\u001b[2J loss": 0.5}}\n',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_are_shown_as_far_as_they_go(tmp_path, content):
    folder = run_folder(tmp_path, spec_of())
    folder.mkdir(parents=True)
    (folder / HISTORY).write_bytes(content.replace(b"HOST", json.dumps(platform.node()).encode()))
    (folder / RECORD).write_bytes(content)
    assert all(not row or "loss" in "".join(row) for row in rows_of(folder))
    lines = list(Watch(tmp_path).lines())
    assert all(line.isprintable() for line in lines)
    assert "1 damaged" in lines[-1]


@pytest.mark.parametrize("make", ["link", "folder", "pipe", "huge"])
def test_what_is_no_history_is_passed_over(tmp_path, make):
    file = run_folder(tmp_path, spec_of()) / HISTORY
    file.parent.mkdir(parents=True)
    if make == "link":
        file.symlink_to("/dev/zero")
    elif make == "folder":
        file.mkdir()
    elif make == "pipe":
        os.mkfifo(file)
    else:
        with file.open("wb") as stream:
            stream.truncate(2**40)
    assert rows_of(file.parent) == []
    assert len(list(Watch(tmp_path).lines())) == (3 if make == "huge" else 1)


# --- watch ------------------------------------------------------------------------------------------------------------


def test_watch_tells_what_goes_on_from_what_was_left(tmp_path):
    running, killed, done, elsewhere = (spec_of(seed) for seed in range(4))
    _, journal = begun(tmp_path, running)
    made(journal, ROWS[0])
    for spec in (killed, done, elsewhere):
        _, journal = begun(tmp_path, spec)
        made(journal, ROWS[0])
        made(journal, ROWS[1])
        file = run_folder(tmp_path, spec) / HISTORY
        first, _, rest = file.read_text().partition("\n")
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        facts = json.loads(first) | ({"host": "other"} if spec is elsewhere else {"process": ended.pid})
        file.write_text(f"{json.dumps(facts)}\n{rest}")
    os.utime(run_folder(tmp_path, elsewhere) / HISTORY, (0, 0))
    write_record(tmp_path, RunRecord(spec=done, status="ok", metrics={"top1": 0.5}))
    watch = Watch(tmp_path)
    lines = list(watch.lines())
    assert [line.split("  ")[0] for line in lines[1:-1]].count("classification bn seed 2") == 0
    (first,) = (line for line in lines if "seed 0" in line)
    assert "epoch 2/4" in first
    assert "10/40" in first
    assert "train_loss 1  val_top1 0.1" in first
    assert "left for" in next(line for line in lines if "seed 1" in line)
    assert "silent for" in next(line for line in lines if "seed 3" in line)
    assert lines[-1].startswith("1 ok, 1 being made, 1 without a sign, 1 left by their process, to go on with in ")
    write_record(tmp_path, RunRecord(spec=killed, status="failed", reason="why"))
    (run_folder(tmp_path, done) / RECORD).unlink()
    assert list(watch.lines())[-1].startswith("1 failed, ")


def test_watch_needs_no_torch_and_ends_when_told(tmp_path):
    command = [sys.executable, "run_suite.py", "watch", str(tmp_path), "--interval", "0.1"]
    once = "import sys; sys.argv[1:] = ['watch', sys.argv[1], '--once']\nfrom suite.cli import main\n"
    once += "try:\n    main()\nfinally:\n    assert not {'torch', 'pandas'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", once, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"no run in {tmp_path}\n", "")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in a shell's background
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == [f"no run in {tmp_path}\n", "\n", f"no run in {tmp_path}\n"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)  # read on: who meets a closed pipe before the signal ends with 0
    assert process.returncode == 130


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Watch(tmp_path / "no")


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (Position("training", 2, 10), "epoch 3/10"),
        (Position("search", 0, 50), "search, epoch 1/50"),
        (Position("training", 10, 10), "after training"),
        (Position("training", 300, 2000, unit="step"), "step 300/2000"),
        (Position("attack pgd 0"), "attack pgd 0"),
        (Position("test episodes", 119, 600, unit="part"), "test episodes 120/600"),
    ],
)
def test_positions_in_words(position, words):
    assert where(live.asdict(position)) == words


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"epoch": 1, "train_loss": 2.0, "train_top1": 0.1, "val_top1": 0.5}, ["train_loss", "val_top1"]),
        ({"step": 1, "val_loss": 2.0, "seconds": 1.0}, ["val_loss"]),
        ({"epoch": 1, "learning_rate": 1.0, "a": 1.0, "b": 2.0, "c": 3.0}, ["a", "b"]),
        ({}, []),
    ],
)
def test_a_line_shows_loss_and_validation(row, shown):
    assert [name for name, _ in telling(row)] == shown


def test_the_display_says_where_a_run_stands_and_what_its_last_epoch_gave(tmp_path):
    from suite.engine import Event

    spec = spec_of()
    progress = Progress([spec], Names([spec]), {}, Remaining(1))
    progress.take(Event("started", spec))
    assert progress.note(spec.key) == ""
    at = live.asdict(Position("training", 2, 10))
    progress.take(Event("progress", spec, fraction=0.2, position=at, row={"train_loss": 0.12345, "val_top1": None}))
    progress.take(Event("progress", spec, fraction=0.3, position=at))
    assert progress.note(spec.key) == "epoch 3/10  train_loss 0.1235  val_top1 nan"
    progress.take(Event("progress", spec, position={"phase": "\x1b[2J"}, row={"loss\n": 1.0}))
    assert progress.note(spec.key) == "U+001B[2J  lossU+000A 1"
    progress.take(Event("waiting", spec, text="taken"))
    assert progress.note(spec.key) == ""


# --- trackers ---------------------------------------------------------------------------------------------------------


def tracked(tmp_path, rows, spec=None, say=print):
    ears = Live(tmp_path, spec or spec_of(rate=0.1, name=["a"], none=None), say=say)
    run_folder(tmp_path, ears.spec).mkdir(parents=True, exist_ok=True)
    journal = Journal({"rows": list(rows), "steps": 0, "loops": {}, "results": {}}, tell=ears.tell)
    ears.begin(journal, ("tensorboard",))
    return ears, journal


def test_a_run_that_goes_on_logs_no_epoch_twice(tmp_path):
    _, journal = tracked(tmp_path, [])
    for row in ROWS[:3]:
        made(journal, row)
    ears, journal = tracked(tmp_path, ROWS[:1])  # the checkpoint was older
    made(journal, ROWS[1])
    made(journal, ROWS[2])
    ears.end(RunRecord(spec=ears.spec, status="ok", metrics={"top1": 0.25}))
    scalars, _ = read_back(tmp_path, ears.spec)
    assert scalars["val_top1"] == [(n, torch.tensor(n / 10).item()) for n in (1, 2, 3)]
    assert scalars["metrics/top1"] == [(3, 0.25)]
    assert trackers.hyperparameters(ears.spec) == {
        "task": "classification",
        "norm": "bn",
        "seed": 0,
        "option.rate": 0.1,
        "option.name": '["a"]',
    }


def test_a_tracker_that_fails_costs_a_line(tmp_path, monkeypatch):
    said = []

    def fails(when):
        def begin(folder, spec):
            if when == "begin":
                raise RuntimeError("no\nserver")
            return SimpleNamespace(row=lambda number, row: 1 / 0, end=lambda record: None)

        return begin

    for when in ("begin", "row"):
        monkeypatch.setattr(trackers, "TRACKERS", {"tensorboard": ("x", fails(when))})
        ears, journal = tracked(tmp_path, [], say=said.append)
        made(journal, ROWS[0])
        made(journal, ROWS[1])
        ears.end(RunRecord(spec=ears.spec, status="ok"))
    assert said == [
        "tracker tensorboard is left out: RuntimeError: no server",
        "tracker tensorboard is left out: ZeroDivisionError: division by zero",
    ]


def test_trackers_are_checked_before_anything_is_run(monkeypatch):
    with pytest.raises(ValueError, match='unknown tracker "tensorbord"; allowed: tensorboard; did you mean'):
        trackers.check_trackers(["tensorbord"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="python -m pip install tensorboard"):
        trackers.check_trackers(["tensorboard"])
