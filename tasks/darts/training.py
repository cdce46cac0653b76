"""The two loops of architecture search: the search itself, and the training of a derived network from scratch.

Search: the training part is cut into two disjoint halves. Each step takes a batch of both: the architecture's step on
the second half, then the weights' step on the first. Retraining: all training images, the last epoch counts. The
validation part is only looked at, the test part only after retraining.

Deliberate differences to the published code: learning rates follow their cosines, and the drop-path probability its
line, per step and not per epoch, so that a short run reaches their ends too; weight decay spares biases and norms, as
everywhere here; initial weights are drawn by name (tasks.nets.initialize) and not by torch's default; the search
network is validated on images that neither half contains, which makes both halves smaller where a data set had no
validation part; the architecture's batches go once through its half, where the published loop draws each anew; images
that fill no batch are left out of an epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import NormFactory
from norms.situation import after_update, situation
from tasks.base import RunContext
from tasks.darts.architect import (
    Batch,
    SearchStepOptions,
    architecture_optimizer,
    architecture_step,
    weights_step,
)
from tasks.darts.genotype import CELLS, INPUTS, NODES, OPERATIONS, Genotype, edge
from tasks.darts.networks import Architecture, DerivedNetwork, SearchNetwork, drop_path_factors
from tasks.darts.options import ArchitectureSearchOptions
from tasks.data.batches import augment, cutout, normalize, ordered_batches, shuffled_batches
from tasks.data.images import ImageData, Split
from tasks.fit import (
    EVALUATION_BATCH,
    SHIFT_PROBE,
    PeakMemory,
    StepClock,
    composition_shift,
    evaluate,
    keeps_stats,
    learning_rate_at,
    norm_sizes,
    recalibrated,
    recalibration_batches,
    set_learning_rate,
    sgd,
)
from tasks.step import StepOptions, raise_if_diverged

"""Test images, at most, that composition shift is measured with: half as probes, half as mates."""
History = list[dict[str, float]]


@dataclass(frozen=True)
class Searched:
    """What a search leaves.

    Attributes:
        genotype: derived from the last architecture.
        val_top1: of the search network after its last step, on the validation part.
        seconds: wall time of the search without the validation of each epoch.
        step_seconds: median of a search step, without data and augmentation.
        peak_memory_mb: of the first epoch's steps, with the network's own memory.
        norm_parameters, norm_buffers: values in all norms of the search network.
        constant_output: it gives every validation image the same class.
    """

    genotype: Genotype
    val_top1: float
    seconds: float
    step_seconds: float
    peak_memory_mb: float
    norm_parameters: int
    norm_buffers: int
    constant_output: bool


@dataclass(frozen=True)
class Retrained:
    """What one retraining leaves: accuracies as fractions, at the last epoch; see tasks.architecture_search."""

    top1: float
    top1_recalibrated: float
    val_top1: float
    test_loss: float
    composition_shift: float
    parameters: int
    constant_output: bool


class Images:
    """Batches of one data set on the run's device, prepared for a network."""

    def __init__(self, data: ImageData, options: ArchitectureSearchOptions):
        self.data, self.augmentation = data, options.augmentation
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format

    def prepare(self, images: Tensor) -> Tensor:
        return normalize(images, self.data.mean, self.data.std).contiguous(memory_format=self.memory_format)

    def epoch(
        self, part: Split, batch_size: int, order: torch.Generator, draws: torch.Generator, hole: int
    ) -> Iterator[Batch]:
        """One epoch of augmented batches; `hole`: side of the cutout."""
        for images, labels in shuffled_batches(part, batch_size, order):
            yield cutout(self.prepare(augment(images, draws, self.augmentation)), draws, hole), labels

    def in_order(self, part: Split) -> Iterator[Batch]:
        return ((self.prepare(images), labels) for images, labels in ordered_batches(part, EVALUATION_BATCH))


def halves(train: Split, context: RunContext) -> tuple[Split, Split]:
    """Two disjoint halves of the training part, for weights and architecture; of an odd number one image is left."""
    order = torch.randperm(len(train), generator=context.generator("halves")).to(train.labels.device)
    half = len(train) // 2
    return train.select(order[:half]), train.select(order[half : 2 * half])


