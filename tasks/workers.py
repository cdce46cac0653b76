"""What the workers of one run (norms.workers) do together beside forwards: losses, gradients, sums, what they found.

Every worker calls each of these at the same place of the run, with tensors of its own; all get the same answer, to the
last bit. A process that trains alone gets its own tensors back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from norms.workers import Workers
from tasks.base import Diverged


def shared_loss(loss: Tensor, count: int, workers: Workers) -> tuple[Tensor, Tensor]:
    """This worker's part of the mean loss over a batch, and that mean.

    Args:
        loss: a scalar, the mean over the worker's own samples. Over no sample it is not a number; its part is then 0,
            with a graph that leads through every layer, where the other workers wait.
        count: n_r, its samples.

    Returns:
        loss * n_r / N, of which the gradients are summed over workers, and the sum of all these parts, without
        gradient.
    """
    if workers.alone:
        return loss, loss.detach()
    if not count:
        loss = torch.nan_to_num(loss, nan=0.0)
    own = loss.detach().double()
    sums = workers.total(torch.stack([own * count, torch.full_like(own, count)]))
    return loss * (count / float(sums[1])), sums[0] / sums[1]


def sum_gradients(parameters: Iterable[nn.Parameter], workers: Workers) -> None:
    """Sum `.grad` of each parameter over the workers, in one message for each dtype.

    A gradient that no worker has stays None, so that optimizers pass over the parameter, as in one process; one that
    only others have comes to be. Its memory format stays.
    """
    if workers.alone:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(parameters):
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        device = group[0].device
        own = [p.new_zeros(p.numel()) if p.grad is None else p.grad.detach().reshape(-1) for p in group]
        have = torch.tensor([p.grad is not None for p in group], dtype=group[0].dtype, device=device)
        whole = workers.total(torch.cat([have, *own]))
        anyone = (whole[: len(group)] > 0).tolist()
        parts = whole[len(group) :].split([p.numel() for p in group])
        for parameter, part, there in zip(group, parts, anyone, strict=True):
            if there:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part.view(parameter.shape))


def rows(found: Sequence[Tensor], batch: int, whole: int, workers: Workers, device: torch.device) -> Tensor:
    """The rows that all workers found, in the order of the images: (whole, K).

    Args:
        found: (n, K) of each batch that is this worker's; batch i is that of worker i % W. There may be none.
        batch: images of every batch but the last.
        whole: images of all batches.
        device: of the network.

    Returns:
        Of several workers: in float64, on that device.
    """
    if workers.alone:
        return torch.cat(list(found))
    width = int(workers.gather(torch.tensor(found[0].shape[1] if found else 0, device=device)).max())
    filled = torch.zeros(whole, width, dtype=torch.float64, device=device)
    for number, part in enumerate(found):
        start = (workers.rank + number * workers.size) * batch
        filled[start : start + len(part)] = part
    return workers.total(filled)


def raise_together(trouble: str, turns: Sequence[float], workers: Workers, device: torch.device | str) -> None:
    """Diverged on every worker, with the text of the one that met it first; nothing where nobody did.

    Args:
        trouble: what this worker met; "": nothing.
        turns: of each worker, the same list on all of them: the number of its batch that was at fault; inf: none.
    """
    first = min(range(len(turns)), key=lambda rank: turns[rank])
    if turns[first] == float("inf"):
        return
    raise Diverged(_said(trouble, first, workers, device))


def _said(text: str, rank: int, workers: Workers, device: torch.device | str) -> str:
    """The text of one worker, on all of them."""
    if workers.alone:
        return text
    own = text.encode() if workers.rank == rank else b""
    length = int(workers.total(torch.tensor(len(own), device=device)))
    letters = torch.zeros(length, dtype=torch.int32, device=device)
    letters[: len(own)] = torch.tensor(list(own), dtype=torch.int32, device=device)
    return bytes(workers.total(letters).tolist()).decode()


def seed_apart(workers: Workers, *place: object) -> None:
    """Seed the global generators anew, from the worker's rank and the given place in the run.

    Workers would else drop the same units of their different images. The first one's generators stay as they are, so
    that its checkpoint says all there is to say of this.
    """
    if not workers.rank:
        return
    import numpy

    digest = hashlib.sha256("/".join(map(str, (*place, workers.rank))).encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number % 2**32)
