"""suite.engine beside other invocations, hosts and launchers: claims are waited for or taken over, runs that are lost
go on, and nothing is stored by who no longer makes the run."""

import os
import re
import signal
import threading
import time

import pytest
from parts.fake_launcher import GONE, FakeLauncher
from parts.folders import spec
from parts.watching import until

from results import claims
from results.claims import CLAIM
from results.record import RunRecord
from results.store import find_record, run_folder, run_lock, write_record
from suite import engine
from suite.engine import MOST_LOST, execute

LEASE = 0.6


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Claims last for less than a second, and are looked at often."""
    monkeypatch.setattr(claims, "LEASE", LEASE)
    monkeypatch.setattr(claims, "RENEWED", LEASE / 4)
    monkeypatch.setattr(engine, "_POLL", 0.02)
    monkeypatch.setattr(engine, "_GRACE", 0.05)


def run(specs, out, launcher=None, **options):
    """How many ended in each status, and what was told as (kind, text)."""
    told = []
    counts = execute(
        specs,
        None,
        out,
        launcher=FakeLauncher() if launcher is None else launcher,
        on_event=lambda event: told.append((event.kind, event.text)),
        **options,
    )
    return counts, told


class Elsewhere:
    """Another host that makes a run: its claim stands in the folder, and is renewed while it lives."""

    def __init__(self, out, of):
        self.out, self.of, self.file = out, of, run_folder(out, of) / CLAIM
        with run_lock(out, of).acquire(timeout=0):
            text = self.file.read_text()
        self.text = re.sub(r"(?m)^host=.*$", "host=node17", re.sub(r"(?m)^pid=.*$", "pid=4242", text))
        self.file.write_text(self.text)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._renew)
        self.thread.start()

    def _renew(self):
        while not self.over.wait(LEASE / 6):
            os.utime(self.file)

    def dies(self):
        self.over.set()
        self.thread.join()

    def ends(self, **fields):
        self.dies()
        write_record(self.out, RunRecord(spec=self.of, **fields))
        self.file.unlink()


@pytest.fixture
def elsewhere(tmp_path):
    made = []

    def begin(of):
        made.append(Elsewhere(tmp_path, of))
        return made[-1]

    yield begin
    for each in made:
        each.dies()


def test_a_run_that_another_host_makes_is_waited_for_and_its_record_counts(elsewhere, tmp_path):
    other, launcher = elsewhere(spec()), FakeLauncher()
    timer = threading.Timer(2.5 * LEASE, lambda: other.ends(status="failed", reason="there"))
    timer.start()
    start = time.monotonic()
    counts, told = run([spec()], tmp_path, launcher)
    assert counts == {"failed": 1}
    assert time.monotonic() - start > 2 * LEASE  # longer than a claim lasts that is not renewed
    assert find_record(tmp_path, spec()).reason == "there"
    assert [kind for kind, _ in told] == ["waiting", "finished"]
    assert not (tmp_path / CLAIM).exists()


def test_a_run_whose_host_is_gone_is_taken_over_once_its_claim_is_old(elsewhere, tmp_path):
    elsewhere(spec()).dies()
    start = time.monotonic()
    assert run([spec()], tmp_path)[0] == {"ok": 1}
    assert LEASE * 0.9 < time.monotonic() - start < LEASE + 5
    assert not list(tmp_path.rglob(f"{CLAIM}*"))


@pytest.mark.parametrize("skew", [-1e6, 1e6])
def test_the_clock_of_another_host_may_say_anything(elsewhere, tmp_path, skew):
    other = elsewhere(spec())
    other.dies()
    os.utime(other.file, (time.time() + skew,) * 2)
    start = time.monotonic()
    assert run([spec()], tmp_path)[0] == {"ok": 1}
    assert time.monotonic() - start > LEASE * 0.9  # it was seen unrenewed for so long, by the clock of this host


def test_no_wait_leaves_as_soon_as_the_others_are_known_to_live(elsewhere, tmp_path):
    living, launcher = elsewhere(spec(seed=1)), FakeLauncher()
    start = time.monotonic()
    counts, _ = run([spec(seed=1), spec(seed=0)], tmp_path, launcher, wait=False)
    assert counts == {"ok": 1, "elsewhere": 1}
    assert time.monotonic() - start < 2 * LEASE
    assert living.file.read_text() == living.text
    assert [does for key, does in launcher.started if key == spec(seed=0).key] == ["ok"]


def test_no_wait_does_not_leave_before_that_and_takes_over_the_dead(elsewhere, tmp_path):
    elsewhere(spec()).dies()
    assert run([spec()], tmp_path, wait=False)[0] == {"ok": 1}


def test_no_wait_leaves_a_process_of_this_host_at_once(tmp_path):
    with run_lock(tmp_path, spec()).acquire(timeout=0):
        start = time.monotonic()
        assert run([spec()], tmp_path, wait=False)[0] == {"elsewhere": 1}
        assert time.monotonic() - start < LEASE


def test_one_whose_claim_was_taken_over_stores_nothing_and_the_other_record_counts(tmp_path):
    launcher = FakeLauncher({spec().key: ["taken"]})

    def told(event):
        if event.kind == "waiting":
            write_record(tmp_path, RunRecord(spec=spec(), status="ok", metrics={"top1": 0.25}))

    assert execute([spec()], None, tmp_path, launcher=launcher, on_event=told) == {"ok": 1}
    assert find_record(tmp_path, spec()).metrics == {"top1": 0.25}
    assert launcher.started == [(spec().key, "taken")]


def test_a_claim_that_was_taken_over_is_known_to_be_lost(elsewhere, tmp_path):
    lost = []
    claim = run_lock(tmp_path, spec(), lost.append)
    claim.acquire(timeout=0)
    (run_folder(tmp_path, spec()) / CLAIM).unlink()
    elsewhere(spec())
    assert until(lambda: lost, 5)
    assert "changed" in lost[0].reason or "missing" in lost[0].reason


@pytest.mark.parametrize("times", range(1, MOST_LOST + 1))
def test_a_run_that_is_lost_with_its_machine_goes_on(tmp_path, times):
    launcher = FakeLauncher({spec().key: ["dies"] * times})
    counts, told = run([spec(), spec(seed=1)], tmp_path, launcher)
    assert counts == {"ok": 2}
    assert [text for kind, text in told if kind == "note"] == [f"{GONE}; it goes on from the start"] * times
    assert len(launcher.started) == 2 + times


def test_one_that_is_lost_again_and_again_has_failed_with_the_reason(tmp_path):
    launcher = FakeLauncher({spec().key: ["dies"] * 99})
    assert run([spec(), spec(seed=1)], tmp_path, launcher)[0] == {"failed": 1, "ok": 1}
    assert find_record(tmp_path, spec()).reason == GONE
    assert len(launcher.started) == 1 + MOST_LOST + 1
    assert not list(tmp_path.rglob(CLAIM))


@pytest.mark.parametrize("does", ["twice", "silent", "late"])
def test_messages_that_come_twice_or_never_change_no_record_and_no_count(tmp_path, does):
    launcher = FakeLauncher({spec(seed=seed).key: [does] for seed in range(3)}, jobs=2)
    counts, told = run([spec(seed=seed) for seed in range(3)], tmp_path, launcher)
    assert counts == {"ok": 3}
    assert [kind for kind, _ in told].count("finished") == 3
    assert len(launcher.started) == 3


def test_one_that_hangs_is_killed_after_its_time_and_costs_itself_only(tmp_path):
    launcher = FakeLauncher({spec().key: ["hangs"]}, jobs=2)
    assert run([spec(), spec(seed=1)], tmp_path, launcher, timeout=0.2)[0] == {"failed": 1, "ok": 1}
    assert find_record(tmp_path, spec()).reason == "time limit of 0.2 s"


def test_one_that_does_not_end_after_its_record_is_killed_and_is_ok(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_LEAVE", 0.1)
    launcher = FakeLauncher({spec().key: ["stays"]})
    assert run([spec()], tmp_path, launcher)[0] == {"ok": 1}
    assert launcher.closed


def test_a_run_that_is_lost_while_all_are_told_to_leave_has_not_failed(tmp_path):
    launcher = FakeLauncher({spec().key: ["dies"]}, on_start=lambda run: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            run([spec()], tmp_path, launcher)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert find_record(tmp_path, spec()) is None
    assert launcher.closed
    assert run([spec()], tmp_path)[0] == {"ok": 1}
