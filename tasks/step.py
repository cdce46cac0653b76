"""One update: the facts that norms are told, the check of the loss, the optimizers' step, the norms' `after_update`.

Every training goes through `told` and `update`, whatever its loss; `train_step` is the plain one, of one forward and
one cross entropy.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.protocol import norm_modules
from norms.situation import after_update, hold, predict, situation
from norms.workers import ALONE, Workers
from tasks.base import Diverged
from tasks.workers import shared_loss, sum_gradients

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class StepOptions:
    """Options of one update on a batch.

    Args:
        slices: norm batches in the SGD batch; slice k is x[k::slices].
        label_smoothing: of the cross entropy.
        precision: "bfloat16" runs forwards under autocast.
        domain: of the batch, or (N,) of its images, for norms that ask; None: not told.
        gradient_clip: largest norm of the gradient of all parameters; None: it is left as it is.
        workers: that take this step together, each on its part of the batch.
    """

    slices: int = 1
    label_smoothing: float = 0.0
    precision: Precision = "float32"
    domain: int | Tensor | None = None
    gradient_clip: float | None = None
    workers: Workers = ALONE


@contextlib.contextmanager
def told(net: nn.Module, images: Tensor, options: StepOptions, **facts: Any) -> Iterator[None]:
    """Within the block `net` computes in the options' precision, and its norms know domain and norm batches.

    Args:
        net: any network.
        images: whose device counts.
        options: domain, slices, precision.
        facts: in the place of `domain` or `slices`, or further ones (norms.situation.situation).
    """
    known = {"domain": options.domain, "slices": options.slices, "workers": options.workers, **facts}
    with situation(net, **known), autocast(images.device, options.precision):
        yield


def update(
    loss: Tensor,
    net: nn.Module,
    *optimizers: torch.optim.Optimizer,
    images: Tensor,
    options: StepOptions,
    what: str,
    cleared: Iterable[torch.optim.Optimizer] = (),
    clipped: nn.Module | None = None,
) -> None:
    """Gradients of a loss and one step of each optimizer. Norms are told by the caller, once a batch is done with:
    `after_update`.

    With several workers every one of them calls this, with the loss of its part; the step is that of the whole batch,
    the same on all of them.

    Args:
        loss: a scalar, the mean over the samples (of several forwards: the sum of such means).
        net: the network, for the message of Diverged.
        optimizers: the optimizers that step, their rates set.
        images: (N, C, H, W) of the forward: as many as count in the mean over all workers, and for the message.
        options: gradient_clip, and what the forward was told.
        what: "step 7", for the message.
        cleared: optimizers of further parameters that the loss reaches; their gradients are cleared, too.
        clipped: the part of `net` whose gradients are clipped, together; None: all of it.

    Raises:
        Diverged: the loss is not finite, on all workers if it is so on one; weights and statistics stand as the forward
            left them.
    """
    loss, whole = shared_loss(loss, len(images), options.workers)
    raise_if_diverged(whole, net, images, options, what)
    for optimizer in {*optimizers, *cleared}:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    stepped = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    sum_gradients([*(clipped or net).parameters(), *stepped], options.workers)
    if options.gradient_clip is not None:
        nn.utils.clip_grad_norm_((clipped or net).parameters(), options.gradient_clip)
    for optimizer in optimizers:
        optimizer.step()


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    options: StepOptions = StepOptions(),
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One update on one batch.

    Args:
        net: in training mode.
        optimizer: its learning rate is set by the caller.
        images: (N, C, H, W), normalized; with several workers this one's part.
        labels: (N,).
        options: norm batches, label smoothing, precision, workers.
        progress: fraction of training that is done after this step, for schedules inside norms.
        step: for the message only.

    Returns:
        The loss before the update (mean over N) and the number of images it classified correctly, as tensors.

    Raises:
        Diverged: the loss is not finite; weights and statistics stand as the forward left them.
    """

    def forward() -> Tensor:
        with told(net, images, options):
            return net(images)

    logits = forward()
    loss = F.cross_entropy(wide(logits), labels, label_smoothing=options.label_smoothing)
    update(loss, net, optimizer, images=images, options=options, what=f"step {step}")
    after_update(net, forward, progress)
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def raise_if_diverged(loss: Tensor, net: nn.Module, images: Tensor, options: StepOptions, what: str) -> None:
    """Diverged where a scalar loss is not finite; the message names `what` and the layers (`describe_non_finite`)."""
    if loss.device.type != "meta" and not math.isfinite(value := loss.item()):
        raise Diverged(f"{what}: the loss is {value}; {describe_non_finite(net, images, options)}")


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def wide(outputs: Tensor) -> Tensor:
    """Outputs in float32, or as they are where they are at least as exact: what losses are computed from."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def describe_non_finite(net: nn.Module, images: Tensor, options: StepOptions, most: int = 3) -> str:
    """The parameters, buffers and outputs of `net` on this batch that are not finite: the first `most` names of each.

    The forward is repeated under `hold`, so nothing that a norm keeps moves. Of several workers (options) each says the
    names that any of them found.
    """
    outputs: list[tuple[str, bool]] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, _broken(output)))

        return look

    leaves = [(n, m) for n, m in net.named_modules() if n and not any(m.children())]
    stamped = [(n, m) for n, m in norm_modules(net) if any(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves + stamped]
    try:
        with torch.no_grad(), hold(net), told(net, images, options):
            # as `evaluate` forwards it: norms that combine branches have no other forward without a domain
            net(images) if net.training else predict(net, images)
    finally:
        for handle in handles:
            handle.remove()
    looked = {
        "inputs": [("images", _broken(images))],
        "parameters": [(n, _broken(p)) for n, p in net.named_parameters()],
        "buffers": [(n, _broken(b)) for n, b in net.named_buffers()],
        "outputs": outputs,
    }
    every = torch.tensor([broken for pairs in looked.values() for _, broken in pairs], dtype=torch.int32)
    anyone = iter(options.workers.total(every.to(images.device)).tolist())
    found = {kind: list(dict.fromkeys(name for name, _ in pairs if next(anyone))) for kind, pairs in looked.items()}
    parts = [f"{kind} {_first(names, most)}" for kind, names in found.items() if names]
    return "not finite: " + "; ".join(parts) if parts else "every parameter and layer output is finite"


def _broken(x: Tensor) -> bool:
    return not bool(torch.isfinite(x).all())


def _first(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
