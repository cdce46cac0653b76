"""The two loops of architecture search: the search itself, and the training of a derived network from scratch.

Search: the training part is cut into two disjoint halves. Each step takes a batch of both: the architecture's step on
the second half, then the weights' step on the first. Retraining: all training images, the last epoch counts. The
validation part is only looked at, the test part only after retraining.

Deliberate differences to the published code: learning rates follow their schedules, and the drop-path probability its
line, per step and not per epoch, so that a short run reaches their ends too; weight decay spares biases and norms, as
everywhere here; initial weights are drawn by name (tasks.nets.init.initialize) and not by torch's default; the search
network is validated on images that neither half contains, which makes both halves smaller where a data set had no
validation part; the architecture's batches go once through its half, where the published loop draws each anew; images
that fill no batch are left out of an epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.factory import NormFactory
from norms.situation import after_update
from tasks.architecture_search.architect import (
    Batch,
    SearchStepOptions,
    architecture_optimizer,
    architecture_step,
    weights_step,
)
from tasks.architecture_search.genotype import CELLS, INPUTS, NODES, OPERATIONS, Genotype, edge
from tasks.architecture_search.networks import Architecture, DerivedNetwork, SearchNetwork, drop_path_factors
from tasks.architecture_search.options import ArchitectureSearchOptions
from tasks.base import RunContext
from tasks.cost import PeakMemory, norm_sizes
from tasks.data.batches import augment, cutout, ordered_batches
from tasks.data.images import ImageData, Split
from tasks.data.reading import stream
from tasks.evaluate import (
    EVALUATION_BATCH,
    SHIFT_PROBE,
    Evaluation,
    composition_shift,
    evaluate,
    keeps_stats,
    recalibrated,
    recalibration_batches,
)
from tasks.inputs import preparation
from tasks.loop import Loop, epoch_ends
from tasks.step import told, update


@dataclass(frozen=True)
class Searched:
    """The result of a search: plain values, so that they can be stored.

    Attributes:
        genotype: derived from the last architecture, as JSON.
        val_top1: of the search network after its last step, on the validation part.
        seconds: wall time of the search, in all processes, without the validation of each epoch.
        step_seconds: median of a search step, without data and augmentation.
        peak_memory_mb: of the first epoch's steps, with the network's own memory.
        norm_parameters, norm_buffers: values in all norms of the search network.
        constant_output: it gives every validation image the same class.
    """

    genotype: str
    val_top1: float
    seconds: float
    step_seconds: float
    peak_memory_mb: float
    norm_parameters: int
    norm_buffers: int
    constant_output: bool


@dataclass(frozen=True)
class Retrained:
    """The result of one retraining: accuracies as fractions, at the last epoch. `weights`: the network's state_dict,
    where it is kept."""

    top1: float
    top1_recalibrated: float
    val_top1: float
    test_loss: float
    composition_shift: float
    parameters: int
    constant_output: bool
    weights: Mapping[str, Any] | None = None


class Images:
    """Batches of one data set on the run's device, prepared for a network."""

    def __init__(self, data: ImageData, options: ArchitectureSearchOptions):
        self.data, self.augmentation = data, options.augmentation
        self.prepare = preparation(data.mean, data.std, options.memory_format)

    def augmented(self, batch: Batch, draws: torch.Generator, hole: int) -> Batch:
        """`hole`: side of the cutout."""
        images, labels = batch
        return cutout(self.prepare(augment(images, draws, self.augmentation)), draws, hole), labels

    def in_order(self, part: Split) -> Iterator[Batch]:
        return ((self.prepare(images), labels) for images, labels in ordered_batches(part, EVALUATION_BATCH))


def halves(train: Split, context: RunContext) -> tuple[Split, Split]:
    """Two disjoint halves of the training part, for weights and architecture; of an odd number one image is left."""
    order = torch.randperm(len(train), generator=context.generator("halves")).to(train.labels.device)
    half = len(train) // 2
    return train.select(order[:half]), train.select(order[half : 2 * half])


