"""Runs that are told to leave, or are killed: the same command goes on with them, and nothing shows that it was so."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from parts.resuming import TIMED
from parts.watching import alive, until
from PIL import Image

from norms.registry import load_plugin
from results.store import find_record, run_folder
from suite.checkpoints import BEFORE, NEWEST, found
from suite.engine import execute, look
from suite.environment import ROOT
from suite.live import HISTORY
from suite.output import OUTPUT
from suite.planning import Plan, plan_config
from suite.processes import below
from suite.progress import Names
from suite.runner import Runner
from suite.status import Status, describe
from tasks.data import prepare

SMALL = {"model": "resnet8", "width": 4, "epochs": 30, "batch_size": 8, "recalibration_images": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the prepared data set pets/."""
    folder, draw = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "ab":
            (folder / "pets" / part / label).mkdir(parents=True)
            for i in range(20):
                image = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(folder / "pets" / part / label / f"{i}.png")
    prepare(f"folder:{folder / 'pets'}", folder / "data", size=8)
    return folder


def grid(place):
    options = {**SMALL, "dataset": f"folder:{place / 'pets'}", "augmentation": "crop_flip"}
    return {"norms": ["cbn"], "seeds": [0], "tasks": {"classification": options}}


@pytest.fixture(scope="module")
def classified(place):
    """(spec, runner, what an uninterrupted run gives)."""
    planned = plan_config(grid(place), data_dir=place / "data")
    runner = Runner(data_dir=place / "data", folders=planned.folders, checkpoint_every=300)
    (spec,) = planned.runs
    assert execute([spec], runner, place / "whole") == {"ok": 1}
    assert [path.name for path in run_folder(place / "whole", spec).iterdir() if path.suffix] == ["record.json"]
    return spec, runner, results(place / "whole", spec)


def results(out, spec):
    """What must be equal: everything but time, memory, and where it was made."""
    record = find_record(out, spec)
    history = [{k: v for k, v in row.items() if k not in TIMED} for row in record.history]
    return record.status, {k: v for k, v in record.metrics.items() if k not in TIMED}, history, record.evidence


class After:
    """Hears a grid's events; does something once, when so many epochs of a run are finished."""

    def __init__(self, epochs=-1, action=None):
        self.left, self.action, self.events = epochs, action, []

    def __call__(self, event):
        self.events.append(event)
        self.left -= event.row is not None
        if not self.left:
            self.left = -1
            self.action(event.spec)

    def said(self, kind):
        return [event.text for event in self.events if event.kind == kind and event.text]


def worker_of(out, spec):
    return json.loads((run_folder(out, spec) / HISTORY).read_text().partition("\n")[0])["process"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGINT to the grid"])
def test_a_run_that_is_told_to_leave_goes_on_to_the_same_record(classified, tmp_path, number):
    spec, runner, whole = classified
    if number.endswith("grid"):
        tell, before = After(10, lambda spec: os.kill(os.getpid(), signal.SIGINT)), signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        try:
            with pytest.raises(KeyboardInterrupt):
                execute([spec], runner, tmp_path, on_event=tell)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)
    else:
        tell = After(10, lambda spec: os.kill(worker_of(tmp_path, spec), signal.Signals[number]))
        assert execute([spec], runner, tmp_path, on_event=tell) == {"stopped": 1}
    note = found(run_folder(tmp_path, spec), spec.key)
    assert tell.said("stopped") == [note.origin]
    assert 10 <= note.position["done"] < 30
    assert look(tmp_path, spec) == ("todo", None)
    assert not (run_folder(tmp_path, spec) / OUTPUT).exists()

    tell = After()
    assert execute([spec], runner, tmp_path, on_event=tell) == {"ok": 1}
    assert tell.said("progress") == [note.origin]
    assert not tell.said("note")
    assert results(tmp_path, spec) == whole
    record = find_record(tmp_path, spec)
    assert [part["until"] for part in record.environment["parts"]] == [note.text, "the end"]
    assert record.seconds == pytest.approx(sum(part["seconds"] for part in record.environment["parts"]), abs=0.5)
    assert not list(run_folder(tmp_path, spec).glob("*checkpoint*"))


def test_a_killed_run_is_failed_and_retry_goes_on_from_its_last_checkpoint(classified, tmp_path):
    spec, runner, whole = classified
    runner = Runner(**{**vars(runner), "checkpoint_every": 0.02})
    tell = After(10, lambda spec: os.kill(worker_of(tmp_path, spec), signal.SIGKILL))
    assert execute([spec], runner, tmp_path, on_event=tell) == {"failed": 1}
    folder = run_folder(tmp_path, spec)
    (folder / NEWEST).write_bytes((folder / NEWEST).read_bytes()[:-3000])
    (folder / f".{NEWEST}.deadbeef.1.abcd").write_bytes(b"half")
    assert found(folder, spec.key).position["done"] > 0
    tell = After()
    assert execute([spec], runner, tmp_path, retry=True, on_event=tell) == {"ok": 1}
    (line,) = tell.said("note")
    assert line.endswith("; the one before it is read")
    assert results(tmp_path, spec) == whole
    assert not list(folder.glob("*checkpoint*"))


