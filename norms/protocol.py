"""The protocol between the suite and a normalization layer: facts, declared and told, optional methods and attributes.

    NormInfo        the facts that a norm declares
    Situation       the facts that a training loop tells every norm
    hooks           optional methods of a layer, one Protocol each: `hook(layer, AfterUpdate)` is the layer, or None
    Attributes      optional attributes of a layer that something reads

`make_norm` stamps `norm_info` and `situation` on each layer that it builds; all code that asks whether a module is a
norm asks for that stamp. A layer is any nn.Module on x (N, C, *): it need have none of the hooks and attributes.

The suite also puts things into the `__dict__` of a layer, which no layer has to know: `telling` (norms.telling) for
good, `forward` (norms.situation) within `situation`, `recalibrating`, `track` and `forward` within `recalibrate`. Base
classes here look for `recalibrating`, so that they keep statistics that are not finite, too, for it to see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from torch import Tensor, nn

from norms.workers import Workers

Activation = nn.Module | Callable[[Tensor], Tensor]
"""The activation that a norm may fuse."""

NEEDS = frozenset({"conv_weight", "activation", "domain", "context", "second_look"})
VARIANCES = ("biased", "unbiased")
AXES = tuple("".join(parts) for parts in itertools.product(("", "N"), ("", "C"), ("", "HW")))
SETTING_FIELDS = ("norm_batch_size", "num_domains", "image_shape")
"""Facts of a run that a constructor may ask for by naming a parameter so; the plan fills them in before hashing."""


@dataclass(frozen=True)
class NormInfo:
    """The facts that a norm declares about itself; the conformance checks measure every field.

    Args:
        name: the registered name: lower case letters, digits and underscores.
        source: the paper the definition follows.
        version: raised with every change of results; a plugin's norms have the plugin's (norms.source).
        mixes_samples: in training, one sample's output depends on the others of its batch.
        keeps_stats: has running statistics that training moves and evaluation uses.
        mixes_samples_in_eval: the same dependence in evaluation mode.
        exact_gradient: the backward is the derivative of the forward (so gradcheck applies).
        compiles: `torch.compile(fullgraph=True)` works and gives the eager result.
        needs: further inputs of a call beside x: any of "conv_weight" (called as norm(y, weight=w)), "activation"
            (takes `activation=` at build and applies it), "domain", "context" (read from `self.situation`),
            "second_look" (asks `after_update` to show it the batch again).
        axes: letters of "NCHW", the axes along which a value's training output depends on other values: "NHW" for bn,
            "CHW" for gn, "" for none. None: not declared.
        across_iterations: the statistics of earlier iterations enter the training output in the place of a larger
            batch. Several norm batches per update would look like several iterations to such a norm, so tasks skip it.
        slices_at_once: the layer itself honours `self.situation.slices`; any other layer that mixes samples is called
            once per norm batch (see norms.situation).
        functional: training works inside torch.func's transforms (vmap, grad, jvp), with the buffers that
            functional_call brings. A norm that declares False raises a RuntimeError under vmap and jvp. Evaluation
            always works.
        variance: "biased" (divided by the count) or "unbiased" (by the count less one), the variance in the training
            formula; None: not declared, or there is none.
        running_variance: the same of the variance that running statistics take in.
    """

    name: str
    source: str
    version: int | str
    mixes_samples: bool
    keeps_stats: bool
    mixes_samples_in_eval: bool = False
    exact_gradient: bool = True
    compiles: bool = True
    needs: frozenset[str] = frozenset()
    axes: str | None = None
    across_iterations: bool = False
    slices_at_once: bool = False
    functional: bool = True
    variance: str | None = None
    running_variance: str | None = None


@dataclass(frozen=True)
class Situation:
    """The facts about a batch that a training loop tells every norm of a network (see norms.situation.situation)."""

    domain: int | Tensor | None = None
    part: str | None = None
    slices: int = 1
    again: bool = False
    workers: Workers | None = None


class AfterUpdate(Protocol):
    """A layer that follows the course of training.

    Called by norms.situation.after_update, after each optimizer step. A layer that also keeps statistics warns where a
    training loop never calls (norms.telling). Layers: brn, mabn, mbn, cbn, tasknorm.
    """

    def after_update(self, progress: float) -> None:
        """An optimizer step was taken; `progress` in [0, 1] is the fraction of training that is done."""


class TransformWeight(Protocol):
    """A layer that changes the weight of the convolution before it.

    Called by the code that pairs the two, in each forward and in both modes: tasks.nets.blocks, norms.convert; and once
    by norms.fuse.
    The gradient of the weight goes through the result. Layers: ws_gn, ws_bn, mabn.
    """

    def transform_weight(self, weight: Tensor) -> Tensor:
        """The weight (C, C_in / groups, *) to convolve with, of the same shape."""


class MakeRoom(Protocol):
    """A layer whose buffers depend on the size of the convolution's weight.

    Called once, where the layer is built beside its convolution (tasks.nets.blocks, norms.convert), so that the buffers
    have their final shape before copies are made of them. Layers: cbn.
    """

    def make_room(self, weight: Tensor) -> None:
        """Buffers for weights (C, *) of this size."""


class BranchDistance(Protocol):
    """A layer with a branch per domain, which says how far a sample is from each.

    Called by norms.situation.predict, in evaluation, where no domain is told: once per branch, before the layer's
    forward in that branch. Layers: bne.
    """

    num_domains: int

    def branch_distance(self, x: Tensor, domain: int) -> Tensor:
        """The distances (N,) of the samples of x (N, C, *), the layer's input, from a domain."""


