"""Adversarial training: how robust a network becomes with each norm, against every attack of one fixed ensemble.

Training crafts every batch anew (PGD, TRADES or FGSM with a random start) and updates once; the network's mode while
it crafts is an option, nothing that a norm keeps moves meanwhile, and the training forward then moves it as usual. An
input is in [0, 1], its normalization is inside the network, so epsilon means the same for every data set.

No selection: the reported checkpoint is the last epoch, although robustness often peaks earlier. Test images decide
nothing.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import NormFactory, NormInfo, forked_generators
from norms.situation import after_update, situation
from tasks import data as datasets
from tasks.attacks.crafting import check_examples, crafting
from tasks.attacks.evaluation import Robustness, evaluate_robustness, pgd_only
from tasks.attacks.gradient import cross_entropy, divergence, pgd, uniform_start
from tasks.attacks.options import AdversarialOptions
from tasks.base import Diverged, Outcome, RunContext, Setting
from tasks.data.batches import augment, ordered_batches, shuffled_batches
from tasks.data.images import ImageData, Split, shuffled_order
from tasks.fit import (
    PeakMemory,
    StepClock,
    StepOptions,
    composition_shift,
    evaluate,
    learning_rate_at,
    norm_sizes,
    raise_if_diverged,
    set_learning_rate,
    sgd,
    train_step,
)
from tasks.nets import build_net
from tasks.requirements import check_installed
from tasks.trial import lacking, refusal, try_forward

EVALUATION_BATCH = 250
UNKNOWN_SHAPE, UNKNOWN_CLASSES = (3, 64, 64), 10
"""What planning assumes of a folder of images; a norm that refuses the true size then fails in its run."""
SHIFT_PROBE = 64
"""Test images, at most, that `composition_shift` is measured with: half as probes, half as mates."""
TRADES_START = 0.001
"""Standard deviation of the start of TRADES' crafting: at the image itself the divergence has no gradient."""


