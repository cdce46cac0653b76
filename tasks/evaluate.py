"""Evaluation of classifiers: accuracy and loss, composition shift, recalibrated copies.

Several workers of a run share what `evaluate` does: each forwards whole batches, and their sums are added. What is of
few images (composition_shift, recalibrated) each of them does alike, and all of it.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.protocol import norm_modules
from norms.running import recalibrate
from norms.situation import predict, situation
from norms.workers import ALONE, Workers
from tasks.step import Precision, StepOptions, autocast, describe_non_finite
from tasks.workers import raise_together

EVALUATION_BATCH = 250
"""Images per forward where nothing is learned."""
SHIFT_PROBE = 64
"""Images, at most, that a task measures `composition_shift` with: half as probes, half as mates."""


@dataclass(frozen=True)
class Evaluation:
    """Sums over a data set, divided once.

    Args:
        top1: fraction of images whose largest logit is the label's.
        loss: mean cross entropy in nats.
        constant: every image got the same class.
    """

    top1: float
    loss: float
    constant: bool


@torch.no_grad()
def evaluate(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision = "float32",
    what: str = "evaluation",
    domain: int | None = None,
    workers: Workers = ALONE,
) -> Evaluation:
    """Evaluate `net` (switched to evaluation mode and back) on batches of normalized images (N, C, H, W), labels (N,).

    Args:
        net: the same on all workers.
        batches: this worker's (tasks.data.reading.in_order); there may be none.
        precision: of the forwards.
        what: for the message of Diverged only.
        domain: told to norms that ask.
        workers: that evaluate together; each returns the whole.

    Raises:
        Diverged: the loss of a batch is not finite, on all workers if it is so on one; names the layers.
        ValueError: there is no image.
    """
    correct, loss, count, lowest, highest = 0, 0.0, 0, math.inf, -math.inf
    trouble, turn = "", math.inf
    with evaluating(net):
        for number, (images, labels) in enumerate(batches):
            with situation(net, domain=domain), autocast(images.device, precision):
                logits = predict(net, images)
            # one transfer per batch, and not every accelerator has float64
            logits, labels = logits.cpu().double(), labels.cpu()
            batch_loss = float(F.cross_entropy(logits, labels, reduction="sum"))
            if not math.isfinite(batch_loss):
                where = describe_non_finite(net, images, StepOptions(precision=precision, domain=domain))
                trouble, turn = f"{what}: the loss is {batch_loss}; {where}", number
                break
            predicted = logits.argmax(1)
            correct += int((predicted == labels).sum())
            loss += batch_loss
            count += len(labels)
            if len(labels):
                lowest, highest = min(lowest, int(predicted.min())), max(highest, int(predicted.max()))
    # not every accelerator has float64, and alone nobody else is to be asked
    device = "cpu" if workers.alone else next(net.parameters()).device
    own = torch.tensor([correct, loss, count, lowest, highest, turn], dtype=torch.float64, device=device)
    of_all = workers.gather(own)
    raise_together(trouble, of_all[:, 5].tolist(), workers, device)
    correct, loss, count = of_all[:, :3].sum(0).tolist()
    if not count:
        raise ValueError("evaluate: no images")
    return Evaluation(correct / count, loss / count, bool(of_all[:, 3].min() == of_all[:, 4].max()))


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Within the block every module is in evaluation mode; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def composition_shift(
    net: nn.Module, images: Tensor, precision: Precision = "float32", domain: int | None = None
) -> float:
    """Largest change of one image's evaluation logits when its batch mates change (absolute, in logits).

    The first half of `images` (N, C, H, W), N >= 2, is seen beside the second half, and beside the second half with
    its sign flipped. Zero or float noise for a norm that does not mix samples in evaluation.
    """
    probes, mates = images.chunk(2)
    with evaluating(net), situation(net, domain=domain), autocast(images.device, precision):
        plain = predict(net, torch.cat([probes, mates]))[: len(probes)]
        other = predict(net, torch.cat([probes, -mates]))[: len(probes)]
    return float((plain.cpu().double() - other.cpu().double()).abs().max())


def recalibrated(
    net: nn.Module,
    batches: Iterable[Tensor],
    slices: int = 1,
    precision: Precision = "float32",
    domain: int | None = None,
) -> nn.Module:
    """A copy of `net` whose running statistics are those of `batches` alone, pooled over all norm batches.

    With `domain`, norms that keep statistics per domain have those of this domain estimated and keep the others.
    """
    net = copy.deepcopy(net)

    def forward(images: Tensor) -> Tensor:
        with autocast(images.device, precision):
            return net(images)

    recalibrate(net, batches, slices, forward, domain)
    return net


def recalibration_batches(available: int, norm_batch: int) -> tuple[int, int]:
    """(images used, images per forward) for recalibration from at most `available` images.

    As many whole norm batches as there are, several of them per forward where that comes out even: at most 128 images
    or one norm batch.
    """
    whole = available // norm_batch
    together = max(k for k in range(1, max(1, 128 // norm_batch) + 1) if whole % k == 0)
    return whole * norm_batch, together * norm_batch


def keeps_stats(net: nn.Module) -> bool:
    """True if any norm of `net` declares running statistics."""
    return any(norm.norm_info.keeps_stats for _, norm in norm_modules(net))  # type: ignore[union-attr]


def needs_domain(net: nn.Module) -> bool:
    """True if any norm of `net` declares that it needs the domain."""
    return any("domain" in norm.norm_info.needs for _, norm in norm_modules(net))  # type: ignore[union-attr, operator]
