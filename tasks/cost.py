"""The cost of training: values in norms, seconds of a step, peak memory."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from norms.protocol import norm_modules

WARM_UP_STEPS = 5
"""Steps that `StepClock.median` leaves out (a quarter of a shorter run's)."""


def norm_sizes(net: nn.Module) -> tuple[int, int]:
    """Numbers of values in the parameters and in the buffers of all norms of `net`."""
    norms = [norm for _, norm in norm_modules(net)]
    return (
        sum(p.numel() for norm in norms for p in norm.parameters()),
        sum(b.numel() for norm in norms for b in norm.buffers()),
    )


class StepClock:
    """Wall seconds of training steps: `with clock: train_step(...)`. Accelerators are waited for at both ends."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, list[float]()

    def __enter__(self) -> None:
        self._wait()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float:
        """Median over the steps after WARM_UP_STEPS. Raises ValueError before the first step."""
        if not self.seconds:
            raise ValueError("no step was timed")
        return statistics.median(self.seconds[min(WARM_UP_STEPS, len(self.seconds) // 4) :])

    def _wait(self) -> None:
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)


class PeakMemory:
    """Largest memory in use since `PeakMemory(device)`, above what was in use then.

    CUDA: what torch's allocator handed out. CPU: the process's resident memory without the pages of library files,
    from /proc where the kernel allows the high-water mark to be reset; elsewhere the growth of the process's largest
    resident set, a lower bound. Other accelerators: as on the CPU, so without the accelerator's own memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            _return_free_memory()
            with contextlib.suppress(OSError):  # no such file, or not ours to write: the mark is then never reset
                Path("/proc/self/clear_refs").write_text("5")
            self.before = _peak_resident()

    def megabytes(self) -> float:
        """In units of 10^6 bytes."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _peak_resident()
        return max(0, peak - self.before) / 1e6


def _peak_resident() -> int:
    """High-water mark of the process's resident memory in bytes, less the file pages that are resident now."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) * 1024
    except (OSError, KeyError):
        import resource  # not on every system that has torch

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _return_free_memory() -> None:
    """Ask glibc to return free heap, which would otherwise hide the growth; no-op elsewhere."""
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