def search(norm: NormFactory, data: ImageData, options: ArchitectureSearchOptions, context: RunContext) -> Searched:
    """Search an architecture; the journal gets one row per epoch.

    Raises:
        Diverged: a loss is not finite.
    """
    images = Images(data, options)
    memory = PeakMemory(context.device)
    net = SearchNetwork(
        options.search_channels,
        options.search_cells,
        norm=norm,
        in_channels=data.image_shape[0],
        num_classes=data.num_classes,
        device=context.device,
        generator=lambda purpose: context.generator(f"search/{purpose}"),
    ).to(memory_format=options.memory_format)
    if options.compile:
        net.body.compile()  # which both steps call
    optimizer = options.trained_by(net.body, "search")
    adam = architecture_optimizer(net, options.architecture_learning_rate, options.architecture_weight_decay)
    size = options.search_batch_size
    per_step = SearchStepOptions(
        options.told(size).slices,
        options.order == "second",
        options.architecture_steps_move_statistics,
        options.gradient_clip,
        options.precision,
    )
    draws = [context.generator(f"search/{half}/augmentation") for half in HALVES]
    streams = [
        stream(part, size, context.generator(f"search/{half}/order"))
        for half, part in zip(HALVES, halves(data.train, context), strict=True)
    ]
    loop = Loop(
        context,
        "search",
        ends=epoch_ends(options.search_epochs, len(streams[0]), options.search_max_steps),
        rates={optimizer: functools.partial(options.rate, "search")},
        keeps={"net": net, "architecture optimizer": adam},
        memory=memory,
    )

    def validated() -> Evaluation:
        what = f"validation of the search network after step {loop.step}"
        return evaluate(net, images.in_order(data.val), options.precision, what)

    val: Evaluation | None = None
    for epoch in loop.epochs():
        epoch.row["retraining"] = 0.0
        for step, *batches in epoch.steps(*streams):
            training, held_out = (
                images.augmented(batch, drawn, options.search_cutout)
                for batch, drawn in zip(batches, draws, strict=True)
            )
            with step:
                held_out_loss = architecture_step(net, optimizer, adam, training, held_out, per_step, step.number)
                loss, right = weights_step(net, optimizer, training, per_step, progress=step.progress, step=step.number)
            step.saw(size, right, train_loss=loss, architecture_loss=held_out_loss)
        val = validated()
        epoch.row |= {"val_top1": val.top1, **mixing_weights(net.architecture)}
    val = val or validated()  # a run that was interrupted after the last epoch makes none
    return Searched(
        net.architecture.genotype().text,
        val.top1,
        loop.wall,
        loop.clock.median(),
        loop.peak,
        *norm_sizes(net),
        val.constant,
    )


HALVES = ("weights", "architecture")


@torch.no_grad()
def mixing_weights(architecture: Architecture) -> dict[str, float]:
    """ "normal.2.0.sep_conv_3x3": the weight of that operation on the edge from state 0 to state 2 of normal cells."""
    named: dict[str, float] = {}
    for cell, weights in zip(CELLS, architecture(), strict=True):
        rows = weights.cpu().tolist()
        for node in range(NODES):
            for state in range(INPUTS + node):
                row = zip(OPERATIONS, rows[edge(node, state)], strict=True)
                named |= {f"{cell}.{INPUTS + node}.{state}.{name}": weight for name, weight in row}
    return named


def retrain(
    genotype: Genotype,
    norm: NormFactory,
    data: ImageData,
    options: ArchitectureSearchOptions,
    context: RunContext,
    number: int,
    control: bool,
) -> Retrained:
    """Train the network of a genotype from scratch; the journal gets one row per epoch.

    Args:
        number: of the retraining, from 1; all draws are named by it, so the control of the same number has the same.
        control: the genotype is a random one (for history and messages).

    Raises:
        Diverged: a loss is not finite.
    """

    def generator(purpose: str) -> torch.Generator:
        return context.generator(f"retraining {number}/{purpose}")

    images, size, name = Images(data, options), options.retrain_batch_size, retraining_name(number, control)
    net = derived(genotype, norm, data.image_shape[0], data.num_classes, options, context.device, generator)
    optimizer = options.trained_by(net, "retrain")
    order, draws, paths = generator("order"), generator("augmentation"), generator("drop path")
    batches = stream(data.train, size, order)
    loop = Loop(
        context,
        f"{'control' if control else 'retraining'} {number}",
        ends=epoch_ends(options.retrain_epochs, len(batches), options.retrain_max_steps),
        rates={optimizer: functools.partial(options.rate, "retrain")},
        keeps={"net": net},
    )
    for epoch in loop.epochs():
        epoch.row |= {"retraining": float(number), "random": float(control)}
        for step, drawn in epoch.steps(batches):
            batch = images.augmented(drawn, draws, options.retrain_cutout)
            keep = None
            if options.drop_path > 0:
                dropped = options.drop_path * (step.number - 1) / loop.total
                keep = drop_path_factors(net.num_paths, size, dropped, paths).to(context.device)
            with step:
                loss, right = _retrain_step(
                    net, optimizer, batch, keep, options, step.progress, f"{name}, step {step.number}"
                )
            step.saw(size, right, train_loss=loss)
        what = f"{name}, validation after step {loop.step}"
        epoch.row["val_top1"] = evaluate(net, images.in_order(data.val), options.precision, what).top1
    measured = _measure(net, images, options, generator, context.journal.rows[-1]["val_top1"], name)
    if context.keep_weights and number == 1 and not control:
        measured = replace(measured, weights=net.state_dict())
    return measured


