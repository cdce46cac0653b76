"""Adversarial training: crafting a batch, one update of each method, the loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from norms.workers import ALONE, Workers
from tasks.adversarial.crafting import check_examples, crafting
from tasks.adversarial.options import CLEAN, AdversarialOptions
from tasks.adversarial.pgd import cross_entropy, pgd, uniform_start
from tasks.adversarial.trades import divergence, normal_start, trades_step
from tasks.base import RunContext
from tasks.cost import PeakMemory
from tasks.data.batches import Share, augment
from tasks.data.reading import Data, Part, left_to_augment, stream
from tasks.data.reading import in_order as stored
from tasks.evaluate import EVALUATION_BATCH, evaluate
from tasks.loop import Loop, epoch_ends
from tasks.step import told, train_step


def craft(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    options: AdversarialOptions,
    workers: Workers = ALONE,
) -> Tensor:
    """Training examples of one batch, each in its ball, crafted in the mode that the options name.

    Args:
        net: images in [0, 1] -> logits; nothing of it changes.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        start: see `draw_start`.
        options: method (not "standard"), radius, step size, steps, mode, norm batches.
        workers: that craft the other parts of the batch at the same time.
    """
    assert options.crafting_mode is not None
    per_step, what = options.told_with(workers), f"crafting ({options.method})"
    with crafting(net, options.crafting_mode, per_step.slices, what, per_step.domain, per_step.precision, workers):
        if options.method == "trades":
            if options.crafting_mode == "eval":  # every image for itself
                per_step = replace(per_step, slices=1, workers=ALONE)
            with torch.no_grad(), told(net, images, per_step, domain=CLEAN):
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


def draw_start(
    images: Tensor, options: AdversarialOptions, generator: torch.Generator, share: Share | None = None
) -> Tensor:
    """The first perturbation of every image, from a CPU generator: uniform in the ball, for TRADES a small normal.
    share: the part of a batch that the images are, if they are not all of it."""
    if options.method == "trades":
        return normal_start(images, generator, share)
    return uniform_start(images, options.radius, generator, share)


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
    workers: Workers = ALONE,
) -> tuple[Tensor, Tensor]:
    """Craft, then one update. Arguments and results as tasks.step.train_step's; `start` is None for "standard".

    standard: the cross entropy of the images. pgd, fgsm_rs: that of the examples. trades: see `trades_step`.
    """
    place: dict[str, Any] = {"progress": progress, "step": step}
    per_step = options.told_with(workers)
    if start is None:
        return train_step(net, optimizer, images, labels, per_step, **place)
    examples = craft(net, images, labels, start, options, workers)
    if options.method == "trades":
        return trades_step(net, optimizer, images, examples, labels, options, **place, workers=workers)
    return train_step(net, optimizer, examples, labels, per_step, **place)


def train(net: nn.Module, data: Data, options: AdversarialOptions, context: RunContext, memory: PeakMemory) -> Loop:
    """Train `net` in place; the journal gets one row per epoch."""
    optimizer = options.trained_by(net)
    augmentation, starts = context.generator("augmentation"), context.generator("starts")
    batches = stream(data.train, options.batch_size, context.generator("order"), options.augmentation, context.workers)
    left, share = left_to_augment(data.train, options.augmentation), Share(options.batch_size, context.workers)
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
            images = scaled(augment(images, augmentation, left, share), options)
            start = None if options.method == "standard" else draw_start(images, options, starts, share)
            with step:
                place: dict[str, Any] = {"progress": step.progress, "step": step.number, "workers": context.workers}
                loss, right = adversarial_step(net, optimizer, images, labels, start, options, **place)
            step.saw(len(labels), right, train_loss=loss)
        what = f"validation after step {loop.step}"
        val = in_order(data.val, options, context.device, context.workers)
        found = evaluate(net, val, options.precision, what, options.deployed, context.workers)
        epoch.row["val_top1"] = found.top1
    return loop


def scaled(images: Tensor, options: AdversarialOptions) -> Tensor:
    """Images (N, C, H, W) on the scale 0 to 255 -> float32 in [0, 1], in the run's memory format."""
    return (images.float() / 255).contiguous(memory_format=options.memory_format)


def in_order(
    part: Part, options: AdversarialOptions, device: torch.device, workers: Workers
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for evaluation, images in [0, 1]: those of this worker."""
    batches = stored(part, EVALUATION_BATCH, workers)
    return ((scaled(images.to(device), options), labels.to(device)) for images, labels in batches)