def test_what_a_task_can_not_use_falls_back(classified, tmp_path):
    """Checkpoints of another network: whole files, with the right key."""
    import torch

    from suite.checkpoints import Note, write

    spec, runner, whole = classified
    state = {"rows": [], "steps": 1, "loops": {"training": {"ends": [1]}}, "results": {}}
    run_folder(tmp_path, spec).mkdir(parents=True)
    for name in (NEWEST, BEFORE):
        write(run_folder(tmp_path, spec) / name, state | {"w": torch.zeros(3)}, Note(spec.key, {}, "epoch 2 of 9", 1.0))
    tell = After()
    assert execute([spec], runner, tmp_path, on_event=tell) == {"ok": 1}
    first, second = tell.said("note")
    assert "can not be used: training: its epochs end after [1] steps" in first
    assert first.endswith("the one before it is read")
    assert second.endswith("the run begins anew")
    assert results(tmp_path, spec) == whole
    assert "parts" not in find_record(tmp_path, spec).environment


# ---------------------------------------------------------------- odd moments

PLUGIN = """
import os, signal, sys, time
import torch
from tasks import register_task, task_names
from tasks.base import Options, Outcome, Setting
from tasks.data.stream import Drawn
from tasks.loop import Loop

class LeavingOptions(Options):
    mode: str = "plain"

def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)

class Leaving:
    name, version, options, metrics = "leaving", 1, LeavingOptions, ("top1",)

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def run(self, norm, options, context):
        mode, net = options.mode, torch.nn.Linear(2, 1)
        again = bool(context.journal.rows)
        draws = context.generator("draws")
        if mode == "before" and not (context.data_dir / "once").exists():
            (context.data_dir / "once").touch()
            tell()
        if mode == "hang":
            (context.data_dir / "hangs").write_text(str(os.getpid()))
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            time.sleep(1000)
        if mode == "saving":
            import suite.checkpoints as checkpoints
            write = checkpoints.write
            def interrupted(*arguments):
                tell(), tell(signal.SIGUSR1)
                write(*arguments)
                tell()
            checkpoints.write = interrupted
        if mode == "recording":
            import suite.launch.process as worker
            write = worker.write_record
            def interrupted(*arguments):
                tell()
                file = write(*arguments)
                tell(signal.SIGUSR1)
                return file
            worker.write_record = interrupted
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        loop = Loop(context, "training", ends=[4, 8, 12], rates={optimizer: lambda at: 0.1}, keeps={"net": net})
        for epoch in loop.epochs():
            for step, x in epoch.steps(Drawn(lambda: torch.randn(4, 2, generator=draws))):
                if mode == "child" and step.number == 1:
                    reads, writes = os.pipe()
                    child = os.fork()
                    if not child:
                        os.write(writes, b"forked")  # before that Python forgets a signal
                        time.sleep(1000)
                    os.read(reads, 6)
                    os.kill(child, signal.SIGTERM)
                    assert os.waitpid(child, 0)[1] == signal.SIGTERM
                if step.number == 6 and not again and mode in ("plain", "saving", "twice", "swallow", "convert"):
                    if mode != "twice":
                        tell()
                    else:
                        for _ in range(5):
                            tell(), tell(signal.SIGUSR1)
                    assert context.journal.leaving, "within a step the run goes on"
                with step:
                    optimizer.zero_grad()
                    loss = net(x).square().mean()
                    loss.backward()
                    optimizer.step()
                step.saw(4, 0, train_loss=loss.detach())
            if epoch.number == 2 and not again and mode in ("except", "between", "broken"):
                try:
                    tell()
                    time.sleep(1000)
                except Exception:
                    raise AssertionError("it is no Exception")
                except BaseException:
                    if mode == "broken":
                        raise RuntimeError("of a library")
                    if mode == "between":
                        raise
        return Outcome({"top1": float(net.weight.detach().sum())}, context.journal.rows)

if "leaving" not in task_names():
    register_task(Leaving())
"""

