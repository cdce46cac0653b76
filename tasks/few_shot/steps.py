"""The end of every method's update: the mean of the losses, checked, and one step of the optimizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tasks.base import Diverged
from tasks.few_shot.episodic import needs_context
from tasks.step import StepOptions, update


def update_on_mean(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[Tensor],
    images: Tensor,
    options: StepOptions,
    step: int,
) -> None:
    loss = torch.stack(losses).mean()
    if needs_context(net) and loss.device.type != "meta" and not math.isfinite(value := loss.item()):
        # the message of `update` looks at the layers in a forward of its own, which has no context
        raise Diverged(f"step {step}: the loss is {value}")
    update(loss, net, optimizer, images=images, options=options, what=f"step {step}")
