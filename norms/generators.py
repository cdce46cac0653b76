"""Random generators that a layer's own draws must not move."""

from __future__ import annotations

import contextlib

import torch


def forked_generators(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Restores the generators that a layer on this device can draw from: the CPU's, and an accelerator's own."""
    if device.type in ("cpu", "meta", "mps"):  # fork_rng has no mps; torch's layers draw nothing there by themselves
        return torch.random.fork_rng(devices=[])
    if not torch.get_device_module(device).is_available():  # a fake device: shapes are checked, nothing is drawn
        return torch.random.fork_rng(devices=[])
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    return torch.random.fork_rng(devices=[index], device_type=device.type)
