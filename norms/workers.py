"""Workers: processes that train one network together, each on its part of every batch.

Worker r of W takes x[r::W] of a batch x that all of them draw alike, so that a worker's part is a norm batch: "images
per GPU", as papers say it, and W workers give the numbers of one process with W norm batches (norms.situation). With
`sync` the statistics of norms are those of all workers' samples, as of one process with one norm batch.

A norm hears of its workers from its situation: `norm.situation.workers`, None where a process trains alone. Every
worker forwards the same layers in the same order, also where its own part is empty; else the others wait for it.

For a layer of one's own:
- One that mixes samples, and keeps no statistics or inherits from a base class here and gives all of them to `track`
  (norms.running), trains with workers as it is. What `track` is given moves the running statistics of all workers
  alike, once its forward has ended, in the order of norm batches.
- With `sync` its forward must merge its moments by itself: `self.merging` (norms.channels) are the workers to do it
  with, or None; `norms.kernels.grouping.normalize`, `norms.kernels.moments.batch_moments` and `Workers.merge` do it.
  The class that defines such a forward says so: `syncs = True`. A class that inherits the forward of a layer here
  inherits that word; one that writes a forward anew says it anew. Its forward goes the whole way for an empty part.
- `refusal` says why a layer can not train with workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

if TYPE_CHECKING:
    from norms.protocol import NormInfo

TRACKED = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers that norms.running moves."""


