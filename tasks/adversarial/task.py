"""Adversarial training: how robust a network becomes with each norm, against every attack of one fixed ensemble.

Training crafts every batch anew (PGD, TRADES or FGSM with a random start) and updates once; the network's mode while
it crafts is an option, nothing that a norm keeps moves meanwhile, and the training forward then moves it as usual. An
input is in [0, 1], its normalization is inside the network, so epsilon means the same for every data set.

No selection: the reported checkpoint is the last epoch, although robustness often peaks earlier. Test images decide
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from norms.protocol import NormInfo, Situation, equivalent, norm_modules
from norms.situation import situation
from tasks import data as datasets
from tasks.admission import Host, expected, in_both_modes, refusal
from tasks.adversarial.evaluation import Robustness, evaluate_robustness, part_seeds, pgd_only
from tasks.adversarial.networks import build
from tasks.adversarial.options import CLEAN, AdversarialOptions
from tasks.adversarial.training import in_order, scaled, train
from tasks.base import Outcome, RunContext, Setting, Trained
from tasks.cost import PeakMemory
from tasks.data.images import Split, shuffled_order
from tasks.data.reading import Data, Part, opened, select
from tasks.evaluate import SHIFT_PROBE, composition_shift, evaluate, needs_domain
from tasks.inputs import Prepare, facts_of
from tasks.nets.guests import conversion
from tasks.nets.models import build_net
from tasks.third_party import check_installed


class Adversarial:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions of the attacked test images (`attack_images` of them, the same for every norm and
    seed, in a fixed order), in evaluation mode, last epoch:
        clean_top1: without attack.
        fgsm_top1, pgd_top1: right without and under the attack; PGD with restarts, worst case over them.
        autoattack_top1: right without and under each of AutoAttack's parts (see ensemble.py); None without any.
            Never above the figure of a part.
        robust_top1: worst case of each image over all these attacks.
        robust_ci95: half width of Wilson's 95 % interval of robust_top1, over images; its ends are in the evidence.
        val_top1: the whole validation part, without attack.
        val_pgd_top1: PGD without restarts, on as many validation images.
        composition_shift: see tasks.evaluate.composition_shift; on 64 of the test images.
        step_seconds: median of a training step, crafting included, without data and augmentation.
        peak_memory_mb: of the first epoch's training steps with the network's own memory.
        norm_parameters, norm_buffers: numbers of values in all norms.

    The evidence names each attack's figure and every sign of gradient masking. The history has one row per epoch;
    train_top1 is that of the forwards that are trained on.
    """

    name = "adversarial"
    version = 2
    options = AdversarialOptions
    metrics = (
        "robust_top1",
        "robust_ci95",
        "clean_top1",
        "fgsm_top1",
        "pgd_top1",
        "autoattack_top1",
        "val_top1",
        "val_pgd_top1",
        "composition_shift",
        "step_seconds",
        "peak_memory_mb",
        "norm_parameters",
        "norm_buffers",
    )
    headline = "robust_top1"
    validation = "val_pgd_top1"
    always_shown = ("crafting_mode",)
    folds_over = ""

    def setting(self, options: AdversarialOptions) -> Setting:
        return Setting(options.norm_batch, options.num_domains, datasets.dataset_info(options.dataset).image_shape)

    def data_checksum(self, options: AdversarialOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these attacks can not be run here."""
        if options.autoattack:
            check_installed("torchattacks", "adversarial: autoattack")
        datasets.check_classifiable(options.dataset, data_dir, options.num_classes)
        counts = datasets.class_counts(options.dataset, data_dir, options.num_classes)
        options.check_classes(len(counts["train"]))
        for option, given, what, available in (
            ("batch_size", options.batch_size, "training", int(counts["train"].sum())),
            ("attack_images", options.attack_images, "test", int(counts["test"].sum())),
        ):
            if given > available:
                raise ValueError(f'{option} {given} exceeds the {available} {what} images of "{options.dataset}"')
        return datasets.checksum(options.dataset, data_dir)

    def why_not(self, norm: NormFactory, info: NormInfo, options: AdversarialOptions) -> str | None:
        """None if this norm can be trained and attacked here, else the reason in one line."""
        absent = ("context",) if options.num_domains == 2 else ("domain", "context")
        shape, classes = expected(options.dataset, options.num_classes)
        host = Host(
            f"{self.name} ({options.method})",
            build_net,
            options.backbone(classes, shape[0]),
            shape,
            options.norm_batch,
            options.slices,
            absent,
            forward_and_attack,
            {"domain": options.deployed},
            options.asked_workers,
        )
        return refusal(norm, info, host)

    def steps(self, options: AdversarialOptions, data_dir: Path) -> int:
        """Updates of a run."""
        counts = datasets.class_counts(options.dataset, data_dir, options.num_classes)["train"]
        return options.total_steps(int(counts.sum()))

    def network(
        self, norm: NormFactory, options: AdversarialOptions, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Prepare]:
        """See tasks.base.Telling. The network takes images in [0, 1], and its norms are told that each may be attacked,
        as in the run's evaluation."""
        net = build(norm, options, facts)
        for _, module in norm_modules(net):
            module.situation = Situation(options.deployed)  # type: ignore[assignment]
        return net, lambda images: scaled(images, options)

    def run(self, norm: NormFactory, options: AdversarialOptions, context: RunContext) -> Outcome:
        data = opened(options.dataset, context, classes=options.num_classes)
        memory = PeakMemory(context.device)
        facts = facts_of(data)
        net = build(norm, options, facts, context.device, context.generator)
        # dropout of torchvision's models draws from the global generators, so a run seeds them for itself
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            loop = train(net, data, options, context, memory)
            metrics, evidence = _measure(net, data, options, context)
        history = context.journal.rows
        metrics |= loop.costs(net) | {"val_top1": history[-1]["val_top1"]}
        evidence |= {
            "data": data.kind,
            "selection": "last epoch",
            "equals": equivalent(net),
            **conversion(net),
            "crafting_mode": options.crafting_mode,
            "train_images": len(data.train),
            **options.design_of_workers,
        }
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, history, evidence=evidence, trained=Trained(net.state_dict(), facts))


