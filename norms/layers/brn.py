"""brn: bn's output, corrected towards the running statistics within limits; Ioffe 2017, arXiv:1702.03275."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from norms.bases.streaming import Streaming
from norms.kernels.former import row_moments
from norms.kernels.grouping import evaluate, normalize
from norms.kernels.moments import batch_moments
from norms.registry import register
from norms.workers import Workers


@register(
    name="brn",
    source="Ioffe 2017, arXiv:1702.03275",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
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
        merging, workers = self.merging, self.situation.workers if self.training else None
        if self.is_empty(x) and merging is None:
            if workers is not None and not self._recalibrated:
                self._before_own(x, None, workers)
            return self.empty(x)
        count = self._check(x, 2 if merging is None else 0)
        if not self.training:
            return evaluate(x, self.running_mean, self.running_var, self.weight, self.bias, self.num_channels, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        if not self._recalibrated:
            with contextlib.ExitStack() as stack:
                if merging is not None:
                    own = batch_moments(x.detach(), merging)
                else:
                    own = tuple(t[0] for t in row_moments(x, 1))  # type: ignore[assignment]
                if workers is not None and merging is None:
                    unbiased = torch.stack((own[0], own[1] * (count / (count - 1))))
                    stack.enter_context(self.as_if_after(self._before_own(x, unbiased, workers)))
                r, d = (t.to(wide) for t in self.correction(*own))
            if weight is None or bias is None:
                weight, bias = r, d
            else:
                weight, bias = r * weight, torch.addcmul(bias, d, weight)
        y, mean, var = normalize(x, weight, bias, self.num_channels, 1, self.eps, merging)
        self.track(mean, var, count)
        return y

    def _before_own(self, x: Tensor, own: Tensor | None, workers: Workers) -> Tensor:
        """Mean and unbiased variance (R, 2, C) of the norm batches that workers of smaller ranks have now.

        In one process they come before this one's, and have moved the running statistics already.

        Args:
            x: this worker's norm batch.
            own: (2, C) its moments; None where it is empty.
            workers: all of which call this.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        row = x.new_zeros(0, 2 * self.num_channels, dtype=wide) if own is None else own.reshape(1, -1)
        found = workers.rows(
            row, 1, False, x.shape[0] > workers.blocks
        )  # those of larger ranks may be empty, none before one's own
        return found[: workers.rank].reshape(-1, 2, self.num_channels)

    def correction(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """r and d (C,) for a batch of this mean and biased variance (C,), by the statistics and limits as they are."""
        with torch.no_grad():
            settled = self.num_batches_tracked * (1 if self.momentum is None else self.momentum) >= 1
            ramps = [
                ((self.progress - self.warmup) / (until - self.warmup)).clamp(0, 1) * settled
                for until in (self.r_until, self.d_until)
            ]
            r_limit, d_limit = 1 + (self.r_max - 1) * ramps[0], self.d_max * ramps[1]
            rstd = torch.rsqrt(self.running_var + self.eps)
            r = torch.sqrt(var + self.eps) * rstd
            d = (mean - self.running_mean) * rstd
            return r.clamp(1 / r_limit, r_limit), d.clamp(-d_limit, d_limit)
