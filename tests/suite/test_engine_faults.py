"""suite.engine where folders are odd, the fork server is killed, and runs leave things behind: it costs that run only.

Each claim: the grid goes on, the run is recorded or named with path and reason, and nothing of it is left.
"""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver, process
from pathlib import Path

import pytest
from parts.watching import alive, until

from norms.registry import load_plugin
from results.record import RunRecord
from results.store import RECORD, find_record, run_folder, run_lock, set_aside, write_record, write_versions
from suite import engine, output
from suite.engine import execute, look, write_skipped
from suite.environment import ROOT
from suite.launch import server
from suite.output import OUTPUT
from suite.planning import plan_config
from suite.runner import TRACEBACK, Runner

PLUGIN = """
import atexit, multiprocessing, multiprocessing.util, os, signal, subprocess, sys, threading, time
from tasks import register_task, task_names
from tasks.base import Options, Outcome, Setting

class FaultOptions(Options):
    mode: str = "ok"

class Hostile(Exception):
    def __str__(self):
        raise RuntimeError("no message")

class Stuck:
    def write(self, text):
        return len(text)
    def flush(self):
        time.sleep(1000)

def note(context):
    with (context.data_dir / "left").open("a") as log:
        log.write(f"{os.getpid()}\\n")

def child(context, sessions):
    # a child that left the group of its run, also by way of a child that ends at once
    for _ in range(sessions):
        if os.fork():
            return
        os.setsid()
    note(context)
    time.sleep(1000)

class Faults:
    name, version, options, metrics = "engine_faults", 1, FaultOptions, ("top1",)

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def run(self, norm, options, context):
        mode = options.mode
        if mode == "slow":
            note(context)
            time.sleep(1.5)
        if mode in ("thread", "thread_exit"):
            threading.Thread(target=time.sleep, args=(1000,)).start()
        if mode == "thread_exit":
            sys.exit(3)
        if mode == "finalizer":
            multiprocessing.util.Finalize(None, time.sleep, args=(1000,), exitpriority=1)
            atexit.register(time.sleep, 1000)
        if mode == "process":
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,)).start()
        if mode == "stdout":
            sys.stdout = Stuck()
        if mode in ("setsid", "setsid_abort", "setsid_hang", "orphan_hang"):
            child(context, 2 if mode == "orphan_hang" else 1)
        if mode == "orphan_abort":
            child(context, 2)
        if mode in ("setsid_abort", "orphan_abort"):
            time.sleep(0.2)
            os.abort()
        if mode.endswith("_hang"):
            time.sleep(1000)
        if mode == "long":
            raise RuntimeError("x" * 3_000_000)
        if mode == "hostile":
            raise Hostile
        if mode == "loud":
            block = b"y" * 99 + b"\\n"
            for _ in range(30):
                os.write(1, block * 1000)
                time.sleep(0.05)
            print("the last word", flush=True)
        if mode == "server":
            with multiprocessing.Manager() as manager:  # a socket of its own
                return Outcome({"top1": float(manager.list([0.25])[0])}, [])
        return Outcome({"top1": 0.5}, [])

if "engine_faults" not in task_names():
    register_task(Faults())
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "faults.py"
    file.write_text(PLUGIN)
    load_plugin(file)
    return file


@pytest.fixture
def runner(plugin, tmp_path):
    return Runner(plugins=(plugin,), data_dir=tmp_path, commit="abc")


def specs_of(modes, seeds=(0,)):
    return plan_config({"norms": ["bn"], "seeds": list(seeds), "tasks": {"engine_faults": {"mode": modes}}}).runs


def left(folder):
    """The processes that runs have noted."""
    file = folder / "left"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---------------------------------------------------------------- folders


def folder_is_a_file(folder):
    folder.rmdir()
    folder.write_text("mine")


def folder_is_a_link_loop(folder):
    folder.rmdir()
    folder.symlink_to(folder)


def lock_is_a_folder(folder):
    (folder / ".claim").mkdir()


def lock_is_a_link(folder):
    (folder.parent / "precious").write_text("precious")
    (folder / ".claim").symlink_to(folder.parent / "precious")


def lock_is_a_pipe(folder):
    os.mkfifo(folder / ".claim")


def output_is_a_folder(folder):
    (folder / OUTPUT).mkdir()


BROKEN = {
    folder_is_a_file: "exists",
    folder_is_a_link_loop: "",
    lock_is_a_folder: ".claim: is not a regular file",
    lock_is_a_link: ".claim: is not a regular file",
    lock_is_a_pipe: ".claim: is not a regular file",
    output_is_a_folder: f"{OUTPUT}: Is a directory",
}


def test_a_folder_or_lock_that_can_not_be_used_costs_its_run_which_is_named(runner, tmp_path):
    out, events = tmp_path / "out", []
    specs = specs_of(["ok"], range(len(BROKEN) + 1))
    for spec, breaks in zip(specs, BROKEN, strict=False):
        folder = run_folder(out, spec)
        folder.mkdir(parents=True)
        breaks(folder)
    assert execute(specs, runner, out, jobs=2, on_event=events.append) == {"failed": len(BROKEN), "ok": 1}
    ends = {e.spec.key: e.record for e in events if e.kind == "finished"}
    for spec, (breaks, reason) in zip(specs, BROKEN.items(), strict=False):
        assert str(run_folder(out, spec)) in ends[spec.key].reason, breaks
        assert reason in ends[spec.key].reason
    assert (run_folder(out, specs[0]).parent / "precious").read_text() == "precious"
    assert find_record(out, specs[-1]).status == "ok"
    assert find_record(out, specs[5]).status == "failed"  # it could be stored there


def record_is_a_folder(file, _):
    file.mkdir()
    (file / "inside").write_text("kept")


def record_is_a_link(file, elsewhere):
    file.symlink_to(elsewhere)


def record_is_a_link_to_nothing(file, _):
    file.symlink_to("nothing")


def record_is_a_pipe(file, _):
    os.mkfifo(file)


def record_without_end(file, _):
    file.symlink_to("/dev/zero")


ODD_RECORDS = [record_is_a_folder, record_is_a_link, record_is_a_link_to_nothing, record_is_a_pipe, record_without_end]


def test_a_record_that_is_no_file_is_set_aside_and_its_run_made(runner, tmp_path):
    out, events = tmp_path / "out", []
    specs = specs_of(["ok"], range(len(ODD_RECORDS)))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    for spec, odd in zip(specs, ODD_RECORDS, strict=True):
        run_folder(out, spec).mkdir(parents=True)
        odd(run_folder(out, spec) / RECORD, elsewhere)
        assert look(out, spec) == ("damaged", None), odd
    assert execute(specs, runner, out, jobs=2, on_event=events.append) == {"ok": len(specs)}
    told = {e.spec.key: Path(e.text) for e in events if e.kind == "damaged"}
    assert len(told) == len(specs)
    assert (told[specs[0].key] / "inside").read_text() == "kept"
    assert elsewhere.read_text() == "precious"
    for spec in specs:
        assert find_record(out, spec).status == "ok"


def test_a_folder_called_as_a_record_is_set_aside_beside_others(tmp_path):
    for number in (1, 2):
        (tmp_path / RECORD).mkdir()
        assert set_aside(tmp_path / RECORD).name == f"{RECORD}.damaged-{number}"
    assert all(p.is_dir() for p in tmp_path.iterdir())


def test_what_a_run_writes_goes_through_no_link(runner, tmp_path):
    out = tmp_path / "out"
    (spec,) = specs_of(["hostile"])
    folder = run_folder(out, spec)
    folder.mkdir(parents=True)
    for name in (OUTPUT, TRACEBACK, "artifact.json"):
        (tmp_path / name).write_text("precious")
        (folder / name).symlink_to(tmp_path / name)
    assert execute([spec], runner, out) == {"failed": 1}
    assert [(tmp_path / name).read_text() for name in (OUTPUT, TRACEBACK, "artifact.json")] == ["precious"] * 3
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert "Hostile" in (folder / TRACEBACK).read_text()


def test_a_traceback_that_can_not_be_written_leaves_the_reason(runner, tmp_path):
    (spec,) = specs_of(["long"])
    (run_folder(tmp_path, spec) / TRACEBACK).mkdir(parents=True)
    assert execute([spec], runner, tmp_path) == {"failed": 1}
    record = find_record(tmp_path, spec)
    assert record.reason.startswith("RuntimeError: xxx")
    assert record.artifacts == []


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.EROFS, errno.ENOSPC, errno.ESTALE, errno.EIO, errno.ENAMETOOLONG]
)
def test_an_error_of_the_disk_in_the_parent_is_counted_and_said(runner, tmp_path, monkeypatch, number):
    """The worker's own lock works; it is killed, and what its parent wants to store can not be."""
    (spec,) = specs_of(["orphan_abort"])
    events = []

    def refuse(file, *_, **__):
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr(engine, "run_lock", lambda out, spec: refuse(run_folder(out, spec) / ".claim"))
    assert execute([spec], runner, tmp_path, on_event=events.append) == {"failed": 1}
    reason = events[-1].record.reason
    assert f".claim: {os.strerror(number)}" in reason
    assert "SIGABRT" in reason
    assert find_record(tmp_path, spec) is None
    assert write_skipped(tmp_path, [(spec, "no")]) == [f"{run_folder(tmp_path, spec)}/.claim: {os.strerror(number)}"]


