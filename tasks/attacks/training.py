"""Adversarial training: the network from [0, 1] images to logits, crafting a batch, one update, the loop.

Differences of "trades" from the published code (Zhang et al. 2019, github.com/yaodongyu/TRADES):

- An update forwards the images once and the examples once, so running statistics move twice: by images, by examples.
  There the images are forwarded once more for the divergence, and statistics move three times: by images, by examples,
  by images.
- The start of crafting, an image plus noise, is projected into the ball and [0, 1] before the first gradient. There
  only the iterates after it are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import NormFactory
from norms.situation import after_update, situation
from tasks.attacks.crafting import check_examples, crafting
from tasks.attacks.gradient import cross_entropy, divergence, pgd, uniform_start
from tasks.attacks.options import ADVERSARIAL, CLEAN, AdversarialOptions
from tasks.base import RunContext
from tasks.data.batches import augment, ordered_batches, shuffled_batches
from tasks.data.images import ImageData, Split
from tasks.fit import (
    EVALUATION_BATCH,
    PeakMemory,
    StepClock,
    evaluate,
    learning_rate_at,
    set_learning_rate,
)
from tasks.nets import build_net
from tasks.step import StepOptions, raise_if_diverged, train_step

TRADES_START = 0.001
"""Standard deviation of the start of TRADES' crafting: at the image itself the divergence has no gradient."""


class Standardized(nn.Module):
    """net((x - mean) / std) per channel: x (N, C, H, W) in [0, 1] -> logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str):
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def build(norm: NormFactory, data: ImageData, options: AdversarialOptions, context: RunContext) -> nn.Module:
    """The network of a run, from [0, 1] images to logits, in training mode."""
    net = build_net(
        options.model,
        norm,
        num_classes=data.num_classes,
        in_channels=data.image_shape[0],
        width=options.width,
        device=context.device,
        generator=context.generator,
    )
    standardized = Standardized(net, data.mean, data.std, context.device)
    return standardized.to(memory_format=options.memory_format)


def craft(net: nn.Module, images: Tensor, labels: Tensor, start: Tensor, options: AdversarialOptions) -> Tensor:
    """Training examples of one batch, each in its ball, crafted in the mode that the options name.

    Args:
        net: images in [0, 1] -> logits; nothing of it changes.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        start: see `draw_start`.
        options: method (not "standard"), radius, step size, steps, mode, norm batches.
    """
    assert options.crafting_mode is not None
    with crafting(net, options.crafting_mode, options.slices, f"crafting ({options.method})", options.deployed):
        if options.method == "trades":
            slices = options.slices if options.crafting_mode == "train" else 1
            with torch.no_grad(), situation(net, CLEAN, slices=slices):
                objective = divergence(net(images))
        else:
            objective = cross_entropy(labels)
        examples = pgd(
            net,
            images,
            objective,
            epsilon=options.radius,
            step_size=options.training_step_size,
            steps=options.steps or 1,  # fgsm_rs has one
            start=start,
        )
    return check_examples(examples, images, options.radius, f"crafting ({options.method})")


def draw_start(images: Tensor, options: AdversarialOptions, generator: torch.Generator) -> Tensor:
    """The first perturbation of every image, from a CPU generator: uniform in the ball, for TRADES a small normal."""
    if options.method == "trades":
        return torch.empty(images.shape).normal_(0, TRADES_START, generator=generator).to(images.device)
    return uniform_start(images, options.radius, generator)


def adversarial_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    start: Tensor | None,
    options: AdversarialOptions,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Craft, then one SGD update. Arguments and results as tasks.fit.train_step's; `start` is None for "standard".

    pgd, fgsm_rs: the cross entropy of the examples. trades: that of the images + beta * KL(images || examples), mean
    over N; both forwards move running statistics once each, images first.
    """
    per_step = StepOptions(options.slices, domain=options.deployed)
    if start is None:
        return train_step(net, optimizer, images, labels, per_step, progress=progress, step=step)
    examples = craft(net, images, labels, start, options)
    if options.method != "trades":
        return train_step(net, optimizer, examples, labels, per_step, progress=progress, step=step)

    def forward() -> tuple[Tensor, Tensor]:
        with situation(net, CLEAN, slices=options.slices):
            clean = net(images)
        with situation(net, ADVERSARIAL, slices=options.slices):
            return clean, net(examples)

    clean, attacked = forward()
    target, moved = F.log_softmax(clean, dim=1), F.log_softmax(attacked, dim=1)
    loss = F.cross_entropy(clean, labels)
    loss = loss + (options.trades_beta or 0.0) * F.kl_div(moved, target, reduction="batchmean", log_target=True)
    raise_if_diverged(loss, net, examples, per_step, f"step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    after_update(net, forward, progress)
    return loss.detach(), (attacked.detach().argmax(1) == labels).sum()


def train(
    net: nn.Module,
    data: ImageData,
    options: AdversarialOptions,
    context: RunContext,
    memory: PeakMemory,
    history: list[dict[str, float]],
) -> dict[str, float | None]:
    """Train `net` in place, append one row per epoch to `history`, return the cost metrics."""
    optimizer = options.trained_by(net)
    order, augmentation, starts = (context.generator(purpose) for purpose in ("order", "augmentation", "starts"))
    total = options.total_steps(len(data.train))
    clock, step, peak = StepClock(context.device), 0, 0.0
    for epoch in range(options.epochs):
        before = sum(clock.seconds)
        loss_sum, seen, rate = 0.0, 0, 0.0
        correct = torch.zeros((), dtype=torch.int64, device=context.device)
        for images, labels in shuffled_batches(data.train, options.batch_size, order):
            if step == total:
                break
            # the middle of the step, so that neither the first nor the last rate is 0
            done = (step + 0.5) / total
            rate = learning_rate_at(
                done, options.peak_learning_rate, options.schedule, options.warmup, options.milestones or ()
            )
            set_learning_rate(optimizer, rate)
            step += 1
            images = scaled(augment(images, augmentation, options.augmentation), options)
            start = None if options.method == "standard" else draw_start(images, options, starts)
            with clock:
                loss, right = adversarial_step(
                    net, optimizer, images, labels, start, options, progress=step / total, step=step
                )
            loss_sum += float(loss) * len(labels)
            correct += right
            seen += len(labels)
            if step % 20 == 0:
                context.report(0.6 * step / total)
        if epoch == 0:
            peak = memory.megabytes()  # before the first evaluation, whose batches may be larger
        val = evaluate(net, in_order(data.val, options), what=f"validation after step {step}", domain=options.deployed)
        history.append(
            {
                "epoch": float(epoch + 1),
                "train_loss": loss_sum / seen,
                "train_top1": float(correct) / seen,
                "val_top1": val.top1,
                "learning_rate": rate,
                "seconds": sum(clock.seconds) - before,
            }
        )
        if step == total:
            break
    return {"step_seconds": clock.median(), "peak_memory_mb": peak}


def scaled(images: Tensor, options: AdversarialOptions) -> Tensor:
    """Images (N, C, H, W) on the scale 0 to 255 -> float32 in [0, 1], in the run's memory format."""
    return (images.float() / 255).contiguous(memory_format=options.memory_format)


def in_order(part: Split, options: AdversarialOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for evaluation, images in [0, 1]."""
    return ((scaled(images, options), labels) for images, labels in ordered_batches(part, EVALUATION_BATCH))
