"""Prototypical networks (Snell et al. 2017, arXiv:1703.05175): one update on episodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.situation import after_update
from tasks.few_shot.episodic import TrainingEpisode, forward_together, update_on_mean
from tasks.few_shot.heads import prototypical
from tasks.few_shot.options import PLAIN
from tasks.step import StepOptions, told, wide


def prototypical_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    episodes: list[TrainingEpisode],
    way: int,
    options: StepOptions = PLAIN,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update of a prototypical network.

    Args:
        net: in training mode.
        optimizer: its learning rate is set by the caller.
        episodes: of the update; see TrainingEpisode.
        way: classes per episode.
        options: precision and gradient_clip.
        progress: fraction of training that is done after this step.
        step: for the message only.

    Returns:
        The mean loss before the update and the number of queries classified correctly.

    Raises:
        Diverged: the loss is not finite.
    """

    images = episodes[-1][2]

    def forward() -> list[tuple[Tensor, Tensor]]:
        with told(net, images, options):
            return [forward_together(net, support, query) for support, _, query, _ in episodes]

    losses, correct = [], []
    for (first, second), (_, support_labels, _, query_labels) in zip(forward(), episodes, strict=True):
        logits = prototypical(wide(first), support_labels, wide(second), way)
        losses.append(F.cross_entropy(logits, query_labels))
        correct.append((logits.detach().argmax(1) == query_labels).sum())
    update_on_mean(net, optimizer, losses, images, options, step)
    after_update(net, forward, progress)
    return torch.stack(losses).mean().detach(), torch.stack(correct).sum()
