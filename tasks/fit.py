"""What the tasks share around their steps (tasks.step) and loops (tasks.loop).

What gets weight decay, the learning-rate schedule, evaluation sums, composition shift, recalibrated copies, and the two
cost measurements.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import norm_modules
from norms.running import recalibrate
from norms.situation import predict, situation
from tasks.base import Diverged
from tasks.step import Precision, StepOptions, autocast, describe_non_finite

Schedule = Literal["cosine", "onecycle", "constant", "steps"]
MILESTONES = (0.5, 0.75)
"""Of the schedule "steps": He et al. 2015 for CIFAR-10."""
BETAS = (0.9, 0.999)
EVALUATION_BATCH = 250
"""Images per forward where nothing is learned."""
SHIFT_PROBE = 64
"""Images, at most, that a task measures `composition_shift` with: half as probes, half as mates."""
WARM_UP_STEPS = 5
"""Steps that `StepClock.median` leaves out (a quarter of a shorter run's)."""


# What is learned, and how fast


def parameter_groups(net: nn.Module, weight_decay: float, norm_weight_decay: bool = False) -> list[dict[str, Any]]:
    """Two optimizer groups: with and without decay.

    Not decayed: parameters named `bias`, and every parameter of every norm, whatever its name or shape; norms are
    recognized by the stamp of `make_norm`. With `norm_weight_decay` all parameters of all norms are decayed.
    """
    of_norms = {id(p) for _, norm in norm_modules(net) for p in norm.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        in_norm = id(parameter) in of_norms
        decays = norm_weight_decay if in_norm else name.rpartition(".")[2] != "bias"
        (decayed if decays else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def sgd(
    net: nn.Module,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    norm_weight_decay: bool = False,
    nesterov: bool = True,
) -> torch.optim.SGD:
    """SGD over `parameter_groups`, its momentum (where above 0) Nesterov's unless told otherwise."""
    groups = parameter_groups(net, weight_decay, norm_weight_decay)
    nesterov = nesterov and momentum > 0
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, foreach=True)


def adamw(
    net: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    norm_weight_decay: bool = False,
    betas: tuple[float, float] = BETAS,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over `parameter_groups`."""
    groups = parameter_groups(net, weight_decay, norm_weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, foreach=True)


def learning_rate_at(
    progress: float, peak: float, schedule: Schedule, warmup: float, milestones: Sequence[float] = MILESTONES
) -> float:
    """The learning rate after the fraction `progress` in [0, 1] of all steps; `warmup` is below 1.

    cosine: linear from 0 to `peak` over the fraction `warmup`, then half a cosine to 0.
    onecycle: half a cosine from peak / 25 to `peak` over `warmup`, then half a cosine to peak / 250,000 (Smith & Topin
    2018 in torch's version, without its cycle of the momentum).
    constant: the linear warm-up, then `peak`.
    steps: the linear warm-up, then `peak`, divided by 10 from each of `milestones` on (fractions of all steps; the
    default is He et al.'s 2015 for CIFAR-10).
    """
    start, end = (peak / 25, peak / 250_000) if schedule == "onecycle" else (0.0, 0.0)
    if progress < warmup:
        done = progress / warmup
        if schedule == "onecycle":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + (peak - start) * done
    if schedule == "constant":
        return peak
    if schedule == "steps":
        return peak / 10 ** sum(progress >= milestone for milestone in milestones)
    left = (1 - progress) / (1 - warmup)
    return end + (peak - end) * (1 - math.cos(math.pi * left)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


# Evaluation


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
) -> Evaluation:
    """Evaluate `net` (switched to evaluation mode and back) on batches of normalized images (N, C, H, W), labels (N,).

    `what` is for the message of Diverged only; `domain` is told to norms that ask.

    Raises:
        Diverged: the loss of a batch is not finite; names the layers.
        ValueError: there is no image.
    """
    with evaluating(net):
        correct, loss, count = 0, 0.0, 0
        classes: set[int] = set()
        for images, labels in batches:
            with situation(net, domain=domain), autocast(images.device, precision):
                logits = predict(net, images)
            # one transfer per batch, and not every accelerator has float64
            logits, labels = logits.cpu().double(), labels.cpu()
            batch_loss = float(F.cross_entropy(logits, labels, reduction="sum"))
            if not math.isfinite(batch_loss):
                where = describe_non_finite(net, images, StepOptions(precision=precision, domain=domain))
                raise Diverged(f"{what}: the loss is {batch_loss}; {where}")
            predicted = logits.argmax(1)
            correct += int((predicted == labels).sum())
            loss += batch_loss
            count += len(labels)
            if len(classes) < 2:
                classes.update(predicted.unique().tolist())
    if not count:
        raise ValueError("evaluate: no images")
    return Evaluation(correct / count, loss / count, len(classes) == 1)


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
    """Whether any norm of `net` declares running statistics."""
    return any(norm.norm_info.keeps_stats for _, norm in norm_modules(net))  # type: ignore[union-attr]


def needs_domain(net: nn.Module) -> bool:
    """Whether any norm of `net` declares that it needs the domain."""
    return any("domain" in norm.norm_info.needs for _, norm in norm_modules(net))  # type: ignore[union-attr, operator]


# Cost


def norm_sizes(net: nn.Module) -> tuple[int, int]:
    """Numbers of values in the parameters and in the buffers of all norms of `net`."""
    norms = [norm for _, norm in norm_modules(net)]
    return (
        sum(p.numel() for norm in norms for p in norm.parameters()),
        sum(b.numel() for norm in norms for b in norm.buffers()),
    )


class StepClock:
    """Wall seconds of training steps: `with clock: train_step(...)`. Accelerators are waited for at both ends."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, list[float]()

    def __enter__(self) -> None:
        self._wait()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float:
        """Median over the steps after WARM_UP_STEPS. Raises ValueError before the first step."""
        if not self.seconds:
            raise ValueError("no step was timed")
        return statistics.median(self.seconds[min(WARM_UP_STEPS, len(self.seconds) // 4) :])

    def _wait(self) -> None:
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)


class PeakMemory:
    """Largest memory in use since `PeakMemory(device)`, above what was in use then.

    CUDA: what torch's allocator handed out. CPU: the process's resident memory without the pages of library files,
    from /proc where the kernel allows the high-water mark to be reset; elsewhere the growth of the process's largest
    resident set, a lower bound. Other accelerators: as on the CPU, so without the accelerator's own memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            _return_free_memory()
            with contextlib.suppress(OSError):  # no such file, or not ours to write: the mark is then never reset
                Path("/proc/self/clear_refs").write_text("5")
            self.before = _peak_resident()

    def megabytes(self) -> float:
        """In units of 10^6 bytes."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _peak_resident()
        return max(0, peak - self.before) / 1e6


def _peak_resident() -> int:
    """High-water mark of the process's resident memory in bytes, less the file pages that are resident now."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) * 1024
    except (OSError, KeyError):
        import resource  # not on every system that has torch

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _return_free_memory() -> None:
    """Ask glibc to return free heap, which would otherwise hide the growth; no-op elsewhere."""
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
