"""Training on several domains at once, and what is measured on each of them and on the unseen one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from norms.workers import ALONE, Workers
from tasks.base import RunContext
from tasks.cost import PeakMemory
from tasks.data.batches import Share, augment
from tasks.data.reading import Data, Part, in_order, left_to_augment, stream
from tasks.domain_generalization.options import DomainGeneralizationOptions
from tasks.evaluate import EVALUATION_BATCH, Evaluation, evaluate
from tasks.inputs import Prepare
from tasks.loop import Epoch, Loop, epoch_ends
from tasks.step import Precision, train_step


def train(
    net: nn.Module,
    sources: Sequence[Part],
    options: DomainGeneralizationOptions,
    context: RunContext,
    prepare: Prepare,
    memory: PeakMemory,
    measure: Callable[[Epoch], None],
) -> Loop:
    """Train `net` in place on batches [domain 0; domain 1; ...].

    Args:
        net: in training mode.
        sources: training parts, in the order in which norms number the domains.
        options: of the run.
        context: draws by name.
        prepare: images -> input, on the run's device.
        memory: begun before the network was built.
        measure: called after the steps of every epoch, with the network as it then is; adds to the epoch's row.

    Raises:
        Diverged: the loss is not finite.
    """
    optimizer = options.trained_by(net)
    # on the CPU, where norms look at it without waiting for the device
    domains = torch.arange(len(sources)).repeat_interleave(options.batch_size)
    share = Share(len(domains), context.workers, groups=len(sources))
    workers = replace(context.workers, blocks=len(sources))
    per_step = replace(options.told_with(workers), domain=share.of(domains))
    draws = context.generator("augmentation")
    # a small domain is passed more often than a large one
    streams = [
        stream(part, options.batch_size, context.generator(f"order of {name}"), options.augmentation, context.workers)
        for part, name in zip(sources, options.sources, strict=True)
    ]
    left = left_to_augment(sources[0], options.augmentation)  # one set: all of it in memory, or nothing
    images_each = sum(len(part) for part in sources) // len(sources)
    total = options.total_steps(images_each)
    loop = Loop(
        context,
        "training",
        ends=epoch_ends(options.epochs, images_each // options.batch_size, total),
        rates={optimizer: options.rate},
        keeps={"net": net},
        memory=memory,
    )
    for epoch in loop.epochs():
        for step, *pairs in epoch.steps(*streams):
            images, labels = (torch.cat(tensors).to(context.device) for tensors in zip(*pairs, strict=True))
            images = prepare(augment(images, draws, left, share))
            with step:
                loss, right = train_step(
                    net, optimizer, images, labels, per_step, progress=step.progress, step=step.number
                )
            step.saw(len(labels), right, train_loss=loss)
        measure(epoch)
    return loop


def over_sources(
    net: nn.Module,
    parts: Sequence[Part],
    prepare: Prepare,
    what: str,
    precision: Precision = "float32",
    workers: Workers = ALONE,
) -> float:
    """Mean accuracy over one part of each source domain, each forwarded as of its domain."""
    found = [
        evaluate(net, _in_order(part, prepare, workers), precision, f"{what}, domain {domain}", domain, workers).top1
        for domain, part in enumerate(parts)
    ]
    return sum(found) / len(found)


def on_unseen(
    net: nn.Module,
    data: Data,
    prepare: Prepare,
    what: str,
    precision: Precision = "float32",
    workers: Workers = ALONE,
) -> Evaluation:
    """All images of a domain that the network does not know."""
    batches = (batch for part in parts_of(data) for batch in _in_order(part, prepare, workers))
    return evaluate(net, batches, precision, f"held-out domain {what}", workers=workers)


def parts_of(data: Data) -> tuple[Part, Part, Part]:
    return data.train, data.val, data.test


def _in_order(part: Part, prepare: Prepare, workers: Workers) -> Iterator[tuple[Tensor, Tensor]]:
    return ((prepare(images), labels) for images, labels in in_order(part, EVALUATION_BATCH, workers))
