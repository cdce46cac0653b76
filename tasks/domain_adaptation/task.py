"""Unsupervised domain adaptation: what a norm changes when labels come from one domain and images from two.

The target's labels reach two things: the scores that are reported, and the oracle, which is marked as one. The training
loop and the rules that choose an epoch are given target images (training.py, selection.py).

The headline is the last epoch. Input is normalized by the source's mean and deviation for both domains, so that only
the network adapts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from norms.protocol import NormInfo, equivalent
from norms.situation import predict, situation
from tasks import data as datasets
from tasks.admission import lacking, refusal, try_forward
from tasks.base import Outcome, RunContext, Setting, Trained
from tasks.cost import PeakMemory, norm_sizes
from tasks.data.batches import normalize
from tasks.data.reading import Data, Part, augmented, first, opened, without_labels
from tasks.domain_adaptation.forward import forward_domains
from tasks.domain_adaptation.networks import AdaptationNet, build
from tasks.domain_adaptation.options import SOURCE, DomainAdaptationOptions
from tasks.domain_adaptation.selection import Prepare, choose, measure, observe, score
from tasks.domain_adaptation.training import train
from tasks.evaluate import SHIFT_PROBE, composition_shift, keeps_stats, recalibrated, recalibration_batches
from tasks.loop import Epoch

UNKNOWN_SHAPE, UNKNOWN_CLASSES = (3, 64, 64), 10
"""What planning assumes of a folder of images; a norm that refuses the true size then fails in its run."""


class DomainAdaptation:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions, of the last epoch unless said otherwise:
        target_top1: the target's test part. The gain over the same norm's source-only run is derived in results.
        target_top1_source_val: the same for the epoch with the best source validation accuracy.
        target_top1_im: for the epoch with the best `im_score`, which needs no label.
        target_top1_oracle: for the epoch with the best accuracy on the target's validation part: it uses target labels
            and is no result of adaptation.
        target_top1_adabn: after running statistics were re-estimated on target training images at fixed weights
            (AdaBN, Li et al. 2016, arXiv:1603.04779). Equal to target_top1 for norms without statistics.
        source_top1, val_top1: the source's test and validation parts.
        im_score: information maximization on the target's validation images, see tasks.domain_adaptation.losses.
        composition_shift: see tasks.evaluate.composition_shift; on the first 64 target test images.
        step_seconds: median of a training step (of mcd: all its updates on a batch), without data and augmentation.
        peak_memory_mb: of the first epoch's training steps with the network's own memory.
        norm_parameters, norm_buffers: numbers of values in all norms.

    The history has one row per epoch, `target_top1` included; nothing but the rules above reads it. A network whose
    outputs are not finite on any of these parts, the target's included, ends the run as diverged.
    """

    name = "domain_adaptation"
    version = 1
    options = DomainAdaptationOptions
    metrics = (
        "target_top1",
        "target_top1_source_val",
        "target_top1_im",
        "target_top1_oracle",
        "target_top1_adabn",
        "source_top1",
        "val_top1",
        "im_score",
        "composition_shift",
        "step_seconds",
        "peak_memory_mb",
        "norm_parameters",
        "norm_buffers",
    )

    def setting(self, options: DomainAdaptationOptions) -> Setting:
        shape = datasets.dataset_info(options.dataset).image_shape
        return Setting(options.shared, options.num_domains, shape)

    def data_checksum(self, options: DomainAdaptationOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these two domains can not serve."""
        used = (options.source, options.target)
        datasets.check_domains(options.dataset, data_dir, used, options.num_classes)
        datasets.check_batch_size(options.dataset, data_dir, used, options.batch_size, options.num_classes)
        return datasets.checksum(options.dataset, data_dir)

    def why_not(self, norm: NormFactory, info: NormInfo, options: DomainAdaptationOptions) -> str | None:
        """None, or why this norm can not train here."""
        if reason := lacking(info, self.name, ("context",), options.slices):
            return reason
        described = datasets.dataset_info(options.dataset)
        classes = options.num_classes or described.num_classes or UNKNOWN_CLASSES
        return _refusal(norm, options, described.image_shape or UNKNOWN_SHAPE, classes)

    def steps(self, options: DomainAdaptationOptions, data_dir: Path) -> int:
        """Updates of a run."""
        labels = datasets.domain_labels(options.dataset, data_dir)[options.source]["train"]
        return options.total_steps(
            len(labels) if options.num_classes is None else int((labels < options.num_classes).sum())
        )

    def network(
        self, norm: NormFactory, options: DomainAdaptationOptions, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """See tasks.base.Telling. Norms that ask for a domain are told with norms.situation: facts["target_domain"] is
        the target's, 0 the source's."""
        net = build(norm, options, channels=facts["in_channels"], classes=facts["num_classes"])
        return net, _preparation(facts["mean"], facts["std"], options)

    def run(self, norm: NormFactory, options: DomainAdaptationOptions, context: RunContext) -> Outcome:
        source, target = (
            opened(options.dataset, context, domain=domain, classes=options.num_classes)
            for domain in (options.source, options.target)
        )
        memory = PeakMemory(context.device)
        facts = {
            "num_classes": source.num_classes,
            "in_channels": source.image_shape[0],
            "mean": source.mean,
            "std": source.std,
            "target_domain": options.target_domain,
        }
        net = build(
            norm,
            options,
            channels=source.image_shape[0],
            classes=source.num_classes,
            device=context.device,
            generator=context.generator,
        )
        prepare = _preparation(source.mean, source.std, options, context.device)
        history = context.journal.rows
        domain, precision = options.target_domain, options.precision

        def measured(epoch: Epoch) -> None:
            what = f"after epoch {epoch.number}"
            epoch.row |= observe(net, source.val, without_labels(target.val), prepare, domain, what, precision)
            epoch.row |= score(net, target.val, target.test, prepare, domain, what, precision)

        # dropout of torchvision's models draws from the global generators, so a run seeds them for itself
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            loop = train(net, source.train, without_labels(target.train), options, context, prepare, memory, measured)
            metrics, evidence = _measure(net, source, target, history, prepare, options, context)
        parameters, buffers = norm_sizes(net)
        metrics |= {
            "step_seconds": loop.clock.median(),
            "peak_memory_mb": loop.peak,
            "norm_parameters": float(parameters),
            "norm_buffers": float(buffers),
        }
        kinds = {source.kind, target.kind}
        evidence |= {
            "data": kinds.pop() if len(kinds) == 1 else "real and synthetic",
            "selection": "last epoch",
            "equals": equivalent(net),
            "train_images": len(source.train),
            "target_train_images": len(target.train) if options.num_domains == 2 else 0,
        }
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, history, evidence=evidence, trained=Trained(net.state_dict(), facts))


TASK = DomainAdaptation()


def _preparation(
    mean: Sequence[float],
    std: Sequence[float],
    options: DomainAdaptationOptions,
    device: torch.device | None = None,
) -> Prepare:
    """device: where images go; None: where they are."""

    def prepare(images: Tensor) -> Tensor:
        return normalize(images.to(device or images.device), mean, std).contiguous(memory_format=options.memory_format)

    return prepare


def _measure(
    net: AdaptationNet,
    source: Data,
    target: Data,
    history: list[dict[str, float]],
    prepare: Prepare,
    options: DomainAdaptationOptions,
    context: RunContext,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Everything that is measured after the last epoch, and what the table has to say about it."""
    domain, last = options.target_domain, history[-1]
    final = measure(net, source.test, prepare, SOURCE, "source test", options.precision)
    metrics = {name: last[name] for name in ("target_top1", "val_top1", "im_score")}
    chosen = dict(choose(history))
    metrics |= {f"target_top1_{rule}": history[place]["target_top1"] for rule, place in chosen.items()}
    probe = prepare(first(target.test, SHIFT_PROBE).images)
    metrics |= {
        "source_top1": final.top1,
        "target_top1_adabn": last["target_top1"],
        "composition_shift": composition_shift(net, probe, options.precision, domain),
    }
    evidence: dict[str, Any] = {
        "constant_output": final.constant,
        "test_images": len(target.test),
        "chosen_epochs": {rule: place + 1 for rule, place in chosen.items()},
    }
    if keeps_stats(net):
        adapted, count = adabn(net, without_labels(target.train), prepare, options, context)
        metrics["target_top1_adabn"] = measure(
            adapted, target.test, prepare, domain, "target test, AdaBN", options.precision
        ).top1
        evidence["adabn_images"] = count
    return metrics, evidence


def adabn(
    net: AdaptationNet, part: Part, prepare: Prepare, options: DomainAdaptationOptions, context: RunContext
) -> tuple[nn.Module, int]:
    """A copy of `net` with the target's statistics, from its training images alone; and how many it took.

    As recalibration in the other tasks: shuffled, with training augmentation, in norm batches of as many images as a
    norm batch of training holds of one domain, pooled.
    """
    count, group = recalibration_batches(min(options.adabn_images, len(part)), options.shared)
    chosen = torch.randperm(len(part), generator=context.generator("adabn"))[:count]
    draws = context.generator("adabn augmentation")
    seen = augmented(part, chosen.split(group), options.augmentation, draws, context.device)
    batches = (prepare(images) for images in seen)
    return recalibrated(net, batches, group // options.shared, options.precision, options.target_domain), count


def _refusal(
    norm: NormFactory, options: DomainAdaptationOptions, shape: tuple[int, int, int], classes: int
) -> str | None:
    """The text of the ValueError with which this norm refuses these shapes or forwards, or None."""

    # shapes are the same in every precision, which the meta device has not; and compiling takes minutes
    plain = options.model_copy(update={"precision": "float32", "compile": False})

    def forward(device: str, shared: int) -> None:
        net = build(norm, plain, channels=shape[0], classes=classes, device=device)
        if options.num_domains == 1:
            try_forward(net, shape, options.slices, shared, device, SOURCE)
            return
        slices = min(options.slices, 2)  # as try_forward
        images = torch.zeros(slices * shared, *shape, device=device)
        trial = plain.model_copy(update={"batch_size": slices * shared, "norm_batch_size": shared})
        forward_domains(net, images, images, trial)
        with situation(net.eval(), options.target_domain):
            predict(net, images)

    network = (TASK.name, options.model, options.width, options.slices, classes, options.forward)
    return refusal(norm, forward, options.shared, shape, network)
