"""Domain generalization: how a network trained on several domains meets one that it has never seen, with each norm.

One domain is left out; the others are trained on by empirical risk minimization, equally many images of each in every
batch, norms being told which. Nothing of the held-out domain is used: not for weights, statistics, the input's mean and
deviation, or the choice of an epoch. It is forwarded without a domain, so a norm that can not do without one is
skipped, and one that places an image between the domains it knows (bne) combines them (norms.situation.predict).

The held-out domain is one option and an axis of grids; its mean, its worst and the columns of a table are derived in
results. The headline is the last epoch.
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
from tasks.admission import Host, expected, refusal
from tasks.base import Outcome, RunContext, Setting, Trained
from tasks.cost import PeakMemory
from tasks.data.reading import Data, first, moments_of, opened
from tasks.domain_generalization.options import DomainGeneralizationOptions
from tasks.domain_generalization.training import on_unseen, over_sources, parts_of, train
from tasks.evaluate import SHIFT_PROBE, composition_shift
from tasks.inputs import Prepare, facts_of, preparation
from tasks.loop import Epoch
from tasks.nets.guests import conversion
from tasks.nets.models import build_net


class DomainGeneralization:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions, of the last epoch unless said otherwise:
        target_top1: all images of the held-out domain.
        target_top1_source_val: the same for the epoch with the best `val_top1`.
        source_top1: mean over the source domains' test parts, each forwarded as of its domain.
        val_top1: mean over the source domains' validation parts, likewise.
        composition_shift: see tasks.evaluate; on the first 64 images of the held-out domain's test part.
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
    headline = "target_top1"
    validation = "val_top1"
    always_shown: tuple[str, ...] = ()
    folds_over = "held_out"

    def setting(self, options: DomainGeneralizationOptions) -> Setting:
        shape = datasets.dataset_info(options.dataset).image_shape
        return Setting(options.norm_batch, len(options.sources), shape)

    def data_checksum(self, options: DomainGeneralizationOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these domains can not serve."""
        datasets.check_domains(options.dataset, data_dir, options.domains or (), options.num_classes)
        datasets.check_batch_size(options.dataset, data_dir, options.sources, options.batch_size, options.num_classes)
        return datasets.checksum(options.dataset, data_dir)

    def why_not(self, norm: NormFactory, info: NormInfo, options: DomainGeneralizationOptions) -> str | None:
        """None if this norm can be trained here and evaluated on an unseen domain, else the reason in one line."""
        shape, classes = expected(options.dataset, options.num_classes)
        host = Host(
            self.name,
            build_net,
            options.backbone(classes, shape[0]),
            shape,
            options.norm_batch,
            options.slices,
            ("context",),
            forward_sources,
            {"count": len(options.sources)},
            options.asked_workers,
        )
        return refusal(norm, info, host)

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
        net = _build(norm, options, facts)
        return net, preparation(facts["mean"], facts["std"], options.memory_format)

    def run(self, norm: NormFactory, options: DomainGeneralizationOptions, context: RunContext) -> Outcome:
        def load(domain: str) -> Data:
            return opened(options.dataset, context, domain=domain, classes=options.num_classes)

        sources, held_out = [load(domain) for domain in options.sources], load(options.held_out)
        mean, std = moments_of(sources)

        prepare = preparation(mean, std, options.memory_format, context.device)
        memory = PeakMemory(context.device)
        facts = facts_of(held_out) | {"mean": mean, "std": std, "sources": list(options.sources)}
        net = _build(norm, options, facts, device=context.device, generator=context.generator)
        history, precision, workers = context.journal.rows, options.precision, context.workers

        def measured(epoch: Epoch) -> None:
            what = f"after epoch {epoch.number}"
            vals = [data.val for data in sources]
            epoch.row["val_top1"] = over_sources(net, vals, prepare, f"validation {what}", precision, workers)
            epoch.row["target_top1"] = on_unseen(net, held_out, prepare, what, precision, workers).top1

        # dropout of torchvision's models draws from the global generators, so a run seeds them for itself
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            loop = train(net, [data.train for data in sources], options, context, prepare, memory, measured)
            tests = [data.test for data in sources]
            of_sources = over_sources(net, tests, prepare, "test of the sources", precision, workers)
            constant = on_unseen(net, held_out, prepare, "at the end", precision, workers).constant
        chosen = max(range(len(history)), key=lambda i: (history[i]["val_top1"], -i))
        metrics = {
            "target_top1": history[-1]["target_top1"],
            "target_top1_source_val": history[chosen]["target_top1"],
            "source_top1": of_sources,
            "val_top1": history[-1]["val_top1"],
            "composition_shift": composition_shift(net, prepare(first(held_out.test, SHIFT_PROBE).images), precision),
            **loop.costs(net),
        }
        kinds = {data.kind for data in (*sources, held_out)}
        evidence = {
            "data": " and ".join(sorted(kinds)),
            "selection": "last epoch",
            "equals": equivalent(net),
            **conversion(net),
            "constant_output": constant,
            "chosen_epochs": {"source_val": chosen + 1},
            "train_images": sum(len(data.train) for data in sources),
            "test_images": sum(len(part) for part in parts_of(held_out)),
            **options.design_of_workers,
        }
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, history, evidence=evidence, trained=Trained(net.state_dict(), facts))


TASK = DomainGeneralization()


def _build(
    norm: NormFactory, options: DomainGeneralizationOptions, facts: Mapping[str, Any], **where: Any
) -> nn.Module:
    backbone = options.backbone(facts["num_classes"], facts["in_channels"])
    return options.ready(build_net(norm=norm, **backbone, **where))


def forward_sources(net: nn.Module, images: Tensor, slices: int, *, count: int) -> None:
    """Forward images (N, C, H, W) of each of so many domains in one training batch, then those of an unseen domain."""
    domains = torch.arange(count).repeat_interleave(len(images))
    with situation(net.train(), domain=domains, slices=slices):
        net(images.repeat(count, 1, 1, 1))
    predict(net.eval(), images)
