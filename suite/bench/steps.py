"""What training steps cost: small norm batches beside large ones, architecture search beside a bare loop."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from norms.registry import make_norm
from suite.bench.timing import alternate, ratio


def steps(rounds: int = 25) -> Iterator[str]:
    """Training-step time of norm batch 2 inside an SGD batch of 64, as a ratio to norm batch 64.

    On the networks of the configs at 32x32, with the task's defaults (channels_last).
    """
    from tasks.nets.models import build_net
    from tasks.schedule import sgd
    from tasks.step import StepOptions, train_step

    x = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    x, labels = x.contiguous(memory_format=torch.channels_last), torch.arange(64) % 10
    groups: tuple[dict[str, Any], ...] = ({"num_groups": 1}, {"num_groups": 8}, {"num_groups": 64})
    cases = [("bn", {}), *(("bgn", g) for g in groups), ("gn", {"num_groups": 8})]
    for model in ("resnet18_narrow", "resnet8"):
        yield f"steps {model}, SGD batch 64: median seconds of a training step"
        for name, options in [*cases, ("ln", {}), ("in", {}), ("pn", {}), ("none", {})]:
            contestants = {}
            for slices in (1, 32):
                net = build_net(model, make_norm(name, **options), num_classes=10, in_channels=1)
                net = net.to(memory_format=torch.channels_last)
                optimizer = sgd(net, learning_rate=0.01, momentum=0.9, weight_decay=5e-4)
                contestants[slices] = _step(train_step, net, optimizer, x, labels, StepOptions(slices=slices))
            seconds = alternate({str(k): call for k, call in contestants.items()}, rounds)
            label = name + "".join(f"({k}={v})" for k, v in options.items())
            yield (
                f"  {label:<20} norm batch 64: {statistics.median(seconds['1']):.4f} s   "
                f"2: {statistics.median(seconds['32']):.4f} s   ratio {ratio(seconds['32'], seconds['1']):.2f}"
            )


def _step(train_step: Callable[..., Any], net: nn.Module, *arguments: Any) -> Callable[[], Any]:
    return lambda: train_step(net, *arguments)


def search(rounds: int = 7) -> Iterator[str]:
    """Search steps per second of architecture_search, first and second order, beside the same network stepped by a bare
    loop (backward through everything, no norm batches, no held statistics, no checks)."""
    from tasks.architecture_search.architect import (
        SearchStepOptions,
        architecture_optimizer,
        architecture_step,
        weights_step,
    )
    from tasks.architecture_search.networks import SearchNetwork
    from tasks.schedule import sgd

    size, batch = 16, 32
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(2, batch, 1, size, size, generator=draw)
    pairs = [(x.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10) for x in images]

    def contestant(second: bool, bare: bool) -> Callable[[], Any]:
        net = SearchNetwork(4, 3, norm=make_norm("bn"), in_channels=1, num_classes=10)
        net = net.to(memory_format=torch.channels_last)
        weights = sgd(net.body, learning_rate=0.025, momentum=0.9, weight_decay=3e-4, nesterov=False)
        adam = architecture_optimizer(net, 0.01, 1e-3)
        options = SearchStepOptions(second_order=second)

        def ours() -> None:
            architecture_step(net, weights, adam, pairs[0], pairs[1], options)
            weights_step(net, weights, pairs[0], options)

        return (lambda: _bare_search_step(net, weights, adam, pairs, second)) if bare else ours

    threads = torch.get_num_threads()
    yield f"search: 4 channels, 3 cells, batch {batch}, {size}x{size}, bn: search steps per second, {threads} thread(s)"
    for name, second in (("first order", False), ("second order", True)):
        seconds = alternate({str(bare): contestant(second, bare) for bare in (False, True)}, rounds)
        ours, bare = (1 / statistics.median(seconds[key]) for key in ("False", "True"))
        overhead = 100 * (ratio(seconds["False"], seconds["True"]) - 1)
        yield f"  {name:<14}{ours:6.2f} /s   bare loop {bare:6.2f} /s   overhead {overhead:+.0f} %"


def _bare_search_step(net: Any, weights: Any, adam: Any, pairs: Any, second: bool) -> None:
    """A search step in the order of the published code, without the suite's checks."""

    def loss(network: Any, pair: Any) -> Tensor:
        return nn.functional.cross_entropy(network(pair[0]), pair[1])

    adam.zero_grad()
    if not second:
        loss(net, pairs[1]).backward()
    else:
        rate, momentum, params = 0.025, 0.9, list(net.body.parameters())
        architecture = list(net.architecture.parameters())
        gradients = torch.autograd.grad(loss(net, pairs[0]), params)
        unrolled = copy.deepcopy(net)
        with torch.no_grad():
            for p, own, g in zip(unrolled.body.parameters(), params, gradients, strict=True):
                buffer = weights.state.get(own, {}).get("momentum_buffer", 0.0)
                p.sub_(rate * (momentum * buffer + g + 3e-4 * own))
        loss(unrolled, pairs[1]).backward()
        vector = [p.grad for p in unrolled.body.parameters()]
        radius = 0.01 / torch.cat([v.flatten() for v in vector]).norm()
        sides = []
        for step in (radius, -2 * radius):
            with torch.no_grad():
                for p, v in zip(params, vector, strict=True):
                    p.add_(step * v)
            sides.append(torch.autograd.grad(loss(net, pairs[0]), architecture))
        with torch.no_grad():
            for p, v in zip(params, vector, strict=True):
                p.add_(radius * v)
        for p, other, plus, minus in zip(architecture, unrolled.architecture.parameters(), *sides, strict=True):
            p.grad = other.grad - rate * (plus - minus) / (2 * radius)
    adam.step()
    weights.zero_grad()
    loss(net, pairs[0]).backward()
    nn.utils.clip_grad_norm_(net.body.parameters(), 5.0)
    weights.step()