class Standardized(nn.Module):
    """net((x - mean) / std) per channel: x (N, C, H, W) in [0, 1] -> logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str):
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


class Adversarial:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions of the attacked test images (`attack_images` of them, the same for every norm and
    seed, in a fixed order), in evaluation mode, last epoch:
        clean_top1: without attack.
        fgsm_top1, pgd_top1: right without and under the attack; PGD with restarts, worst case over them.
        autoattack_top1: right without and under each of AutoAttack's parts (see tasks.attacks.ensemble); None without
            any. Never above the figure of a part.
        robust_top1: worst case of each image over all these attacks.
        robust_ci95: half width of Wilson's 95 % interval of robust_top1, over images; its ends are in the evidence.
        val_top1: the whole validation part, without attack.
        val_pgd_top1: PGD without restarts, on as many validation images.
        composition_shift: see tasks.fit.composition_shift; on 64 of the test images.
        step_seconds: median of a training step, crafting included, without data and augmentation.
        peak_memory_mb: of the first epoch's training steps with the network's own memory.
        norm_parameters, norm_buffers: numbers of values in all norms.

    The evidence names each attack's figure and every sign of gradient masking. The history has one row per epoch;
    train_top1 is that of the forwards that are trained on.
    """

    name = "adversarial"
    version = 1
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

    def setting(self, options: AdversarialOptions) -> Setting:
        return Setting(options.shared, 1, datasets.dataset_info(options.dataset).image_shape)

    def data_checksum(self, options: AdversarialOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these attacks can not be run here."""
        if options.autoattack:
            check_installed("torchattacks", "adversarial: autoattack")
        datasets.check_classifiable(options.dataset, data_dir, options.num_classes)
        checksum = datasets.checksum(options.dataset, data_dir)
        train, test, classes = _facts(options.dataset, data_dir, options.num_classes, checksum)
        options.check_classes(classes)
        for option, given, what, available in (
            ("batch_size", options.batch_size, "training", train),
            ("attack_images", options.attack_images, "test", test),
        ):
            if given > available:
                raise ValueError(f'{option} {given} exceeds the {available} {what} images of "{options.dataset}"')
        return checksum

    def why_not(self, norm: NormFactory[nn.Module], info: NormInfo, options: AdversarialOptions) -> str | None:
        """None, or why this norm can not be trained or attacked here; each question is asked once."""
        if reason := lacking(info, self.name):
            return reason
        described = datasets.dataset_info(options.dataset)
        classes = options.num_classes or described.num_classes or UNKNOWN_CLASSES
        shape = described.image_shape or UNKNOWN_SHAPE
        # a factory is a partial of (info, constructor, options)
        key = (*norm.args[:2], json.dumps(norm.args[2], sort_keys=True), options.model, options.width)
        key = (*key, options.shared, options.slices, shape, classes)
        if key not in _REFUSALS:
            _REFUSALS[key] = _refusal(norm, options, shape, classes)
        return _REFUSALS[key]

    def run(self, norm: NormFactory[nn.Module], options: AdversarialOptions, context: RunContext) -> Outcome:
        from norms.convert import equivalent  # here, since it imports torchvision, which planning does not need

        data = _load(options.dataset, context.data_dir, options.num_classes).to(context.device)
        memory = PeakMemory(context.device)
        net = build(norm, data, options, context)
        history: list[dict[str, float]] = []
        # dropout of torchvision's models draws from the global generators, so a run seeds them for itself
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            try:
                cost = _train(net, data, options, context, memory, history)
                context.report(0.6)
            except Diverged as error:
                error.history[:] = history
                raise
            metrics, evidence = _measure(net, data, options, context)
        metrics |= cost | {"val_top1": history[-1]["val_top1"]}
        parameters, buffers = norm_sizes(net)
        metrics |= {"norm_parameters": float(parameters), "norm_buffers": float(buffers)}
        evidence |= {
            "data": data.kind,
            "selection": "last epoch",
            "equals": equivalent(net),
            "crafting_mode": options.crafting_mode,
            "train_images": len(data.train),
        }
        return Outcome({name: metrics[name] for name in self.metrics}, history, evidence=evidence)


TASK = Adversarial()

_REFUSALS: dict[tuple[Any, ...], str | None] = {}


def build(norm: NormFactory[nn.Module], data: ImageData, options: AdversarialOptions, context: RunContext) -> nn.Module:
    """The network of a run, from [0, 1] images to logits, in training mode."""
    net = build_net(
        options.model,
        norm,
        num_classes=data.num_classes,
        in_channels=data.image_shape[0],
        width=options.width,
        device=context.device,
        generator=context.generator,
    )
    standardized = Standardized(net, data.mean, data.std, context.device)
    return standardized.to(memory_format=_memory_format(options))


def craft(net: nn.Module, images: Tensor, labels: Tensor, start: Tensor, options: AdversarialOptions) -> Tensor:
    """Training examples of one batch, each in its ball, crafted in the mode that the options name.

    Args:
        net: images in [0, 1] -> logits; nothing of it changes.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        start: see `draw_start`.
        options: method (not "standard"), radius, step size, steps, mode, norm batches.
    """
    assert options.crafting_mode is not None
    with crafting(net, options.crafting_mode, options.slices, f"crafting ({options.method})"):
        if options.method == "trades":
            with torch.no_grad():
                objective = divergence(net(images))
        else:
            objective = cross_entropy(labels)
        examples = pgd(
            net,
            images,
            objective,
            epsilon=options.radius,
            step_size=options.training_step_size,
            steps=options.steps,
            start=start,
        )
    return check_examples(examples, images, options.radius, f"crafting ({options.method})")


def draw_start(images: Tensor, options: AdversarialOptions, generator: torch.Generator) -> Tensor:
    """The first perturbation of every image, from a CPU generator: uniform in the ball, for TRADES a small normal."""
    if options.method == "trades":
        return torch.empty(images.shape).normal_(0, TRADES_START, generator=generator).to(images.device)
    return uniform_start(images, options.radius, generator)


def adversarial_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    start: Tensor | None,
    options: AdversarialOptions,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Craft, then one SGD update. Arguments and results as tasks.fit.train_step's; `start` is None for "standard".

    pgd, fgsm_rs: the cross entropy of the examples. trades: that of the images + beta * KL(images || examples), mean
    over N; both forwards move running statistics once each, images first.
    """
    per_step = StepOptions(options.slices)
    if start is None:
        return train_step(net, optimizer, images, labels, per_step, progress=progress, step=step)
    examples = craft(net, images, labels, start, options)
    if options.method != "trades":
        return train_step(net, optimizer, examples, labels, per_step, progress=progress, step=step)

    def forward() -> tuple[Tensor, Tensor]:
        with situation(net, slices=options.slices):
            return net(images), net(examples)

    clean, attacked = forward()
    target, moved = F.log_softmax(clean, dim=1), F.log_softmax(attacked, dim=1)
    loss = F.cross_entropy(clean, labels)
    loss = loss + options.trades_beta * F.kl_div(moved, target, reduction="batchmean", log_target=True)
    raise_if_diverged(loss, net, examples, per_step, f"step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    after_update(net, forward, progress)
    return loss.detach(), (attacked.detach().argmax(1) == labels).sum()


def _train(
    net: nn.Module,
    data: ImageData,
    options: AdversarialOptions,
    context: RunContext,
    memory: PeakMemory,
    history: list[dict[str, float]],
) -> dict[str, float | None]:
    """Train `net` in place, append one row per epoch to `history`, return the cost metrics."""
    optimizer = sgd(
        net,
        learning_rate=options.peak_learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        norm_weight_decay=options.norm_weight_decay,
    )
    order, augmentation, starts = (context.generator(purpose) for purpose in ("order", "augmentation", "starts"))
    steps_per_epoch = len(data.train) // options.batch_size
    total = min(options.epochs * steps_per_epoch, options.max_steps or options.epochs * steps_per_epoch)
    clock, step, peak = StepClock(context.device), 0, 0.0
    for epoch in range(options.epochs):
        before = sum(clock.seconds)
        loss_sum, seen, rate = 0.0, 0, 0.0
        correct = torch.zeros((), dtype=torch.int64, device=context.device)
        for images, labels in shuffled_batches(data.train, options.batch_size, order):
            if step == total:
                break
            # the middle of the step, so that neither the first nor the last rate is 0
            done = (step + 0.5) / total
            rate = learning_rate_at(
                done, options.peak_learning_rate, options.schedule, options.warmup, options.milestones
            )
            set_learning_rate(optimizer, rate)
            step += 1
            images = scaled(augment(images, augmentation, options.augmentation), options)
            start = None if options.method == "standard" else draw_start(images, options, starts)
            with clock:
                loss, right = adversarial_step(
                    net, optimizer, images, labels, start, options, progress=step / total, step=step
                )
            loss_sum += float(loss) * len(labels)
            correct += right
            seen += len(labels)
            if step % 20 == 0:
                context.report(0.6 * step / total)
        if epoch == 0:
            peak = memory.megabytes()  # before the first evaluation, whose batches may be larger
        val = evaluate(net, _in_order(data.val, options), what=f"validation after step {step}")
        history.append(
            {
                "epoch": float(epoch + 1),
                "train_loss": loss_sum / seen,
                "train_top1": float(correct) / seen,
                "val_top1": val.top1,
                "learning_rate": rate,
                "seconds": sum(clock.seconds) - before,
            }
        )
        if step == total:
            break
    return {"step_seconds": clock.median(), "peak_memory_mb": peak}


def _measure(
    net: nn.Module, data: ImageData, options: AdversarialOptions, context: RunContext
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Everything that is measured after the last epoch, and what the table has to say about it."""
    attacks = options.attacks(data.num_classes)
    test, val = (_chosen(part, name, options) for part, name in ((data.test, "test"), (data.val, "val")))
    final = evaluate(net, _in_order(test, options), what="test")  # names the layers where something is not finite
    found = evaluate_robustness(
        net,
        scaled(test.images, options),
        test.labels,
        attacks,
        context.generator,
        lambda fraction: context.report(0.6 + 0.35 * fraction),
    )
    validated = evaluate_robustness(
        net,
        scaled(val.images, options),
        val.labels,
        pgd_only(attacks),
        lambda purpose: context.generator(f"val {purpose}"),
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
        "composition_shift": composition_shift(net, scaled(test.images[:SHIFT_PROBE], options)),
    }
    return metrics, _evidence(found, (low, high), final.constant, options)


def _evidence(
    found: Robustness, interval: tuple[float, float], constant: bool, options: AdversarialOptions
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
            *(f"{part}: {_effort(part, options)}" for part in options.autoattack),
        ],
    }


def _effort(part: str, options: AdversarialOptions) -> str:
    if part == "square":
        return f"{options.square_queries} queries"
    return f"{options.fab_steps if part == 'fab_t' else options.apgd_steps} steps"


def scaled(images: Tensor, options: AdversarialOptions) -> Tensor:
    """Images (N, C, H, W) on the scale 0 to 255 -> float32 in [0, 1], in the run's memory format."""
    return (images.float() / 255).contiguous(memory_format=_memory_format(options))


def _memory_format(options: AdversarialOptions) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.contiguous_format


def _in_order(part: Split, options: AdversarialOptions) -> Any:
    return ((scaled(images, options), labels) for images, labels in ordered_batches(part, EVALUATION_BATCH))


def _chosen(part: Split, name: str, options: AdversarialOptions) -> Split:
    """The images that are attacked: a choice that depends on nothing but their number, in stored order."""
    order = shuffled_order(len(part), f"attacked {name} images")[: options.attack_images]
    return part.select(torch.from_numpy(order).sort().values.to(part.labels.device))


def _load(dataset: str, data_dir: Path, classes: int | None) -> ImageData:
    if not datasets.in_memory(dataset, data_dir):
        raise ValueError(f'data set "{dataset}" is too large for memory, and adversarial needs one that fits')
    return datasets.load(dataset, data_dir, classes=classes)


@functools.lru_cache(maxsize=64)
def _facts(dataset: str, data_dir: Path, classes: int | None, checksum: str) -> tuple[int, int, int]:
    """Training images, test images, classes. Cached: a plan asks for each setting; `checksum` is part of the key."""
    data = _load(dataset, data_dir, classes)
    return len(data.train), len(data.test), data.num_classes


def _refusal(
    norm: NormFactory[nn.Module], options: AdversarialOptions, shape: tuple[int, int, int], classes: int
) -> str | None:
    """The text of the ValueError with which this norm refuses these shapes or an attack, or None."""

    def forward(device: str, shared: int) -> None:
        net = build_net(
            options.model, norm, num_classes=classes, in_channels=shape[0], width=options.width, device=device
        )
        try_forward(net, shape, options.slices, shared, device)
        check_attackable(net.train(), torch.zeros(shared, *shape, device=device))
        check_attackable(net.eval(), torch.zeros(1, *shape, device=device))

    return refusal(norm, forward, options.shared, shape)


def check_attackable(net: nn.Module, images: Tensor) -> None:
    """ValueError where the logits do not depend on the images (N, C, H, W) in a way that a gradient can follow."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    if not net(images.requires_grad_()).requires_grad:
        raise ValueError(
            f"in {'training' if net.training else 'evaluation'} mode no gradient reaches the images, so attacks can "
            "not be crafted"
        )
