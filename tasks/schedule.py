"""The parameter groups of weight decay, the optimizers, and the schedules of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from norms import plugins
from norms.protocol import norm_modules
from norms.values import nearest

Schedule = Literal["cosine", "onecycle", "constant", "steps"]
MILESTONES = (0.5, 0.75)
"""Of the schedule "steps": He et al. 2015 for CIFAR-10."""
BETAS = (0.9, 0.999)
OPTIMIZERS = ("sgd", "adamw")
"""The suite's own."""

BuildOptimizer = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]
_REGISTERED: dict[str, BuildOptimizer] = {}


def register_optimizer(name: str, *, replace: bool = False) -> Callable[[BuildOptimizer], BuildOptimizer]:
    """Decorator of a function `(groups, learning_rate) -> torch.optim.Optimizer`: `optimizer: NAME` then trains by it.

    The function gets the two groups that ours get (`parameter_groups`: with and without weight decay, one of them where
    the other is empty) and the peak learning rate. The loop sets `lr` of every group before each step, and calls
    `step()` without a closure once the gradients are there.

    Args:
        name: lower case letters, digits and underscores.
        replace: replace one that was registered at the prompt, or by a program; for notebooks.

    Raises:
        ValueError: the name is malformed or taken.
    """
    plugins.check_name("optimizer", name)

    def add(build: BuildOptimizer) -> BuildOptimizer:
        if name in OPTIMIZERS or name in _REGISTERED:
            plugins.check_free("optimizer", name, "", replace=replace, of_the_suite=name in OPTIMIZERS)
        plugins.registered("optimizer", name, lambda: _REGISTERED)
        _REGISTERED[name] = build
        return build

    return add


def check_optimizer(name: str) -> str:
    """The name itself. Raises ValueError, with the nearest, for an unknown one."""
    if name not in OPTIMIZERS and name not in _REGISTERED and not plugins.load_offered("optimizer", name):
        known = (*OPTIMIZERS, *_REGISTERED)
        raise ValueError(f'unknown optimizer "{name}"; optimizers: {", ".join(known)}{nearest(name, known)}')
    return name


def registered_optimizer(
    name: str, net: nn.Module, *, learning_rate: float, weight_decay: float, norm_weight_decay: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that a user registered, over `parameter_groups`.

    Raises:
        ValueError: an unknown name; what the function returns is no optimizer, or does not move every parameter.
    """
    check_optimizer(name)
    groups = parameter_groups(net, weight_decay, norm_weight_decay)
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    optimizer = _REGISTERED[name](groups, learning_rate)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f'optimizer "{name}" returned a {type(optimizer).__name__}; a torch.optim.Optimizer is needed')
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if moved != wanted:
        raise ValueError(f'optimizer "{name}" moves {len(moved & wanted)} of the {len(wanted)} parameters that it got')
    return optimizer


def parameter_groups(net: nn.Module, weight_decay: float, norm_weight_decay: bool = False) -> list[dict[str, Any]]:
    """Two optimizer groups: with and without decay.

    Not decayed: parameters named `bias`, and every parameter of every norm, whatever its name or shape; norms are
    recognized by the stamp of `make_norm`. With `norm_weight_decay` all parameters of all norms are decayed.
    """
    of_norms = {id(p) for _, norm in norm_modules(net) for p in norm.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        in_norm = id(parameter) in of_norms
        decays = norm_weight_decay if in_norm else name.rpartition(".")[2] != "bias"
        (decayed if decays else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def sgd(
    net: nn.Module,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    norm_weight_decay: bool = False,
    nesterov: bool = True,
) -> torch.optim.SGD:
    """SGD over `parameter_groups`, its momentum (where above 0) Nesterov's unless told otherwise."""
    groups = parameter_groups(net, weight_decay, norm_weight_decay)
    nesterov = nesterov and momentum > 0
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, foreach=True)


def adamw(
    net: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    norm_weight_decay: bool = False,
    betas: tuple[float, float] = BETAS,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over `parameter_groups`."""
    groups = parameter_groups(net, weight_decay, norm_weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, foreach=True)


def learning_rate_at(
    progress: float, peak: float, schedule: Schedule, warmup: float, milestones: Sequence[float] = MILESTONES
) -> float:
    """The learning rate after the fraction `progress` in [0, 1] of all steps; `warmup` is below 1.

    cosine: linear from 0 to `peak` over the fraction `warmup`, then half a cosine to 0.
    onecycle: half a cosine from peak / 25 to `peak` over `warmup`, then half a cosine to peak / 250,000 (Smith & Topin
    2018 in torch's version, without its cycle of the momentum).
    constant: the linear warm-up, then `peak`.
    steps: the linear warm-up, then `peak`, divided by 10 from each of `milestones` on (fractions of all steps; the
    default is He et al.'s 2015 for CIFAR-10).
    """
    start, end = (peak / 25, peak / 250_000) if schedule == "onecycle" else (0.0, 0.0)
    if progress < warmup:
        done = progress / warmup
        if schedule == "onecycle":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + (peak - start) * done
    if schedule == "constant":
        return peak
    if schedule == "steps":
        return peak / 10 ** sum(progress >= milestone for milestone in milestones)
    left = (1 - progress) / (1 - warmup)
    return end + (peak - end) * (1 - math.cos(math.pi * left)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
