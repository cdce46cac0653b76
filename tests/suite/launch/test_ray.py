"""suite.launch.ray without Ray: a fake of its few calls, whose nodes die, hang, and lose or repeat messages."""

import threading

import pytest
from parts.fake_ray import FakeRay, make_ok
from parts.watching import until

from results.claims import CLAIM
from results.record import RunRecord, RunSpec, record_text
from results.store import find_record, run_folder, run_lock
from suite.checkpoints import BEFORE, NEWEST
from suite.engine import MOST_LOST, execute
from suite.launch import cluster as connection
from suite.launch import far
from suite.launch import ray as on_ray
from suite.launch.incoming import Incoming
from suite.launch.launcher import LOST, LaunchError
from suite.launch.ray import RayLauncher
from suite.launch.travelling import plain
from suite.live import HISTORY
from suite.output import OUTPUT


def spec_of(seed=0):
    return RunSpec(
        task="t",
        norm="bn",
        norm_options={},
        task_options={},
        seed=seed,
        norm_version="1",
        task_version="1",
        data_checksum="",
        norm_label="bn",
    )


def record_text_of(spec, **fields):
    return record_text(RunRecord(spec=spec, **{"status": "ok", "metrics": {"top1": 0.5}, **fields}))


@pytest.fixture
def ray(monkeypatch):
    """Ray with two nodes of one CPU; `ray.script` makes the runs."""
    fake = FakeRay(nodes=2)
    fake.install(monkeypatch)
    yield fake
    fake.stop()


def play(*messages):
    """A script: these messages, in this order."""

    def script(job, send):
        for number, kind, value in messages:
            send(number, kind, value)

    return script


def ending(spec, number=2):
    return number, "end", {"record": record_text_of(spec), "left": False, "code": 0}


def run(specs, out, **options):
    events = []
    launcher = RayLauncher("10.0.0.1:6379", **options)
    counts = execute(specs, make_ok, out, launcher=launcher, on_event=events.append)
    return counts, events, launcher


def test_records_come_back_and_are_written_under_the_claim(ray, tmp_path):
    specs = [spec_of(seed) for seed in range(12)]
    held = []

    def script(job, send):
        spec = RunSpec.model_validate(job["spec"])
        held.append((run_folder(tmp_path, spec) / CLAIM).exists())
        assert send(1, "started", None) == ""
        send(*ending(spec))

    ray.script = script
    counts, events, launcher = run(specs, tmp_path)
    assert counts == {"ok": 12}
    assert held == [True] * 12
    assert [find_record(tmp_path, spec).metrics for spec in specs] == [{"top1": 0.5}] * 12
    assert not list(tmp_path.rglob(CLAIM))
    assert not launcher._going
    assert [event.kind for event in events].count("started") == 12


def test_a_message_that_comes_twice_counts_once(ray, tmp_path):
    spec = spec_of()
    end, started = ending(spec, 3), (1, "started", None)
    ray.script = play(started, started, (2, "note", "once"), (2, "note", "once"), end, end)
    counts, events, _ = run([spec], tmp_path)
    assert counts == {"ok": 1}
    assert [(event.kind, event.text) for event in events if event.kind in ("started", "note")] == [
        ("started", ""),
        ("note", "once"),
    ]


