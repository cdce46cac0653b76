"""Adversarial training: the network from [0, 1] images to logits, crafting a batch, one update, the loop.

Differences of "trades" from the published code (Zhang et al. 2019, github.com/yaodongyu/TRADES):

- An update forwards the images once and the examples once, so running statistics move twice: by images, by examples.
  There the images are forwarded once more for the divergence, and statistics move three times: by images, by examples,
  by images.
- The start of crafting, an image plus noise, is projected into the ball and [0, 1] before the first gradient. There
  only the iterates after it are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.situation import after_update
from tasks.adversarial.crafting import check_examples, crafting
from tasks.adversarial.gradient import cross_entropy, divergence, pgd, uniform_start
from tasks.adversarial.options import ADVERSARIAL, CLEAN, AdversarialOptions
from tasks.base import RunContext
from tasks.cost import PeakMemory
from tasks.data.batches import augment
from tasks.data.reading import Data, Part, left_to_augment, stream
from tasks.data.reading import in_order as stored
from tasks.evaluate import EVALUATION_BATCH, evaluate
from tasks.loop import Loop, epoch_ends
from tasks.nets.models import build_net
from tasks.step import told, train_step, update, wide

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


def facts_of(data: Data) -> dict[str, Any]:
    """What `build` needs to know of a data set, as JSON has it."""
    channels = data.image_shape[0]
    return {"num_classes": data.num_classes, "in_channels": channels, "mean": data.mean, "std": data.std}


def build(
    norm: NormFactory,
    options: AdversarialOptions,
    facts: Mapping[str, Any],
    device: torch.device | str = "cpu",
    generator: Callable[[str], torch.Generator] | None = None,
) -> nn.Module:
    """The network of a run, from [0, 1] images to logits, in training mode. `generator`: as build_net's."""
    net = build_net(
        options.model,
        norm,
        num_classes=facts["num_classes"],
        in_channels=facts["in_channels"],
        width=options.width,
        device=device,
        generator=generator,
    )
    return options.ready(Standardized(net, facts["mean"], facts["std"], device))


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
    per_step, what = options.told, f"crafting ({options.method})"
    with crafting(net, options.crafting_mode, per_step.slices, what, per_step.domain, per_step.precision):
        if options.method == "trades":
            slices = options.slices if options.crafting_mode == "train" else 1
            with torch.no_grad(), told(net, images, per_step, domain=CLEAN, slices=slices):
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
    return check_examples(examples, images, options.radius, what)


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
    """Craft, then one update. Arguments and results as tasks.step.train_step's; `start` is None for "standard".

    pgd, fgsm_rs: the cross entropy of the examples. trades: that of the images + beta * KL(images || examples), mean
    over N; both forwards move running statistics once each, images first.
    """
    if start is None:
        return train_step(net, optimizer, images, labels, options.told, progress=progress, step=step)
    examples = craft(net, images, labels, start, options)
    if options.method != "trades":
        return train_step(net, optimizer, examples, labels, options.told, progress=progress, step=step)

    def forward() -> tuple[Tensor, Tensor]:
        with told(net, images, options.told, domain=CLEAN):
            clean = net(images)
        with told(net, examples, options.told, domain=ADVERSARIAL):
            return clean, net(examples)

    clean, attacked = (wide(logits) for logits in forward())
    target, moved = F.log_softmax(clean, dim=1), F.log_softmax(attacked, dim=1)
    loss = F.cross_entropy(clean, labels)
    loss = loss + (options.trades_beta or 0.0) * F.kl_div(moved, target, reduction="batchmean", log_target=True)
    update(loss, net, optimizer, images=examples, options=options.told, what=f"step {step}")
    after_update(net, forward, progress)
    return loss.detach(), (attacked.detach().argmax(1) == labels).sum()


def train(
    net: nn.Module, data: Data, options: AdversarialOptions, context: RunContext, memory: PeakMemory
) -> dict[str, float]:
    """Train `net` in place; the journal gets one row per epoch. Returns the cost metrics."""
    optimizer = options.trained_by(net)
    augmentation, starts = context.generator("augmentation"), context.generator("starts")
    batches = stream(data.train, options.batch_size, context.generator("order"), options.augmentation)
    left = left_to_augment(data.train, options.augmentation)
    total = options.total_steps(len(data.train))
    loop = Loop(
        context,
        "training",
        ends=epoch_ends(options.epochs, len(batches), total),
        rates={optimizer: options.rate},
        keeps={"net": net},
        memory=memory,
    )
    for epoch in loop.epochs():
        for step, (images, labels) in epoch.steps(batches):
            images, labels = images.to(context.device), labels.to(context.device)
            images = scaled(augment(images, augmentation, left), options)
            start = None if options.method == "standard" else draw_start(images, options, starts)
            with step:
                loss, right = adversarial_step(
                    net, optimizer, images, labels, start, options, progress=step.progress, step=step.number
                )
            step.saw(len(labels), right, train_loss=loss)
        what = f"validation after step {loop.step}"
        val = evaluate(net, in_order(data.val, options, context.device), options.precision, what, options.deployed)
        epoch.row["val_top1"] = val.top1
    return {"step_seconds": loop.clock.median(), "peak_memory_mb": loop.peak}


def scaled(images: Tensor, options: AdversarialOptions) -> Tensor:
    """Images (N, C, H, W) on the scale 0 to 255 -> float32 in [0, 1], in the run's memory format."""
    return (images.float() / 255).contiguous(memory_format=options.memory_format)


def in_order(part: Part, options: AdversarialOptions, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for evaluation, images in [0, 1]."""
    batches = stored(part, EVALUATION_BATCH)
    return ((scaled(images.to(device), options), labels.to(device)) for images, labels in batches)
