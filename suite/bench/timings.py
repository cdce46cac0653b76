"""Timings as ratios, each pair measured in one process and alternating, so that a noisy machine moves both alike.

Every function here yields lines of text as soon as they are known; the command line prints them. None of this is a
test: a ratio that a loaded machine spoils must not fail anything.
"""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.protocol import AfterUpdate, NormInfo, TransformWeight, hook
from norms.registry import make_norm, norm_info, norm_names, norm_option_defaults
from norms.situation import situation
from results.record import RunRecord, RunSpec
from results.store import write_record
from suite.bench import bookkeeping, reading, rivals
from suite.bench.timing import alternate, ratio
from suite.environment import ALLOCATOR_SWITCH, ROOT, set_allocator

LAYER_SHAPES = ((64, 64, 28, 28), (64, 16, 32, 32), (16, 256, 16, 16))
BGN_GROUPS = (1, 8, 64, 512)


def layers(rounds: int = 7) -> Iterator[str]:
    """Forward and backward of every norm beside torch's BatchNorm2d and GroupNorm, from a million elements on.

    One line per norm, input shape and memory format: median milliseconds, and the median over rounds of the ratio to
    torch.nn.BatchNorm2d and to torch.nn.GroupNorm in the same round. A norm that fuses an activation does more than
    the two. A second look after an update is not part of it. Norms that work on their convolution's weight: `pairs`.
    """
    for shape in LAYER_SHAPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            contestants = _contestants(shape)
            yield f"layers {shape} {_named(memory_format)}: forward + backward, {torch.get_num_threads()} thread(s)"
            seconds = _race(contestants, shape, memory_format, rounds)
            for norm, times in seconds.items():
                yield (
                    f"  {norm:<28}{1e3 * statistics.median(times):9.2f} ms"
                    f"{ratio(times, seconds['torch BatchNorm2d']):8.2f} x BatchNorm2d"
                    f"{ratio(times, seconds['torch GroupNorm(8)']):8.2f} x GroupNorm"
                )


def pairs(rounds: int = 7) -> Iterator[str]:
    """Forward and backward of a 3x3 convolution and a norm that works on its weight, beside the same convolution and
    torch.nn.BatchNorm2d."""
    shape = LAYER_SHAPES[0]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        contestants: dict[str, nn.Module] = {"torch BatchNorm2d": _pair(shape[1], nn.BatchNorm2d(shape[1]))}
        for name, layer in _layers(shape[1]).items():
            if _takes_weight(layer):
                contestants[name] = _pair(shape[1], layer)
        yield f"pairs {shape} {_named(memory_format)}: convolution 3x3 and norm, {torch.get_num_threads()} thread(s)"
        seconds = _race(contestants, shape, memory_format, rounds)
        for norm, times in seconds.items():
            yield (
                f"  {norm:<28}{1e3 * statistics.median(times):9.2f} ms"
                f"{ratio(times, seconds['torch BatchNorm2d']):8.2f} x convolution + BatchNorm2d"
            )


def _named(memory_format: torch.memory_format) -> str:
    return "contiguous" if memory_format is torch.contiguous_format else "channels_last"


def _race(
    contestants: dict[str, nn.Module], shape: tuple[int, ...], memory_format: torch.memory_format, rounds: int
) -> dict[str, list[float]]:
    x, g = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(memory_format=memory_format)
        for seed in (0, 1)
    )
    calls = {
        name: _forward_backward(layer.to(memory_format=memory_format), x, g) for name, layer in contestants.items()
    }
    return alternate(calls, rounds)


def _contestants(shape: tuple[int, ...]) -> dict[str, nn.Module]:
    channels, values = shape[1], shape[1] * shape[2] * shape[3]
    contestants: dict[str, nn.Module] = {
        "torch BatchNorm2d": nn.BatchNorm2d(channels),
        "torch GroupNorm(8)": nn.GroupNorm(8, channels),
    }
    for name, layer in _layers(channels).items():
        if name == "bgn":
            for groups in BGN_GROUPS:
                if values % groups == 0:
                    contestants[f"bgn(num_groups={groups})"] = make_norm("bgn", num_groups=groups)(channels)
        elif not _takes_weight(layer):
            contestants[name] = layer
    return contestants


def _layers(channels: int) -> dict[str, nn.Module]:
    """A layer of every registered norm, in 8 groups where it takes a number, with a ReLU where it fuses one."""
    found: dict[str, nn.Module] = {}
    for name in norm_names():
        options: dict[str, Any] = {"num_groups": 8} if "num_groups" in norm_option_defaults(name) else {}
        fused = nn.ReLU() if "activation" in norm_info(name).needs else None
        label = f"{name}(num_groups=8)" if options and name != "bgn" else name
        layer = make_norm(name, **options)(channels, activation=fused)
        following = hook(layer, AfterUpdate)
        if following is not None:
            following.after_update(1.0)  # past the part of training in which some are plain bn
        found[label] = layer
    return found


