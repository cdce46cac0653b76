"""Forwards of an episode with the right statistics, the support first for norms that need it; the end of an update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from norms.protocol import NormInfo, norm_modules
from norms.situation import hold, predict, situation
from tasks.base import Diverged
from tasks.evaluate import EVALUATION_BATCH, evaluating
from tasks.step import StepOptions, update

TrainingEpisode = tuple[Tensor, Tensor, Tensor, Tensor]
"""Support (S, C, H, W), its labels (S,), query (Q, C, H, W), its labels (Q,)."""


def declared(net: nn.Module) -> list[NormInfo]:
    infos: list[Any] = [norm.norm_info for _, norm in norm_modules(net)]
    return infos


def needs_context(net: nn.Module) -> bool:
    """True if a norm of `net` has to see the support of an episode before its queries."""
    return any("context" in info.needs for info in declared(net))


def mixes_queries_in_training(net: nn.Module) -> bool:
    """True if queries of one batch see each other in training mode; after a context they do not (norms.conformance)."""
    return any(info.mixes_samples and "context" not in info.needs for info in declared(net))


def mixes_queries_in_evaluation(net: nn.Module) -> bool:
    """The same in evaluation mode."""
    return any(info.mixes_samples_in_eval and "context" not in info.needs for info in declared(net))


@contextlib.contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Within the block norms use each batch's own statistics and keep nothing; all else (dropout) is in evaluation
    mode. Afterwards every module is in the mode it was in."""
    with evaluating(net):
        for _, norm in norm_modules(net):
            norm.train()
        with hold(net):
            yield


def show_context(net: nn.Module, support: Tensor) -> None:
    """Let the norms that need it see the support; without any nothing is forwarded."""
    if needs_context(net):
        with situation(net, part="context"):
            net(support)


def forward_together(net: nn.Module, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of support (S, C, H, W) and query (Q, C, H, W), in the network's mode: one batch, or first the context
    and then the queries where a norm asks for that."""
    if needs_context(net):
        with situation(net, part="context"):
            first = net(support)
        with situation(net, part="query"):
            return first, net(query)
    both = net(torch.cat([support, query]))
    return both[: len(support)], both[len(support) :]


def forward_alone(net: nn.Module, images: Tensor) -> Tensor:
    """Evaluation outputs (N, *) of images (N, C, H, W), none of which depends on another image. Norms that need a
    context have seen it, and are told that these are queries."""
    size = 1 if mixes_queries_in_evaluation(net) else EVALUATION_BATCH
    return torch.cat([predict(net, part) for part in images.split(size)])


def forward_inductive(net: nn.Module, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluation outputs of an episode, in which no query sees another one; the support may be seen whole."""
    if not needs_context(net):
        return forward_alone(net, support), forward_alone(net, query)
    with situation(net, part="context"):
        first = predict(net, support)
    with situation(net, part="query"):
        return first, forward_alone(net, query)


def update_on_mean(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[Tensor],
    images: Tensor,
    options: StepOptions,
    step: int,
) -> None:
    """The end of each method's update: the mean of the losses, checked, and one step of the optimizer.

    Args:
        net: in training mode.
        optimizer: its learning rate is set by the caller.
        losses: scalars, one of each episode or batch.
        images: (N, C, H, W) of a forward, for the message of Diverged.
        options: gradient_clip, and what the forwards were told.
        step: for the message.

    Raises:
        Diverged: the mean is not finite.
    """
    loss = torch.stack(losses).mean()
    if needs_context(net) and loss.device.type != "meta" and not math.isfinite(value := loss.item()):
        # the message of `update` looks at the layers in a forward of its own, which has no context
        raise Diverged(f"step {step}: the loss is {value}")
    update(loss, net, optimizer, images=images, options=options, what=f"step {step}")
