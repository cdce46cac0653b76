"""Norms that normalize training by statistics of more than the batch: brn, mabn; online shares parts.

    brn     bn's output times r plus d, which put the running       Ioffe 2017, arXiv:1702.03275
            statistics in the batch's place, within limits
    mabn    second moments averaged over the last batches, of x in  Yan et al. 2020, arXiv:2001.06838
            the forward, of gradient times output in the backward
    online  each sample by the running statistics of those before   Chiley et al. 2019, arXiv:1905.05894
            it; in the backward a control process

None of the backward passes is the derivative of the forward: statistics of other batches are constants, and mabn and
online put statistics of earlier gradients in the place of the batch's. What the backward keeps, it writes into the
buffers that its forward saw, so that a forward inside `hold` never moves the layer's own, whenever its backward comes.
Second derivatives, where they are asked for, hold all statistics fixed.

Axes: N sample, C channel, H W (any number of) spatial positions, P = H * W, K rows of statistics: N (one per sample)
or 1 (one for the batch).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, fx

from norms.channels import PerChannel, check_arguments, memory_format, transformed
from norms.grouping import Blocks, _ordinary, evaluate, normalize
from norms.registry import register
from norms.running import RunningStatistics, finite_or


class _Streaming(PerChannel, RunningStatistics):
    """What the three share: C channels, eps, per-channel affine, and running statistics of size C."""

    def __init__(
        self,
        num_channels: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        check_arguments(eps=eps, num_channels=num_channels)
        super().__init__(num_channels, momentum, device, dtype)
        self.add_channels(num_channels, eps, affine, device, dtype)

    def _new_buffer(self, name: str, *shape: int) -> None:
        """A buffer of zeros, of the running statistics' type."""
        self.register_buffer(name, self.running_mean.new_zeros(shape))

    def _check(self, x: Tensor, values: int) -> int:
        """Refuse x of another shape or with fewer values per channel in training; the number of values."""
        self.check_channels(x)
        count = x.shape[0] * math.prod(x.shape[2:])
        if self.training and count < values:
            raise ValueError(
                f"Expected at least {values} value(s) per channel when training, given {count} from x of shape "
                f"{tuple(x.shape)}"
            )
        return count

    def _refuse_transforms(self) -> None:
        """RuntimeError where torch.func's transforms, or forward-mode derivatives, would pass the backward by."""
        if transformed():
            raise RuntimeError(
                f"{type(self).__name__} has a backward of its own, which moves what the layer keeps, so it does not "
                "train inside torch.func's transforms (vmap, grad, jvp); it evaluates there"
            )

    @property
    def _recalibrated(self) -> bool:
        """Momentum 1, as norms.running.recalibrate sets it: the running statistics are to be those of one batch alone,
        which is nothing to normalize another batch by."""
        return self.momentum == 1

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}"


# --- sums and products over x, in few passes where the kernels of norms.grouping apply -----------------------------


def _fast(x: Tensor) -> bool:
    return x.device.type == "cpu" and _ordinary(x) and not torch.is_grad_enabled()


def _on(x: Tensor, per_row: Tensor) -> Tensor:
    """(K, C), to be broadcast over x (N, C, *)."""
    return per_row.reshape(*per_row.shape, *[1] * (x.dim() - 2))


def _over(x: Tensor, rows: int) -> tuple[int, ...]:
    return (*(() if rows == x.shape[0] else (0,)), *range(2, x.dim()))


def _means(x: Tensor, rows: int) -> Tensor:
    """x (N, C, *) -> (K, C)."""
    over = _over(x, rows)
    return (x.mean(over) if over else x).reshape(rows, -1)


