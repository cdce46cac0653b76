"""Costs of bookkeeping in training, as ratios: checkpoints beside a minute of steps, the loop beside a bare loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.registry import make_norm
from suite.bench.timing import alternate, ratio
from suite.checkpoints import NEWEST, Checkpoints
from tasks.base import RunContext
from tasks.data.stream import Drawn
from tasks.journal import Journal
from tasks.loop import Loop
from tasks.nets.models import build_net
from tasks.schedule import set_learning_rate, sgd
from tasks.step import train_step

MINUTE = 60.0
"""Seconds between two checkpoints."""


def checkpoints(saves: int = 7) -> Iterator[str]:
    """Time that training waits for a checkpoint, as a part of a minute of steps: the run itself writes it.

    A copy of the state at hand, and writing it: serialized, synced, renamed. The first one is left out.
    """
    for model, shape in (("resnet18_narrow", (64, 1, 32, 32)), ("resnet50", (4, 3, 64, 64))):
        with tempfile.TemporaryDirectory() as folder:
            net, optimizer, batches = _training(model, shape)
            copied: list[float] = []
            written: list[float] = []
            stored = Checkpoints(Path(folder), "bench", {}, print, time.perf_counter)
            journal = Journal(save=_timed(stored.save, written), every=0.0)
            journal.keep = _timed(journal.keep, copied)  # type: ignore[method-assign]
            loop = Loop(
                RunContext(torch.device("cpu"), 0, Path(), Path(folder), journal=journal),
                "training",
                ends=[saves + 1],
                rates={optimizer: lambda progress: 0.01},
                keeps={"net": net},
            )
            for epoch in loop.epochs():
                for step, (images, labels) in epoch.steps(batches):
                    with step:
                        loss, right = train_step(net, optimizer, images, labels, step=step.number)
                    step.saw(len(labels), right, train_loss=loss)
            size = (Path(folder) / NEWEST).stat().st_size / 1e6
            waited = [c + w for c, w in zip(copied[1:], written[1:], strict=False)]
            yield (
                f"checkpoints {model}: {size:.0f} MB; a step {statistics.median(loop.clock.seconds):.3f} s; copying "
                f"{statistics.median(copied[1:]):.3f} s, writing {statistics.median(written[1:]):.3f} s"
            )
            cost = (100 * seconds / MINUTE for seconds in (statistics.median(waited), max(waited)))
            yield "  every {:.0f} s: {:.2f} % of the time at the median, {:.2f} % at the worst".format(MINUTE, *cost)


def loop(rounds: int = 9, steps: int = 20) -> Iterator[str]:
    """An epoch of steps in the loop, its state kept at the end, beside the same steps in a bare `for`."""
    for model, shape in (("resnet8", (64, 1, 32, 32)), ("resnet18_narrow", (64, 1, 32, 32))):
        net, optimizer, batches = _training(model, shape)

        def ours(net: Any = net, optimizer: Any = optimizer, batches: Any = batches) -> None:
            journal = Journal(save=lambda state, position: True)
            context = RunContext(torch.device("cpu"), 0, Path(), Path(), journal=journal)
            rates = {optimizer: lambda progress: 0.01}
            for epoch in Loop(context, "training", ends=[steps], rates=rates, keeps={"net": net}).epochs():
                for step, (images, labels) in epoch.steps(batches):
                    with step:
                        loss, right = train_step(net, optimizer, images, labels, step=step.number)
                    step.saw(len(labels), right, train_loss=loss)

        def bare(net: Any = net, optimizer: Any = optimizer, batches: Any = batches) -> None:
            total, correct = 0.0, torch.zeros((), dtype=torch.int64)
            for step in range(steps):
                images, labels = next(batches)
                set_learning_rate(optimizer, 0.01)
                loss, right = train_step(net, optimizer, images, labels, step=step)
                total += float(loss) * len(labels)
                correct = correct + right

        seconds = alternate({"ours": ours, "bare": bare}, rounds)
        cost = 100 * (ratio(seconds["ours"], seconds["bare"]) - 1)
        yield (
            f"loop {model}: {steps} steps in {statistics.median(seconds['ours']):.3f} s, in a bare for "
            f"{statistics.median(seconds['bare']):.3f} s: {cost:+.2f} %"
        )


def _training(
    model: str, shape: tuple[int, int, int, int]
) -> tuple[nn.Module, torch.optim.Optimizer, Drawn[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net = build_net(model, make_norm("bn"), num_classes=10, in_channels=shape[1])
    net = net.to(memory_format=torch.channels_last)
    batch = torch.randn(shape).contiguous(memory_format=torch.channels_last), torch.arange(shape[0]) % 10
    return net, sgd(net, learning_rate=0.01, momentum=0.9, weight_decay=5e-4), Drawn(lambda: batch)


def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    return timed
