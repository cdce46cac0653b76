"""Training of few-shot networks: the three methods' updates, where their batches come from, the loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import NormFactory
from norms.situation import after_update, situation
from tasks.base import Diverged, RunContext
from tasks.data.batches import augment, normalize, shuffled_batches
from tasks.data.episodes import EpisodeSampler, variants_needed
from tasks.data.images import ImageData, Split
from tasks.fit import (
    PeakMemory,
    StepClock,
    learning_rate_at,
    parameter_groups,
    set_learning_rate,
)
from tasks.metalearning.episodic import forward_together, needs_context
from tasks.metalearning.heads import prototypical
from tasks.metalearning.maml import Maml, StepStatistics
from tasks.metalearning.networks import FewShotNet, build_few_shot_net
from tasks.metalearning.options import FewShotOptions
from tasks.step import StepOptions, raise_if_diverged

ROWS = 10
"""Rows of the history."""


def build(norm: NormFactory, data: ImageData, options: FewShotOptions, context: RunContext) -> FewShotNet:
    """The network of a run, in training mode."""
    net = build_few_shot_net(
        options.model,
        options.method,
        norm,
        image_shape=data.image_shape,
        num_classes=options.way if options.method == "maml" else len(data.train.labels.unique()),
        width=options.width,
        device=context.device,
        generator=context.generator,
    )
    return net.to(memory_format=_memory_format(options))


def prototypical_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    episodes: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    way: int,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update of a prototypical network.

    Args:
        net: in training mode.
        optimizer: its learning rate is set by the caller.
        episodes: support (S, C, H, W), its labels, query (Q, C, H, W), its labels.
        way: classes per episode.
        progress: fraction of training that is done after this step.
        step: for the message only.

    Returns:
        The mean loss before the update and the number of queries classified correctly.

    Raises:
        Diverged: the loss is not finite.
    """

    def forward() -> list[tuple[Tensor, Tensor]]:
        return [forward_together(net, support, query) for support, _, query, _ in episodes]

    losses, correct = [], []
    for (first, second), (_, support_labels, _, query_labels) in zip(forward(), episodes, strict=True):
        logits = prototypical(first, support_labels, second, way)
        losses.append(F.cross_entropy(logits, query_labels))
        correct.append((logits.detach().argmax(1) == query_labels).sum())
    _update(net, optimizer, losses, episodes[-1][2], step)
    after_update(net, forward, progress)
    return torch.stack(losses).mean().detach(), torch.stack(correct).sum()


def imprinting_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update of the classifier of the training classes; arguments and results as `prototypical_step`'s. A batch is
    the context of its own images."""

    def forward() -> Tensor:
        with situation(net, part="context"):
            return net(images)

    logits = forward()
    loss = F.cross_entropy(logits, labels)
    _update(net, optimizer, [loss], images, step)
    after_update(net, forward, progress)
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def maml_step(
    maml: Maml,
    optimizer: torch.optim.Optimizer,
    episodes: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update of MAML; arguments and results as `prototypical_step`'s."""
    losses, correct = [], []
    for episode in episodes:
        loss, logits = maml.meta_loss(*episode)
        losses.append(loss)
        correct.append((logits.detach().argmax(1) == episode[3]).sum())
    _update(maml.net, optimizer, losses, episodes[-1][2], step)
    maml.after_update([query for _, _, query, _ in episodes], progress)
    return torch.stack(losses).mean().detach(), torch.stack(correct).sum()


