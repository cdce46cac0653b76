"""Image classification: one network, one data set; what changes with the norm and with its batch.

The SGD batch and the norm batch (images per forward that share statistics) are two options. With `norm_batch_size`
below `batch_size` a batch x is forwarded in norm batches x[k::slices] and updated once, which isolates the statistics;
lowering both together (the rate then follows `batch_size`) is the other design. The evidence names which one a run is.
Workers, each with a part of the SGD batch, are another way to make either (tasks.supervised).

No selection: the reported checkpoint is the last epoch. Test images decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from norms.protocol import NormInfo, equivalent
from norms.workers import Workers
from tasks import data as datasets
from tasks.admission import Host, expected, refusal
from tasks.base import Outcome, RunContext, Setting, Trained
from tasks.classification.options import ClassificationOptions
from tasks.cost import PeakMemory
from tasks.data.batches import Share, augment
from tasks.data.reading import Data, Part, augmented, by_class, first, in_order, left_to_augment, opened, select, stream
from tasks.data.stream import Stream
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
from tasks.inputs import Prepare, facts_of, preparation
from tasks.loop import Loop, epoch_ends
from tasks.nets.guests import conversion
from tasks.nets.models import build_net
from tasks.step import autocast, train_step

TRAIN_PROBE = 2000
"""Training images, at most, that `train_top1` is measured on."""
UNKNOWN_SHAPE = (3, 224, 224)
"""The shape that planning assumes of a folder of images."""


class Classification:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions:
        top1, test_loss: the test part, last epoch.
        top1_recalibrated: after statistics were re-estimated at fixed weights on `recalibration_images` training
            images, shuffled and augmented, in the run's norm batches, moments pooled. Equal to top1 for norms
            without statistics.
        top1_recalibrated_plain: the same from images without augmentation.
        val_top1: the validation part, last epoch. Of glyphs it is another family of faces than the test part's, and a
            harder one: comparable between runs, not with top1.
        train_top1: up to 2,000 training images, drawn by name, without augmentation, in evaluation mode.
        composition_shift: see tasks.evaluate.composition_shift; on the first 64 test images.
        step_seconds: median of a training step, without data and augmentation.
        peak_memory_mb: of the first epoch's training steps with the network's own memory.
        norm_parameters, norm_buffers: numbers of values in all norms.

    The history has one row per epoch; its train_loss and train_top1 are those of the training forwards themselves
    (augmented images, batch statistics, changing weights), its val_top1 is measured after the epoch.
    """

    name = "classification"
    version = 1
    options = ClassificationOptions
    metrics = (
        "top1",
        "top1_recalibrated",
        "top1_recalibrated_plain",
        "val_top1",
        "train_top1",
        "test_loss",
        "composition_shift",
        "step_seconds",
        "peak_memory_mb",
        "norm_parameters",
        "norm_buffers",
    )
    headline = "top1"
    validation = "val_top1"
    always_shown: tuple[str, ...] = ()
    folds_over = ""

    def setting(self, options: ClassificationOptions) -> Setting:
        shape = datasets.dataset_info(options.dataset).image_shape
        return Setting(norm_batch_size=options.norm_batch, num_domains=1, image_shape=shape)

    def data_checksum(self, options: ClassificationOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these options can not be run on it."""
        datasets.check_classifiable(options.dataset, data_dir, options.num_classes)
        counts = datasets.class_counts(options.dataset, data_dir, options.num_classes)["train"]
        if options.batch_size > (train := int(counts.sum())):
            raise ValueError(
                f'batch_size {options.batch_size} exceeds the {train} training images of "{options.dataset}"'
            )
        if (groups := options.single_class_groups) is not None:
            size = options.batch_size // groups
            if (whole := int((counts // size).sum())) < groups:
                raise ValueError(
                    f'single_class_groups {groups}: the classes of "{options.dataset}" fill {whole} groups of {size} '
                    "training images of one class; lower batch_size"
                )
        return datasets.checksum(options.dataset, data_dir)

    def why_not(self, norm: NormFactory, info: NormInfo, options: ClassificationOptions) -> str | None:
        """None if this norm can be trained here, else the reason in one line."""
        shape, classes = expected(options.dataset, options.num_classes, UNKNOWN_SHAPE)
        backbone = options.backbone(classes, shape[0])
        host = Host(
            self.name,
            build_net,
            backbone,
            shape,
            options.norm_batch,
            options.slices,
            workers=options.asked_workers,
        )
        return refusal(norm, info, host)

    def steps(self, options: ClassificationOptions, data_dir: Path) -> int:
        """Updates of a run."""
        counts = datasets.class_counts(options.dataset, data_dir, options.num_classes)["train"]
        return options.total_steps(int(counts.sum()))

    def network(
        self, norm: NormFactory, options: ClassificationOptions, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Prepare]:
        """See tasks.base.Telling."""
        net = _build(norm, options, facts)
        return net, preparation(facts["mean"], facts["std"], options.memory_format)

    def run(self, norm: NormFactory, options: ClassificationOptions, context: RunContext) -> Outcome:
        data = opened(options.dataset, context, classes=options.num_classes)
        memory = PeakMemory(context.device)
        facts = facts_of(data)
        net = _build(norm, options, facts, device=context.device, generator=context.generator)
        # dropout of torchvision's models draws from the global generators, so a run seeds them for itself
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            loop = _train(net, data, options, context, memory)
        metrics, evidence = _measure(net, data, options, context)
        history = context.journal.rows
        metrics |= loop.costs(net) | {"val_top1": history[-1]["val_top1"]}
        evidence |= {
            "data": data.kind,
            "selection": "last epoch",
            "equals": equivalent(net),
            **conversion(net),
            "design": options.design,
            "augmentation": options.augmentation,
            "train_images": len(data.train),
            "test_images": len(data.test),
        }
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, history, evidence=evidence, trained=Trained(net.state_dict(), facts))


TASK = Classification()


def _build(norm: NormFactory, options: ClassificationOptions, facts: Mapping[str, Any], **where: Any) -> nn.Module:
    backbone = options.backbone(facts["num_classes"], facts["in_channels"])
    return options.ready(build_net(norm=norm, **backbone, **where))


def _train(net: nn.Module, data: Data, options: ClassificationOptions, context: RunContext, memory: PeakMemory) -> Loop:
    """Train `net` in place; the journal gets one row per epoch."""
    optimizer = options.trained_by(net)
    augmentation, left = context.generator("augmentation"), left_to_augment(data.train, options.augmentation)
    batches = _stream(data.train, options, context.generator("order"), context.workers)
    share = Share(options.batch_size, context.workers)
    prepare, per_step = preparation(data.mean, data.std, options.memory_format), options.told_with(context.workers)
    total = options.total_steps(len(data.train))
    loop = Loop(
        context,
        "training",
        ends=epoch_ends(options.epochs, len(batches), total),
        total=total,
        rates={optimizer: options.rate},
        keeps={"net": net},
        memory=memory,
    )
    for epoch in loop.epochs():
        for step, (images, labels) in epoch.steps(batches):
            images, labels = images.to(context.device), labels.to(context.device)
            images = prepare(augment(images, augmentation, left, share))
            with step:
                loss, right = train_step(
                    net, optimizer, images, labels, per_step, progress=step.progress, step=step.number
                )
            step.saw(len(labels), right, train_loss=loss)
        validation = _in_order(data.val, prepare, context.device, context.workers)
        what = f"validation after step {loop.step}"
        epoch.row["val_top1"] = evaluate(net, validation, options.precision, what, workers=context.workers).top1
    if options.final_pass == "class_sorted":
        _sorted_pass(net, data.train, options, context, prepare)
    return loop


def _stream(
    part: Part, options: ClassificationOptions, order: torch.Generator, workers: Workers
) -> Stream[tuple[Tensor, Tensor]]:
    if options.single_class_groups is None:
        return stream(part, options.batch_size, order, options.augmentation, workers)
    return by_class(part, options.batch_size, options.single_class_groups, order, options.augmentation, workers)


@torch.no_grad()
def _sorted_pass(
    net: nn.Module,
    part: Part,
    options: ClassificationOptions,
    context: RunContext,
    prepare: Prepare,
) -> None:
    """Move running averages once more over the training images, sorted by class; no weight changes."""
    labels = part.labels.cpu()
    whole = labels.argsort(stable=True)[: len(labels) // options.norm_batch * options.norm_batch]
    draws = context.generator("augmentation of the final pass")
    for images in augmented(part, whole.split(options.norm_batch), options.augmentation, draws, context.device):
        with autocast(context.device, options.precision):
            net(prepare(images))


def _measure(
    net: nn.Module, data: Data, options: ClassificationOptions, context: RunContext
) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics that are measured after the last epoch, and their evidence."""
    prepare = preparation(data.mean, data.std, options.memory_format)

    def measured(network: nn.Module, part: Part, what: str) -> Evaluation:
        batches = _in_order(part, prepare, context.device, context.workers)
        return evaluate(network, batches, options.precision, what, workers=context.workers)

    final = measured(net, data.test, "test")
    probe = torch.randperm(len(data.train), generator=context.generator("train probe"))[:TRAIN_PROBE]
    mates = first(data.test, SHIFT_PROBE).to(context.device)
    metrics = {
        "top1": final.top1,
        "test_loss": final.loss,
        "train_top1": measured(net, select(data.train, probe), "training images").top1,
        "composition_shift": composition_shift(net, prepare(mates.images), options.precision),
        "top1_recalibrated": final.top1,
        "top1_recalibrated_plain": final.top1,
    }
    evidence: dict[str, Any] = {"constant_output": final.constant}
    if keeps_stats(net):
        count, group = recalibration_batches(min(options.recalibration_images, len(data.train)), options.norm_batch)
        chosen = torch.randperm(len(data.train), generator=context.generator("recalibration"))[:count]
        for name, kind in (("top1_recalibrated", options.augmentation), ("top1_recalibrated_plain", "none")):
            draws = context.generator("recalibration augmentation")
            seen = augmented(data.train, chosen.split(group), kind, draws, context.device)
            batches = (prepare(images) for images in seen)
            mended = recalibrated(net, batches, group // options.norm_batch, options.precision)
            metrics[name] = measured(mended, data.test, f"test, {name}").top1
        evidence["recalibration_images"] = count
    return metrics, evidence


def _in_order(part: Part, prepare: Prepare, device: torch.device, workers: Workers) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for evaluation, normalized: those of this worker."""
    batches = in_order(part, EVALUATION_BATCH, workers)
    return ((prepare(images.to(device)), labels.to(device)) for images, labels in batches)
