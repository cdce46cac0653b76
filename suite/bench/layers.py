"""What layers cost: time and memory of forward and backward, beside torch's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from norms.protocol import AfterUpdate, NormInfo, TransformWeight, hook
from norms.registry import make_norm, norm_info, norm_names, norm_option_defaults
from norms.situation import situation
from suite.bench.timing import alternate, in_fresh_process, ratio

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
    calls = {name: forward_backward(layer.to(memory_format=memory_format), x, g) for name, layer in contestants.items()}
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


def forward_backward(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], Any]:
    """A call that forwards x (N, C, *) and goes back from g, its output's gradient."""
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
        peak = in_fresh_process(_peak_of_layer, name, options, shape, channels)
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
