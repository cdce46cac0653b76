"""MAML (Finn et al. 2017, arXiv:1703.03400) on learn2learn, with norms that keep statistics.

    theta_0 = theta      theta_{k+1} = theta_k - a * grad L(support; theta_k)      meta-loss: L(query; theta_K)

The clone that adapts is learn2learn's `clone_module`. Its steps are our own, equal to learn2learn's to the last bit
(`_descend`): there each step walks all modules and leaves an attribute at every parameter.

First order treats the inner gradients as constants. Norms are in training mode in every forward of training, so
support and queries are normalized each by their own batch; what that does to running statistics is the option
`inner_statistics` (see tasks.few_shot.options).

A norm that needs a context is told each inner forward of the support as one. What it kept of the last of them belongs
to theta_{K-1} (and its graph is gone where the order is first), so the support is shown once more at theta_K before the
queries: one more forward of the support per episode, for such norms alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.protocol import norm_modules
from norms.situation import after_update, hold
from tasks.data.episodes import Episode
from tasks.few_shot.episodic import (
    TrainingEpisode,
    batch_statistics,
    forward_alone,
    mixes_queries_in_training,
    show_context,
    update_on_mean,
)
from tasks.few_shot.evaluation import Accuracy, Pool, episode_accuracy
from tasks.few_shot.options import PLAIN, FewShotOptions
from tasks.journal import Journal
from tasks.step import StepOptions, told, wide
from tasks.third_party import import_legacy

Buffers = dict[str, Tensor | None]


class StepStatistics:
    """One set of every norm's buffers for each forward of an adaptation: steps 0 to `steps` - 1, and the queries'.

    Args:
        net: whose buffers every set begins with.
        steps: of the inner loop.
    """

    def __init__(self, net: nn.Module, steps: int):
        self.device = next(net.parameters()).device
        self.sets: list[dict[str, Buffers]] = [
            {
                name: {k: None if b is None else b.clone() for k, b in part._buffers.items()}
                for name, part in _parts(net)
            }
            for _ in range(steps + 1)
        ]

    @contextlib.contextmanager
    def step(self, net: nn.Module, index: int) -> Iterator[None]:
        """Within the block the norms of `net` (the network or a clone of it) have set `index`, and may change it."""
        before = [(part, dict(part._buffers)) for _, part in _parts(net)]
        for name, part in _parts(net):
            part._buffers.update(self.sets[index][name])
        try:
            yield
        finally:
            for (name, part), (_, own) in zip(_parts(net), before, strict=True):
                # the graph of what a norm keeps of a context ends with its step
                self.sets[index][name] = {k: None if b is None else b.detach() for k, b in part._buffers.items()}
                part._buffers.update(own)

    def state_dict(self) -> dict[str, Any]:
        return {"sets": self.sets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the buffers of every step, whatever stands in their places here: None, or one of another shape.

        Raises:
            ValueError: they are of other norms, or of another number of steps.
        """
        sets = state["sets"]
        ours, theirs = ([{name: set(part) for name, part in one.items()} for one in each] for each in (self.sets, sets))
        if ours != theirs:
            raise ValueError(f"statistics of {len(theirs)} steps were kept, here are {len(ours)}, or of other norms")
        self.sets = [
            {
                name: {k: None if b is None else b.to(self.device, copy=True) for k, b in part.items()}
                for name, part in one.items()
            }
            for one in sets
        ]


def _hand_back(clone: nn.Module, net: nn.Module) -> None:
    """Hand the state of a clone's norms back to those of the network, without its graph: a clone shares tensors that
    are changed in place, but a buffer that a norm replaces, or its extra state, is the clone's alone."""
    for (_, own), (_, part) in zip(_parts(net), _parts(clone), strict=True):
        for key, buffer in part._buffers.items():
            if buffer is not own._buffers[key] or (buffer is not None and buffer.requires_grad):
                own._buffers[key] = None if buffer is None else buffer.detach()
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            own.set_extra_state(part.get_extra_state())


def _descend(net: nn.Module, loss: Tensor, rate: float, first_order: bool) -> None:
    """Put w - rate * dloss/dw in the place of every weight w of a clone: new tensors, in second order with their graph.

    A weight that the loss does not reach, or that is not learned, stays; one that several modules share stays one.
    """
    weights = [w for w in net.parameters() if w.requires_grad]
    second = not first_order
    gradients = torch.autograd.grad(loss, weights, retain_graph=second, create_graph=second, allow_unused=True)
    moved = {w: w - rate * g for w, g in zip(weights, gradients, strict=True) if g is not None}
    for part in net.modules():
        own = part._parameters
        # a clone's weights are no nn.Parameter, which setattr would ask for
        own.update({key: moved[w] for key, w in own.items() if w is not None and w in moved})  # type: ignore[misc]


def _parts(net: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}/{inner}", part) for name, norm in norm_modules(net) for inner, part in norm.named_modules()]


