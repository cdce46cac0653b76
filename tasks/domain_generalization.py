"""Domain generalization: how a network trained on several domains meets one that it has never seen, with each norm.

One domain is left out; the others are trained on by empirical risk minimization, equally many images of each in every
batch, norms being told which. Nothing of the held-out domain is used: not for weights, statistics, the input's mean and
deviation, or the choice of an epoch. It is forwarded without a domain, so a norm that can not do without one is
skipped, and one that places an image between the domains it knows (bne) combines them (norms.situation.predict).

The held-out domain is one option and an axis of grids; its mean, its worst and the columns of a table are derived in
results. The headline is the last epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from norms.registry import NormFactory, NormInfo, equivalent, forked_generators, nearest
from norms.situation import predict, situation
from tasks import data as datasets
from tasks.base import Batch, Outcome, RunContext, Setting, Trained
from tasks.data.batches import augment, normalize, ordered_batches
from tasks.data.images import ImageData, Split, channel_moments
from tasks.data.reading import stream
from tasks.fit import (
    EVALUATION_BATCH,
    SHIFT_PROBE,
    Evaluation,
    PeakMemory,
    composition_shift,
    evaluate,
    norm_sizes,
)
from tasks.loop import Epoch, Loop, epoch_ends
from tasks.nets import build_net
from tasks.step import Precision, train_step
from tasks.supervised import SupervisedOptions
from tasks.trial import lacking, refusal

UNKNOWN_SHAPE, UNKNOWN_CLASSES = (3, 64, 64), 10
"""What planning assumes of a folder of images; a norm that refuses the true size then fails in its run."""
Prepare = Callable[[Tensor], Tensor]


class DomainGeneralizationOptions(SupervisedOptions):
    """Options of one run: those of SupervisedOptions, and

    Attributes:
        dataset: one with domains.
        domains: the domains that take part; null: all of a built-in set or of torchvision's. Of a folder they are named
            here, since a norm is built for a number of domains before any data is read.
        held_out: one of them, for the test.

    Of SupervisedOptions, `batch_size` and `norm_batch_size` count images of each source domain: a batch holds so many
    of every one, and so does every norm batch (a norm that mixes samples shares statistics over all of these; the rule
    of `bgn` for its groups goes by the images of one). `learning_rate` is per 128 images of all. `epochs` are passes
    over as many images as the sources have together.
    """

    dataset: str = "digits"
    domains: tuple[str, ...] | None = None
    held_out: str = "blend"
    batch_size: Batch[int] = 32

    @model_validator(mode="before")
    @classmethod
    def _all_domains(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("domains") is not None:
            return given
        dataset = given.get("dataset", cls.model_fields["dataset"].default)
        # what is no name at all, the field itself refuses
        return (
            given | {"domains": datasets.dataset_info(dataset).domains or None} if isinstance(dataset, str) else given
        )

    @model_validator(mode="after")
    def _sources_are_left(self) -> DomainGeneralizationOptions:
        if self.domains is None and not self.dataset.startswith("folder:"):
            raise ValueError(f'data set "{self.dataset}" has no domains; digits and mnist_usps_svhn have, and folders')
        if self.domains is None:
            raise ValueError(f'domains: those of data set "{self.dataset}" are not known before it is read; name them')
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains names one twice: {', '.join(self.domains)}")
        if self.held_out not in self.domains:
            raise ValueError(
                f'held_out "{self.held_out}" is not among the domains; allowed: {", ".join(self.domains)}'
                f"{nearest(self.held_out, self.domains)}"
            )
        if len(self.sources) < 2:
            raise ValueError(
                f'with "{self.held_out}" held out of {", ".join(self.domains)}, generalization has '
                f"{len(self.sources)} source domain{'s' * (len(self.sources) != 1)}"
                f"{f' ({self.sources[0]})' if self.sources else ''}; two or more are needed"
            )
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The domains that are trained on; norms know them by their position here."""
        return tuple(domain for domain in self.domains or () if domain != self.held_out)

    @property
    def peak_learning_rate(self) -> float:
        return super().peak_learning_rate * (len(self.sources) if self.scale_learning_rate else 1)


