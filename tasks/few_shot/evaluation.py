"""The same episodes in the inductive and in the transductive way.

Inductive: each query is predicted without the others. Where evaluation does not mix samples every image is embedded
once and serves all episodes; it is the same number as a forward per episode. Transductive: norms use the statistics of
support and queries together, which only norms that mix samples can tell from the inductive way. A norm that is shown
the support as its context never mixes queries, so its two ways are one, with a forward per episode.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from norms.running import recalibrate
from norms.situation import hold
from tasks.base import Diverged
from tasks.data.episodes import Episode
from tasks.data.images import Split
from tasks.evaluate import EVALUATION_BATCH, evaluating, keeps_stats
from tasks.few_shot.episodic import (
    batch_statistics,
    forward_alone,
    forward_inductive,
    forward_together,
    mixes_queries_in_training,
    needs_context,
)
from tasks.few_shot.heads import Head
from tasks.journal import Journal
from tasks.step import Precision, autocast, wide

NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of every episode, float64 (E,) on the CPU, in both ways."""

    inductive: Tensor
    transductive: Tensor

    @classmethod
    def of(cls, episodes: Sequence[tuple[float, float | None]]) -> Accuracy:
        """From both of each episode; where the transductive way was not measured it equals the inductive one."""
        inductive = [alone for alone, _ in episodes]
        transductive = [alone if together is None else together for alone, together in episodes]
        return cls(torch.tensor(inductive, dtype=torch.float64), torch.tensor(transductive, dtype=torch.float64))

    @property
    def ci95(self) -> float:
        """Half width of the normal 95 % interval of the mean inductive accuracy over episodes.

        It takes episodes as independent; they share images and classes, so the true uncertainty is larger.
        """
        return NORMAL_95 * float(self.inductive.std()) / math.sqrt(len(self.inductive))


@dataclass(frozen=True)
class Pool:
    """The source of an episode's images.

    Args:
        part: stored images, on the run's device.
        look_up: (query, variant) -> images on the scale 0 to 255, see tasks.data.episodes.query_pool.
        prepare: images on that scale -> inputs of the network.
    """

    part: Split
    look_up: Callable[[Tensor, Tensor], Tensor]
    prepare: Callable[[Tensor], Tensor]

    @property
    def device(self) -> torch.device:
        return self.part.images.device

    def stored(self, index: Tensor) -> Tensor:
        return self.prepare(self.part.images[index.to(self.device)])

    def support(self, episode: Episode) -> Tensor:
        return self.stored(episode.support)

    def query(self, episode: Episode) -> Tensor:
        return self.prepare(self.look_up(episode.query, episode.variant))

    @contextlib.contextmanager
    def statistics(self, net: nn.Module, support: Tensor | None) -> Iterator[None]:
        """Within the block `net` is in evaluation mode, its running statistics its own, or those of `support` alone.

        The caller holds them.
        """
        with evaluating(net):
            if support is not None:
                recalibrate(net, [support])
            yield


def episode_accuracy(logits: Tensor, truth: Tensor, number: int) -> float:
    """Fraction of queries whose largest logit (Q, W) is the true one's (Q,).

    Raises:
        Diverged: a logit is not finite (the largest of those would be a class like any other); names the episode.
    """
    if not torch.isfinite(logits).all():
        raise Diverged(f"episode {number} of the evaluation: logits are not finite")
    return float((logits.argmax(1) == truth).float().mean())


@torch.no_grad()
def evaluate_episodes(
    net: nn.Module,
    head: Head,
    episodes: Sequence[Episode],
    pool: Pool,
    way: int,
    *,
    transductive: bool = True,
    support_statistics: bool = False,
    precision: Precision = "float32",
    journal: Journal | None = None,
    name: str = "episodes",
) -> Accuracy:
    """Accuracies of a method that only embeds (prototypical networks, weight imprinting).

    Args:
        net: images (N, C, H, W) -> embeddings (N, D). Weights, buffers and modes stay as they are.
        head: embeddings -> logits.
        episodes: drawn before, so that they are the same whatever the norm.
        pool: their images.
        way: classes per episode.
        transductive: measure that way, too.
        support_statistics: inductive statistics are those of each episode's support alone.
        precision: of the embeddings; the head reads them in float32.
        journal: of the run, which keeps every episode's accuracies under `name`; None: of nobody.
    """
    mixing = transductive and mixes_queries_in_training(net)
    apart = needs_context(net) or (support_statistics and keeps_stats(net))
    embedded = None if apart else _embed_once(net, episodes, pool, precision)

    def accuracy(number: int, episode: Episode, support: Tensor, query: Tensor) -> float:
        support, query = wide(support), wide(query)
        logits = head(support, episode.support_labels.to(support.device), query, way)
        return episode_accuracy(logits, episode.query_labels.to(logits.device), number)

    def measure(item: tuple[int, Episode]) -> tuple[float, float | None]:
        number, episode = item
        if embedded is not None:
            alone = accuracy(number, episode, *embedded(episode))
        else:
            support = pool.support(episode)
            with (
                hold(net),
                autocast(pool.device, precision),
                pool.statistics(net, support if support_statistics and keeps_stats(net) else None),
            ):
                found = forward_inductive(net, support, pool.query(episode))
            alone = accuracy(number, episode, *found)
        if not mixing:
            return alone, None
        with batch_statistics(net), autocast(pool.device, precision):
            found = forward_together(net, pool.support(episode), pool.query(episode))
        return alone, accuracy(number, episode, *found)

    return Accuracy.of((journal or Journal()).each(name, list(enumerate(episodes)), measure))


def _embed_once(
    net: nn.Module, episodes: Sequence[Episode], pool: Pool, precision: Precision
) -> Callable[[Episode], tuple[Tensor, Tensor]]:
    """episode -> embeddings of its support and of its queries, each image and each variant forwarded once."""
    count = len(pool.part)
    stored = torch.cat([episode.support for episode in episodes]).unique()
    varied = torch.cat([episode.variant * count + episode.query for episode in episodes]).unique()
    with hold(net), autocast(pool.device, precision), pool.statistics(net, None):
        plain = torch.cat([forward_alone(net, pool.stored(index)) for index in stored.split(EVALUATION_BATCH)])
        other = torch.cat(
            [
                forward_alone(net, pool.prepare(pool.look_up(i % count, i // count)))
                for i in varied.split(EVALUATION_BATCH)
            ]
        )

    def look_up(episode: Episode) -> tuple[Tensor, Tensor]:
        support = torch.searchsorted(stored, episode.support)
        query = torch.searchsorted(varied, episode.variant * count + episode.query)
        return plain[support.to(plain.device)], other[query.to(other.device)]

    return look_up
