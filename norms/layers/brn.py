"""brn: bn's output, corrected towards the running statistics within limits; Ioffe 2017, arXiv:1702.03275."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from norms.bases.streaming import Streaming
from norms.kernels import by_moments, moments, native
from norms.kernels.grouping import evaluate, normalize
from norms.kernels.plain import table_type
from norms.registry import register
from norms.situation import check_slices
from norms.workers import enough


@register(
    name="brn",
    source="Ioffe 2017, arXiv:1702.03275",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    slices_at_once=True,
    exact_gradient=False,
    variance="biased",
    running_variance="unbiased",
)
class BatchRenorm(Streaming):
    """Batch renormalization: bn's output, corrected towards the output by running statistics.

        y = ((x - mean_B) / sigma_B * r + d) * weight + bias          sigma = sqrt(var + eps), biased var_B
        r = clip(sigma_B / sigma, 1 / r_limit, r_limit)                no gradient through r and d
        d = clip((mean_B - mean) / sigma, -d_limit, d_limit)

    with mean, sigma the running ones before this batch moves them. Where nothing is clipped, y is what evaluation would
    give. Limits 1 and 0 are bn: up to `warmup`, then they rise linearly to r_max at `r_until` and to d_max at
    `d_until`, all three as fractions of training (`after_update` tells; a layer that is never told stays bn).
    Evaluation is bn's.

    The paper's schedule is 5,000 steps of bn, r_max 3 at step 40,000, d_max 5 at step 25,000; the defaults are these
    numbers divided by some 130,000 steps of training (from memory, not confirmed).

    Differences to the paper: the running variance is torch's (average of unbiased variances), where the paper averages
    sigma_B (from memory, not confirmed); momentum is bn's, where the paper takes 0.01 (from memory, not confirmed); and
    the limits stay at 1 and 0 for the first 1 / momentum batches, while the running statistics still hold much of their
    start, which the paper's schedule never meets. With momentum 1 (recalibration) it is bn.

    Args:
        num_channels: C.
        r_max: largest r, at least 1.
        d_max: largest |d|, at least 0.
        warmup: fraction of training up to which it is bn.
        r_until: fraction of training at which r_max is reached.
        d_until: fraction of training at which d_max is reached.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.

    Raises:
        ValueError: limits or fractions out of range; (forward, training) one value per channel.
    """

    syncs = True
    progress: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: float = 0.04,
        r_until: float = 0.3,
        d_until: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps, momentum, affine, device, dtype)
        if r_max < 1 or d_max < 0:
            raise ValueError(f"r_max={r_max}, d_max={d_max}: r_max is at least 1 and d_max at least 0")
        if not 0 <= warmup < min(r_until, d_until) or max(r_until, d_until) > 1:
            raise ValueError(
                f"warmup={warmup}, r_until={r_until}, d_until={d_until}: fractions of training, warmup the smallest"
            )
        self.r_max, self.d_max = r_max, d_max
        self.warmup, self.r_until, self.d_until = warmup, r_until, d_until
        self._new_buffer("progress")

    def reset_running_stats(self) -> None:
        """As after construction: mean 0, variance 1, no batch seen, no progress of training."""
        super().reset_running_stats()
        self.progress.zero_()

    def after_update(self, progress: float) -> None:
        """Note the fraction of training that is done."""
        self.progress.fill_(progress)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        merging = self.merging
        if self.is_empty(x) and merging is None:
            nothing = x.new_zeros(0, self.num_channels, dtype=table_type(x))
            if self.training and self.situation.workers is not None and not self._recalibrated:
                self._found(nothing, nothing, x)
            return self.empty(x)
        if not self.training:
            self._check(x, 0)
            return evaluate(x, self.running_mean, self.running_var, self.weight, self.bias, self.num_channels, self.eps)
        slices = self.situation.slices
        check_slices(x, slices)
        count = self._check(x[::slices], 2 if merging is None else 0)
        if slices == 1 and self.situation.workers is None and native.ready(x) is not None:
            return self._alone(x, count)
        batch: list[Tensor] = []  # mean, unbiased variance, r and d of this forward, all without gradient

        def line(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            total: int | Tensor = count
            if merging is not None:
                mean, var, total = merging.merge(mean, var, count)
                if not batch:
                    enough(count, total, merging)
            if not batch:
                own_mean, own_var = mean.detach(), var.detach()
                unbiased = own_var * (total / (total - 1))
                found = None if self._recalibrated or merging is not None else self._found(own_mean, unbiased, x)
                batch.extend((own_mean, unbiased, *self.correction(own_mean, own_var, found)))
            scale = torch.rsqrt(var + self.eps) * batch[2]
            shift = torch.addcmul(batch[3], mean, scale, value=-1)
            return (scale, shift) if weight is None or bias is None else (scale * weight, bias + shift * weight)

        y = by_moments(x, line, self.weight, self.bias, rows=slices)[0]
        self.track(batch[0], batch[1], count)
        return y

    def _alone(self, x: Tensor, count: int) -> Tensor:
        """One norm batch: bn's kernel with another weight and bias."""
        mean, var = moments(x.detach(), 1)
        weight, bias = self.correction(mean[0], var[0])
        if self.weight is not None and self.bias is not None:
            weight, bias = weight * self.weight, torch.addcmul(self.bias, bias, self.weight)
        given = (mean, var)
        y, mean, var = normalize(x, weight, bias, self.num_channels, 1, self.eps, given=given)
        self.track(mean, var, count)
        return y

    def _found(self, mean: Tensor, var: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What each of K norm batches finds if all have come one after the other, those of other workers, too: running
        mean and variance (K, C), and of how many norm batches they are, (K, 1). None: what is kept, for one alone.

        Args:
            mean: (K, C) of this worker's norm batches; (0, C) where its part is empty.
            var: likewise, unbiased.
            x: this worker's part.
        """
        workers, slices = self.situation.workers, self.situation.slices
        first, step = 0, 1
        if workers is not None:
            # those of larger ranks may be empty, none before one's own
            rows = workers.rows(torch.cat((mean, var), 1), slices, True, x.shape[0] > workers.blocks)
            mean, var = rows.chunk(2, 1)
            first, step = workers.rank, max(1, len(rows) // slices)
        if len(mean) < 2 or not len(x):
            return None
        before = self.one_by_one(mean, var)[first:-1:step]
        number = torch.arange(first, len(mean), step, device=mean.device)[:, None]
        return before[:, 0], before[:, 1], number + self.num_batches_tracked

    def correction(
        self, mean: Tensor, var: Tensor, found: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """r and d of norm batches, by the limits as they are; while recalibrating 1 and 0.

        Args:
            mean: of the norm batches, (K, C) or (C,).
            var: likewise, biased.
            found: the running mean and variance, likewise, and of how many norm batches they are; None: what is kept.
        """
        if self._recalibrated:
            return torch.ones_like(mean), torch.zeros_like(mean)
        with torch.no_grad():
            seen: Any
            running_mean, running_var, seen = found or (self.running_mean, self.running_var, self.num_batches_tracked)
            progress: Any = self.progress
            if found is None and native.ready(mean) is not None:  # on a CPU, outside of graphs
                seen, progress = int(seen), float(progress)
            r_limit, d_limit = self._limits(seen, progress)
            rstd = torch.rsqrt(running_var.to(mean.dtype) + self.eps)
            r = torch.sqrt(var + self.eps) * rstd
            d = (mean - running_mean) * rstd
            # Stacked, since a compiled graph would do what is pointwise anew in its backward, when all this has moved.
            return torch.stack((r.clamp(1 / r_limit, r_limit), d.clamp(-d_limit, d_limit))).unbind()  # type: ignore[return-value]

    def _limits(self, seen: Any, progress: Any) -> tuple[Any, Any]:
        """r_limit and d_limit, tensors or, where the arguments are, numbers, which saves operations.

        Args:
            seen: norm batches that the running statistics are of.
            progress: the fraction of training that is done.
        """
        settled = seen * (1 if self.momentum is None else self.momentum) >= 1
        rises = []
        for until, rise in ((self.r_until, self.r_max - 1), (self.d_until, self.d_max)):
            part = (progress - self.warmup) / (until - self.warmup)
            part = part.clamp(0, 1) if isinstance(part, Tensor) else min(max(part, 0.0), 1.0)
            rises.append(part * settled * rise)
        return 1 + rises[0], rises[1]
