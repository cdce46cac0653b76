"""Training: one step of the methods that learn by one loss, and the loop over epochs. MCD's step is in mcd.py.

The loop is given the target as images. It hands the network back after every epoch, so that whoever measures it holds
the labels and the loop does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.situation import after_update
from tasks.adaptation.forward import forward_domains, told
from tasks.adaptation.losses import certainty_weights, conditioned, domain_loss, reversal_strength, reverse_gradient
from tasks.adaptation.mcd import mcd_step
from tasks.adaptation.networks import AdaptationNet
from tasks.adaptation.options import SOURCE, DomainAdaptationOptions
from tasks.adaptation.selection import Prepare
from tasks.base import RunContext
from tasks.data.batches import augment, shuffled_batches
from tasks.data.images import Split
from tasks.fit import (
    StepClock,
    learning_rate_at,
    set_learning_rate,
)
from tasks.step import StepOptions, raise_if_diverged, train_step

Step = Callable[[Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]
"""(source images, labels, target images, progress, step) -> loss, source images classified correctly"""


def adversarial_step(
    net: AdaptationNet,
    optimizer: torch.optim.Optimizer,
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    options: DomainAdaptationOptions,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update by DANN's or CDAN+E's loss: CE(source) + trade_off * domain loss, the gradient of which comes back
    reversed, with a strength that grows with `progress`, to the features (and to CDAN+E's weights).

    Arguments and results as `tasks.adaptation.mcd.mcd_step`.
    """

    def forward() -> tuple[Tensor, Tensor]:
        return forward_domains(net, source, target, options)

    assert net.discriminator is not None
    features = torch.cat(forward())
    logits = net.classify(features)
    of_source = logits[: len(source)]
    strength = reversal_strength(progress)
    if options.method == "cdan_e":
        given = conditioned(reverse_gradient(features, strength), logits.softmax(1), net.maps)
        weights: Tensor | None = certainty_weights(logits, strength)
    else:
        given, weights = reverse_gradient(features, strength), None
    of_domain = domain_loss(net.discriminator(given)[:, 0], len(source), weights)
    loss = F.cross_entropy(of_source, labels) + (options.trade_off or 0.0) * of_domain
    raise_if_diverged(loss, net, torch.cat([source, target]), told(source, target, options), f"step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    after_update(net, forward, progress)
    return loss.detach(), (of_source.detach().argmax(1) == labels).sum()


def train(
    net: AdaptationNet,
    source: Split,
    target: Tensor,
    options: DomainAdaptationOptions,
    context: RunContext,
    prepare: Prepare,
    clock: StepClock,
) -> Iterator[dict[str, float]]:
    """Train `net` in place; after every epoch a row of its history, with the network as it then is.

    Args:
        net: in training mode; whoever evaluates it in between puts that back.
        source: the training part, with labels.
        target: (N, C, H, W), uint8: training images. "source_only" never reads them.
        options: of the run.
        context: draws by name, so that every method and norm meets the same batches of the source.
        prepare: images -> input.
        clock: times the steps.

    Raises:
        Diverged: a loss is not finite.
    """
    update, optimizers = _method(net, options)
    order = context.generator("order")
    of_source, of_target = context.generator("augmentation"), context.generator("target augmentation")
    stream = _endless(target, options.batch_size, context.generator("target order"))
    total, step = options.total_steps(len(source)), 0
    for epoch in range(options.epochs):
        before, loss_sum, seen, rate = sum(clock.seconds), 0.0, 0, 0.0
        correct = torch.zeros((), dtype=torch.int64, device=context.device)
        for images, labels in shuffled_batches(source, options.batch_size, order):
            if step == total:
                break
            rate = learning_rate_at((step + 0.5) / total, options.peak_learning_rate, options.schedule, options.warmup)
            for optimizer in optimizers:
                set_learning_rate(optimizer, rate)
            step += 1
            images = prepare(augment(images, of_source, options.augmentation))
            others = images
            if options.num_domains == 2:
                others = prepare(augment(next(stream), of_target, options.augmentation))
            with clock:
                loss, right = update(images, labels, others, step / total, step)
            loss_sum += float(loss) * len(labels)
            correct += right
            seen += len(labels)
            if step % 20 == 0:
                context.report(0.95 * step / total)
        yield {
            "epoch": float(epoch + 1),
            "train_loss": loss_sum / seen,
            "train_top1": float(correct) / seen,
            "learning_rate": rate,
            "seconds": sum(clock.seconds) - before,
        }
        if step == total:
            break


def _method(net: AdaptationNet, options: DomainAdaptationOptions) -> tuple[Step, list[torch.optim.Optimizer]]:
    """What one update does, and the optimizers whose rate follows the schedule."""
    if options.method == "mcd":
        of_features, of_heads = options.trained_by(net.backbone), options.trained_by(net.heads)

        def by_discrepancy(
            images: Tensor, labels: Tensor, others: Tensor, progress: float, step: int
        ) -> tuple[Tensor, Tensor]:
            return mcd_step(net, of_features, of_heads, images, labels, others, options, progress=progress, step=step)

        return by_discrepancy, [of_features, of_heads]
    optimizer = options.trained_by(net)

    def by_one_loss(
        images: Tensor, labels: Tensor, others: Tensor, progress: float, step: int
    ) -> tuple[Tensor, Tensor]:
        if options.method == "source_only":
            per_step = StepOptions(options.slices, domain=SOURCE)
            return train_step(net, optimizer, images, labels, per_step, progress=progress, step=step)
        return adversarial_step(net, optimizer, images, labels, others, options, progress=progress, step=step)

    return by_one_loss, [optimizer]


def _endless(images: Tensor, batch_size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Batches of the target, shuffled anew for every pass, for as long as the source lasts."""
    while True:
        chosen = torch.randperm(len(images), generator=order).to(images.device)
        for index in chosen[: len(chosen) - len(chosen) % batch_size].split(batch_size):
            yield images[index]