def _takes_weight(layer: nn.Module) -> bool:
    info = layer.norm_info
    assert isinstance(info, NormInfo)
    return "conv_weight" in info.needs or hook(layer, TransformWeight) is not None


def _pair(channels: int, norm: nn.Module) -> nn.Module:
    from tasks.nets.blocks import ConvNormAct

    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return ConvNormAct(conv, norm, None) if hasattr(norm, "norm_info") else nn.Sequential(conv, norm)


def _forward_backward(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], Any]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    halves = torch.arange(len(x)) // (len(x) // 2)  # for norms that ask: half source, half target

    def once() -> None:
        with situation(layer, halves, part="context"):
            layer(x).backward(g)
        x.grad = None

    return once


def memory(shape: tuple[int, ...] = (64, 64, 64, 64)) -> Iterator[str]:
    """Peak resident memory of one forward and backward, each norm in its own process, as a ratio to BatchNorm2d."""
    channels = shape[1]
    contestants: list[tuple[str, dict[str, Any]]] = [("torch", {}), ("bn", {})]
    contestants += [("bgn", {"num_groups": groups}) for groups in BGN_GROUPS]
    contestants += [("gn", {"num_groups": 8}), ("ln", {}), ("in", {}), ("pn", {}), ("none", {})]
    size = 4 * torch.Size(shape).numel() / 2**20
    yield f"memory {shape}: peak of forward + backward beyond input and gradient ({size:.0f} MiB each)"
    reference = 0.0
    for name, options in contestants:
        peak = _in_fresh_process(_peak_of_layer, name, options, shape, channels)
        reference = reference or peak
        label = "torch BatchNorm2d" if name == "torch" else name + "".join(f"({k}={v})" for k, v in options.items())
        total = (peak + 2 * size) / (reference + 2 * size)
        yield f"  {label:<28}{peak:9.1f} MiB{total:8.2f} x BatchNorm2d (input and gradient included)"


def _peak_of_layer(name: str, options: dict[str, Any], shape: tuple[int, ...], channels: int) -> float:
    from tasks.cost import PeakMemory

    layer = nn.BatchNorm2d(channels) if name == "torch" else make_norm(name, **options)(channels)
    small = torch.randn(2, channels, *shape[2:], requires_grad=True)
    layer(small).sum().backward()  # what is allocated once (libraries, thread pools) is not the layer's
    x, g = torch.randn(shape), torch.randn(shape)
    x.requires_grad_()
    peak = PeakMemory(torch.device("cpu"))
    layer(x).backward(g)
    return peak.megabytes() * 1e6 / 2**20


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


def allocator(rounds: int = 3) -> Iterator[str]:
    """Element-wise operations, a norm and whole steps with glibc's allocator as it is and as the suite sets it.

    The setting holds for a whole process and can not be undone, so each round starts a pair of fresh ones.
    """
    yield "allocator: seconds with blocks returned to the system / kept, and their ratio"
    pairs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        system = _in_fresh_process(_allocator_probe, allocator="system")
        resident = _in_fresh_process(_allocator_probe)
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
        "BatchNorm2d, 16 MiB": _forward_backward(layer, small, torch.randn_like(small)),
        "BatchNorm2d, 64 MiB": _forward_backward(layer, large, torch.randn_like(large)),
        "training step, resnet8, batch 128": lambda: train_step(net, optimizer, batch, labels),
    }
    return {name: statistics.median(times) for name, times in alternate(calls, 9).items()}


def _in_fresh_process(function: Callable[..., Any], *arguments: Any, allocator: str = "resident") -> Any:
    """The result of a call in a new interpreter, in which the allocator is set (or not) before torch is imported."""
    before = os.environ.get(ALLOCATOR_SWITCH)
    os.environ[ALLOCATOR_SWITCH] = allocator
    try:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            return pool.apply(_call, (function, arguments))
    finally:
        if before is None:
            del os.environ[ALLOCATOR_SWITCH]
        else:
            os.environ[ALLOCATOR_SWITCH] = before


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    set_allocator()
    torch.set_num_threads(1)
    return function(*arguments)


NOTHING = """
    from tasks import register_task
    from tasks.base import Options, Outcome, Setting

    class NothingOptions(Options):
        index: int = 0

    class Nothing:
        name, version, options, metrics = "nothing", 1, NothingOptions, ("top1",)

        def setting(self, options):
            return Setting()

        def data_checksum(self, options, data_dir):
            return "none"

        def why_not(self, norm, info, options):
            return None

        def run(self, norm, options, context):
            return Outcome({"top1": 0.5})

    register_task(Nothing())
"""
"""A task that does nothing, so that what a run of it takes is the engine's."""