class ResetRunningStats(Protocol):
    """A layer that keeps statistics and can forget them, as torch's layers do it.

    Called by norms.running.recalibrate, which a norm that declares `keeps_stats` needs it for, and by
    `PerChannel.reset_parameters`. Layers: those with running statistics, and tasknorm.
    """

    def reset_running_stats(self) -> None:
        """Everything that training made the layer keep, as after construction; parameters stay."""


class ResetParameters(Protocol):
    """A layer that can be used after `to_empty`, which gives memory to a network built on the meta device.

    Called by torch (FSDP) and by the conformance checks, at any time. Layers: all of the suite.
    """

    def reset_parameters(self) -> None:
        """Parameters and buffers as after construction."""


class CheckChannels(Protocol):
    """A layer that checks its input first of all.

    Looked for by norms.factory, once per layer: a layer without it gets a forward pre-hook that refuses integers. One
    that checks by itself in another way sets it to None.
    Layers: all of the suite, which call it in their forwards.
    """

    def check_channels(self, x: Tensor) -> None:
        """ValueError where x is not (N, C, *) or holds no floating-point numbers."""


HOOKS: dict[type, str] = {
    AfterUpdate: "after_update",
    TransformWeight: "transform_weight",
    MakeRoom: "make_room",
    BranchDistance: "branch_distance",
    ResetRunningStats: "reset_running_stats",
    ResetParameters: "reset_parameters",
    CheckChannels: "check_channels",
}
"""Every optional method of a layer that something here calls."""

_Hook = TypeVar("_Hook")


def hook(layer: nn.Module, kind: type[_Hook]) -> _Hook | None:
    """The layer, as one that has this hook, or None where it has not.

    Not by isinstance: with a Protocol that takes up to 20 us, and a forward may ask.
    """
    return cast(_Hook, layer) if callable(getattr(layer, HOOKS[kind], None)) else None


class Attributes(Protocol):
    """Optional attributes of a layer that something reads.

    Attributes:
        num_channels: C. Read by norms.fuse, which refuses a convolution of another number.
        num_groups: G, resolved. Read by norms.convert, to know a GroupNorm that the layer equals.
        equivalent_to: the registered norm that the layer equals as it is configured (a BGN with G = C: "bn"), or None.
            Read by `equivalent`, for tables to say so, and by norms.convert, to carry statistics over. Layers: bgn,
            evonorm_b0, evonorm_s0, proxy, cbn, dsbn, dual_bn, bne.
        momentum: weight of the new value in running statistics, None: the average of all batches. Of the layer or a
            part of it. norms.running.recalibrate sets it to 1 for its length; without it the layer estimates by its own
            rule. Layers: those with running statistics.
        progress: the fraction of training that `after_update` told last. norms.running.recalibrate keeps it where it
            resets everything else. Layers: brn, mabn, cbn.
        weight: parameter (C,), the scale after normalization. Set to zero by an option of tasks (tasks.nets.init),
            carried over by norms.convert.
        bias: parameter (C,), the shift. Carried over by norms.convert.
    """

    num_channels: int
    num_groups: int
    equivalent_to: str | None
    momentum: float | None
    progress: Tensor | float
    weight: nn.Parameter | None
    bias: nn.Parameter | None


class OnlyLooks(Protocol):
    """A forward pre-hook that changes nothing, so that norms.fuse may leave it out: norms.telling, norms.factory and
    norms.convert attach such hooks to layers."""

    only_looks: bool


def norm_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every stamped norm in `net`, in definition order; nested stamped parts are not repeated."""
    inside: tuple[str, ...] = ()
    for name, module in net.named_modules():
        if isinstance(getattr(module, "norm_info", None), NormInfo) and not (inside and name.startswith(inside)):
            inside = (*inside, f"{name}." if name else "")
            yield name, module
            if not name:
                return


def equivalent(net: nn.Module) -> str | None:
    """The name X when every norm of ours in `net` says `equivalent_to == X` (a BGN with G = C says "bn"), else None."""
    names = {getattr(norm, "equivalent_to", None) for _, norm in norm_modules(net)}
    return names.pop() if len(names) == 1 else None
