"""Training: one step of the methods that learn by one loss, and the loop over epochs. MCD's step is in mcd.py.

The loop is given the target without its labels. What measures the network after every epoch is handed to it, so that
the labels are with whoever measures, and not with the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from norms.workers import Workers
from tasks.base import RunContext
from tasks.cost import PeakMemory
from tasks.data.batches import Share, augment
from tasks.data.reading import Part, left_to_augment, stream
from tasks.domain_adaptation.dann import adversarial_step
from tasks.domain_adaptation.mcd import mcd_step
from tasks.domain_adaptation.networks import AdaptationNet
from tasks.domain_adaptation.options import SOURCE, DomainAdaptationOptions
from tasks.inputs import Prepare
from tasks.loop import Epoch, Loop, epoch_ends
from tasks.step import train_step

Step = Callable[[Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]
"""(source images, labels, target images, progress, step) -> loss, source images classified correctly"""


def train(
    net: AdaptationNet,
    source: Part,
    target: Part,
    options: DomainAdaptationOptions,
    context: RunContext,
    prepare: Prepare,
    memory: PeakMemory | None = None,
    measure: Callable[[Epoch], None] = lambda epoch: None,
) -> Loop:
    """Train `net` in place.

    Args:
        net: in training mode; whoever evaluates it in between puts that back.
        source: the training part, with labels.
        target: the training part, without labels (tasks.data.reading.without_labels). "source_only" never reads it.
        options: of the run.
        context: draws by name, so that every method and norm meets the same batches of the source.
        prepare: images -> input, on the run's device.
        memory: begun before the network was built.
        measure: called after the steps of every epoch, with the network as it then is; adds to the epoch's row.

    Raises:
        Diverged: a loss is not finite.
    """
    step_of, optimizers = _method(net, options, context.workers)
    of_source, of_target = context.generator("augmentation"), context.generator("target augmentation")
    batches = stream(source, options.batch_size, context.generator("order"), options.augmentation, context.workers)
    others = stream(
        target, options.batch_size, context.generator("target order"), options.augmentation, context.workers
    )
    share = Share(options.batch_size, context.workers)
    left = left_to_augment(source, options.augmentation)  # one set: both in memory, or none
    total = options.total_steps(len(source))
    loop = Loop(
        context,
        "training",
        ends=epoch_ends(options.epochs, len(batches), total),
        rates=dict.fromkeys(optimizers, options.rate),
        keeps={"net": net},
        memory=memory,
    )
    both = options.num_domains == 2
    for epoch in loop.epochs():
        for step, (images, labels), *drawn in epoch.steps(batches, *([others] if both else [])):
            images, labels = images.to(context.device), labels.to(context.device)
            images = prepare(augment(images, of_source, left, share))
            of_other = images
            if both:
                of_other = prepare(augment(drawn[0][0].to(context.device), of_target, left, share))
            with step:
                loss, right = step_of(images, labels, of_other, step.progress, step.number)
            step.saw(len(labels), right, train_loss=loss)
        measure(epoch)
    return loop


def _method(
    net: AdaptationNet, options: DomainAdaptationOptions, workers: Workers
) -> tuple[Step, list[torch.optim.Optimizer]]:
    """The update of the method, and the optimizers whose rate follows the schedule."""
    if options.method == "mcd":
        of_features, of_heads = options.trained_by(net.backbone), options.trained_by(net.heads)

        def by_discrepancy(
            images: Tensor, labels: Tensor, others: Tensor, progress: float, step: int
        ) -> tuple[Tensor, Tensor]:
            place: dict[str, Any] = {"progress": progress, "step": step, "workers": workers}
            return mcd_step(net, of_features, of_heads, images, labels, others, options, **place)

        return by_discrepancy, [of_features, of_heads]
    optimizer = options.trained_by(net)

    def by_one_loss(
        images: Tensor, labels: Tensor, others: Tensor, progress: float, step: int
    ) -> tuple[Tensor, Tensor]:
        if options.method == "source_only":
            per_step = replace(options.told_with(workers), domain=SOURCE)
            return train_step(net, optimizer, images, labels, per_step, progress=progress, step=step)
        place: dict[str, Any] = {"progress": progress, "step": step, "workers": workers}
        return adversarial_step(net, optimizer, images, labels, others, options, **place)

    return by_one_loss, [optimizer]
