"""The guard around every attack. The task sets the network's mode; an attack may read the network and change nothing.

Attack libraries switch modes by class name and leave the network changed (torchattacks looks for "BatchNorm", so a
custom norm is crafted against in another mode than bn). So the mode is set here, for every module alike, and after the
attack weights, buffers and modes are compared with what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from norms.generators import forked_generators
from norms.situation import hold, situation
from norms.workers import ALONE, Workers
from tasks.step import Precision, autocast

Mode = Literal["eval", "train"]
TOLERANCE = 1e-6
"""Rounding of float32 that an example may be outside of its ball by: (x + e) - x is e only up to 6e-8."""


@contextlib.contextmanager
def crafting(
    net: nn.Module,
    mode: Mode,
    slices: int = 1,
    what: str = "the attack",
    domain: int | Tensor | None = None,
    precision: Precision = "float32",
    workers: Workers = ALONE,
) -> Iterator[None]:
    """Within the block `net` is in `mode` and computes in `precision`, its norms keep nothing, its weights need no
    gradient, and draws from the global generators are undone; afterwards everything is as before, which is verified bit
    by bit.

    Args:
        net: any network; every module is switched, whatever its class.
        mode: "eval": running statistics; "train": the batch's own, as in a training step.
        slices: norm batches in each forwarded batch, in mode "train".
        what: the attack's name, for the message.
        domain: of the images, for norms that ask; None: not told.
        precision: of the forwards. Logits may so be of bfloat16; objectives are taken of float32 (tasks.step.wide).

        workers: that forward the other parts of each batch, in mode "train".

    Raises:
        RuntimeError: the block changed a weight, a buffer or a mode; names the first ones.
    """
    modes = [(name, module, module.training) for name, module in net.named_modules()]
    slots = [(name, values, dict(values)) for name, m, _ in modes for values in (m._parameters, m._buffers)]
    named = [(f"{name}.{key}".lstrip("."), t) for name, _, own in slots for key, t in own.items() if t is not None]
    state = [(name, tensor, tensor.detach().clone()) for name, tensor in named]
    learned = [t for _, t, _ in state if t.requires_grad]
    gradients = [t.grad for t in learned]
    device = state[0][1].device if state else torch.device("cpu")
    training = mode == "train"
    try:
        for _, module, _ in modes:
            module.training = training
        for parameter in learned:
            parameter.requires_grad_(False)
        told = situation(net, domain, slices=slices, workers=workers) if training else situation(net, domain)
        with forked_generators(device), hold(net), told, autocast(device, precision):
            yield
        switched = [name or "the network" for name, module, _ in modes if module.training != training]
    finally:
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = gradient
        for _, module, before in modes:
            module.training = before
    _refuse(what, "the mode of", switched)
    moved = [
        f"{name}.{key}".lstrip(".")
        for name, now, before in slots
        for key in (*before, *(k for k in now if k not in before))
        if now.get(key) is not before.get(key)
    ]
    changed = [name for name, tensor, copy in state if not _same(tensor.detach(), copy)]
    _refuse(what, "the weight or buffer", [*moved, *changed])


def _same(tensor: Tensor, copy: Tensor) -> bool:
    # torch.equal first: it is much the faster, and only calls a tensor with a NaN different from itself
    if tensor.device.type == "meta" or torch.equal(tensor, copy):
        return True
    return bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all())


def _refuse(what: str, kind: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RuntimeError(f"{what} changed {kind} {', '.join(names[:3])}{more}")


def check_examples(examples: Tensor, images: Tensor, epsilon: float, what: str = "the attack") -> Tensor:
    """`examples` itself, after all of them were found in the ball of radius `epsilon` around `images` and in [0, 1].

    Args:
        examples, images: (N, C, H, W) in [0, 1].
        epsilon: in units of the images.
        what: the attack's name, for the message.

    Raises:
        RuntimeError: any value of any example is outside by more than rounding, or not finite; says by how much.
    """
    if examples.shape != images.shape:
        raise RuntimeError(f"{what} returned {tuple(examples.shape)} for images of {tuple(images.shape)}")
    if not len(images) or examples.device.type == "meta":
        return examples
    detached = examples.detach()
    extremes = torch.stack([(detached - images).abs().max(), -detached.min(), detached.max() - 1])
    # not a number where any value is not finite, and then no comparison holds
    distance, below, above = extremes.tolist()
    if not (distance <= epsilon + TOLERANCE and below <= TOLERANCE and above <= TOLERANCE):
        raise RuntimeError(
            f"{what} returned an example outside: distance {distance * 255:.6g}/255 of {epsilon * 255:g}/255 allowed, "
            f"values from {-below:.6g} to {above + 1:.6g} of 0 to 1 allowed"
        )
    return examples
