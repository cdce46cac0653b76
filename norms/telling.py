"""A warning where a norm that follows the course of training is never told of it.

Without that call brn, mabn, mbn, cbn and a user's norm with `after_update` are other layers: brn stays bn, mbn's second
look never comes. In a training loop that was not written for them nothing else would show that.
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import torch
from torch import nn

UNTOLD = 3
"""Updates of its weights that a norm goes through in silence: a loop may do something of its own with them."""


class Once:
    """Shared by the norms that one factory builds, so that one warning stands for a network."""

    def __init__(self) -> None:
        self.warned = False


class Telling:
    """A forward pre-hook of one norm, which counts the updates that it was not told of.

    An update is known by the version of the norm's first learned parameter, which an optimizer changes in place. Of a
    norm without one nothing is known.

    Attributes:
        only_looks: the hook changes nothing, so that a norm can be fused without it.
        untold: updates since the norm was told of one.
        paused: number of `hold` blocks around the norm, within which weights change for a trial.
    """

    only_looks = True

    def __init__(self, once: Once):
        self.once = once
        self.untold = self.paused = 0
        self._version: tuple[int, int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Telling:
        return Telling(copy.deepcopy(self.once, memo))  # a copy made inside `hold` is not held

    def told(self) -> None:
        """The norm was told of an update."""
        self.untold, self._version = 0, None

    def __call__(self, norm: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or self.paused or not norm.training or not torch.is_grad_enabled():
            return
        parameter = next((p for p in norm.parameters() if p.requires_grad), None)
        if parameter is None or parameter.is_inference():
            return
        before, self._version = self._version, (id(parameter), parameter._version)
        if before is None or before[0] != id(parameter) or before == self._version or _tried():
            return
        self.untold += 1
        if self.untold == UNTOLD and not self.once.warned:
            self.once.warned = True
            name = norm.norm_info.name  # type: ignore[union-attr]
            warnings.warn(
                f'norm "{name}" follows the course of training, and its weights were updated {UNTOLD} times without a '
                "word to it: call norms.after_update(net, again, progress) after each optimizer step",
                stacklevel=2,
            )


def _tried() -> bool:
    """Whether an optimizer's step calls this forward, as LBFGS does to try weights; it is told once for the step."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "step" and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return True
    return False
