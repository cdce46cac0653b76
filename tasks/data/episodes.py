"""Few-shot episodes: some classes, a few support images of each, and query images to be told apart.

A support and a query of a class are different stored images (of glyphs: different faces). Where a class has too few
others, or the option asks for it, a query is one of V variants of a stored image, each variant a random affine drawn
once by name, so that an evaluation embeds every variant once. Queries stand in random order: their order says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.data.batches import augment
from tasks.data.images import Split


@dataclass(frozen=True)
class Episode:
    """One episode, as positions in a part of a data set (all int64, on the CPU).

    Args:
        support, support_labels: (way * shot,), in random order; labels 0 to way - 1.
        query, variant, query_labels: (way * queries,), in random order; `variant` below the sampler's number of them.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    variant: Tensor
    query_labels: Tensor


class EpisodeSampler:
    """Draws episodes from the labels of a part.

    Args:
        labels: (N,), any integers.
        way: classes in an episode.
        shot: support images of each.
        queries: query images of each.
        variants: V, how often a stored image may be a query of one episode, each time as another variant.

    Raises:
        ValueError: as `check_episodes` for a part of no name.
    """

    def __init__(self, labels: Tensor, way: int, shot: int, queries: int, variants: int = 1):
        check_episodes(labels, "given", way=way, shot=shot, queries=queries, variants=variants)
        labels = labels.cpu()
        self.way, self.shot, self.queries, self.variants = way, shot, queries, variants
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]

    def draw(self, generator: torch.Generator) -> Episode:
        """Draw the next episode from a CPU generator, and from nothing else."""
        support, query, variant = [], [], []
        for index in torch.randperm(len(self.members), generator=generator)[: self.way].tolist():
            members = self.members[index]
            members = members[torch.randperm(len(members), generator=generator)]
            others = members[self.shot :]
            pairs = torch.randperm(len(others) * self.variants, generator=generator)[: self.queries]
            support.append(members[: self.shot])
            query.append(others[pairs // self.variants])
            variant.append(pairs % self.variants)
        first = torch.randperm(self.way * self.shot, generator=generator)
        second = torch.randperm(self.way * self.queries, generator=generator)
        return Episode(
            torch.cat(support)[first],
            torch.arange(self.way).repeat_interleave(self.shot)[first],
            torch.cat(query)[second],
            torch.cat(variant)[second],
            torch.arange(self.way).repeat_interleave(self.queries)[second],
        )

    def draw_many(self, count: int, generator: torch.Generator) -> list[Episode]:
        return [self.draw(generator) for _ in range(count)]


def variants_needed(labels: Tensor, shot: int, queries: int) -> int:
    """The smallest V for which every class has `queries` pairs of another image and a variant."""
    fewest = int(torch.unique(labels, return_counts=True)[1].min())
    return math.ceil(queries / (fewest - shot)) if fewest > shot else 1


def check_episodes(
    labels: Tensor,
    part: str,
    *,
    way: int,
    shot: int,
    queries: int,
    variants: int | None = 1,
    names: tuple[str, str] = ("way", "queries"),
) -> None:
    """ValueError where some episode could not be drawn; names the option, what was given and what there is.

    Args:
        labels: (N,) of the part.
        part: its name, for the message.
        way, shot, queries: of an episode.
        variants: of a stored image; None: as many as are needed.
        names: of the options that `way` and `queries` come from.
    """
    found, counts = torch.unique(labels, return_counts=True)
    if way > len(found):
        raise ValueError(f"{names[0]} {way} exceeds the {len(found)} classes of the {part} part")
    fewest, which = int(counts.min()), int(found[counts.argmin()])
    if shot >= fewest:
        raise ValueError(
            f"shot {shot} leaves no query: class {which} of the {part} part has {fewest} images, so shot is at most "
            f"{fewest - 1}"
        )
    if variants is not None and queries > (fewest - shot) * variants:
        raise ValueError(
            f"shot {shot} and {names[1]} {queries} exceed the {fewest} images of class {which} of the {part} part; "
            "lower one of them, or let queries (or training images) be augmented"
        )


def query_pool(part: Split, variants: int, kind: str, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """(query, variant), (M,) each -> images (M, C, H, W) on the scale 0 to 255.

    Args:
        part: stored images.
        variants: V.
        kind: "none": the stored images themselves; else an augmentation (tasks.data.batches.augment), drawn at once.
        generator: a CPU generator named for it.
    """
    if kind == "none":
        return lambda query, variant: part.images[query.to(part.images.device)]
    drawn = torch.stack([augment(part.images, generator, kind) for _ in range(variants)])

    def look_up(query: Tensor, variant: Tensor) -> Tensor:
        return drawn[variant.to(drawn.device), query.to(drawn.device)]

    return look_up
