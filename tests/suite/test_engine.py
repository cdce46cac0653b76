"""suite.engine and suite.runner: whatever a run does, it costs that run only, is recorded, and is never made twice."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.watching import alive, until

from norms.registry import load_plugin
from results.record import RunRecord, RunSpec
from results.store import RECORD, find_record, record_files, run_folder, run_lock, write_record
from suite import cli, engine
from suite.engine import execute, look, time_limit, write_skipped
from suite.environment import ROOT
from suite.output import OUTPUT
from suite.planning import plan_config
from suite.runner import TRACEBACK, Runner

PLUGIN = """
import ctypes, os, signal, sys, time, warnings
from pathlib import Path
from tasks import register_task, task_names
from tasks.base import Diverged, Options, Outcome, Setting

class FakeOptions(Options):
    mode: str = "ok"
    seconds: float = 0.0

class Fake:
    name, version, options, metrics = "engine_fake", 1, FakeOptions, ("top1", "test_loss")

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def run(self, norm, options, context):
        mode = options.mode
        with (context.data_dir / "made").open("a") as log:  # one line per run that is really made
            log.write(f"{mode} {context.seed} {os.getpid()}\\n")
        start = time.monotonic()
        while time.monotonic() < start + options.seconds:
            context.report((time.monotonic() - start) / options.seconds)
            time.sleep(0.01)
        if mode == "raise":
            raise RuntimeError("first line\\nsecond line")
        if mode == "abort":
            os.abort()
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "exit":
            os._exit(0)
        if mode == "as_if_lost":
            os._exit(75)
        if mode == "speak_and_die":
            context.report(0.5)
            os._exit(3)
        if mode == "diverge":
            raise Diverged("step 3: conv1", [{"loss": 1.0}, {"loss": float("nan")}])
        if mode == "hang":
            while True:
                pass
        if mode == "hang_in_c":
            ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock
        if mode == "leave_child":
            if os.fork() == 0:
                time.sleep(1000)
            os.abort()
        if mode == "print":
            print("said by the run", flush=True)
        if mode == "interrupt":
            raise KeyboardInterrupt
        if mode == "not_text":
            raise OSError("no file \\udcff")
        if mode in ("odd_history", "odd_evidence"):
            history = [{"loss": "low"}] if mode == "odd_history" else []
            return Outcome({"top1": 0.5, "test_loss": 1.0}, history, evidence={"data": print})
        metrics = {"top1": 0.5, "test_loss": float("nan") if mode == "nan" else 1.0}
        if mode == "extra":
            metrics["top5"] = 1.0
        if mode == "once" and not (context.data_dir / "once").exists():
            (context.data_dir / "once").touch()
            raise RuntimeError("the first time")
        return Outcome(metrics, [{"loss": 2.0}], evidence={"data": "synthetic"})

if "engine_fake" not in task_names():
    register_task(Fake())
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "fake.py"
    file.write_text(PLUGIN)
    load_plugin(file)
    return file


@pytest.fixture
def runner(plugin, tmp_path):
    return Runner(plugins=(plugin,), data_dir=tmp_path, budget="reduced", commit="abc")


def specs_of(modes, seeds=(0,), seconds=0.0):
    config = {"norms": ["bn"], "seeds": list(seeds), "tasks": {"engine_fake": {"mode": modes, "seconds": seconds}}}
    return plan_config(config).runs


def made(folder):
    """(mode, seed, pid) of every run that was begun."""
    file = folder / "made"
    return [tuple(line.split()) for line in file.read_text().splitlines()] if file.exists() else []


ENDS = {
    "ok": ("ok", ""),
    "print": ("ok", ""),
    "diverge": ("diverged", "step 3: conv1"),
    "raise": ("failed", "RuntimeError: first line second line"),
    "nan": ("failed", "test_loss = nan"),
    "extra": ("failed", "top5"),
    "abort": ("failed", "killed by SIGABRT"),
    "kill": ("failed", "killed by SIGKILL"),
    "exit": ("failed", "exit code 0 before"),
    "hang": ("failed", "time limit of 2 s"),
    "hang_in_c": ("failed", "time limit of 2 s"),
    "leave_child": ("failed", "killed by SIGABRT"),
    "interrupt": ("failed", "exit code 1 before the run was finished; see output.txt"),
    "not_text": ("failed", "no file \\udcff"),
    "odd_history": ("failed", "history.0.loss"),
    "odd_evidence": ("failed", "PydanticSerializationError"),
}


