"""Base classes of norms that keep running statistics, per channel or group (RunningStatistics) or also per domain.

Conventions are torch's: `running_mean`, `running_var` (unbiased) and `num_batches_tracked` are buffers, changed in
place under no_grad; `momentum` is the weight of the new value and None means the average of all batches so far.
Statistics of K norm batches that one forward computed at once move the buffers as if the batches had come one after
the other:

    r_j+1 = (1 - m_j) r_j + m_j s_j        m_j = m with momentum m; 1 / (n + j + 1) with None and n batches before

Differences to torch: the running statistics are float32 also where the parameters are created in a smaller type
(`module.bfloat16()` still casts every buffer, as it does for torch's own layers); and a statistic that is not finite,
of a batch that overflowed, say, leaves the running one of that channel as it was, where torch's stays nan for ever.
The batch is counted all the same: in the equation above r_j stands in the place of s_j.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from norms.kernels import native
from norms.workers import Workers

Given = tuple[Tensor, Tensor, Any]
"""The arguments of one call of `track`."""


class RunningStatistics(nn.Module):
    """A module with running mean and variance; a norm inherits from it and calls `track` in training.

    Args:
        size: number of statistics (channels for bn, groups for bgn), or the shape of them.
        momentum: weight of the new value in [0, 1]; None: the average of all batches so far.
        device: where the buffers live.
        dtype: of the parameters; the statistics take it where it is float32 or better, else float32.

    Attributes:
        tracks_parts: a norm batch may be handed to `track` in parts, each with statistics of its own (ghost), so that
            recalibration must take them there: the buffers would show the last one only.
        syncs: whether a forward that the class defines merges its moments over workers (norms.workers).

    Raises:
        ValueError: a momentum outside [0, 1].
    """

    tracks_parts: bool = False
    syncs: bool = False
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        size: int | tuple[int, ...],
        momentum: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: it is the weight of the new value, in [0, 1], or None")
        self.momentum = momentum
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(size, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def reset_running_stats(self) -> None:
        """As after construction: mean 0, variance 1, no batch seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Take in the statistics of K norm batches, in order.

        Args:
            mean: (K, size) batch means.
            var: (K, size) unbiased batch variances.
            count: values that entered each of them (running statistics do not need it, recalibration does).
        """
        with torch.no_grad():
            k = mean.shape[0]
            if self._moved(self.running_mean, self.running_var, mean, var):
                self.num_batches_tracked.add_(k)
                return
            if k > 1:
                after = self.one_by_one(mean, var)[-1]
                self.num_batches_tracked.add_(k)
                self.running_mean.copy_(after[0])
                self.running_var.copy_(after[1])
                return
            self.num_batches_tracked.add_(k)
            sound = self.sound(mean, var)
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                new = torch.where(sound, new, running)
                if self.momentum is None:
                    # on the device, without reading the counter: no synchronization, no graph break
                    running.add_((new - running).sum(0).div_(self.num_batches_tracked))
                else:
                    running.copy_(torch.lerp(running, new[0].to(running.dtype), self.momentum))  # lerp_ has no vmap

    def _moved(self, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> bool:
        """Whether the native library has moved the running statistics: a call in the place of ten small operations."""
        if self.momentum is None or "recalibrating" in self.__dict__:
            return False
        return native.track(running_mean, running_var, mean, var, self.momentum)

    @torch.no_grad()
    def one_by_one(self, mean: Tensor, var: Tensor) -> Tensor:
        """The running statistics before each of K norm batches that come one after the other, and after the last.

        In closed form: with a_j = 1 - m_j, or 1 where s_j is not finite, and A_j = a_0 ... a_j

            r_j+1 = A_j (r_0 + sum_i<=j (1 - a_i) s_i / A_i)

        Args:
            mean: (K, size) batch means, K at least 1.
            var: (K, size) unbiased batch variances.

        Returns:
            (K + 1, 2, size), mean and variance, in the type of `mean`; nothing is changed.
        """
        kind = torch.promote_types(mean.dtype, self.running_mean.dtype)
        room = torch.finfo(kind)
        found = [torch.stack((self.running_mean, self.running_var)).to(kind)[None]]
        sound = self.sound(mean, var)
        if self.momentum is None:
            number = torch.arange(1, len(mean) + 1, device=mean.device) + self.num_batches_tracked
            share, rows = number.to(kind).reciprocal().view(-1, *[1] * (mean.dim() - 1)) * sound, len(mean)
        else:
            share = sound.to(kind).mul_(self.momentum)
            # so many that A_j and one over it are in the type's range
            rows = max(1, int(math.log(room.tiny) * 0.7 / math.log(max(min(1 - self.momentum, 0.999), room.eps))))
        share = share[:, None]
        kept = (1 - share).clamp(min=room.eps)  # as good as 0 beside 1, and it may be divided by
        moved = torch.where(sound[:, None], torch.stack((mean, var), 1).to(kind), 0) * share
        for a, new in zip(kept.split(rows), moved.split(rows), strict=True):
            product = a.cumprod(0)
            found.append(product * (found[-1][-1:] + (new / product).cumsum(0)))
        return torch.cat(found)

    def sound(self, mean: Tensor, var: Tensor) -> Tensor:
        """A mask of the batch statistics that may be kept: those that are finite in the type of the running statistics.

        Where the mean is not finite, the variance is not either, so that one comparison does for both, since small
        operations count; but not in a smaller type (`module.half()`). A recalibration is shown what there is.
        """
        if "recalibrating" in self.__dict__:
            return torch.ones_like(var, dtype=torch.bool)
        kept = self.running_var.dtype
        found = var.to(kept) < math.inf
        return found if kept in (torch.float32, torch.float64) else found & (mean.to(kept).abs() < math.inf)

    def take_in(self, given: list[Given], workers: Workers, like: Tensor, slices: int | None) -> None:
        """Track what one forward of each worker gave to `track`, in the order of norm batches.

        Local norm batch j of worker r is x[r + jW :: KW] of the whole batch, so number r + jW of all KW. Statistics
        that are merged over workers are those of one norm batch and alike everywhere, so they are tracked as they are.

        Args:
            given: to `track` by this worker's forward; nothing where its part is empty.
            workers: all of which call this, whatever they were given.
            like: x (N, ...), this worker's part.
            slices: norm batches that were forwarded at once; None: one, of which there may be several parts.
        """
        if workers.sync:
            for rows in given:
                self.track(*rows)
            return
        own = self._packed(given, torch.promote_types(like.dtype, self.running_mean.dtype), like.device)
        if self.tracks_parts:  # the parts of a norm batch stay together
            batches = slices or 1
            for parts in own.view(batches, len(own) // batches, own.shape[1]):
                found = workers.rows(parts, None, False, False)
                if len(found):
                    self._track_packed(found, given[0][2] if given else 0)
            return
        per_worker = slices or 1
        if len(own) not in (0, per_worker):
            raise ValueError(
                f"{type(self).__name__} gave the statistics of {len(own)} norm batches to track() in a forward of "
                f"{per_worker}; where they are parts of one norm batch, say tracks_parts = True"
            )
        # x[r::W] of each block: where a worker has two samples, the others have one
        complete = len(own) > 0 and len(like) > workers.blocks
        found = workers.rows(own, per_worker, slices is not None, complete)
        if len(found):
            self._track_packed(found, given[0][2] if given else 0)

    def _packed(self, given: list[Given], dtype: torch.dtype, device: torch.device) -> Tensor:
        """(R, F): a row of numbers per norm batch."""
        rows = [torch.cat((mean.flatten(1), var.flatten(1)), dim=1).to(dtype) for mean, var, _ in given]
        none = torch.zeros(0, 2 * self.running_mean.numel(), dtype=dtype, device=device)
        return torch.cat((none, *(r.detach() for r in rows)))

    def _track_packed(self, rows: Tensor, count: int) -> None:
        mean, var = rows.view(len(rows), 2, *self.running_mean.shape).unbind(1)
        self.track(mean, var, count)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As torch's batch normalization does it: states from before torch 0.4.1, of frozen layers and of other
        # libraries have no counter.
        key = prefix + "num_batches_tracked"
        tracked = self.num_batches_tracked
        if key not in state_dict and prefix + "running_mean" in state_dict and tracked is not None:
            state_dict[key] = torch.zeros_like(tracked, device="cpu") if tracked.is_meta else tracked
        super()._load_from_state_dict(state_dict, prefix, *args)


class DomainStatistics(RunningStatistics):
    """Running statistics of each domain: `running_mean`, `running_var` (D, C) and `num_batches_tracked` (D,).

    Arguments and errors as RunningStatistics, with the shape (D, C) as size.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        momentum: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(shape, momentum, device, dtype)
        self.register_buffer("num_batches_tracked", torch.zeros(shape[0], device=device, dtype=torch.long))

    def track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:  # type: ignore[override]
        """Take in the statistics of K norm batches, in order; a domain without values in one is not moved by it.

        Args:
            mean: (K, D, C) means.
            var: (K, D, C) unbiased variances.
            count: (K, D, 1) values that entered each of them.
        """
        with torch.no_grad():
            alone = (
                len(self.running_mean) == 1 and native.ready(self.running_mean) is not None and bool((count > 0).all())
            )
            if alone and self._moved(self.running_mean[0], self.running_var[0], mean[:, 0], var[:, 0]):
                self.num_batches_tracked.add_(len(mean))
                return
            held = (count > 0).to(mean.dtype)
            seen = held.sum(0)  # (D, 1)
            self.num_batches_tracked.add_(seen[:, 0].long())
            sound = self.sound(mean, var)
            pairs = [
                (running, torch.where(sound, new, running))
                for running, new in ((self.running_mean, mean), (self.running_var, var))
            ]
            if self.momentum is None:
                total = self.num_batches_tracked[:, None].clamp(min=1)
                for running, new in pairs:
                    running.add_((held * (new - running)).sum(0).div_(total))
                return
            if len(held) == 1:  # as RunningStatistics does it, to the last bit
                for running, new in pairs:
                    moved = torch.lerp(running, new[0].to(running.dtype), self.momentum)
                    running.copy_(torch.where(held[0] > 0, moved, running))
                return
            age = seen - held.cumsum(0)  # norm batches of the same domain that come after
            kept = 1 - self.momentum
            weight = held * self.momentum * torch.pow(torch.full_like(age, kept), age)
            left = torch.pow(torch.full_like(seen, kept), seen)
            for running, new in pairs:
                running.mul_(left).add_((weight * new).sum(0))

    def _packed(self, given: list[Given], dtype: torch.dtype, device: torch.device) -> Tensor:
        rows = [torch.cat((m.flatten(1), v.flatten(1), n.flatten(1).to(dtype)), dim=1).to(dtype) for m, v, n in given]
        none = torch.zeros(0, 2 * self.running_mean.numel() + len(self.running_mean), dtype=dtype, device=device)
        return torch.cat((none, *(r.detach() for r in rows)))

    def _track_packed(self, rows: Tensor, count: Any) -> None:
        size, shape = self.running_mean.numel(), self.running_mean.shape
        mean, var, counts = rows.split([size, size, shape[0]], dim=1)
        self.track(mean.reshape(-1, *shape), var.reshape(-1, *shape), counts.reshape(-1, shape[0], 1))


def finite_or(new: Tensor, kept: Tensor) -> Tensor:
    """`new`, and where that is infinite or nan `kept`, which broadcasts to it."""
    return torch.where(new.abs() < math.inf, new, kept.to(new.dtype))
