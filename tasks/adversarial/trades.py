"""TRADES (Zhang et al. 2019, arXiv:1901.08573): what its crafting climbs, and one update.

    min  CE(net(x), y) + beta * KL(net(x) || net(x')),   x' in the ball around x makes the divergence large

Differences from the published code (github.com/yaodongyu/TRADES):

- An update forwards the images once and the examples once, so running statistics move twice: by images, by examples.
  There the images are forwarded once more for the divergence, and statistics move three times: by images, by examples,
  by images.
- The start of crafting, an image plus noise, is projected into the ball and [0, 1] before the first gradient. There
  only the iterates after it are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.situation import after_update
from norms.workers import ALONE, Workers
from tasks.adversarial.options import ADVERSARIAL, CLEAN, AdversarialOptions
from tasks.adversarial.pgd import Objective
from tasks.data.batches import Share
from tasks.step import told, update, wide

START = 0.001
"""Standard deviation of the start of crafting: at the image itself the divergence has no gradient."""


def divergence(clean: Tensor) -> Objective:
    """KL(clean || attacked) of the predicted distributions, summed; `clean`: logits (N, K) of the images themselves."""
    target = F.log_softmax(wide(clean.detach()), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum", log_target=True)


def normal_start(images: Tensor, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """A small normal perturbation, (N, C, H, W) like `images`, from a CPU generator. share: as of `uniform_start`."""
    share = share or Share(len(images))
    draw = torch.empty(share.count, *images.shape[1:]).normal_(0, START, generator=generator)
    return share.of(draw).to(images.device)


def trades_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    examples: Tensor,
    labels: Tensor,
    options: AdversarialOptions,
    *,
    progress: float = 0.0,
    step: int = 0,
    workers: Workers = ALONE,
) -> tuple[Tensor, Tensor]:
    """One update on images and their examples: the cross entropy of the images + beta * KL(images || examples), mean
    over N. Both forwards move running statistics once each, images first.

    Args:
        images, examples: (N, C, H, W) in [0, 1].
        Others and results as tasks.step.train_step's; examples classified correctly are counted.
    """

    per_step = options.told_with(workers)

    def forward() -> tuple[Tensor, Tensor]:
        with told(net, images, per_step, domain=CLEAN):
            clean = net(images)
        with told(net, examples, per_step, domain=ADVERSARIAL):
            return clean, net(examples)

    clean, attacked = (wide(logits) for logits in forward())
    target, moved = F.log_softmax(clean, dim=1), F.log_softmax(attacked, dim=1)
    loss = F.cross_entropy(clean, labels)
    loss = loss + (options.trades_beta or 0.0) * F.kl_div(moved, target, reduction="batchmean", log_target=True)
    update(loss, net, optimizer, images=examples, options=per_step, what=f"step {step}")
    after_update(net, forward, progress)
    return loss.detach(), (attacked.detach().argmax(1) == labels).sum()
