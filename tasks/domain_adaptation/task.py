"""Unsupervised domain adaptation: what a norm changes when labels come from one domain and images from two.

The target's labels reach two things: the scores that are reported, and the oracle, which is marked as one. The training
loop and the rules that choose an epoch are given target images (training.py, selection.py).

The headline is the last epoch. Input is normalized by the source's mean and deviation for both domains, so that only
the network adapts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from norms.protocol import NormInfo, equivalent
from norms.situation import predict, situation
from tasks import data as datasets
from tasks.admission import Host, expected, in_both_modes, refusal
from tasks.base import Outcome, RunContext, Setting, Trained
from tasks.cost import PeakMemory
from tasks.data.reading import Data, Part, augmented, first, opened, without_labels
from tasks.domain_adaptation.networks import AdaptationNet, build
from tasks.domain_adaptation.options import SOURCE, TARGET, DomainAdaptationOptions
from tasks.domain_adaptation.selection import choose, measure, observe, score
from tasks.domain_adaptation.training import train
from tasks.evaluate import SHIFT_PROBE, composition_shift, keeps_stats, recalibrated, recalibration_batches
from tasks.inputs import Prepare, facts_of, preparation
from tasks.loop import Epoch
from tasks.nets.guests import conversion
from tasks.nets.models import build_net


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
    headline = "target_top1"
    validation = "val_top1"  # of the source: the target's labels choose nothing
    always_shown = ("forward",)
    folds_over = ""

    def setting(self, options: DomainAdaptationOptions) -> Setting:
        shape = datasets.dataset_info(options.dataset).image_shape
        return Setting(options.norm_batch, options.num_domains, shape)

    def data_checksum(self, options: DomainAdaptationOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these two domains can not serve."""
        used = (options.source, options.target)
        datasets.check_domains(options.dataset, data_dir, used, options.num_classes)
        datasets.check_batch_size(options.dataset, data_dir, used, options.batch_size, options.num_classes)
        return datasets.checksum(options.dataset, data_dir)

    def why_not(self, norm: NormFactory, info: NormInfo, options: DomainAdaptationOptions) -> str | None:
        """None if this norm can be trained here, else the reason in one line."""
        shape, classes = expected(options.dataset, options.num_classes)
        host = Host(
            self.name,
            build_net,  # the backbone, where all norms are
            options.backbone(classes, shape[0]),
            shape,
            options.norm_batch,
            options.slices,
            ("context",),
            forward_backbone,
            {"joint": None if options.num_domains == 1 else options.forward == "joint"},
            options.asked_workers,
        )
        return refusal(norm, info, host)

    def baseline(self, options: DomainAdaptationOptions) -> DomainAdaptationOptions | None:
        """The source-only run of the same options: a gain is what adaptation adds to it."""
        return None if options.method == "source_only" else options.source_only

    def steps(self, options: DomainAdaptationOptions, data_dir: Path) -> int:
        """Updates of a run."""
        labels = datasets.domain_labels(options.dataset, data_dir)[options.source]["train"]
        return options.total_steps(
            len(labels) if options.num_classes is None else int((labels < options.num_classes).sum())
        )

    def network(
        self, norm: NormFactory, options: DomainAdaptationOptions, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Prepare]:
        """See tasks.base.Telling. Norms that ask for a domain are told with norms.situation: facts["target_domain"] is
        the target's, 0 the source's."""
        net = build(norm, options, channels=facts["in_channels"], classes=facts["num_classes"])
        return net, preparation(facts["mean"], facts["std"], options.memory_format)

    def run(self, norm: NormFactory, options: DomainAdaptationOptions, context: RunContext) -> Outcome:
        source, target = (
            opened(options.dataset, context, domain=domain, classes=options.num_classes)
            for domain in (options.source, options.target)
        )
        memory = PeakMemory(context.device)
        facts = facts_of(source) | {"target_domain": options.target_domain}
        net = build(
            norm,
            options,
            channels=source.image_shape[0],
            classes=source.num_classes,
            device=context.device,
            generator=context.generator,
        )
        prepare = preparation(source.mean, source.std, options.memory_format, context.device)
        history = context.journal.rows
        domain, precision, workers = options.target_domain, options.precision, context.workers

        def measured(epoch: Epoch) -> None:
            what = f"after epoch {epoch.number}"
            epoch.row |= observe(net, source.val, without_labels(target.val), prepare, domain, what, precision, workers)
            epoch.row |= score(net, target.val, target.test, prepare, domain, what, precision, workers)

        # dropout of torchvision's models draws from the global generators, so a run seeds them for itself
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            loop = train(net, source.train, without_labels(target.train), options, context, prepare, memory, measured)
            metrics, evidence = _measure(net, source, target, history, prepare, options, context)
        metrics |= loop.costs(net)
        kinds = {source.kind, target.kind}
        evidence |= {
            "data": kinds.pop() if len(kinds) == 1 else "real and synthetic",
            "selection": "last epoch",
            "equals": equivalent(net),
            **conversion(net),
            "train_images": len(source.train),
            "target_train_images": len(target.train) if options.num_domains == 2 else 0,
            **options.design_of_workers,
        }
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, history, evidence=evidence, trained=Trained(net.state_dict(), facts))


TASK = DomainAdaptation()


def _measure(
    net: AdaptationNet,
    source: Data,
    target: Data,
    history: list[dict[str, float]],
    prepare: Prepare,
    options: DomainAdaptationOptions,
    context: RunContext,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics that are measured after the last epoch, and their evidence."""
    domain, last = options.target_domain, history[-1]
    final = measure(net, source.test, prepare, SOURCE, "source test", options.precision, context.workers)
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
            adapted, target.test, prepare, domain, "target test, AdaBN", options.precision, context.workers
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
    count, group = recalibration_batches(min(options.adabn_images, len(part)), options.norm_batch)
    chosen = torch.randperm(len(part), generator=context.generator("adabn"))[:count]
    draws = context.generator("adabn augmentation")
    seen = augmented(part, chosen.split(group), options.augmentation, draws, context.device)
    batches = (prepare(images) for images in seen)
    return recalibrated(net, batches, group // options.norm_batch, options.precision, options.target_domain), count


def forward_backbone(net: nn.Module, images: Tensor, slices: int, *, joint: bool | None) -> None:
    """Forward images (N, C, H, W) of each domain as `forward_domains` does, then those of the target in evaluation
    mode. joint: None where the source is all there is."""
    if joint is None:
        in_both_modes(net, images, slices, domain=SOURCE)
        return
    apart = [(images, SOURCE), (images, TARGET)]
    together = [(torch.cat([images, images]), torch.tensor([SOURCE, TARGET]).repeat_interleave(len(images)))]
    for batch, domain in together if joint else apart:
        with situation(net.train(), domain=domain, slices=slices):
            net(batch)
    with situation(net.eval(), TARGET):
        predict(net, images)