def search(
    norm: NormFactory,
    data: ImageData,
    options: ArchitectureSearchOptions,
    context: RunContext,
    history: History,
    report: Callable[[float], None],
) -> Searched:
    """Search an architecture; one row per epoch is appended to `history`.

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
    ).to(memory_format=images.memory_format)
    optimizer = sgd(
        net.body,
        learning_rate=options.search_learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        norm_weight_decay=options.norm_weight_decay,
        nesterov=False,
    )
    adam = architecture_optimizer(net, options.architecture_learning_rate, options.architecture_weight_decay)
    size = options.search_batch_size
    per_step = SearchStepOptions(
        size // options.shared(size),
        options.order == "second",
        options.architecture_steps_move_statistics,
        options.gradient_clip,
    )
    order = {half: context.generator(f"search/{half}/order") for half in HALVES}
    draws = {half: context.generator(f"search/{half}/augmentation") for half in HALVES}
    parts = dict(zip(HALVES, halves(data.train, context), strict=True))
    total = search_steps(options, len(data.train))
    clock, step, peak, seconds = StepClock(context.device), 0, 0.0, 0.0
    for epoch in range(options.search_epochs):
        start, first = time.perf_counter(), len(clock.seconds)
        sums, correct, seen, rate = [0.0, 0.0], torch.zeros((), dtype=torch.int64, device=context.device), 0, 0.0
        streams = [images.epoch(parts[half], size, order[half], draws[half], options.search_cutout) for half in HALVES]
        for training, held_out in zip(*streams, strict=True):
            if step == total:
                break
            least = options.search_learning_rate_min
            span = options.search_learning_rate - least
            rate = least + learning_rate_at((step + 0.5) / total, span, "cosine", warmup=0)
            set_learning_rate(optimizer, rate)
            step += 1
            with clock:
                held_out_loss = architecture_step(net, optimizer, adam, training, held_out, per_step, step)
                loss, right = weights_step(net, optimizer, training, per_step, progress=step / total, step=step)
            sums = [s + float(new) * size for s, new in zip(sums, (loss, held_out_loss), strict=True)]
            correct += right
            seen += size
            report(step / total)
        seconds += time.perf_counter() - start
        peak = peak or memory.megabytes()
        val = evaluate(net, images.in_order(data.val), what=f"validation of the search network after step {step}")
        history.append(
            {
                "epoch": float(epoch + 1),
                "retraining": 0.0,
                "train_loss": sums[0] / seen,
                "train_top1": float(correct) / seen,
                "architecture_loss": sums[1] / seen,
                "val_top1": val.top1,
                "learning_rate": rate,
                "seconds": sum(clock.seconds[first:]),
                **mixing_weights(net.architecture),
            }
        )
        if step == total:
            break
    genotype = net.architecture.genotype()
    return Searched(genotype, val.top1, seconds, clock.median(), peak, *norm_sizes(net), val.constant)


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
    history: History,
    report: Callable[[float], None],
    number: int,
    control: bool,
) -> Retrained:
    """Train the network of a genotype from scratch; one row per epoch is appended to `history`.

    Args:
        number: of the retraining, from 1; all draws are named by it, so the control of the same number has the same.
        control: the genotype is a random one (for history and messages).

    Raises:
        Diverged: a loss is not finite.
    """

    def generator(purpose: str) -> torch.Generator:
        return context.generator(f"retraining {number}/{purpose}")

    images, size = Images(data, options), options.retrain_batch_size
    name = f"retraining {number} of {'a random' if control else 'the found'} architecture"
    net = DerivedNetwork(
        genotype,
        options.retrain_channels,
        options.retrain_cells,
        norm=norm,
        in_channels=data.image_shape[0],
        num_classes=data.num_classes,
        auxiliary=options.auxiliary_weight > 0,
        device=context.device,
        generator=generator,
    ).to(memory_format=images.memory_format)
    optimizer = sgd(
        net,
        learning_rate=options.retrain_learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        norm_weight_decay=options.norm_weight_decay,
        nesterov=False,
    )
    slices = size // options.shared(size)
    order, draws, paths = generator("order"), generator("augmentation"), generator("drop path")
    total = _steps(len(data.train), size, options.retrain_epochs, options.retrain_max_steps)
    step = 0
    for epoch in range(options.retrain_epochs):
        start, loss_sum, seen, rate = time.perf_counter(), 0.0, 0, 0.0
        correct = torch.zeros((), dtype=torch.int64, device=context.device)
        for batch in images.epoch(data.train, size, order, draws, options.retrain_cutout):
            if step == total:
                break
            rate = learning_rate_at((step + 0.5) / total, options.retrain_learning_rate, "cosine", warmup=0)
            set_learning_rate(optimizer, rate)
            keep = None
            if options.drop_path > 0:
                keep = drop_path_factors(net.num_paths, size, options.drop_path * step / total, paths)
                keep = keep.to(context.device)
            step += 1
            loss, right = _retrain_step(
                net, optimizer, batch, keep, options, slices, step / total, f"{name}, step {step}"
            )
            loss_sum += float(loss) * size
            correct += right
            seen += size
            report(step / total)
        val = evaluate(net, images.in_order(data.val), what=f"{name}, validation after step {step}")
        history.append(
            {
                "epoch": float(epoch + 1),
                "retraining": float(number),
                "random": float(control),
                "train_loss": loss_sum / seen,
                "train_top1": float(correct) / seen,
                "val_top1": val.top1,
                "learning_rate": rate,
                "seconds": time.perf_counter() - start,
            }
        )
        if step == total:
            break
    return _measure(net, images, options, generator, val.top1, name)


def _retrain_step(
    net: DerivedNetwork,
    optimizer: torch.optim.SGD,
    batch: Batch,
    keep: Tensor | None,
    options: ArchitectureSearchOptions,
    slices: int,
    progress: float,
    what: str,
) -> tuple[Tensor, Tensor]:
    """One update; the loss of the main classifier and the number of images that it got right."""
    images, labels = batch

    def forward() -> list[Tensor]:
        with situation(net, slices=slices):
            return net.logits(images, keep)

    logits, *auxiliary = forward()
    main = F.cross_entropy(logits.float(), labels)
    loss = main + sum(options.auxiliary_weight * F.cross_entropy(a.float(), labels) for a in auxiliary)
    raise_if_diverged(loss, net, images, StepOptions(slices=slices), what)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), options.gradient_clip)
    optimizer.step()
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
    final = evaluate(net, images.in_order(data.test), what=f"{name}, test")
    mates = data.test.images[:SHIFT_PROBE]
    mended = final
    if keeps_stats(net):
        shared = options.shared(options.retrain_batch_size)
        count, group = recalibration_batches(min(options.recalibration_images, len(data.train)), shared)
        chosen = torch.randperm(len(data.train), generator=generator("recalibration"))[:count]
        draws = generator("recalibration augmentation")
        parts = data.train.images[chosen.to(data.train.images.device)].split(group)
        batches = (images.prepare(augment(part, draws, images.augmentation)) for part in parts)
        fresh = recalibrated(net, batches, group // shared)
        mended = evaluate(fresh, images.in_order(data.test), what=f"{name}, test, recalibrated")
    return Retrained(
        top1=final.top1,
        top1_recalibrated=mended.top1,
        val_top1=val_top1,
        test_loss=final.loss,
        composition_shift=composition_shift(net, images.prepare(mates)),
        parameters=net.parameters_without_auxiliary(),
        constant_output=final.constant,
    )


def search_steps(options: ArchitectureSearchOptions, train_images: int) -> int:
    """How many steps a search on so many training images takes."""
    return _steps(train_images // 2, options.search_batch_size, options.search_epochs, options.search_max_steps)


def _steps(images: int, batch_size: int, epochs: int, most: int | None) -> int:
    whole = epochs * (images // batch_size)
    return whole if most is None else min(whole, most)