def _update(net: nn.Module, optimizer: torch.optim.Optimizer, losses: list[Tensor], images: Tensor, step: int) -> None:
    loss = torch.stack(losses).mean()
    if not needs_context(net):
        raise_if_diverged(loss, net, images, StepOptions(), f"step {step}")
    elif loss.device.type != "meta" and not math.isfinite(value := loss.item()):
        # that one looks at the layers in a forward of its own, which has no context
        raise Diverged(f"step {step}: the loss is {value}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def train(
    net: FewShotNet,
    maml: Maml | None,
    data: ImageData,
    options: FewShotOptions,
    context: RunContext,
    memory: PeakMemory,
    history: list[dict[str, float]],
) -> dict[str, float]:
    """Train `net` in place, append a row per tenth to `history`, return the cost metrics."""
    groups = parameter_groups(net, options.weight_decay, options.norm_weight_decay)
    optimizer = torch.optim.Adam(groups, lr=options.learning_rate)
    batches = _batches(data, options, context) if options.method == "imprinting" else None
    episodes = None if batches is not None else training_episodes(data, options, context)
    clock, peak, loss_sum, right, asked, before = StepClock(context.device), 0.0, 0.0, 0.0, 0, 0.0
    ends = {-(-options.steps * row // ROWS) for row in range(1, ROWS + 1)}
    for step in range(1, options.steps + 1):
        # the middle of the step, so that neither the first nor the last rate is 0
        rate = learning_rate_at((step - 0.5) / options.steps, options.learning_rate, options.schedule, options.warmup)
        set_learning_rate(optimizer, rate)
        progress = step / options.steps
        if batches is not None:
            images, labels = next(batches)
            with clock:
                loss, correct = imprinting_step(net, optimizer, images, labels, progress=progress, step=step)
            count = len(labels)
        else:
            assert episodes is not None
            drawn = list(itertools.islice(episodes, options.episodes_per_step))
            with clock:
                if maml is not None:
                    loss, correct = maml_step(maml, optimizer, drawn, progress=progress, step=step)
                else:
                    way = options.training_way
                    loss, correct = prototypical_step(net, optimizer, drawn, way, progress=progress, step=step)
            count = sum(len(labels) for *_, labels in drawn)
        loss_sum, right, asked = loss_sum + float(loss) * count, right + float(correct), asked + count
        if step in ends:
            if not history:
                peak = memory.megabytes()
            seconds = sum(clock.seconds)
            history.append(
                {
                    "step": float(step),
                    "train_loss": loss_sum / asked,
                    "train_acc": right / asked,
                    "learning_rate": rate,
                    "seconds": seconds - before,
                }
            )
            loss_sum, right, asked, before = 0.0, 0.0, 0, seconds
            context.report(0.6 * progress)
    return {"step_seconds": clock.median(), "peak_memory_mb": peak}


def training_episodes(
    data: ImageData, options: FewShotOptions, context: RunContext
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Training episodes without end: support, its labels, query, its labels; images augmented and normalized."""
    labels, way = data.train.labels.cpu(), options.training_way
    queries = options.training_queries
    # a stored image that is a query twice is augmented anew each time
    variants = 1 if options.training_augmentation == "none" else variants_needed(labels, options.shot, queries)
    sampler = EpisodeSampler(labels, way, options.shot, queries, variants)
    draws, augmentation = context.generator("episodes"), context.generator("augmentation")
    prepare = preparation(data, options)
    while True:
        episode = sampler.draw(draws)
        support, query = (
            prepare(augment(data.train.images[index.to(context.device)], augmentation, kind))
            for index, kind in (
                (episode.support, options.support_augmentation),
                (episode.query, options.training_augmentation),
            )
        )
        yield support, episode.support_labels.to(context.device), query, episode.query_labels.to(context.device)


def _batches(data: ImageData, options: FewShotOptions, context: RunContext) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the training classes without end, labelled 0 to their number - 1."""
    classes = data.train.labels.unique()
    part = Split(data.train.images, torch.searchsorted(classes, data.train.labels))
    order, augmentation = context.generator("order"), context.generator("augmentation")
    prepare = preparation(data, options)
    while True:
        for images, labels in shuffled_batches(part, options.shared, order):
            yield prepare(augment(images, augmentation, options.training_augmentation)), labels


def learner(net: nn.Module, options: FewShotOptions) -> Maml | None:
    """What adapts `net`, where the method does; its statistics per step live as long as it."""
    if options.method != "maml":
        return None
    rate, steps, statistics = options.inner_learning_rate, options.inner_steps, options.inner_statistics
    assert rate is not None
    assert steps is not None
    assert statistics is not None
    sets = StepStatistics(net, steps) if statistics == "per_step" else None
    return Maml(net, rate, steps, options.order == "first", statistics, sets)


def preparation(data: ImageData, options: FewShotOptions) -> Callable[[Tensor], Tensor]:
    """Images on the scale 0 to 255 -> inputs of the network."""
    memory_format = _memory_format(options)

    def prepare(images: Tensor) -> Tensor:
        return normalize(images, data.mean, data.std).contiguous(memory_format=memory_format)

    return prepare


def _memory_format(options: FewShotOptions) -> torch.memory_format:
    wanted = options.method != "maml" if options.channels_last is None else options.channels_last
    return torch.channels_last if wanted else torch.contiguous_format
