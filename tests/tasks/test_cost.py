"""tasks.cost: values in norms, the clock of steps, peak memory."""

import pytest
import torch
from parts.steps import build

from tasks.cost import PeakMemory, StepClock, norm_sizes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_clock_waits_for_every_kind_of_accelerator(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name, times in (("cpu", 0), ("cuda:1", 2), ("mps", 2), ("xpu", 2)):
        with StepClock(torch.device(name)):
            pass
        assert waited == [torch.device(name)] * times
        waited.clear()


def test_norm_sizes_count_values():
    channels = 8 + 8 + 8 + 16 + 16 + 32 + 32
    assert norm_sizes(build("bn")) == (2 * channels, 2 * channels + 7)
    assert norm_sizes(build("gn")) == (2 * channels, 0)
    assert norm_sizes(build("none")) == (2 * channels, 0)


def test_the_clock_leaves_out_warm_up_and_takes_the_median():
    clock = StepClock(torch.device("cpu"))
    with pytest.raises(ValueError, match="no step"):
        clock.median()
    with clock:
        pass
    assert len(clock.seconds) == 1
    clock.seconds = [9.0, 9, 9, 9, 9, 1, 3, 2, *[2.0] * 12]
    assert clock.median() == 2
    clock.seconds = [9.0, 1, 1, 1]
    assert clock.median() == 1


def test_peak_memory_sees_what_was_allocated_and_freed():
    memory = PeakMemory(torch.device("cpu"))
    block = torch.ones(16 * 2**20)
    del block
    assert 60 < memory.megabytes() < 120