@pytest.mark.parametrize("loss", ["node", "worker", "last message"])
def test_a_lost_run_goes_on_elsewhere_from_its_last_checkpoint(ray, tmp_path, loss, checkpoint):
    spec, tries = spec_of(), []

    def script(job, send):
        tries.append(job["checkpoint"])
        send(1, "started", None)
        if len(tries) == 1:
            half = len(checkpoint) // 2
            name = f"runs/t/bn/{spec.key}/{NEWEST}"
            send(2, "part", {"file": name, "first": True, "last": False, "data": checkpoint[:half]})
            send(3, "part", {"file": name, "first": False, "last": True, "data": checkpoint[half:]})
            send(4, "part", {"file": name, "first": True, "last": False, "data": b"half of the next"})
            if loss != "last message":
                raise (
                    ray.exceptions.NodeDiedError("gone")
                    if loss == "node"
                    else ray.exceptions.WorkerCrashedError("dead")
                )
            return
        send(*ending(spec))

    ray.script = script
    counts, events, _ = run([spec], tmp_path)
    assert counts == {"ok": 1}
    assert tries == [None, checkpoint]
    (note,) = [event.text for event in events if event.kind == "note"]
    assert "lost" in note
    assert "goes on from epoch 2 of 3" in note
    assert sorted(path.name for path in run_folder(tmp_path, spec).iterdir()) == ["record.json"]


def test_a_run_that_is_lost_again_and_again_has_failed_with_the_reason(ray, tmp_path):
    def script(job, send):
        raise ray.exceptions.NodeDiedError("the node was taken away. See elsewhere")

    ray.script = script
    counts, _, _ = run([spec_of()], tmp_path)
    assert counts == {"failed": 1}
    assert ray.tasks == MOST_LOST + 1
    assert find_record(tmp_path, spec_of()).reason == (
        "lost with its node or its task: NodeDiedError: the node was taken away"
    )


def test_a_run_that_ends_its_own_process_has_failed_and_is_not_repeated(ray, tmp_path):
    ray.script = play((1, "started", None), (2, "end", {"record": None, "left": False, "code": -6}))
    counts, _, _ = run([spec_of()], tmp_path)
    assert counts == {"failed": 1}
    assert ray.tasks == 1
    assert "SIGABRT" in find_record(tmp_path, spec_of()).reason


def test_a_run_that_hangs_is_ended_at_its_time_limit(ray, tmp_path):
    def script(job, send):
        send(1, "started", None)
        ray.cancelled.wait(20)

    ray.script = script
    launcher = RayLauncher("10.0.0.1:6379")
    counts = execute([spec_of()], make_ok, tmp_path, launcher=launcher, timeout=0.3)
    assert counts == {"failed": 1}
    assert find_record(tmp_path, spec_of()).reason == "time limit of 0.3 s"
    assert ray.cancelled.is_set()


def test_what_still_comes_of_a_run_that_was_given_up_is_told_that_nobody_waits(ray, tmp_path):
    answers, more = [], threading.Event()

    def script(job, send):
        send(1, "started", None)
        ray.cancelled.wait(20)
        more.wait(20)
        answers.append(send(*ending(spec_of())))

    ray.script = script
    launcher = RayLauncher("10.0.0.1:6379")
    launcher.open(make_ok, tmp_path)
    going = launcher.start(spec_of(), None)
    assert until(lambda: any(kind == "started" for _, kind, _ in launcher.news([going], 0.1, [])))
    launcher.kill(going)
    assert [kind for _, kind, _ in launcher.news([going], 0.1, [])] == ["ended"]
    more.set()
    assert until(lambda: answers == ["gone"])
    launcher.close()
    assert find_record(tmp_path, spec_of()) is None


def test_a_run_that_is_told_to_leave_hears_it_with_its_next_message(ray, tmp_path):
    def script(job, send):
        send(1, "started", None)
        number = 2
        while send(number, "beat", None) != "leave":
            number += 1
        send(number + 1, "end", {"record": None, "left": True, "code": 0})

    ray.script = script
    launcher = RayLauncher("10.0.0.1:6379")
    launcher.open(make_ok, tmp_path)
    going = launcher.start(spec_of(), None)
    heard = []
    assert until(lambda: heard.extend(kind for _, kind, _ in launcher.news([going], 0.1, [])) or "started" in heard)
    launcher.leave(going)
    assert until(lambda: heard.extend(kind for _, kind, _ in launcher.news([going], 0.1, [])) or "ended" in heard)
    assert heard == ["started", "left", "ended"]
    launcher.close()


