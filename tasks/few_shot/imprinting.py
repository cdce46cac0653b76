"""Imprinting (Qi et al. 2018, arXiv:1712.07136): one update of the classifier of the training classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.situation import after_update
from tasks.few_shot.episodic import update_on_mean
from tasks.few_shot.options import PLAIN
from tasks.step import StepOptions, told, wide


def imprinting_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    options: StepOptions = PLAIN,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update of the classifier of the training classes; arguments and results as `prototypical_step`'s. A batch is
    the context of its own images."""

    def forward() -> Tensor:
        with told(net, images, options, part="context"):
            return net(images)

    logits = wide(forward())
    loss = F.cross_entropy(logits, labels)
    update_on_mean(net, optimizer, [loss], images, options, step)
    after_update(net, forward, progress)
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()
