"""results.claims: whatever stands in a claim's file, nobody waits for it for ever."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from filelock import Timeout
from parts.watching import until

from results import claims
from results.claims import CLAIM, Waited, folder_lock, is_held


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 0.2)
    monkeypatch.setattr(claims, "RENEWED", 0.05)


def text(host="node17", pid=4242, mode="lease", duration=0.2):
    return f"filelock/2\npid={pid}\nhost={host}\nmode={mode}\ntoken=ab\nduration={duration}\n"


def can_be_had(waited):
    try:
        with waited.claim.acquire(timeout=0):
            return True
    except Timeout:
        return False


@pytest.mark.parametrize(
    "left",
    [
        "",  # of a process that was killed, or a machine that went down, before the first line
        "filelock/2\npid=1",
        text(duration=30.0),  # of another version
        text(mode="exclusive"),
        "4242\nnode17\n",
    ],
)
def test_whatever_was_left_in_a_claim_is_taken_over_once_it_is_old(tmp_path, left):
    (tmp_path / CLAIM).write_text(left)
    waited, start = Waited(tmp_path), time.monotonic()
    assert is_held(tmp_path)
    assert not can_be_had(waited)
    assert not waited.lives()
    assert until(lambda: can_be_had(waited), 5)
    assert time.monotonic() - start >= 0.15
    assert os.listdir(tmp_path) == []


def test_an_odd_claim_that_is_renewed_is_not_taken_over(tmp_path):
    (tmp_path / CLAIM).write_text(text(duration=30.0))
    waited, end = Waited(tmp_path), time.monotonic() + 0.4
    while time.monotonic() < end:
        os.utime(tmp_path / CLAIM)
        assert not can_be_had(waited)
        time.sleep(0.05)
    assert waited.lives()


def test_the_claim_of_one_that_was_as_quick_is_put_back(tmp_path, monkeypatch):
    (tmp_path / CLAIM).touch()
    waited = Waited(tmp_path)
    assert not can_be_had(waited)
    time.sleep(0.25)
    rename = os.rename

    def another_was_quicker(source, target):
        os.unlink(source)
        (tmp_path / "new").write_text(text())
        rename(tmp_path / "new", source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", another_was_quicker)
    assert not can_be_had(waited)
    assert (tmp_path / CLAIM).read_text() == text()
    assert os.listdir(tmp_path) == [CLAIM]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_zombie_does_not_live(tmp_path):
    with subprocess.Popen(["true"]) as zombie:
        assert until(lambda: Path(f"/proc/{zombie.pid}/stat").read_text().split()[2] == "Z", 5)
        (tmp_path / CLAIM).write_text(text(host=claims._host(), pid=zombie.pid))
        assert not Waited(tmp_path).lives()
        (tmp_path / CLAIM).write_text(text(host=claims._host(), pid=os.getpid()))
        assert Waited(tmp_path).lives()
        zombie.wait()


def test_one_process_has_a_claim_once(tmp_path):
    with folder_lock(tmp_path).acquire(timeout=0), pytest.raises(Timeout):
        folder_lock(tmp_path).acquire(timeout=0)
