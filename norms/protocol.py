"""What the suite and a normalization layer know of each other: declared facts, what a layer is told, how it is found.

`NormInfo` is what a norm declares, `Situation` what a training loop tells every norm. `make_norm` stamps both on each
layer that it builds, and everything that later needs to know whether a module is a norm asks for that stamp.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

Activation = nn.Module | Callable[[Tensor], Tensor]
"""What a norm that fuses the activation is built with."""

NEEDS = frozenset({"conv_weight", "activation", "domain", "context", "second_look"})
VARIANCES = ("biased", "unbiased")
AXES = tuple("".join(parts) for parts in itertools.product(("", "N"), ("", "C"), ("", "HW")))
SETTING_FIELDS = ("norm_batch_size", "num_domains", "image_shape")
"""Facts of a run that a constructor may ask for by naming a parameter so; the plan fills them in before hashing."""


@dataclass(frozen=True)
class NormInfo:
    """What a norm declares about itself; the conformance checks measure every field.

    Args:
        name: the registered name: lower case letters, digits and underscores.
        source: the paper the definition follows.
        version: raised with every change of results; a plugin's norms have the plugin's (norms.source).
        mixes_samples: in training, one sample's output depends on the others of its batch.
        keeps_stats: has running statistics that training moves and evaluation uses.
        mixes_samples_in_eval: the same dependence in evaluation mode.
        exact_gradient: the backward is the derivative of the forward (so gradcheck applies).
        compiles: `torch.compile(fullgraph=True)` works and gives the eager result.
        needs: what a call must bring beside x: any of "conv_weight" (called as norm(y, weight=w)), "activation"
            (takes `activation=` at build and applies it), "domain", "context" (read from `self.situation`),
            "second_look" (asks `after_update` to show it the batch again).
        axes: letters of "NCHW", the axes along which a value's training output depends on other values: "NHW" for bn,
            "CHW" for gn, "" for none. None: not declared.
        across_iterations: the statistics of earlier iterations enter the training output in the place of a larger
            batch. Several norm batches per update would look like several iterations, so tasks skip such a norm there.
        slices_at_once: the layer itself honours `self.situation.slices`; any other layer that mixes samples is called
            once per slice (see norms.situation).
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
    """What a training loop says to every norm of a network (see norms.situation.situation)."""

    domain: int | Tensor | None = None
    part: str | None = None
    slices: int = 1
    again: bool = False


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
