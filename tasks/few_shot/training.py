"""Training of few-shot networks: the three methods' updates, where their batches come from, the loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from tasks.base import RunContext
from tasks.cost import PeakMemory
from tasks.data.batches import augment, normalize
from tasks.data.episodes import EpisodeSampler, variants_needed
from tasks.data.images import ImageData, Split
from tasks.data.reading import stream
from tasks.data.stream import Drawn, Stream
from tasks.few_shot.imprinting import imprinting_step
from tasks.few_shot.maml import Maml, StepStatistics
from tasks.few_shot.networks import FewShotNet, build_few_shot_net
from tasks.few_shot.options import FewShotOptions
from tasks.few_shot.prototypical import TrainingEpisode, prototypical_step
from tasks.few_shot.steps import update_on_mean
from tasks.loop import Loop

ROWS = 10
"""Rows of the history."""


def build(
    norm: NormFactory, options: FewShotOptions, image_shape: tuple[int, int, int], classes: int, **where: Any
) -> FewShotNet:
    """The network of a run, in training mode.

    Args:
        norm: a factory from `make_norm`.
        options: of the run.
        image_shape: (C, H, W).
        classes: of the classifier (`outputs`).
        where: device and generator, as build_few_shot_net's.
    """
    net = build_few_shot_net(
        options.model,
        options.method,
        norm,
        image_shape=image_shape,
        num_classes=classes,
        width=options.width,
        **where,
    ).to(memory_format=options.memory_format)
    if options.compile:
        net.embedding.compile()
    return net


def outputs(data: ImageData, options: FewShotOptions) -> int:
    """Classes that a classifier of the method tells apart."""
    return options.way if options.method == "maml" else len(data.train.labels.unique())


def maml_step(
    maml: Maml,
    optimizer: torch.optim.Optimizer,
    episodes: list[TrainingEpisode],
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update of MAML; arguments and results as `prototypical_step`'s, precision and gradient_clip as `maml` is
    told."""
    losses, correct = [], []
    for episode in episodes:
        loss, logits = maml.meta_loss(*episode)
        losses.append(loss)
        correct.append((logits.detach().argmax(1) == episode[3]).sum())
    update_on_mean(maml.net, optimizer, losses, episodes[-1][2], maml.told, step)
    maml.after_update([query for _, _, query, _ in episodes], progress)
    return torch.stack(losses).mean().detach(), torch.stack(correct).sum()


def train(
    net: FewShotNet,
    maml: Maml | None,
    data: ImageData,
    options: FewShotOptions,
    context: RunContext,
    memory: PeakMemory,
) -> dict[str, float]:
    """Train `net` in place; the journal gets a row per tenth. Returns the cost metrics."""
    optimizer, way, facts = options.trained_by(net), options.training_way, options.told
    drawn: Drawn[list[TrainingEpisode]] | Stream[tuple[Tensor, Tensor]]
    if options.method == "imprinting":
        augmentation = context.generator("augmentation")
        prepare = preparation(data.mean, data.std, options)
        drawn = _batches(data, options, context)
    else:
        episodes = training_episodes(data, options, context)
        drawn = Drawn(lambda: list(itertools.islice(episodes, options.episodes_per_step)))
    loop = Loop(
        context,
        "training",
        ends=sorted({-(-options.steps * row // ROWS) for row in range(1, ROWS + 1)}),
        rates={optimizer: options.rate},
        keeps={"net": net} if maml is None or maml.sets is None else {"net": net, "statistics of steps": maml.sets},
        memory=memory,
        accuracy="train_acc",
        counts="step",
    )
    for tenth in loop.epochs():
        for step, batch in tenth.steps(drawn):
            place: dict[str, Any] = {"progress": step.progress, "step": step.number}
            if options.method == "imprinting":
                images, labels = batch
                images = prepare(augment(images, augmentation, options.training_augmentation))
                with step:
                    loss, right = imprinting_step(net, optimizer, images, labels, options=facts, **place)
                count = len(labels)
            else:
                with step:
                    if maml is not None:
                        loss, right = maml_step(maml, optimizer, batch, **place)
                    else:
                        loss, right = prototypical_step(net, optimizer, batch, way, options=facts, **place)
                count = sum(len(labels) for *_, labels in batch)
            step.saw(count, right, train_loss=loss)
    return {"step_seconds": loop.clock.median(), "peak_memory_mb": loop.peak}


def training_episodes(data: ImageData, options: FewShotOptions, context: RunContext) -> Drawn[TrainingEpisode]:
    """Training episodes without end; images augmented and normalized."""
    labels, way = data.train.labels.cpu(), options.training_way
    queries = options.training_queries
    # a stored image that is a query twice is augmented anew each time
    variants = 1 if options.training_augmentation == "none" else variants_needed(labels, options.shot, queries)
    sampler = EpisodeSampler(labels, way, options.shot, queries, variants)
    draws, augmentation = context.generator("episodes"), context.generator("augmentation")
    prepare = preparation(data.mean, data.std, options)

    def draw() -> TrainingEpisode:
        episode = sampler.draw(draws)
        support, query = (
            prepare(augment(data.train.images[index.to(context.device)], augmentation, kind))
            for index, kind in (
                (episode.support, options.support_augmentation),
                (episode.query, options.training_augmentation),
            )
        )
        return support, episode.support_labels.to(context.device), query, episode.query_labels.to(context.device)

    return Drawn(draw)


def _batches(data: ImageData, options: FewShotOptions, context: RunContext) -> Stream[tuple[Tensor, Tensor]]:
    """Stored images of the training classes without end, labelled 0 to their number - 1."""
    classes = data.train.labels.unique()
    part = Split(data.train.images, torch.searchsorted(classes, data.train.labels))
    return stream(part, options.shared, context.generator("order"))


def learner(net: nn.Module, options: FewShotOptions) -> Maml | None:
    """What adapts `net`, where the method does; its statistics per step live as long as it."""
    if options.method != "maml":
        return None
    rate, steps, statistics = options.inner_learning_rate, options.inner_steps, options.inner_statistics
    assert rate is not None
    assert steps is not None
    assert statistics is not None
    sets = StepStatistics(net, steps) if statistics == "per_step" else None
    return Maml(net, rate, steps, options.order == "first", statistics, sets, options.told)


def preparation(mean: Sequence[float], std: Sequence[float], options: FewShotOptions) -> Callable[[Tensor], Tensor]:
    """Images on the scale 0 to 255 -> inputs of the network."""

    def prepare(images: Tensor) -> Tensor:
        return normalize(images, mean, std).contiguous(memory_format=options.memory_format)

    return prepare
