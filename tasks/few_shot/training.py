"""Training of few-shot networks: where the methods' batches come from, and the loop."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tasks.base import RunContext
from tasks.cost import PeakMemory
from tasks.data.batches import augment
from tasks.data.episodes import EpisodeSampler, variants_needed
from tasks.data.images import ImageData, Split
from tasks.data.reading import stream
from tasks.data.stream import Drawn, Stream
from tasks.few_shot.episodic import TrainingEpisode
from tasks.few_shot.imprinting import imprinting_step
from tasks.few_shot.maml import Maml, maml_step
from tasks.few_shot.networks import FewShotNet
from tasks.few_shot.options import FewShotOptions
from tasks.few_shot.prototypical import prototypical_step
from tasks.inputs import preparation
from tasks.loop import Loop

ROWS = 10
"""Rows of the history."""


def train(
    net: FewShotNet,
    maml: Maml | None,
    data: ImageData,
    options: FewShotOptions,
    context: RunContext,
    memory: PeakMemory,
) -> Loop:
    """Train `net` in place; the journal gets a row per tenth of the steps."""
    optimizer, way, facts = options.trained_by(net), options.training_way, options.told
    drawn: Drawn[list[TrainingEpisode]] | Stream[tuple[Tensor, Tensor]]
    if options.method == "imprinting":
        augmentation = context.generator("augmentation")
        prepare = preparation(data.mean, data.std, options.memory_format)
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
    return loop


def training_episodes(data: ImageData, options: FewShotOptions, context: RunContext) -> Drawn[TrainingEpisode]:
    """Training episodes without end; images augmented and normalized."""
    labels, way = data.train.labels.cpu(), options.training_way
    queries = options.training_queries
    # a stored image that is a query twice is augmented anew each time
    variants = 1 if options.training_augmentation == "none" else variants_needed(labels, options.shot, queries)
    sampler = EpisodeSampler(labels, way, options.shot, queries, variants)
    draws, augmentation = context.generator("episodes"), context.generator("augmentation")
    prepare = preparation(data.mean, data.std, options.memory_format)

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
    return stream(part, options.norm_batch, context.generator("order"))