def test_a_run_that_another_invocation_makes_is_not_sent(ray, tmp_path):
    with run_lock(tmp_path, spec_of()).acquire(timeout=0):
        launcher = RayLauncher("10.0.0.1:6379")
        launcher.open(make_ok, tmp_path)
        going = launcher.start(spec_of(), None)
        assert [kind for _, kind, _ in launcher.news([going], 0.1, [])] == ["busy", "ended"]
        launcher.close()
    assert ray.tasks == 0


def test_a_claim_that_was_taken_over_lets_nothing_be_written(tmp_path):
    claim = run_lock(tmp_path, spec_of())
    claim.acquire(timeout=0)
    incoming = Incoming(tmp_path, spec_of(), claim)
    (run_folder(tmp_path, spec_of()) / CLAIM).unlink()
    run_lock(tmp_path, spec_of()).acquire(timeout=0)
    assert list(incoming.hear(*ending(spec_of(), 1))) == [("ended", LOST)]
    assert find_record(tmp_path, spec_of()) is None


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "runs/t/bn/other/x", "runs/t/bn/KEY/record.json", "runs/t/bn/KEY/.claim", "x", ""]
)
def test_no_message_writes_outside_the_folder_of_its_run(tmp_path, name):
    spec, claim = spec_of(), run_lock(tmp_path, spec_of())
    claim.acquire(timeout=0)
    incoming = Incoming(tmp_path, spec, claim)
    before = sorted(tmp_path.rglob("*"))
    part = {"file": name.replace("KEY", spec.key), "first": True, "last": True, "data": b"x"}
    for number, kind in enumerate(("part", "grown"), 1):
        assert [kind for kind, _ in incoming.hear(number, kind, part)] == (["note"] if number == 1 else [])
    assert sorted(tmp_path.rglob("*")) == before
    claim.release()


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one_before(tmp_path, checkpoint):
    spec, claim = spec_of(), run_lock(tmp_path, spec_of())
    claim.acquire(timeout=0)
    folder = run_folder(tmp_path, spec)
    (folder / NEWEST).write_bytes(checkpoint[:-30])
    (folder / BEFORE).write_bytes(checkpoint)
    part = {"file": f"runs/t/bn/{spec.key}/{NEWEST}", "first": True, "last": True, "data": checkpoint}
    assert list(Incoming(tmp_path, spec, claim).hear(1, "part", part)) == []
    assert (folder / NEWEST).read_bytes() == (folder / BEFORE).read_bytes() == checkpoint
    claim.release()


# The far side, with its real process


def job_of(spec, tmp_path, **changes):
    return {
        "name": "n",
        "spec": spec.model_dump(mode="json"),
        "run_one": plain(make_ok),
        "code": far.code.here(),
        "gpus": 0,
        "checkpoint": None,
        "data": {"data_dir": str(tmp_path), "sets": {}},
        **changes,
    }