@dataclass(frozen=True)
class Maml:
    """A network with its inner loop.

    Args:
        net: images (N, C, H, W) -> logits (N, way).
        rate: of the inner loop.
        steps: of adaptation in training.
        first_order: inner gradients are constants.
        statistics: "shared", "per_step" or "none".
        sets: the statistics of each step where they are per step, else None.
        told: precision of every forward; gradient_clip of the outer update.
    """

    net: nn.Module
    rate: float
    steps: int
    first_order: bool
    statistics: str
    sets: StepStatistics | None
    told: StepOptions = PLAIN

    def adapted(self, support: Tensor, labels: Tensor, *, steps: int, training: bool) -> nn.Module:
        """A clone of the network after `steps` steps on support (S, C, H, W), labels (S,).

        In training the graph back to the network stays; else adaptation is first-order, with the support's own batch
        statistics, and keeps nothing.
        """
        library = import_legacy("learn2learn", "few_shot with method maml")
        clone: nn.Module = library.utils.clone_module(self.net)
        for step in range(steps):
            with self.statistics_of(clone, step), contextlib.ExitStack() as stack:
                stack.enter_context(told(clone, support, self.told, part="context"))
                if not training:
                    stack.enter_context(batch_statistics(clone))
                elif self.statistics == "none":
                    stack.enter_context(hold(clone))
                logits = clone(support)
            _descend(clone, F.cross_entropy(wide(logits), labels), self.rate, self.first_order or not training)
        return clone

    def meta_loss(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(mean cross entropy of the queries after adaptation, logits (Q, way)); `net` is in training mode."""
        net = self.adapted(support, support_labels, steps=self.steps, training=True)
        with self.statistics_of(net, self.steps), told(net, query, self.told, part="query"):
            show_context(net, support)
            logits = wide(net(query))
        _hand_back(net, self.net)
        return F.cross_entropy(logits, query_labels), logits

    def after_update(self, queries: Sequence[Tensor], progress: float) -> None:
        """Tell the norms that the network was updated, once for each set of statistics: schedules and memories are kept
        in them. A norm that takes a second look sees the queries, with the statistics that are theirs."""
        if self.sets is not None:
            for index in range(self.steps):
                with self.statistics_of(self.net, index):
                    after_update(self.net, lambda: None, progress)

        def again() -> None:
            for query in queries:
                with told(self.net, query, self.told):
                    self.net(query)

        with self.statistics_of(self.net, self.steps):
            after_update(self.net, again, progress)

    def evaluate(
        self,
        episodes: Sequence[Episode],
        pool: Pool,
        steps: int,
        transductive: bool,
        support_statistics: bool,
        *,
        journal: Journal | None = None,
        name: str = "episodes",
    ) -> Accuracy:
        """Accuracies of adapted clones. Inductive: each query alone in evaluation mode, with the last set of running
        statistics (or those of the support). Transductive: with the batch statistics of all queries. The journal of a
        run keeps every episode's under `name`."""

        def measure(item: tuple[int, Episode]) -> tuple[float, float | None]:
            number, episode = item
            support, labels = pool.support(episode), episode.support_labels.to(pool.device)
            query, truth = pool.query(episode), episode.query_labels.to(pool.device)
            net = self.adapted(support, labels, steps=steps, training=False)
            together: Tensor | None = None
            with torch.no_grad(), self.statistics_of(net, self.steps), told(net, query, self.told, part="query"):
                with hold(net), pool.statistics(net, support if support_statistics else None):
                    show_context(net, support)
                    alone = wide(forward_alone(net, query))
                if transductive and mixes_queries_in_training(net):
                    with batch_statistics(net):
                        together = wide(net(query))
            accuracy = episode_accuracy(alone, truth, number)
            return accuracy, None if together is None else episode_accuracy(together, truth, number)

        return Accuracy.of((journal or Journal()).each(name, list(enumerate(episodes)), measure))

    def statistics_of(self, net: nn.Module, index: int) -> contextlib.AbstractContextManager[None]:
        """Within the block norms of `net` have the statistics of step `index`, of `steps` the queries'; no-op where
        there is one set for all."""
        return contextlib.nullcontext() if self.sets is None else self.sets.step(net, index)


def learner(net: nn.Module, options: FewShotOptions) -> Maml | None:
    """The inner loop of `net`, or None if the method has none. Statistics per step live as long as it."""
    if options.method != "maml":
        return None
    rate, steps, statistics = options.inner_learning_rate, options.inner_steps, options.inner_statistics
    assert rate is not None
    assert steps is not None
    assert statistics is not None
    sets = StepStatistics(net, steps) if statistics == "per_step" else None
    return Maml(net, rate, steps, options.order == "first", statistics, sets, options.told)


def maml_step(
    maml: Maml,
    optimizer: torch.optim.Optimizer,
    episodes: list[TrainingEpisode],
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update of MAML. Arguments and results are those of `prototypical_step`; precision and gradient_clip are those
    that `maml` is told."""
    losses, correct = [], []
    for episode in episodes:
        loss, logits = maml.meta_loss(*episode)
        losses.append(loss)
        correct.append((logits.detach().argmax(1) == episode[3]).sum())
    update_on_mean(maml.net, optimizer, losses, episodes[-1][2], maml.told, step)
    maml.after_update([query for _, _, query, _ in episodes], progress)
    return torch.stack(losses).mean().detach(), torch.stack(correct).sum()