@dataclass(frozen=True)
class Workers:
    """The workers of one run, seen from one of them. A value that copies of a network share.

    Args:
        rank: r, of this process, from 0.
        size: W.
        sync: statistics of norms are those of all workers together.
        group: of torch.distributed; None: the default one.
        blocks: a batch [a; b; ...] of so many equal blocks is dealt out block by block: [a[r::W]; b[r::W]; ...].
    """

    rank: int = 0
    size: int = 1
    sync: bool = False
    group: Any = field(default=None, compare=False, repr=False)
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"worker {self.rank} of {self.size}: 0 to {self.size - 1} are needed")

    def __deepcopy__(self, memo: Any) -> Workers:
        return self  # a group of processes can not be copied

    @property
    def alone(self) -> bool:
        """True where one process trains."""
        return self.size == 1

    def share(self, batch: Tensor) -> Tensor:
        """This worker's part x[r::W] of a batch (N, *), a view; it may be empty."""
        return batch if self.size == 1 else batch[self.rank :: self.size]

    def places(self, own: int, whole: int, device: torch.device) -> Tensor:
        """Where in a batch of `whole` samples the `own` samples of this worker are: (own,), rising."""
        within = self.rank + self.size * torch.arange(own // self.blocks, device=device)
        return (torch.arange(self.blocks, device=device)[:, None] * (whole // self.blocks) + within).flatten()

    def counts(self, whole: int) -> list[int]:
        """How many of N samples each worker has, in the order of ranks."""
        return [len(range(rank, whole, self.size)) for rank in range(self.size)]

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all workers, of one shape and type: (W, *x.shape), without gradient."""
        if self.size == 1:
            return x.detach()[None]
        x = x.detach().contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x, group=self.group)
        return torch.stack(found)

    @torch.no_grad()
    def total(self, x: Tensor) -> Tensor:
        """The sum over all workers, a new tensor like x, the same on each of them to the last bit; without gradient."""
        if self.size == 1:
            return x.detach().clone()
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """`gather` with gradient: that of x is the sum of what all workers' losses have for it."""
        if self.size > 1 and torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Gathered.apply(x, self))
        return self.gather(x) if self.size > 1 else x[None]

    def merge(self, mean: Tensor, var: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance of all workers' values, from those of each, with gradient.

        By Chan's formula, so that nothing large is subtracted. Moments of no values are given as zeros.

        Args:
            mean: of this worker's values, in float32 or better.
            var: biased, of the same shape.
            count: values (or equal lots of them) behind each: a number, or a tensor that broadcasts to mean, of as many
                dimensions.

        Returns:
            mean, var: as given, alike on all workers; 0 where nobody has a value.
            count: the sum over workers: (), or of count's shape. In mean's type, so above 2^24 in float32 rounded.
        """
        if isinstance(count, int):
            weight = mean.new_full([1] * mean.dim(), count)
        else:
            weight = count.detach().to(mean.dtype)
        parts = (mean.reshape(-1), var.reshape(-1), weight.reshape(-1))
        found = self.gathered(torch.cat(parts)).split([len(part) for part in parts], dim=1)
        means, variances = (t.reshape(-1, *mean.shape) for t in found[:2])
        counts = found[2].detach().reshape(-1, *weight.shape)
        total = counts.sum(0)
        shares = counts / total.clamp(min=1)
        near = (shares * means).sum(0)
        merged = near + (shares * (means - near)).sum(0)  # what rounding left of large means
        spread = (shares * (variances + (means - merged).square())).sum(0)
        return merged, spread, total.reshape(()) if isinstance(count, int) else total

    @torch.no_grad()
    def rows(self, own: Tensor, most: int | None, interleaved: bool, complete: bool) -> Tensor:
        """The rows of all workers (R, F), alike on each of them.

        Args:
            own: this worker's rows (R, F), of which F and the type are alike on all.
            most: R of a worker that has any; None: each has a number of its own.
            interleaved: the first rows of all workers, then the second ones; else all of one worker, then the next.
            complete: this worker is certain that all have `most` rows, so that it need not wait for the device to look.
        """
        if most is None:
            most = int(self.gather(torch.tensor(len(own), device=own.device)).max())
        padded = torch.cat((own, own.new_zeros(most - len(own), own.shape[1])))
        there = (torch.arange(most, device=own.device) < len(own)).to(own.dtype)[:, None]
        found = self.gather(torch.cat((padded, there), dim=1))  # (W, most, F + 1), on all workers, complete or not
        if interleaved:
            found = found.transpose(0, 1)
        found = found.reshape(self.size * most, -1)
        return found[:, :-1] if complete else found[found[:, -1] > 0, :-1]


ALONE = Workers()
"""One process that trains alone."""


class _Gathered(torch.autograd.Function):
    """`Workers.gather` with gradient, which may be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        workers: Workers = ctx.workers
        return _Summed.apply(grads[0], workers)[workers.rank], None


class _Summed(torch.autograd.Function):
    """`Workers.total` with gradient: the derivative of a sum over workers is the sum of their derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.total(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Summed.apply(grads[0], ctx.workers), None


def refusal(norm: nn.Module, workers: Workers) -> str | None:
    """Why a norm can not train with these workers, in one line that says what to do; None: it can.

    Args:
        norm: a layer built by `make_norm`.
        workers: of which `sync` counts; workers that are one refuse nothing.
    """
    info = cast("NormInfo", norm.norm_info)
    if workers.alone or not (info.mixes_samples or info.mixes_samples_in_eval):
        return None
    name = f'norm "{info.name}"'
    if info.mixes_samples_in_eval:
        return f"{name} mixes samples in evaluation, too, where each worker has other ones; train it with one worker"
    if info.across_iterations:
        return (
            f"{name} has a history of iterations, to which the norm batches of several workers would be several "
            "iterations; train it with one worker"
        )
    if info.keeps_stats and not _tracks(norm):
        return (
            f"{name} ({type(norm).__name__}) keeps statistics in a way of its own, which nobody could make alike on "
            "all workers; inherit from norms.running.RunningStatistics and give them to its track(), or train with one "
            "worker"
        )
    inner = next((path for path, part in norm.named_modules() if part is not norm and _keeps(part)), None)
    if inner is not None:
        return (
            f'{name} ({type(norm).__name__}) has a part "{inner}" that keeps statistics of its own, unseen by its '
            "track(); let the layer itself keep them, or train with one worker"
        )
    if workers.sync and not _syncs(type(norm)):
        return (
            f"{name} ({type(norm).__name__}) computes moments that are not merged over workers; leave sync_norms out, "
            "or merge them in its forward and say syncs = True in its class (see norms.workers)"
        )
    return None


def own_buffers(norm: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The buffers that `track` does not move, by name, each with a number that changes with it. Whole numbers, as of
    calls or of a shape, are alike on all workers anyway."""
    tracked = TRACKED if _tracks(norm) else ()
    return {n: (b, b._version) for n, b in norm.named_buffers() if n not in tracked and b.is_floating_point()}


def moved(norm: nn.Module, before: dict[str, tuple[Tensor, int]]) -> str | None:
    """Why a norm can not train with workers, as `refusal`: a forward in training has changed a buffer of its own.

    Args:
        norm: after the forward.
        before: `own_buffers` before it.
    """
    for name, (buffer, version) in own_buffers(norm).items():
        if name not in before or before[name][0] is not buffer or before[name][1] != version:
            return (
                f'norm "{norm.norm_info.name}" ({type(norm).__name__}) changes its buffer "{name}" in training, which '  # type: ignore[union-attr]
                "nobody could make alike on all workers; keep statistics in running_mean and running_var by track() "
                "(norms.running), or train with one worker"
            )
    return None


def enough(count: int, total: Tensor, workers: Workers) -> None:
    """ValueError where all workers together have fewer than two values per statistic, in training.

    Args:
        count: values of this worker; the device is only waited for where they alone are not enough.
        total: of all workers, ().
    """
    if count < 2 and int(total) < 2:
        raise ValueError(
            f"Expected more than 1 value per statistic when training, given {int(total)} in all {workers.size} workers"
        )


def _tracks(norm: nn.Module) -> bool:
    """Whether it is of norms.running.RunningStatistics, whose import from here would go round in a circle."""
    return hasattr(type(norm), "tracks_parts") and callable(getattr(norm, "track", None))


def _keeps(part: nn.Module) -> bool:
    return any(name.startswith(("running_", "num_batches_")) for name, b in part._buffers.items() if b is not None)


def _syncs(kind: type) -> bool:
    """Whether the class that defines the forward, or one that inherits from that, says `syncs = True`."""
    for each in kind.__mro__:
        if "syncs" in vars(each):
            return bool(vars(each)["syncs"])
        if "forward" in vars(each):
            return False
    return False