class DomainGeneralization:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions, of the last epoch unless said otherwise:
        target_top1: all images of the held-out domain.
        target_top1_source_val: the same for the epoch with the best `val_top1`.
        source_top1: mean over the source domains' test parts, each forwarded as of its domain.
        val_top1: mean over the source domains' validation parts, likewise.
        composition_shift: see tasks.fit.composition_shift; on the first 64 images of the held-out domain's test part.
        step_seconds: median of a training step, without data and augmentation.
        peak_memory_mb: of the first epoch's training steps with the network's own memory.
        norm_parameters, norm_buffers: numbers of values in all norms.

    The history has one row per epoch, `target_top1` included; no rule but the reported ones reads it. A network whose
    outputs are not finite on any of these parts ends the run as diverged.
    """

    name = "domain_generalization"
    version = 1
    options = DomainGeneralizationOptions
    metrics = (
        "target_top1",
        "target_top1_source_val",
        "source_top1",
        "val_top1",
        "composition_shift",
        "step_seconds",
        "peak_memory_mb",
        "norm_parameters",
        "norm_buffers",
    )

    def setting(self, options: DomainGeneralizationOptions) -> Setting:
        shape = datasets.dataset_info(options.dataset).image_shape
        return Setting(options.shared, len(options.sources), shape)

    def data_checksum(self, options: DomainGeneralizationOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these domains can not serve."""
        datasets.check_domains(options.dataset, data_dir, options.domains or (), options.num_classes)
        datasets.check_batch_size(options.dataset, data_dir, options.sources, options.batch_size, options.num_classes)
        return datasets.checksum(options.dataset, data_dir)

    def why_not(self, norm: NormFactory, info: NormInfo, options: DomainGeneralizationOptions) -> str | None:
        """None, or why this norm can not train here, or not be evaluated on a domain that it has not seen."""
        if reason := lacking(info, self.name, ("context",), options.slices):
            return reason
        described = datasets.dataset_info(options.dataset)
        classes = options.num_classes or described.num_classes or UNKNOWN_CLASSES
        return _refusal(norm, options, described.image_shape or UNKNOWN_SHAPE, classes)

    def steps(self, options: DomainGeneralizationOptions, data_dir: Path) -> int:
        """Updates of a run."""
        domains = datasets.domain_labels(options.dataset, data_dir)
        labels = torch.cat([domains[name]["train"] for name in options.sources])
        used = labels if options.num_classes is None else labels[labels < options.num_classes]
        return options.total_steps(len(used) // len(options.sources))

    def network(
        self, norm: NormFactory, options: DomainGeneralizationOptions, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Prepare]:
        """See tasks.base.Telling. An unseen domain is not told; norms.situation tells one of facts["sources"] by its
        position."""
        net = _build(norm, options, facts["num_classes"], facts["in_channels"])
        return net, _preparation(facts["mean"], facts["std"], options)

    def run(self, norm: NormFactory, options: DomainGeneralizationOptions, context: RunContext) -> Outcome:
        def load(domain: str) -> ImageData:
            data = datasets.load(options.dataset, context.data_dir, domain=domain, classes=options.num_classes)
            return data.to(context.device)

        sources, held_out = [load(domain) for domain in options.sources], load(options.held_out)
        mean, std = channel_moments(torch.cat([data.train.images.cpu() for data in sources]))

        prepare = _preparation(mean, std, options)
        memory = PeakMemory(context.device)
        facts = {
            "num_classes": held_out.num_classes,
            "in_channels": held_out.image_shape[0],
            "mean": mean,
            "std": std,
            "sources": list(options.sources),
        }
        net = _build(
            norm,
            options,
            held_out.num_classes,
            held_out.image_shape[0],
            device=context.device,
            generator=context.generator,
        )
        history, precision = context.journal.rows, options.precision

        def measured(epoch: Epoch) -> None:
            what = f"after epoch {epoch.number}"
            vals = [data.val for data in sources]
            epoch.row["val_top1"] = over_sources(net, vals, prepare, f"validation {what}", precision)
            epoch.row["target_top1"] = on_unseen(net, held_out, prepare, what, precision).top1

        # dropout of torchvision's models draws from the global generators, so a run seeds them for itself
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            loop = train(net, [data.train for data in sources], options, context, prepare, memory, measured)
            tests = [data.test for data in sources]
            of_sources = over_sources(net, tests, prepare, "test of the sources", precision)
            constant = on_unseen(net, held_out, prepare, "at the end", precision).constant
        chosen = max(range(len(history)), key=lambda i: (history[i]["val_top1"], -i))
        parameters, buffers = norm_sizes(net)
        metrics = {
            "target_top1": history[-1]["target_top1"],
            "target_top1_source_val": history[chosen]["target_top1"],
            "source_top1": of_sources,
            "val_top1": history[-1]["val_top1"],
            "composition_shift": composition_shift(net, prepare(held_out.test.images[:SHIFT_PROBE]), precision),
            "step_seconds": loop.clock.median(),
            "peak_memory_mb": loop.peak,
            "norm_parameters": float(parameters),
            "norm_buffers": float(buffers),
        }
        kinds = {data.kind for data in (*sources, held_out)}
        evidence = {
            "data": " and ".join(sorted(kinds)),
            "selection": "last epoch",
            "equals": equivalent(net),
            "constant_output": constant,
            "chosen_epochs": {"source_val": chosen + 1},
            "train_images": sum(len(data.train) for data in sources),
            "test_images": sum(len(part) for part in _parts(held_out)),
        }
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, history, evidence=evidence, trained=Trained(net.state_dict(), facts))