def test_the_far_side_tells_all_of_a_run_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(far.tempfile, "gettempdir", lambda: str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(far, "PART", 4)
    spec, out, news = spec_of(), tmp_path / "out", []
    claim = run_lock(out, spec)
    claim.acquire(timeout=0)
    incoming = Incoming(out, spec, claim)
    far.make(job_of(spec, tmp_path), lambda *message: news.extend(incoming.hear(*message)) or "", lambda part: part)
    assert [kind for kind, _ in news if kind != "progress"] == ["started", "stored", "ended"]
    folder = run_folder(out, spec)
    assert find_record(out, spec).status == "ok"
    assert (folder / "weights.pt").read_bytes() == b"w" * 10
    assert (folder / OUTPUT).read_text() == "said by the run\n"
    assert not (folder / HISTORY).exists()
    assert not list((tmp_path / "there").glob("normsuite-run-*"))


def test_other_code_on_a_node_makes_no_run(tmp_path):
    sent = []
    other = {**far.code.here(), "fingerprint": "0" * 16}
    far.make(job_of(spec_of(), tmp_path, code=other), lambda *message: sent.append(message) or "", lambda part: part)
    ((number, kind, line),) = sent
    assert kind == "refused"
    assert "0" * 16 in line
    assert far.code.fingerprint() in line
    claim = run_lock(tmp_path, spec_of()).acquire(timeout=0).lock
    with pytest.raises(LaunchError, match="has other code"):  # no failure of the run: the command ends
        list(Incoming(tmp_path, spec_of(), claim).hear(number, kind, line))
    claim.release()


def test_data_sets_of_a_node_are_used_where_they_are_the_same_and_sent_ones_elsewhere(tmp_path):
    own = tmp_path / "own"
    for name in ("same", "other", "beside"):
        (own / name).mkdir(parents=True)
        (own / name / "manifest.json").write_text(name)
    same = {"manifest": b"same", "files": None, "why": "x"}
    assert far.placed({"data_dir": own, "sets": {"same": same}}, tmp_path / "a", None) == (own, "")
    other = {"manifest": b"new", "files": {"manifest.json": [b"n", b"ew"]}, "why": ""}
    found, missing = far.placed({"data_dir": own, "sets": {"same": same, "other": other}}, tmp_path / "b", bytes)
    assert missing == ""
    assert [(found / name / "manifest.json").read_text() for name in ("same", "other", "beside")] == [
        "same",
        "new",
        "beside",
    ]
    absent = {"manifest": b"x", "files": None, "why": "is too large to be sent: prepare it on the nodes"}
    _, missing = far.placed({"data_dir": own, "sets": {"imagenet": absent}}, tmp_path / "c", None)
    assert missing.startswith('data set "imagenet" is not in')
    assert "prepare it on the nodes" in missing


# Mistakes


def test_without_ray_one_line_says_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r'Ray is not installed; `python -m pip install .*".\[ray\]"'):
        RayLauncher().open(make_ok, tmp_path)


def test_an_address_that_nobody_answers_is_one_line(monkeypatch, tmp_path):
    FakeRay(nodes=1).install(monkeypatch, answers=False)
    with pytest.raises(LaunchError, match="nobody answers") as raised:
        RayLauncher("127.0.0.1:1").open(make_ok, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_node_with_other_code_is_named_before_any_run_is_sent(ray, tmp_path):
    ray.code = {**far.code.here(), "host": "node7", "fingerprint": "f" * 16}
    with pytest.raises(LaunchError, match=r"node node7 has other code: .*code=ship"):
        RayLauncher("10.0.0.1:6379").open(make_ok, tmp_path)
    assert ray.tasks == 0


def test_a_function_without_a_name_can_not_travel(ray, tmp_path):
    with pytest.raises(LaunchError, match="by which others import it"):
        RayLauncher("10.0.0.1:6379").open(lambda *given: None, tmp_path)


def test_as_many_runs_are_sent_as_the_nodes_have_room_for_and_a_few_wait_in_the_queue(ray, tmp_path):
    launcher = RayLauncher("10.0.0.1:6379", cpus=0.5)
    launcher.open(make_ok, tmp_path)
    count = 0
    ray.script = lambda job, send: ray.cancelled.wait(20)
    while launcher.room(spec_of(count)) and count < 100:
        launcher.start(spec_of(count), None)
        count += 1
    assert count == 2 * 2 + on_ray._QUEUED
    launcher.close()
    assert not list(tmp_path.rglob(CLAIM))


@pytest.fixture
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint of `spec_of()`."""
    from suite.checkpoints import Note, write

    file = tmp_path_factory.mktemp("checkpoint") / NEWEST
    write(file, {"rows": []}, Note(spec_of().key, {}, "epoch 2 of 3", 1.0))
    return file.read_bytes()
