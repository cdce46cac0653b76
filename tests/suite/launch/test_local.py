"""suite.launch.local and its devices: every run is shown accelerators of its own, no more run at a time than fit."""

import pytest
import torch
from parts.folders import spec
from parts.shown_devices import look_around

from results.store import find_record
from suite.engine import execute
from suite.launch.choosing import choose
from suite.launch.devices import VISIBLE, Devices, check_device, slots_of
from suite.launch.local import LocalLauncher
from suite.launch.places import read_place


@pytest.fixture
def four(monkeypatch):
    """A machine that seems to have four accelerators."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv(VISIBLE, raising=False)


def choice(device, runs=(), jobs=None, each=None, on="local"):
    return choose(read_place(on), device, jobs, each, 1, runs)


def made(out, specs, launcher):
    """(what each run was shown, the most that went on with one accelerator at a time)."""
    assert execute(specs, look_around, out, launcher=launcher) == {"ok": len(specs)}
    records = [find_record(out, each) for each in specs]
    times: dict[str, list[tuple[float, int]]] = {}
    for record in records:
        for name in record.evidence["shown"].split(","):
            times.setdefault(name, []).extend([(record.metrics["began"], 1), (record.metrics["ended"], -1)])
    most = {}
    for name, changes in times.items():
        going = 0
        for _, change in sorted(changes):
            going += change
            most[name] = max(most.get(name, 0), going)
    return [record.evidence["shown"] for record in records], most


@pytest.mark.parametrize(
    ("given", "visible", "slots"),
    [
        ("cuda", None, ["0", "1", "2", "3"]),
        ("cuda:0,2", None, ["0", "2"]),
        ("cuda:3", None, ["3"]),
        ("cuda", "4,5,6,7", ["4", "5", "6", "7"]),
        ("cuda:0,2", " GPU-a, GPU-b ,GPU-c,GPU-d", ["GPU-a", "GPU-c"]),
        ("cuda:1", "MIG-1,MIG-2,MIG-3,MIG-4", ["MIG-2"]),
        ("cpu", "4,5", None),
    ],
)
def test_slots_are_the_visible_accelerators_in_the_words_of_the_scheduler(four, monkeypatch, given, visible, slots):
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    assert slots_of(given) == slots


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cuda:4", "4 CUDA devices are available"),
        ("cuda:0,9", "4 CUDA devices are available"),
        ("cuda:1,1", "names an accelerator twice"),
        ("cuda:", "not a device"),
        ("cuda:0,", "not a device"),
        ("gpu", "not a device"),
    ],
)
def test_devices_that_are_not_here_are_refused_in_one_line(four, given, said):
    with pytest.raises(ValueError, match=said) as error:
        slots_of(given)
    assert "\n" not in str(error.value)


def test_one_run_of_its_own_takes_one_device(four):
    with pytest.raises(ValueError, match=r"one device is needed here, such as cuda:0"):
        check_device("cuda:0,2")


def test_without_an_accelerator_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="0 CUDA devices are available here; cpu always is"):
        slots_of("cuda")


def test_each_run_is_shown_one_accelerator_and_shares_it_with_nobody(four, tmp_path):
    chosen = choice("cuda:0,2")
    assert (chosen.jobs, chosen.device) == (2, "cuda")
    shown, most = made(tmp_path, [spec(seed=seed) for seed in range(5)], chosen.launcher)
    assert set(shown) == {"0", "2"}
    assert most == {"0": 1, "2": 1}


def test_as_many_runs_share_an_accelerator_as_are_allowed(four, monkeypatch, tmp_path):
    monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b,GPU-c,GPU-d")
    chosen = choice("cuda:1", each=3)
    assert chosen.jobs == 3
    shown, most = made(tmp_path, [spec(seed=seed) for seed in range(6)], chosen.launcher)
    assert set(shown) == {"GPU-b"}
    assert 2 <= most["GPU-b"] <= 3


def test_fewer_jobs_than_accelerators_are_kept(four):
    assert choice("cuda", jobs=1).jobs == 1
    assert choice("cuda", on="local:jobs=2,runs_per_device=2").jobs == 2
    assert choice("cuda", on="local:runs_per_device=2").jobs == 8


def test_each_worker_of_a_run_has_an_accelerator(four, tmp_path):
    specs = [spec(seed=seed, workers=workers) for seed, workers in enumerate((1, 2, 1, 2))]
    shown, most = made(tmp_path, specs, choice("cuda:0,1,3", specs).launcher)
    assert [len(set(each.split(","))) for each in shown] == [1, 2, 1, 2]
    assert set(most.values()) == {1}


def test_a_run_that_needs_more_accelerators_than_there_are_is_refused_in_one_line(four):
    with pytest.raises(ValueError, match=r'device "cuda:0,2": a run of 3 workers needs .*, not 2') as error:
        choice("cuda:0,2", [spec(), spec(workers=3)])
    assert "\n" not in str(error.value)


def test_without_slots_a_run_is_shown_what_the_command_is(monkeypatch, tmp_path):
    monkeypatch.delenv(VISIBLE, raising=False)
    launcher = LocalLauncher(2)
    shown, _ = made(tmp_path, [spec(seed=seed) for seed in range(2)], launcher)
    assert shown == ["none", "none"]


def test_slots_are_given_back_and_the_emptiest_is_taken_first():
    devices = Devices(["a", "b"], runs_each=2)
    assert devices.places == 4
    first, second = devices.take(1), devices.take(1)
    assert {*first, *second} == {"a", "b"}
    third = devices.take(2)
    assert devices.free() == []
    devices.give_back(third)
    devices.give_back(first)
    assert devices.free() == [*first, *second]