TASK = DomainGeneralization()


def _build(
    norm: NormFactory, options: DomainGeneralizationOptions, classes: int, channels: int, **where: Any
) -> nn.Module:
    net = build_net(options.model, norm, num_classes=classes, in_channels=channels, width=options.width, **where)
    return options.ready(net)


def _preparation(mean: Sequence[float], std: Sequence[float], options: DomainGeneralizationOptions) -> Prepare:
    def prepare(images: Tensor) -> Tensor:
        return normalize(images, mean, std).contiguous(memory_format=options.memory_format)

    return prepare


def train(
    net: nn.Module,
    sources: list[Split],
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
        prepare: images -> input.
        memory: begun before the network was built.
        measure: called after the steps of every epoch, with the network as it then is; adds to the epoch's row.

    Raises:
        Diverged: the loss is not finite.
    """
    optimizer = options.trained_by(net)
    # on the CPU, where norms look at it without waiting for the device
    domains = torch.arange(len(sources)).repeat_interleave(options.batch_size)
    per_step = replace(options.told, domain=domains)
    draws = context.generator("augmentation")
    # a small domain is passed more often than a large one
    streams = [
        stream(part, options.batch_size, context.generator(f"order of {name}"))
        for part, name in zip(sources, options.sources, strict=True)
    ]
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
            images, labels = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            images = prepare(augment(images, draws, options.augmentation))
            with step:
                loss, right = train_step(
                    net, optimizer, images, labels, per_step, progress=step.progress, step=step.number
                )
            step.saw(len(labels), right, train_loss=loss)
        measure(epoch)
    return loop


def over_sources(
    net: nn.Module, parts: list[Split], prepare: Prepare, what: str, precision: Precision = "float32"
) -> float:
    """Mean accuracy over one part of each source domain, each forwarded as of its domain."""
    found = [
        evaluate(net, _in_order(part, prepare), precision, f"{what}, domain {domain}", domain).top1
        for domain, part in enumerate(parts)
    ]
    return sum(found) / len(found)


def on_unseen(
    net: nn.Module, data: ImageData, prepare: Prepare, what: str, precision: Precision = "float32"
) -> Evaluation:
    """All images of a domain that the network does not know."""
    batches = (batch for part in _parts(data) for batch in _in_order(part, prepare))
    return evaluate(net, batches, precision, f"held-out domain {what}")


def _parts(data: ImageData) -> tuple[Split, Split, Split]:
    return data.train, data.val, data.test


def _in_order(part: Split, prepare: Prepare) -> Iterator[tuple[Tensor, Tensor]]:
    return ((prepare(images), labels) for images, labels in ordered_batches(part, EVALUATION_BATCH))


def _refusal(
    norm: NormFactory, options: DomainGeneralizationOptions, shape: tuple[int, int, int], classes: int
) -> str | None:
    """The text of the ValueError with which this norm refuses these shapes or an unseen domain, or None."""
    count = len(options.sources)

    def forward(device: str, shared: int) -> None:
        net = build_net(
            options.model, norm, num_classes=classes, in_channels=shape[0], width=options.width, device=device
        )
        slices = min(options.slices, 2)  # more than one is all that matters to shapes, and planning has to be fast
        images = torch.zeros(count * slices * shared, *shape, device=device)
        domains = torch.arange(count).repeat_interleave(slices * shared)
        with situation(net.train(), domain=domains, slices=slices):
            net(images)
        predict(net.eval(), images)

    network = (TASK.name, options.model, options.width, options.slices, classes, count)
    return refusal(norm, forward, options.shared, shape, network)