def _moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C) of x, in float32 or better, without gradient."""
    x = x.detach()  # forward-mode derivatives do not heed no_grad
    with torch.no_grad():
        if _fast(x):
            mean, var = Blocks.of(x, x.shape[1], rows).moments(x).unbind()
            return mean, var
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _means(wide, rows)
        return mean, _means((wide - _on(x, mean)).square(), rows)


def _products(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Means of dy * (x - mean) * rstd and of dy over each row's values; mean, rstd and results (K, C)."""
    rows, channels = mean.shape
    if _fast(x):
        blocks = Blocks.of(x, channels, rows)
        dy = dy.contiguous(memory_format=memory_format(x))
        per_unit = blocks.sums(dy, x, *blocks.spread(torch.stack((mean, rstd))))
        product, total = (blocks.by_group(per_unit).sum(3) / blocks.count).unbind()
        return product, total
    dy = dy.to(mean.dtype)
    return _means(dy * ((x - _on(x, mean)) * _on(x, rstd)), rows), _means(dy, rows)


def _linear(x: Tensor, scale: Tensor, shift: Tensor, dy: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """scale * x + shift, plus factor * dy where these are given; coefficients (K, C). In x's type and memory format."""
    layout = memory_format(x)
    if _fast(x):
        blocks = Blocks.of(x, x.shape[1], scale.shape[0])
        plus = None
        if dy is not None and factor is not None:
            plus = (dy.contiguous(memory_format=layout), blocks.spread(factor[None])[0])
        per_unit = blocks.spread(torch.stack((scale, shift)))
        y = blocks.affine(
            x, per_unit[0], per_unit[1], plus
        ).data  # as in grouping: a view could not be changed in place
    else:
        y = x * _on(x, scale) + _on(x, shift)
        if dy is not None and factor is not None:
            y = y + dy * _on(x, factor)
    return y.to(x.dtype).contiguous(memory_format=layout)


# --- brn ----------------------------------------------------------------------------------------------------------


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
class BatchRenorm(_Streaming):
    """Batch renormalization: bn's output, corrected towards what the running statistics would have given.

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
        if self.is_empty(x):
            return self.empty(x)
        count = self._check(x, 2)
        if not self.training:
            return evaluate(x, self.running_mean, self.running_var, self.weight, self.bias, self.num_channels, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        if not self._recalibrated:
            r, d = (t.to(wide) for t in self.correction(*(t[0] for t in _moments(x, 1))))
            if weight is None or bias is None:
                weight, bias = r, d
            else:
                weight, bias = r * weight, torch.addcmul(bias, d, weight)
        y, mean, var = normalize(x, weight, bias, self.num_channels, 1, self.eps)
        self.track(mean, var, count)
        return y

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


# --- mabn ---------------------------------------------------------------------------------------------------------


SIMULATED_BATCH = 32
"""Images whose statistics mabn's window stands for: the paper's and the code's batch of one worker."""


class _SecondMoment(torch.autograd.Function):
    """mabn's y = factor * rstd * x * weight + bias, with its backward (see MovingAverageBatchNorm)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        rstd: Tensor,
        factor: Tensor,
        averaged: Tensor,
        history: Tensor,
        seen: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rstd, factor)
        ctx.averaged, ctx.history, ctx.seen = averaged, history, seen  # not saved: the backward is to change them
        return _linear(x, (rstd * factor * weight)[None], bias[None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, factor = ctx.saved_tensors
        dy = grads[0]
        product, total = (t[0] for t in _products(dy, x, torch.zeros_like(rstd)[None], rstd[None]))
        slope = factor * weight
        psi = _over_window(slope * product, ctx.history, ctx.seen, ctx.averaged, _average(ctx.history, ctx.seen))
        dx = None
        if ctx.needs_input_grad[0]:
            # rstd * (factor * weight * dy - psi * z), z = rstd * x
            scale = -psi * rstd.square()
            dx = _linear(x, scale[None], torch.zeros_like(scale)[None], dy, (slope * rstd)[None])
        count = dy.numel() // len(weight)
        return dx, factor * product * count, total * count, None, None, None, None, None


def _average(history: Tensor, seen: Tensor) -> Tensor:
    """The average (C,) of the values in a history (L, C) that were seen; 0 where none was."""
    return history.sum(0) / seen.clamp(min=1, max=history.shape[0])


def _over_window(new: Tensor, history: Tensor, seen: Tensor, averaged: Tensor, instead: Tensor) -> Tensor:
    """Put `new` (C,) into the history (L, C) of the last L values; their average where `averaged`, else `new`.

    Args:
        new: the value of this iteration.
        history: of the last L iterations, zero where none was yet; changed in place.
        seen: how many iterations were seen; changed in place.
        averaged: a boolean tensor.
        instead: (C,), what the history takes where `new` is not finite.

    Returns:
        (C,), in the type of `new`.
    """
    length = history.shape[0]
    with torch.no_grad():
        slot = (seen % length).reshape(1)
        history.index_copy_(0, slot, finite_or(new.detach().to(history.dtype), instead)[None])
        seen.add_(1)
        held = seen.clamp(max=length)
        average = (history.sum(0) / held).to(new.dtype)
    return torch.where(averaged, average + (new - new.detach()) / held, new)  # the latest value's share has a gradient


@fx.wrap  # one step of a graph that torch.fx traces, which could not follow a branch on the shape
def centred(weight: Tensor) -> Tensor:
    """A convolution's weight (C, *) with the mean of each filter subtracted. ValueError for filters of one weight."""
    if weight.shape[1:].numel() < 2:
        raise ValueError(
            "mabn: the weights of a filter are centred, which leaves nothing of a single one; given weights of "
            f"shape {tuple(weight.shape)}"
        )
    return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


@register(
    name="mabn",
    source="Yan et al. 2020, arXiv:2001.06838",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    needs={"conv_weight"},
    exact_gradient=False,
    compiles=False,
    across_iterations=True,
    functional=False,
)
class MovingAverageBatchNorm(_Streaming):
    """Moving average batch normalization: the second moments of the last batches, forward and backward.

        chi_t = mean over (N, H, W) of x^2,   chi = average of the last `buffer_size` chi_t
        z = x / sqrt(chi + eps),   y = z * r * weight + bias
        r = clip(sqrt(chi + eps) / sqrt(running + eps), 1 / r_max, r_max)
        then running <- running + momentum * (chi - running)

    and in the backward, with no gradient through r,

        g = dy * weight * r,   psi_t = mean over (N, H, W) of g * z,   psi = average of the last `buffer_size` psi_t
        dx = (g - z * psi) / sqrt(chi + eps)

    No mean is subtracted; instead the weights of the convolution before it are centred (`transform_weight`). Up to
    `warmup` chi and psi are the batch's own, up to `renorm_from` r is 1; both are fractions of training (`after_update`
    tells), and a layer that is never told stays so. The defaults are larger fractions than the code's, so that some
    hundred steps have both phases. The code's numbers are 100 and 1,000 steps, of 600,000 on ImageNet
    and 180,000 on COCO. Evaluation: x / sqrt(running + eps) * weight + bias.

    Read in the official code (its MABN.py). Differences: the average is over as many batches as there were, as long as
    they are fewer than `buffer_size`, and r stays 1 for so long (the code is past both before its warm-up ends);
    `running` starts at the first batch's chi (as in the code for ImageNet, cls/networks/MABN.py) and not at 1; psi
    counts its own iterations, so that a forward without a backward leaves no gap in it. Of psi the code takes no other
    average than the simple one.

    `running_var` is `running`, and `running_mean` is 0, after training; recalibration puts mean and variance of the
    batches there. `running_mean`^2 + `running_var` is the second moment either way.

    Args:
        num_channels: C.
        buffer_size: batches in a simple average; "auto": as many as hold SIMULATED_BATCH images, by norm_batch_size
            (the official code's 16 batches of 2 where it is not known). With large norm batches and large steps a long
            average does not train.
        norm_batch_size: images that share statistics; a run fills it in.
        warmup: fraction of training up to which nothing is averaged.
        renorm_from: fraction of training up to which r is 1.
        r_max: largest r, at least 1.
        eps: added to the second moment.
        momentum: weight of the new value in the running second moment; None: average of all batches.
        affine: weight and bias per channel.

    Raises:
        ValueError: an option out of range; (forward) no convolution weight, which shows that no convolution precedes;
            (transform_weight) filters of a single weight, which centring would make 0.
    """

    progress: Tensor
    chi_history: Tensor
    psi_history: Tensor
    num_backwards_tracked: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        buffer_size: int | Literal["auto"] = "auto",
        norm_batch_size: int | None = None,
        warmup: float = 0.01,
        renorm_from: float = 0.1,
        r_max: float = 5.0,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps, momentum, affine, device, dtype)
        auto = max(1, SIMULATED_BATCH // (norm_batch_size or 2))
        window = auto if isinstance(buffer_size, str) else buffer_size
        if window < 1:
            raise ValueError(f"buffer_size={window}: at least 1 is needed")
        if r_max < 1:
            raise ValueError(f"r_max={r_max}: at least 1 is needed")
        if not 0 <= warmup <= renorm_from <= 1:
            raise ValueError(f"warmup={warmup}, renorm_from={renorm_from}: fractions of training, in this order")
        self.buffer_size, self.r_max = window, r_max
        self.warmup, self.renorm_from = warmup, renorm_from
        self._new_buffer("progress")
        self._new_buffer("chi_history", window, num_channels)
        self._new_buffer("psi_history", window, num_channels)
        self.register_buffer("num_backwards_tracked", torch.zeros_like(self.num_batches_tracked))

    def reset_running_stats(self) -> None:
        """As after construction: no batch seen, empty histories, no progress of training."""
        super().reset_running_stats()
        for buffer in (self.chi_history, self.psi_history, self.num_backwards_tracked, self.progress):
            buffer.zero_()

    def after_update(self, progress: float) -> None:
        """Note the fraction of training that is done."""
        self.progress.fill_(progress)

    def transform_weight(self, weight: Tensor) -> Tensor:
        """The convolution's weight, centred; see `centred`."""
        return centred(weight)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype. `weight`: the convolution's, whatever it is; None is refused."""
        if weight is None:
            raise ValueError(
                "mabn subtracts no mean, so it needs a convolution before it, whose weights it centres; no weight given"
            )
        if self.is_empty(x):
            return self.empty(x)
        count = self._check(x, 1)
        if not self.training:
            nothing, square = torch.zeros_like(self.running_mean), self._second_moment()
            return evaluate(x, nothing, square, self.weight, self.bias, self.num_channels, self.eps)
        self._refuse_transforms()
        mean, var = (t[0] for t in _moments(x, 1))
        rstd, factor, averaged = self._take(mean, var, count)
        if torch.compiler.is_compiling():
            # in one graph the backward would compute rstd and factor anew, from the statistics that they have moved
            torch._dynamo.graph_break()
        scale = torch.ones_like(rstd) if self.weight is None else self.weight.to(rstd.dtype)
        shift = torch.zeros_like(rstd) if self.bias is None else self.bias.to(rstd.dtype)
        history, seen = self.psi_history, self.num_backwards_tracked
        return _SecondMoment.apply(x, scale, shift, rstd, factor, averaged, history, seen)

    def _second_moment(self) -> Tensor:
        return self.running_mean.square() + self.running_var

    @torch.no_grad()
    def _take(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Move the statistics by a batch of this mean and biased variance (C,); 1 / sqrt(chi + eps), r, and whether
        averages are taken."""
        averaged = self.progress >= self.warmup
        running, seen = self._second_moment(), self.num_batches_tracked
        chi = _over_window(mean.square() + var, self.chi_history, seen, averaged, running)
        factor = torch.ones_like(chi)
        if self._recalibrated:
            var = var * (count / max(count - 1, 1))
            sound = self.sound(mean, var)
            self.running_mean.copy_(torch.where(sound, mean, self.running_mean))
            self.running_var.copy_(torch.where(sound, var, self.running_var))
        else:
            r = torch.sqrt((chi + self.eps) / (running + self.eps)).clamp(1 / self.r_max, self.r_max)
            factor = torch.where((self.progress >= self.renorm_from) & (seen > self.buffer_size), r, factor)
            share = 1 / seen if self.momentum is None else torch.where(seen == 1, 1.0, self.momentum)
            new = finite_or(chi.to(running.dtype), running)
            self.running_var.copy_(torch.lerp(running, new, share.to(running.dtype)))
            self.running_mean.zero_()
        return torch.rsqrt(chi + self.eps), factor.to(chi.dtype), averaged