LEFT = {
    "plain": "from epoch 2 of 3",
    "saving": "from epoch 2 of 3",
    "twice": "from epoch 2 of 3",
    "between": "from epoch 2 of 3",
    "except": "from epoch 2 of 3",
    "broken": "from epoch 2 of 3",
    "before": "from the start",
}
"""Where runs that are told to leave in odd moments go on."""
STAYED = ("recording", "child")
"""Those that only their record, or their child, was told about."""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "leaves.py"
    file.write_text(PLUGIN)
    load_plugin(file)
    return file


def odd(modes):
    return plan_config({"norms": ["bn"], "seeds": [0], "tasks": {"leaving": {"mode": list(modes)}}}).runs


def test_signals_at_odd_moments_neither_break_a_run_nor_its_record(plugin, tmp_path):
    (tmp_path / "data").mkdir()
    runner, specs = Runner(plugins=(plugin,), data_dir=tmp_path / "data", checkpoint_every=1e9), odd([*LEFT, *STAYED])
    told = {}

    def tell(event):
        if event.kind in ("stopped", "finished"):
            told[event.spec.task_options["mode"]] = event.text if event.kind == "stopped" else event.record.reason
        assert event.kind != "note", event.text

    assert execute(specs, runner, tmp_path / "out", jobs=4, on_event=tell) == {"stopped": len(LEFT), "ok": len(STAYED)}
    assert told == {**LEFT, **dict.fromkeys(STAYED, "")}
    assert execute(specs, runner, tmp_path / "out", jobs=4) == {"ok": len(specs)}
    made = [find_record(tmp_path / "out", spec) for spec in specs]
    assert len({record.metrics["top1"] for record in made}) == 1
    losses = {tuple(row["train_loss"] for row in record.history) for record in made}
    assert len(losses) == 1
    assert len(losses.pop()) == 3


# ---------------------------------------------------------------- the command


def command(place, out, *options):
    config = place / "grid.yaml"
    config.write_text(json.dumps(grid(place)))
    where = ("--data-dir", str(place / "data"), "--out", str(out))
    return [sys.executable, "run_suite.py", "run", str(config), *where, *options]


def rows(out, spec):
    file = run_folder(out, spec) / HISTORY
    return file.read_text().count('{"row"') if file.exists() else 0


@pytest.mark.parametrize(
    ("how", "whom"),
    [
        ("SIGTERM", "driver"),
        *(
            pytest.param(how, whom, marks=pytest.mark.slow)
            for how, whom in [
                *((how, "driver") for how in ("SIGUSR1", "SIGINT", "SIGHUP", "SIGKILL")),
                *((how, "all") for how in ("SIGTERM", "SIGUSR1")),
            ]
        ),
    ],
)
def test_the_same_command_goes_on_whatever_ended_it(classified, place, tmp_path, how, whom):
    """All: the grid, its fork server and its workers at once, as a scheduler signals."""
    spec, _, whole = classified
    arguments, number = command(place, tmp_path, "--checkpoint-every", "0.05s"), signal.Signals[how]
    parent = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert until(lambda: rows(tmp_path, spec) >= 8, 60)
        worker, start = worker_of(tmp_path, spec), time.monotonic()
        for process in (*(below(parent.pid) if whom == "all" else ()), parent.pid):
            os.kill(process, number)
        assert until(lambda: not alive(worker), 5)
        assert time.monotonic() - start < 5
        said, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
    note = found(run_folder(tmp_path, spec), spec.key)
    assert look(tmp_path, spec) == ("todo", None)
    if how == "SIGKILL":
        assert parent.returncode == -signal.SIGKILL
    else:
        assert parent.returncode == 130
        name = f"classification cbn seed 0 {note.origin}"
        line = f"stopped: 0 of 1 runs were finished and are kept; the same command goes on: {name}"
        assert errors == f"\n{line}\n"
        assert f"stopped: classification cbn seed 0, which goes on {note.origin}" in said
    shown = [*describe(Status(Plan([spec], [], "reduced", 1), tmp_path, retry=False), Names([spec]))]
    assert shown[1].endswith(f"1 to do ({note.origin})")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"going on: classification cbn seed 0 {note.origin}" in lines
    assert results(tmp_path, spec) == whole


def test_a_second_signal_ends_runs_that_do_not_leave(plugin, tmp_path):
    (tmp_path / "data").mkdir()
    (spec,) = odd(["hang"])
    runner = Runner(plugins=(plugin,), data_dir=tmp_path / "data", checkpoint_every=1e9)

    def interrupt():
        assert until(lambda: (tmp_path / "data" / "hangs").exists())
        for pause in (0.0, 0.7):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            execute([spec], runner, tmp_path / "out")
        assert time.monotonic() - start < 8
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert not alive(int((tmp_path / "data" / "hangs").read_text()))
    assert look(tmp_path / "out", spec) == ("todo", None)