def test_every_end_of_a_run_costs_that_run_only_and_is_recorded(runner, tmp_path, capfd):
    out, events = tmp_path / "out", []
    specs = {spec.task_options["mode"]: spec for spec in specs_of(list(ENDS))}
    counts = execute(specs.values(), runner, out, jobs=4, timeout=2, on_event=events.append)
    assert counts == {"ok": 2, "diverged": 1, "failed": len(ENDS) - 3}
    assert capfd.readouterr() == ("", "")  # a run's output and tracebacks never reach the terminal
    for mode, (status, reason) in ENDS.items():
        record = find_record(out, specs[mode])
        assert (mode, record.status) == (mode, status)
        assert reason in record.reason
        assert "\n" not in record.reason
    assert {e.spec.key for e in events if e.kind == "finished"} == {spec.key for spec in specs.values()}
    ok, diverged = find_record(out, specs["ok"]), find_record(out, specs["diverge"])
    assert ok.metrics == {"top1": 0.5, "test_loss": 1.0}
    assert ok.evidence == {"data": "synthetic", "budget": "reduced"}
    assert ok.environment["commit"] == "abc"
    assert ok.environment["threads"] == 1
    assert {"torch", "torchvision", "numpy", "python", "platform", "cpu", "device", "allocator", "kernels"} <= set(
        ok.environment
    )
    # processors of one name round differently, and tables tell where cells come from several
    assert torch.backends.cpu.get_cpu_capability() in ok.environment["device_name"]
    assert diverged.history == [{"loss": 1.0}, {"loss": None}]
    assert diverged.metrics == {}
    assert "second line" in (run_folder(out, specs["raise"]) / TRACEBACK).read_text()
    assert (run_folder(out, specs["print"]) / OUTPUT).read_text() == "said by the run\n"
    assert "KeyboardInterrupt" in (run_folder(out, specs["interrupt"]) / OUTPUT).read_text()
    assert not (run_folder(out, specs["ok"]) / OUTPUT).exists()
    assert not list(out.rglob(f".{RECORD}.*"))
    pids = [pid for _, _, pid in made(tmp_path)]
    assert until(lambda: not any(alive(pid) for pid in pids))


def test_done_is_never_repeated_and_failed_only_with_retry(runner, tmp_path):
    out, specs = tmp_path / "out", specs_of(["ok", "diverge", "once"])
    assert execute(specs, runner, out, jobs=2) == {"ok": 1, "diverged": 1, "failed": 1}
    assert [look(out, spec)[0] for spec in specs] == ["done", "done", "failed"]
    assert execute(specs, runner, out, jobs=2) == {"ok": 1, "diverged": 1, "failed": 1}
    assert len(made(tmp_path)) == 3
    assert execute(specs, runner, out, jobs=2, retry=True) == {"ok": 2, "diverged": 1}
    assert [mode for mode, _, _ in made(tmp_path)].count("once") == 2
    assert len(made(tmp_path)) == 4
    assert not (run_folder(out, specs[2]) / TRACEBACK).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 99}', "foreign"])
def test_a_damaged_record_is_reported_set_aside_and_made_again(runner, tmp_path, content):
    out, events = tmp_path / "out", []
    spec, other = specs_of(["ok"], seeds=[0, 1])
    if content == "foreign":
        content = RunRecord(spec=other, status="ok", metrics={"top1": 1.0}).model_dump_json(by_alias=True).encode()
    file = run_folder(out, spec) / RECORD
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert look(out, spec) == ("damaged", None)
    assert execute([spec], runner, out, on_event=events.append) == {"ok": 1}
    (told,) = [e.text for e in events if e.kind == "damaged"]
    assert Path(told).read_bytes() == content
    assert look(out, spec)[0] == "done"