def engine(few: int = 10, many: int = 60) -> Iterator[str]:
    """What the engine adds to a run: wall seconds of a grid of do-nothing runs, one job, per further run."""
    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder, "nothing.py")
        plugin.write_text(textwrap.dedent(NOTHING))
        seconds = {}
        for runs in (few, many):
            config = Path(folder, f"{runs}.yaml")
            config.write_text(json.dumps({"norms": ["bn"], "seeds": list(range(runs)), "tasks": {"nothing": {}}}))
            arguments = [str(config), "--plugin", str(plugin), "--out", str(Path(folder, str(runs))), "--jobs", "1"]
            seconds[runs] = _command("run", *arguments)[0]
        yield f"engine: {many} do-nothing runs, one job, in {seconds[many]:.1f} s, {few} in {seconds[few]:.1f} s"
        yield f"  {(seconds[many] - seconds[few]) / (many - few):.3f} s per run (its process included)"
        again = _command("run", *arguments)[0]
        yield f"  the same command again, nothing left to do: {again:.1f} s"


def jobs() -> Iterator[str]:
    """How much faster two jobs finish a grid of equal runs than one, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"dataset": "fashion_mnist_mini", "model": "resnet8", "epochs": 1}
        config = Path(folder, "jobs.yaml")
        config.write_text(json.dumps({"norms": ["bn"], "seeds": list(range(6)), "tasks": {"classification": options}}))
        one, two = (
            _command("run", str(config), "--jobs", str(n), "--out", str(Path(folder, str(n))))[0] for n in (1, 2)
        )
        yield f"jobs: 6 equal runs, one job {one:.1f} s, two jobs {two:.1f} s: {one / two:.2f} x faster, start included"


def scale(runs: int = 10_000) -> Iterator[str]:
    """A dry run over 10,000 runs; loading 10,000 made-up records and rendering every table."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "large.yaml")
        norms: list[Any] = [
            "none",
            "bn",
            "in",
            "ln",
            {"gn": {"num_groups": 8}},
            "pn",
            {"bgn": {"num_groups": [1, 2, 4, 8]}},
        ]
        axes = {"learning_rate": [0.01 * k for k in range(1, 11)], "dataset": "fashion_mnist_mini", "model": "resnet8"}
        config.write_text(json.dumps({"norms": norms, "seeds": "0-99", "tasks": {"classification": axes}}))
        seconds = _command("run", str(config), "--dry-run", "--out", str(Path(folder, "dry")))[0]
        yield f"scale: dry run of {len(norms) + 3} norms x 10 rates x 100 seeds = {runs:,} runs in {seconds:.1f} s"
        out = Path(folder, "records")
        for record in itertools.islice(_made_up_records(), runs):
            write_record(out, record)
        start = time.perf_counter()
        tables = subprocess.Popen(
            [sys.executable, str(ROOT / "run_suite.py"), "tables", str(out), "--format", "csv,latex,markdown"],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(tables.pid, 0)
        if status:
            raise RuntimeError(f"tables {out}: status {status}")
        seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 1024  # KiB on Linux
        yield f"  {runs:,} records loaded and every table rendered in {seconds:.1f} s, {peak:.0f} MiB resident at most"


def _made_up_records() -> Iterator[RunRecord]:
    draw = random.Random(0)
    norms = ["none", "bn", "in", "ln", "gn", "pn", "bgn", "mine", "yours", "theirs"]
    names = ["top1", "top1_recalibrated", "val_top1", "train_top1", "test_loss", "composition_shift", "step_seconds"]
    for seed in itertools.count():
        for norm, rate, batch in itertools.product(norms, (0.03, 0.1, 0.3), (1, 2, 4, 16, 64)):
            spec = RunSpec(
                task="classification",
                norm=norm,
                norm_options={"eps": 1e-5},
                task_options={"dataset": "made_up", "learning_rate": rate, "norm_batch_size": batch, "epochs": 20},
                seed=seed,
                norm_version="1",
                task_version="1",
                data_checksum="made up",
                norm_label=norm,
            )
            yield RunRecord(
                spec=spec,
                status="ok",
                metrics={name: draw.random() for name in names},
                history=[{"epoch": e, "train_loss": draw.random(), "val_top1": draw.random()} for e in range(20)],
                environment={"commit": "none", "torch": "none", "device": "cpu", "threads": 1},
                evidence={"data": "synthetic", "budget": "reduced", "selection": "last epoch"},
            )


def _command(*arguments: str) -> tuple[float, str]:
    """Wall seconds and output of a `run_suite.py` command, the interpreter's start included."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_suite.py"), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, done.stdout


BENCHMARKS: dict[str, Callable[[], Iterator[str]]] = {
    "layers": layers,
    "pairs": pairs,
    "memory": memory,
    "steps": steps,
    "search": search,
    "attacks": rivals.attacks,
    "episodes": rivals.episodes,
    "checkpoints": bookkeeping.checkpoints,
    "loop": bookkeeping.loop,
    "data": reading.data,
    "allocator": allocator,
    "engine": engine,
    "jobs": jobs,
    "scale": scale,
}