def test_a_run_that_another_makes_in_a_folder_that_vanishes_is_counted(runner, tmp_path, monkeypatch):
    (spec,) = specs_of(["ok"])
    with run_lock(tmp_path, spec):
        pass

    def gone(event):
        if event.kind == "waiting":
            monkeypatch.setattr(engine, "run_lock", refuse)

    def refuse(out, spec):
        raise PermissionError(errno.EACCES, "Permission denied", str(run_folder(out, spec)))

    with run_lock(tmp_path, spec).acquire(timeout=0):
        counts = execute([spec], runner, tmp_path, on_event=gone)
    assert counts == {"failed": 1}


ELSEWHERE = """
import multiprocessing, os, sys, tempfile
from pathlib import Path
from results.record import RunRecord, RunSpec
from suite.engine import execute, look, write_skipped

def make(spec, folder, report):
    with multiprocessing.Manager() as manager:  # a socket of the run's own
        value = float(manager.list([0.25])[0])
    print(tempfile.gettempdir())
    return RunRecord(spec=spec, status="ok", metrics={"top1": value})

if __name__ == "__main__":
    out, specs = sys.argv[1], [RunSpec.model_validate_json(text) for text in Path(sys.argv[2]).read_text().splitlines()]
    said = lambda e: e.record and print(e.spec.seed, e.record.status, e.record.reason)
    print(*write_skipped(out, [(specs[0], "x")]), look(out, specs[0])[0])
    print(dict(execute(specs, make, out, on_event=said)))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, plugin):
    """(specs, folder, TMPDIR, lines) of a grid made without the power to override permissions, as people work: two
    folders belong to others. Its TMPDIR is longer than a socket's address may be."""
    folder = tmp_path_factory.mktemp("elsewhere")
    out, specs, place = folder / "out", specs_of(["ok"], range(3)), folder / ("x" * 90)
    place.mkdir()
    for spec, mode in zip(specs, (0o000, 0o555, 0o755), strict=True):
        run_folder(out, spec).mkdir(parents=True)
        run_folder(out, spec).chmod(mode)
    (folder / "specs").write_text("\n".join(spec.model_dump_json() for spec in specs))
    (folder / "script.py").write_text(ELSEWHERE)
    powers = "-dac_override,-dac_read_search"
    drop = ["setpriv", "--bounding-set", powers, "--inh-caps", powers] if os.geteuid() == 0 else []
    try:
        done = subprocess.run(
            [*drop, sys.executable, folder / "script.py", out, folder / "specs"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        for spec in specs:
            run_folder(out, spec).chmod(0o755)
    assert (done.stderr, done.returncode) == ("", 0)
    return specs, out, place, done.stdout.splitlines()


def test_folders_of_another_user_cost_their_runs(elsewhere):
    specs, out, _, (skipped, *lines) = elsewhere
    assert skipped == f"{run_folder(out, specs[0])}/.claim: Permission denied damaged"
    assert lines[0].startswith(f"0 failed {run_folder(out, specs[0])}")
    assert lines[1].startswith(f"1 failed {run_folder(out, specs[1])}")
    assert all(line.endswith("Permission denied") for line in lines[:2])
    assert lines[2:] == ["2 ok ", "{'failed': 2, 'ok': 1}"]


def test_a_long_tmpdir_is_no_hindrance_and_stays_what_it_is(elsewhere):
    specs, out, place, _ = elsewhere
    assert find_record(out, specs[2]).metrics == {"top1": 0.25}
    assert (run_folder(out, specs[2]) / OUTPUT).read_text() == f"{place}\n"
    assert not [path for path in place.iterdir() if path.name.startswith("pymp-")]


def test_notes_of_versions_are_added_one_at_a_time(tmp_path):
    """A writer that read the note before another wrote it would write it without the other's part."""
    (spec,) = specs_of(["ok"])
    names = [f"n{i}" for i in range(12)]
    code = (
        "import sys; from results.record import RunSpec; from results.store import write_versions\n"
        "spec = RunSpec.model_validate_json(sys.argv[2])\n"
        "for name in sys.argv[3:]: write_versions(sys.argv[1], [spec.model_copy(update={'norm': name})])"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, spec.model_dump_json(), *names[i::3]], cwd=ROOT)
        for i in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    from results.store import read_versions

    assert set(read_versions(tmp_path)["norm"]) == set(names)
    (tmp_path / ".versions.claim").unlink()
    (tmp_path / ".versions.claim").mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        write_versions(tmp_path, [spec])


# ---------------------------------------------------------------- what runs leave behind

LEAVES = {
    "thread": ("ok", ""),
    "finalizer": ("ok", ""),
    "process": ("ok", ""),
    "stdout": ("ok", ""),
    "setsid": ("ok", ""),
    "orphan_hang": ("failed", "time limit of 2 s"),
    "setsid_hang": ("failed", "time limit of 2 s"),
    "setsid_abort": ("failed", "killed by SIGABRT"),
    "orphan_abort": ("failed", "killed by SIGABRT"),
    "thread_exit": ("failed", "exit code 3 before the run was finished; see output.txt"),
    "long": ("failed", "RuntimeError: xxx"),
    "hostile": ("failed", "Hostile: Hostile"),
    "server": ("ok", ""),
}


def test_what_a_run_leaves_behind_neither_holds_up_the_grid_nor_lives_on(runner, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(engine, "_LEAVE", 0.5)
    out = tmp_path / "out"
    specs = {spec.task_options["mode"]: spec for spec in specs_of(list(LEAVES))}
    start = time.monotonic()
    counts = execute(specs.values(), runner, out, jobs=4, timeout=2)
    assert time.monotonic() - start < 30
    assert {mode: look(out, spec)[1].status for mode, spec in specs.items()} == {m: s for m, (s, _) in LEAVES.items()}
    assert counts == {"ok": 6, "failed": 7}
    for mode, (_, reason) in LEAVES.items():
        record = find_record(out, specs[mode])
        assert reason in record.reason
        assert len(record.reason) <= 2000, "a reason is bounded"
    assert (run_folder(out, specs["long"]) / TRACEBACK).stat().st_size < 200_000
    assert len(left(tmp_path)) == 5
    if sys.platform == "linux":  # elsewhere a child that called setsid stays
        assert until(lambda: not any(map(alive, left(tmp_path))), 3)
    assert capfd.readouterr() == ("", "")


def test_children_that_left_the_group_and_the_socket_go_with_a_killed_parent(tmp_path, plugin):
    place = tmp_path / "t"
    place.mkdir()
    config = tmp_path / "grid.yaml"
    config.write_text("norms: [bn]\nseeds: 0\ntasks: {engine_faults: {mode: [setsid_hang, orphan_hang]}}\n")
    arguments = ["run", config, "--plugin", plugin, "--out", tmp_path / "out", "--data-dir", tmp_path, "--jobs", "2"]
    parent = subprocess.Popen(
        [sys.executable, "run_suite.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.DEVNULL,
    )
    try:
        assert until(lambda: len(left(tmp_path)) == 2, 60)
        assert list(place.glob("pymp-*/listener-*")) or len(str(place)) > 75
    finally:
        parent.kill()
        parent.wait()
    assert until(lambda: not any(map(alive, left(tmp_path))))
    assert until(lambda: not list(place.glob("pymp-*")))


def test_what_a_run_prints_is_bounded_and_keeps_its_start_and_its_end(runner, tmp_path, monkeypatch):
    for name, value in (("LARGEST", 400_000), ("_HEAD", 1_000), ("_TAIL", 1_000)):
        monkeypatch.setattr(output, name, value)
    monkeypatch.setattr(engine, "_LOOK", 0.1)
    (spec,) = specs_of(["loud"])
    assert execute([spec], runner, tmp_path) == {"ok": 1}
    text = (run_folder(tmp_path, spec) / OUTPUT).read_text()
    assert len(text) < 1_500_000  # of 3,000,000
    assert "left out here" in text
    assert text.startswith("y" * 99 + "\n")
    assert text.endswith("the last word\n")


# ---------------------------------------------------------------- the fork server


def server_pid():
    return forkserver._forkserver._forkserver_pid


def test_a_server_killed_between_starts_is_started_again(runner, tmp_path):
    specs, killed = specs_of(["ok"], range(3)), []

    def kill(event):
        if event.kind == "finished" and not killed:
            killed.append(server_pid())
            os.kill(server_pid(), signal.SIGKILL)

    assert execute(specs, runner, tmp_path, on_event=kill) == {"ok": 3}
    assert server_pid() not in killed


@pytest.mark.parametrize("error", [EOFError("unexpected EOF"), ConnectionRefusedError(), BrokenPipeError()])
def test_a_server_that_dies_at_a_start_is_no_ctrl_c(runner, tmp_path, monkeypatch, error):
    """The kill comes after the server was found to be running."""
    (spec,) = specs_of(["ok"])
    real, calls = forkserver.connect_to_new_process, []

    def dies(fds):
        calls.append(fds)
        if len(calls) <= often:
            raise error
        return real(fds)

    monkeypatch.setattr(forkserver, "connect_to_new_process", dies)
    monkeypatch.setattr(server, "_PAUSE", 0.01)
    often = 2
    assert execute([spec], runner, tmp_path) == {"ok": 1}
    often, calls[:] = 100, []
    with pytest.raises(OSError, match=f"no process could be started, at 5 tries.*{type(error).__name__}"):
        execute([spec], runner, tmp_path)


def test_a_server_killed_during_runs_costs_these_runs_at_most(runner, tmp_path):
    specs = specs_of(["slow"], range(3))

    def kill(event):
        if event.kind == "started" and len(started) < 2:
            started.append(event.spec)
            if len(started) == 2:
                os.kill(server_pid(), signal.SIGKILL)

    started = []
    counts = execute(specs, runner, tmp_path, jobs=2, on_event=kill)
    assert counts.total() == 3
    assert counts["ok"] >= 1
    for spec in specs:
        record = find_record(tmp_path, spec)
        assert record.status == "ok" or "fork server was killed" in record.reason
    assert until(lambda: not any(map(alive, left(tmp_path))))
    assert execute(specs, runner, tmp_path, jobs=2, retry=True) == {"ok": 3}


@pytest.fixture
def fresh_place(monkeypatch):
    """As in a program that has used no socket yet."""
    config = process.current_process()._config
    before = config.pop("tempdir", None)
    monkeypatch.setattr(server, "_place", "")
    yield
    config["tempdir"] = before


@pytest.mark.parametrize("length", [76, 107, 108, 230])
def test_a_place_for_sockets_is_found_beside_a_long_tmpdir(tmp_path, fresh_place, monkeypatch, length):
    place = tmp_path / ("x" * max(1, length - len(str(tmp_path)) - 1))
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    server._find_place()
    found = Path(process.current_process()._config["tempdir"])
    found.rmdir()
    assert len(str(found)) < 76
    assert list(place.iterdir()) == []


def test_where_no_folder_holds_a_socket_the_message_names_tmpdir(runner, tmp_path, monkeypatch, fresh_place):
    monkeypatch.setattr(server, "_holds_sockets", lambda folder: False)
    monkeypatch.setenv("TMPDIR", "/scratch/" + "x" * 90)
    with pytest.raises(OSError, match=r'TMPDIR is "/scratch/x+…x+" \(99 characters\)\n.*at most 75') as caught:
        execute(specs_of(["ok"]), runner, tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_folder_that_holds_sockets_is_taken_and_its_name_left_free(tmp_path, fresh_place, monkeypatch):
    monkeypatch.setattr(server, "_places", lambda: iter([str(tmp_path / "missing"), "/tmp"]))
    server._find_place()
    place = Path(process.current_process()._config["tempdir"])
    try:
        assert place.parent == Path("/tmp")
        assert list(place.iterdir()) == []
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(place / "listener-12345678"))
    finally:
        for path in [*place.iterdir(), place]:
            path.unlink() if path.is_socket() else path.rmdir()


def test_ctrl_c_while_the_server_imports_is_not_its_business(tmp_path, plugin):
    """The signal goes to the whole group, as a terminal sends it."""
    config = tmp_path / "grid.yaml"
    config.write_text("norms: [bn]\nseeds: 0\ntasks: {engine_faults: {mode: [slow]}}\n")
    parent = subprocess.Popen(
        [sys.executable, "run_suite.py", "run", config, "--plugin", plugin, "--out", tmp_path / "out"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert "runs to do" in parent.stdout.readline()
        time.sleep(0.3)  # the server is started right after this line, and takes about two seconds
        os.killpg(parent.pid, signal.SIGINT)
        said, errors = parent.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert (said, errors, parent.returncode) == ("", "\nstopped: 0 of 1 runs were finished and are kept\n", 130)


def test_a_record_stored_by_a_worker_counts_although_its_parent_can_lock_nothing(runner, tmp_path, monkeypatch):
    (spec,) = specs_of(["ok"])

    def refuse(out, spec):
        raise OSError(errno.ENOLCK, "No locks available", str(run_folder(out, spec) / ".claim"))

    monkeypatch.setattr(engine, "run_lock", refuse)
    assert execute([spec], runner, tmp_path) == {"ok": 1}


def test_a_standing_skip_needs_no_lock(tmp_path, monkeypatch):
    (spec,) = specs_of(["ok"])
    write_record(tmp_path, RunRecord(spec=spec, status="skipped", reason="no"))
    monkeypatch.setattr(engine, "run_lock", None)
    assert write_skipped(tmp_path, [(spec, "no")]) == []
