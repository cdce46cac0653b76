"""mabn: second moments averaged over the last batches, of x in the forward, of gradient times output in the backward.

Yan et al. 2020, arXiv:2001.06838, "Towards Stabilizing Batch Statistics in Backward Propagation of Batch
Normalization". The backward is not the derivative of the forward: see norms.bases.streaming.

Axes: N sample, C channel, H W (any number of) spatial positions, L iterations of a history.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx

from norms.bases.running_statistics import finite_or
from norms.bases.streaming import Streaming
from norms.kernels import affine, own
from norms.kernels.grouping import evaluate
from norms.kernels.moments import moments
from norms.registry import register

SIMULATED_BATCH = 32
"""Images whose statistics mabn's window stands for: the paper's and the code's batch of one worker."""


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
class MovingAverageBatchNorm(Streaming):
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
        """x: (N, C, *) -> the same shape and dtype. `weight`: the convolution's, any; None is refused."""
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
        x = own.lying(x)
        mean, var = (t[0] for t in moments(x.detach(), 1))
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
        return affine(x, rstd * factor * weight, bias).data  # no view: an activation in place may follow

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, factor = ctx.saved_tensors
        dy = grads[0]
        count = dy.numel() // len(weight)
        nothing = torch.zeros_like(rstd)[None]
        product, total = (t[0] / count for t in own.sums(dy, x, nothing))
        product = product * rstd
        slope = factor * weight
        psi = _over_window(slope * product, ctx.history, ctx.seen, ctx.averaged, _average(ctx.history, ctx.seen))
        dx = None
        if ctx.needs_input_grad[0]:
            # rstd * (factor * weight * dy - psi * z), z = rstd * x
            scale = -psi * rstd.square()
            dx = own.blend(dy, x, (slope * rstd)[None], nothing, scale[None], nothing)
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
        instead: (C,), taken into the history where `new` is not finite.

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
