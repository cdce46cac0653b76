"""The accelerators of this machine as slots: which are visible, and which of them the runs that go on have."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from results.escape import cut

VISIBLE = "CUDA_VISIBLE_DEVICES"
_SOME = re.compile(r"cuda:(\d+(?:,\d+)*)")


def slots_of(device: str) -> list[str] | None:
    """The accelerators that a device names, in the words of CUDA_VISIBLE_DEVICES: "cuda" all that are visible,
    "cuda:0,2" the first and the third of them. None for a device of another kind, which is one slot without a name.

    Raises:
        ValueError: a device that is not here, or one that is named twice.
    """
    import torch

    chosen = _SOME.fullmatch(device)
    if chosen is None and device != "cuda":
        check_device(device)
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = list(range(count)) if chosen is None else [int(number) for number in chosen[1].split(",")]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f'device "{cut(device, 40)}": names an accelerator twice')
    if not numbers or max(numbers) >= count:
        raise _not_here(device, count)
    # a scheduler may have chosen some, by number or by name; ours count among those
    given = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    names = given[:count] if len(given) >= count else [str(number) for number in range(count)]
    return [names[number] for number in numbers]


def check_form(device: str) -> None:
    """ValueError for what is a device on no machine; whether there is such a one elsewhere is not known here."""
    if not _SOME.fullmatch(device):
        _kind(device)


def check_device(device: str) -> None:
    """ValueError for a device that is not here, and for several: those are for runs of their own (`slots_of`)."""
    import torch

    shown = cut(device, 40)
    if _SOME.fullmatch(device) and "," in device:
        raise ValueError(f'device "{shown}": one device is needed here, such as cuda:0')
    kind = _kind(device)
    if kind.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # torch takes 256 for 0 without a word
        if str(kind) != device or (kind.index or 0) >= count:
            raise _not_here(device, count)
    elif kind.type == "cpu":
        if device not in ("cpu", "cpu:0"):
            raise ValueError(f'device "{shown}": there is one cpu')
    else:
        try:
            torch.zeros(1, device=kind).item()  # a value to look at: there is none on "meta"
        except Exception as error:  # each kind that is not here has its own, ImportError among them
            raise ValueError(f'device "{shown}": not available here; cpu always is') from error


def devices_of(device: str, size: int) -> list[str]:
    """The devices of `size` workers on this machine, by rank.

    Raises:
        ValueError: there are fewer, or this device can not have several workers.
    """
    import torch

    where = torch.device(device)
    if where.type == "cpu":
        return [device] * size
    if where.type != "cuda":
        raise ValueError(f'device "{cut(device, 40)}": several workers compute on cpu or cuda')
    if where.index is not None and size > 1:
        raise ValueError(f'device "{cut(device, 40)}" is one, and {size} workers need one each: device "cuda"')
    count = torch.cuda.device_count()
    if count < size:
        raise ValueError(
            f"{size} workers need a CUDA device each, and {count} are visible to this run; fewer workers, "
            "CUDA_VISIBLE_DEVICES with more of them, or torchrun over several machines"
        )
    return [f"cuda:{number}" for number in range(size)]


def _kind(device: str) -> Any:
    """What torch understands by a device."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of kinds that torch is about to give up
            return torch.device(device)
    except RuntimeError as error:
        shown = cut(device, 40)
        raise ValueError(f'device "{shown}": not a device; for example cpu, cuda, cuda:1 or cuda:0,2') from error


def _not_here(device: str, count: int) -> ValueError:
    return ValueError(f'device "{cut(device, 40)}": {count} CUDA devices are available here; cpu always is')


@dataclass
class Devices:
    """Accelerators, each with room for some runs.

    Args:
        names: in the words of CUDA_VISIBLE_DEVICES.
        runs_each: that share one at a time.
    """

    names: list[str]
    runs_each: int = 1
    used: Counter[str] = field(default_factory=Counter)

    @property
    def places(self) -> int:
        """The number of runs, of one accelerator each, at a time."""
        return len(self.names) * self.runs_each

    def free(self) -> list[str]:
        """Those with room for one more run, the emptiest first."""
        return sorted((name for name in self.names if self.used[name] < self.runs_each), key=lambda n: self.used[n])

    def take(self, count: int) -> tuple[str, ...]:
        """So many different ones, for one run. The caller has seen that there is room."""
        taken = tuple(self.free()[:count])
        assert len(taken) == count
        self.used.update(taken)
        return taken

    def give_back(self, taken: tuple[str, ...]) -> None:
        self.used.subtract(taken)