TASK = Adversarial()


def _measure(
    net: nn.Module, data: Data, options: AdversarialOptions, context: RunContext
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The metrics that are measured after the last epoch, and their evidence."""
    attacks = options.attacks(data.num_classes)
    parts: tuple[tuple[Part, str], ...] = ((data.test, "test"), (data.val, "val"))
    test, val = (_chosen(part, name, options).to(context.device) for part, name in parts)
    deployed, precision, once = options.deployed, options.precision, context.journal.once
    told_deployed = replace(options.told_deployed, workers=context.workers)
    # before the attacks: it names the layers where something is not finite
    plain = in_order(test, options, context.device, context.workers)
    final = evaluate(net, plain, precision, "test", deployed, context.workers)
    found = evaluate_robustness(
        net, scaled(test.images, options), test.labels, attacks, context.generator, told_deployed, once
    )
    validated = evaluate_robustness(
        net,
        scaled(val.images, options),
        val.labels,
        pgd_only(attacks),
        lambda purpose: context.generator(f"val {purpose}"),
        told_deployed,
        lambda name, measure: once(f"val {name}", measure),
    )
    low, high = found.interval()
    metrics: dict[str, float | None] = {
        "robust_top1": found.robust_top1,
        "robust_ci95": (high - low) / 2,
        "clean_top1": found.top1(),
        "fgsm_top1": found.top1("fgsm"),
        "pgd_top1": found.top1("pgd"),
        "autoattack_top1": found.top1(*options.autoattack) if options.autoattack else None,
        "val_pgd_top1": validated.top1("pgd"),
        "composition_shift": composition_shift(net, scaled(test.images[:SHIFT_PROBE], options), precision, deployed),
    }
    evidence = _evidence(found, (low, high), final.constant, options, attacks.scale.targets)
    if options.num_domains == 2 and needs_domain(net):
        plain = in_order(test, options, context.device, context.workers)
        of_clean = evaluate(net, plain, precision, "test, clean", CLEAN, context.workers)
        evidence["clean_branch_top1"] = of_clean.top1
    return metrics, evidence | {"attack_seeds": part_seeds(attacks, context.generator)}


def _evidence(
    found: Robustness, interval: tuple[float, float], constant: bool, options: AdversarialOptions, targets: int
) -> dict[str, Any]:
    return {
        "constant_output": constant,
        "test_images": len(found.clean),
        "robust_interval": list(interval),
        "attack_top1": {name: found.top1(name) for name in found.attacks},
        "masking": "; ".join(found.signs_of_masking()),
        "attacks": [
            "fgsm",
            f"pgd: {options.pgd_steps} steps, {options.pgd_restarts} restarts",
            *(f"{part}: {_effort(part, options, targets)}" for part in options.autoattack),
        ],
    }


def _effort(part: str, options: AdversarialOptions, targets: int) -> str:
    if part == "square":
        return f"{options.square_queries} queries"
    steps = f"{options.fab_steps if part == 'fab_t' else options.apgd_steps} steps"
    return f"{steps}, {targets} targets" if part.endswith("_t") else steps


def _chosen(part: Part, name: str, options: AdversarialOptions) -> Split:
    """The images that are attacked: a choice that depends on nothing but their number, in stored order."""
    order = shuffled_order(len(part), f"attacked {name} images")[: options.attack_images]
    return select(part, torch.from_numpy(order).sort().values)


def forward_and_attack(net: nn.Module, images: Tensor, slices: int, *, domain: int | None) -> None:
    """Forward images (N, C, H, W) as tasks.admission.in_both_modes, and ask whether attacks can follow gradients."""
    in_both_modes(net, images, slices, domain=domain)
    with situation(net, domain):
        check_attackable(net.train(), images[: len(images) // slices].clone())
        check_attackable(net.eval(), images[:1].clone())


def check_attackable(net: nn.Module, images: Tensor) -> None:
    """ValueError where the logits do not depend on the images (N, C, H, W) in a way that a gradient can follow."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    if not net(images.requires_grad_()).requires_grad:
        raise ValueError(
            f"in {'training' if net.training else 'evaluation'} mode no gradient reaches the images, so attacks can "
            "not be crafted"
        )