def test_two_invocations_at_once_make_every_run_once_and_both_see_all(runner, tmp_path):
    out, specs = tmp_path / "out", specs_of(["ok", "raise"], seeds=range(4), seconds=0.1)
    counts = []
    threads = [
        threading.Thread(target=lambda order=order: counts.append(execute(order, runner, out, jobs=2)))
        for order in (specs, specs[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [{"ok": 4, "failed": 4}] * 2
    assert len({(mode, seed) for mode, seed, _ in made(tmp_path)}) == len(made(tmp_path)) == 8


def test_a_run_that_another_process_left_without_a_record_is_taken_over(runner, tmp_path):
    out, events = tmp_path / "out", []
    (spec,) = specs_of(["ok"])
    held = run_lock(out, spec).acquire(timeout=0).lock

    def gone(event):
        events.append(event.kind)
        if event.kind == "waiting":
            held.release()

    assert execute([spec], runner, out, on_event=gone) == {"ok": 1}
    assert events[0] == "waiting"


def test_a_run_whose_worker_died_elsewhere_is_left_to_its_own_invocation_to_record(runner, tmp_path, monkeypatch):
    """Between a worker's death and its parent's record the run is unlocked, yet must not be made twice."""
    monkeypatch.setattr(engine, "_GRACE", 5.0)
    out = tmp_path / "out"
    (spec,) = specs_of(["ok"])
    held = run_lock(out, spec).acquire(timeout=0).lock
    died = RunRecord(spec=spec, status="failed", reason="killed by SIGABRT")

    def dies(event):
        if event.kind == "waiting":
            held.release()
            threading.Timer(0.8, write_record, [out, died]).start()

    assert execute([spec], runner, out, on_event=dies) == {"failed": 1}
    assert not made(tmp_path)


class Stuck:
    """As `run_one`: its process never comes further than reading what it is to do."""

    def __reduce__(self):
        return time.sleep, (1000,)


def test_a_process_that_never_comes_to_its_run_has_a_time_limit_too(tmp_path, plugin, monkeypatch):
    monkeypatch.setattr(engine, "_START_LIMIT", 0.5)
    (spec,) = specs_of(["ok"])
    assert execute([spec], Stuck(), tmp_path / "out", timeout=0.1) == {"failed": 1}
    assert "did not come as far as its run" in find_record(tmp_path / "out", spec).reason


def test_a_worker_killed_from_outside_costs_its_run_and_retry_completes_the_grid(runner, tmp_path):
    out, specs = tmp_path / "out", specs_of(["ok"], seeds=range(3), seconds=1.0)

    def shoot():
        until(lambda: made(tmp_path))
        os.kill(int(made(tmp_path)[0][2]), signal.SIGKILL)

    threading.Thread(target=shoot).start()
    assert execute(specs, runner, out, jobs=2) == {"ok": 2, "failed": 1}
    assert execute(specs, runner, out, jobs=2, retry=True) == {"ok": 3}
    assert len(made(tmp_path)) == 4


@pytest.mark.parametrize("timeout", [float("inf"), "inf", "1d", 30 * 24 * 3600, 1e300])
def test_a_time_limit_may_be_longer_than_the_system_can_wait(runner, tmp_path, timeout):
    assert execute(specs_of(["ok"]), runner, tmp_path / "out", timeout=timeout) == {"ok": 1}


TIMES = {"90": 90, "90s": 90, "5m": 300, " 2 h ": 7200, "1.5d": 129_600, "1e3": 1000, 0.5: 0.5, 7: 7}


def test_times_are_seconds_or_have_a_unit():
    assert {given: time_limit(given) for given in TIMES} == TIMES
    assert [time_limit(given) for given in (None, "inf", float("inf"), "infinity", "1e999")] == [None] * 5


@pytest.mark.parametrize(
    "given", [0, -1, float("nan"), "", "m", "0s", "-5m", "nan", "5 minutes", "1h30", "x" * 9999, True]
)
def test_what_is_no_time_is_refused_with_an_example(given):
    with pytest.raises(ValueError, match=r'timeout ".*": a time above 0 is needed, such as .*5m') as caught:
        time_limit(given)
    assert len(str(caught.value)) < 160


@settings(deadline=None, max_examples=200)
@given(text=st.text() | st.from_regex(r"\s?[-+]?[0-9.e_]{0,4}\s?[smhd]?\s?", fullmatch=True))
def test_any_text_is_a_time_or_is_refused_in_one_line(text):
    try:
        seconds, said = time_limit(text), ""
    except ValueError as error:
        seconds, said = None, str(error)
    assert said.startswith('timeout "') or seconds is None or 0 < seconds < float("inf")
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs_are_refused_before_anything_waits_for_them(runner, tmp_path, jobs):
    with pytest.raises(ValueError, match=f"jobs={jobs}: 1 or more"):
        execute(specs_of(["ok"]), runner, tmp_path, jobs=jobs)


def test_a_run_that_ends_as_if_its_claim_was_lost_is_not_begun_again_for_ever(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_GRACE", 0.02)
    monkeypatch.setattr(engine, "_POLL", 0.02)
    monkeypatch.setattr(engine, "MOST_LOST", 1)
    assert execute(specs_of(["as_if_lost"]), runner, tmp_path / "out") == {"failed": 1}
    assert len(made(tmp_path)) == 2


def test_a_command_that_was_stopped_beyond_a_time_limit_finds_what_has_ended_meanwhile(runner, tmp_path):
    def slow(event):  # as Ctrl-Z between two looks
        time.sleep({"started": 0.7, "progress": 1.0}.get(event.kind, 0))

    counts = execute(specs_of(["speak_and_die", "ok"]), runner, tmp_path / "out", timeout=1.2, on_event=slow)
    assert counts == {"failed": 1, "ok": 1}


def test_progress_reaches_the_caller(runner, tmp_path):
    events = []
    execute(specs_of(["ok"], seconds=1.0), runner, tmp_path / "out", on_event=events.append)
    kinds = [e.kind for e in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    fractions = [e.fraction for e in events if e.kind == "progress"]
    assert fractions == sorted(fractions)
    assert any(0 < fraction < 1 for fraction in fractions)


def test_a_norm_that_changed_after_planning_fails_its_run_instead_of_lending_its_key(runner, tmp_path):
    (spec,) = specs_of(["ok"])
    spec = RunSpec(**{**spec.model_dump(), "norm_version": "0"})
    assert execute([spec], runner, tmp_path / "out") == {"failed": 1}
    assert "changed after planning" in find_record(tmp_path / "out", spec).reason
    assert not made(tmp_path)


def test_skips_are_stored_once_and_never_replace_a_result(tmp_path, runner):
    done, failed, new = specs_of(["ok"], seeds=range(3))
    write_record(tmp_path, RunRecord(spec=done, status="ok", metrics={"top1": 1.0}))
    write_record(tmp_path, RunRecord(spec=failed, status="failed", reason="x"))
    for reason in ("first", "second", "second"):
        write_skipped(tmp_path, [(spec, reason) for spec in (done, failed, new)])
    assert [find_record(tmp_path, s).status for s in (done, failed, new)] == ["ok", "skipped", "skipped"]
    assert find_record(tmp_path, new).reason == "second"
    assert look(tmp_path, new)[0] == "todo"  # decided anew with every plan


@pytest.fixture
def command(tmp_path, plugin):
    """The arguments of a command line whose grid has one run that ends and two that hang."""
    config = tmp_path / "grid.yaml"
    config.write_text("norms: [bn]\nseeds: 0\ntasks: {engine_fake: {mode: [ok, hang, hang_in_c]}}\n")
    return [
        *("run", str(config), "--plugin", str(plugin), "--out", str(tmp_path / "out")),
        *("--data-dir", str(tmp_path), "--jobs", "2"),
    ]


def assert_stopped_and_completed_by_the_next_call(runner, folder):
    out = folder / "out"
    assert until(lambda: not any(alive(pid) for _, _, pid in made(folder)), 20)
    assert len(list(record_files(out))) == 1
    ok, hang, _ = specs_of(["ok", "hang", "hang_in_c"])
    assert [look(out, spec)[0] for spec in (ok, hang)] == ["done", "todo"]
    assert execute([ok, hang], runner, out, timeout=0.5) == {"ok": 1, "failed": 1}
    assert [mode for mode, _, _ in made(folder)].count("ok") == 1


def test_workers_go_with_a_killed_parent_and_the_next_call_completes(runner, tmp_path, command):
    parent = subprocess.Popen([sys.executable, "run_suite.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        assert until(lambda: len(made(tmp_path)) == 3, 60)
        time.sleep(0.2)  # the last one is inside its hang
    finally:
        parent.kill()
        parent.wait()
    assert_stopped_and_completed_by_the_next_call(runner, tmp_path)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_its_like_stop_workers_and_keep_finished_runs(runner, tmp_path, command, monkeypatch, capsys, how):
    monkeypatch.setattr(cli, "set_allocator", lambda: None)  # this process is the tests', not a command's
    monkeypatch.setattr(sys, "argv", ["run_suite.py", *command])

    def stop():
        until(lambda: len(made(tmp_path)) == 3, 60)
        time.sleep(0.2)
        os.kill(os.getpid(), how)

    # a shell's background job starts with SIGINT ignored, nohup's with SIGHUP, and the test would wait for ever
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    threading.Thread(target=stop).start()
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGHUP, before[1])
    assert caught.value.code == 130
    assert "1 of 3 runs were finished" in capsys.readouterr().err
    assert_stopped_and_completed_by_the_next_call(runner, tmp_path)
