"""Workers: processes that train one network together, each on its part of every batch.

Worker r of W takes x[r::W] of a batch x that all of them draw alike, so that a worker's part is a norm batch: "images
per GPU", as papers say it, and W workers give the numbers of one process with W norm batches (norms.situation). With
`sync` the statistics of norms are those of all workers' samples, as of one process with one norm batch.

A norm hears of its workers from its situation: `norm.situation.workers`, None where a process trains alone. Every
worker forwards the same layers in the same order, also where its own part is empty; else the others wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

_T = TypeVar("_T")


@dataclass(frozen=True)
class Workers:
    """The workers of one run, seen from one of them. A value that copies of a network share.

    Args:
        rank: r, of this process, from 0.
        size: W.
        sync: statistics of norms are those of all workers together.
        group: of torch.distributed; None: the default one.
    """

    rank: int = 0
    size: int = 1
    sync: bool = False
    group: Any = field(default=None, compare=False, repr=False)

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


ALONE = Workers()
"""One process that trains alone."""
