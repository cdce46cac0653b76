"""suite.launch.choosing: what a place and a device have no use for is refused, and what is said is what happens."""

import pytest
import torch
from parts.folders import spec

from suite.launch.choosing import choose
from suite.launch.devices import VISIBLE
from suite.launch.places import read_place


def choice(on, device, jobs=None, each=None, runs=()):
    return choose(read_place(on), device, jobs, each, 1, runs)


@pytest.mark.parametrize("on", ["local", "slurm:array=2", "ray"])
def test_a_device_of_no_machine_is_refused_before_anything_is_submitted(on):
    with pytest.raises(ValueError, match='device "cuad": not a device; for example cpu, cuda'):
        choice(on, "cuad")


@pytest.mark.parametrize(
    ("on", "device", "each", "why"),
    [
        ("local", "cpu", 2, "device cpu has no accelerators"),
        ("slurm", "cpu", 2, "device cpu has no accelerators"),
        ("slurm:runs_per_device=2", "cpu", None, "device cpu has no accelerators"),
        ("ray", "cuda", 2, "gpus=0.5 lets two runs share"),
    ],
)
def test_runs_that_no_accelerator_can_share_are_refused(on, device, each, why):
    with pytest.raises(ValueError, match=f"runs-per-device 2: .*{why}"):
        choice(on, device, each=each)


def test_devices_of_another_machine_are_its_business():
    choice("slurm:gpus=4", "cuda:0,2", each=2)
    choice("slurm:gpus=4", "cuda")


def test_no_more_runs_at_a_time_are_said_than_accelerators_have_room_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv(VISIBLE, raising=False)
    assert choice("local", "cuda", jobs=8).at_a_time == "4 at a time"
    assert choice("local", "cuda:0", jobs=8, each=2).jobs == 2
    assert choice("local", "cuda", runs=[spec(workers=2)]).jobs == 2
    assert choice("local", "cuda", jobs=3).jobs == 3