def retraining_name(number: int, control: bool) -> str:
    return f"retraining {number} of {'a random' if control else 'the found'} architecture"


def derived(
    genotype: Genotype,
    norm: NormFactory,
    in_channels: int,
    num_classes: int,
    options: ArchitectureSearchOptions,
    device: torch.device | None = None,
    generator: Callable[[str], torch.Generator] | None = None,
) -> DerivedNetwork:
    """The network that is retrained, in the options' memory format, compiled at its first forward where that is asked
    for."""
    net = DerivedNetwork(
        genotype,
        options.retrain_channels,
        options.retrain_cells,
        norm=norm,
        in_channels=in_channels,
        num_classes=num_classes,
        auxiliary=options.auxiliary_weight > 0,
        device=device,
        generator=generator,
    ).to(memory_format=options.memory_format)
    if options.compile:
        net.compile()
    return net


def _retrain_step(
    net: DerivedNetwork,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    keep: Tensor | None,
    options: ArchitectureSearchOptions,
    progress: float,
    what: str,
) -> tuple[Tensor, Tensor]:
    """One update; the loss of the main classifier and the number of images that it got right."""
    images, labels = batch
    facts = options.told(len(labels))

    def forward() -> list[Tensor]:
        with told(net, images, facts):
            return net.logits(images, keep)

    logits, *auxiliary = forward()
    main = F.cross_entropy(logits.float(), labels)
    loss = main + sum(options.auxiliary_weight * F.cross_entropy(a.float(), labels) for a in auxiliary)
    update(loss, net, optimizer, images=images, options=facts, what=what)
    after_update(net, forward, progress)
    return main.detach(), (logits.detach().argmax(1) == labels).sum()


def _measure(
    net: DerivedNetwork,
    images: Images,
    options: ArchitectureSearchOptions,
    generator: Callable[[str], torch.Generator],
    val_top1: float,
    name: str,
) -> Retrained:
    """The test part, once the last epoch is over."""
    data = images.data
    final = evaluate(net, images.in_order(data.test), options.precision, f"{name}, test")
    mates = data.test.images[:SHIFT_PROBE]
    mended = final
    if keeps_stats(net):
        norm_batch = options.norm_batch(options.retrain_batch_size)
        count, group = recalibration_batches(min(options.recalibration_images, len(data.train)), norm_batch)
        chosen = torch.randperm(len(data.train), generator=generator("recalibration"))[:count]
        draws = generator("recalibration augmentation")
        parts = data.train.images[chosen.to(data.train.images.device)].split(group)
        batches = (images.prepare(augment(part, draws, images.augmentation)) for part in parts)
        fresh = recalibrated(net, batches, group // norm_batch, options.precision)
        mended = evaluate(fresh, images.in_order(data.test), options.precision, f"{name}, test, recalibrated")
    return Retrained(
        top1=final.top1,
        top1_recalibrated=mended.top1,
        val_top1=val_top1,
        test_loss=final.loss,
        composition_shift=composition_shift(net, images.prepare(mates), options.precision),
        parameters=net.parameters_without_auxiliary(),
        constant_output=final.constant,
    )


def search_steps(options: ArchitectureSearchOptions, train_images: int) -> int:
    """The number of steps of a search on so many training images."""
    return _steps(train_images // 2, options.search_batch_size, options.search_epochs, options.search_max_steps)


def retrain_steps(options: ArchitectureSearchOptions, train_images: int) -> int:
    """The number of steps of one retraining."""
    return _steps(train_images, options.retrain_batch_size, options.retrain_epochs, options.retrain_max_steps)


def _steps(images: int, batch_size: int, epochs: int, most: int | None) -> int:
    whole = epochs * (images // batch_size)
    return whole if most is None else min(whole, most)
