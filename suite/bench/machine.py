"""What the machine's settings cost: the allocator of memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch import nn

from norms.registry import make_norm
from suite.bench.layers import forward_backward
from suite.bench.timing import alternate, in_fresh_process


def allocator(rounds: int = 3) -> Iterator[str]:
    """Element-wise operations, a norm and whole steps with glibc's allocator as it is and as the suite sets it.

    The setting holds for a whole process and can not be undone, so each round starts a pair of fresh ones.
    """
    yield "allocator: seconds with blocks returned to the system / kept, and their ratio"
    pairs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        system = in_fresh_process(_allocator_probe, allocator="system")
        resident = in_fresh_process(_allocator_probe)
        for what in system:
            pairs.setdefault(what, []).append((system[what], resident[what]))
    for what, times in pairs.items():
        before, after = (statistics.median(column) for column in zip(*times, strict=True))
        yield f"  {what:<34}{before:9.4f} s{after:9.4f} s   {statistics.median(a / b for a, b in times):5.2f} x faster"


def _allocator_probe() -> dict[str, float]:
    from tasks.nets.models import build_net
    from tasks.schedule import sgd
    from tasks.step import train_step

    # glibc itself keeps freed blocks of up to 32 MiB once it has seen one: the first is below that, the second above
    small, large = torch.randn(64, 64, 32, 32), torch.randn(64, 64, 64, 64)
    layer = nn.BatchNorm2d(64)
    net = build_net("resnet8", make_norm("bn"), num_classes=10, in_channels=1)
    optimizer = sgd(net, learning_rate=0.01, momentum=0.9, weight_decay=5e-4)
    batch, labels = torch.randn(128, 1, 32, 32), torch.arange(128) % 10
    calls = {
        "relu, 16 MiB": lambda: torch.relu(small),
        "relu, 64 MiB": lambda: torch.relu(large),
        "BatchNorm2d, 16 MiB": forward_backward(layer, small, torch.randn_like(small)),
        "BatchNorm2d, 64 MiB": forward_backward(layer, large, torch.randn_like(large)),
        "training step, resnet8, batch 128": lambda: train_step(net, optimizer, batch, labels),
    }
    return {name: statistics.median(times) for name, times in alternate(calls, 9).items()}
