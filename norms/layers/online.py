"""online: each sample by the running statistics of those before it, with a control process in the backward.

Chiley et al. 2019, arXiv:1905.05894, "Online Normalization for Training Neural Networks". The backward is not the
derivative of the forward: see norms.bases.streaming.

Axes: N sample, C channel, H W (any number of) spatial positions.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from norms.bases.running_statistics import finite_or
from norms.bases.streaming import Streaming
from norms.kernels import affine, by_moments, own, plain
from norms.kernels.grouping import evaluate
from norms.kernels.moments import moments
from norms.registry import register


@register(
    name="online",
    source="Chiley et al. 2019, arXiv:1905.05894",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
    exact_gradient=False,
    across_iterations=True,
    functional=False,
    running_variance="biased",
)
class OnlineNorm(Streaming):
    """Online normalization: each sample by the running statistics of all samples before it.

    Per channel, the samples of a batch one after the other, with m_t, v_t the mean and biased variance over a sample's
    positions and a = 1 - momentum:

        y_t   = (x_t - mean_(t-1)) / sigma_(t-1),   sigma = sqrt(var + eps)
        var_t = a var_(t-1) + (1 - a) v_t + a (1 - a) (m_t - mean_(t-1))^2
        mean_t = a mean_(t-1) + (1 - a) m_t
        z_t   = y_t * weight + bias
        out_t = z_t / sqrt(mean over (C, H, W) of z_t^2 + eps)            "layer_scaling"
        out_t = clip(z_t, -5, 5)                                          "clamp"

    The backward of out and z is exact; that of y is the control process, with h = backward_momentum = 1 - b:

        g'_t  = g_t - h e_(t-1) y_t,            e_t = e_(t-1) + mean over (H, W) of g'_t y_t
        dx_t  = g'_t / sigma_(t-1) - h u_(t-1),   u_t = u_(t-1) + mean over (H, W) of dx_t

    Evaluation uses the running statistics, then affine and compensation as in training. The paper's decays a / b, per
    sample: CIFAR-10 1023/1024 and 127/128 (the default), CIFAR-100 511/512 and 15/16, ImageNet 0.999 and 0.99.

    Read in the official code. Differences: here momentum=None gives the cumulative average over samples; layer scaling
    shares eps; `num_batches_tracked` counts samples, each of which is a norm batch of its own. Momentum 1, which
    recalibration sets and no option can, would leave the last sample's statistics alone: the batch is then normalized
    by its own pooled statistics, which become the running ones.

    Args:
        num_channels: C.
        backward_momentum: h, the weight of the accumulated errors, per sample; 0: no control.
        compensation: the means against outputs that grow while the statistics lag.
        eps: added to the variance, and to the mean square of a layer.
        momentum: 1 - a, the weight of one new sample in the running statistics; None: average of all samples.
        affine: weight and bias per channel.

    Raises:
        ValueError: momentum or backward_momentum outside [0, 1), an unknown compensation.
    """

    error_product: Tensor
    error_mean: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        backward_momentum: float = 1 / 128,
        compensation: Literal["layer_scaling", "clamp", "none"] = "layer_scaling",
        eps: float = 1e-5,
        momentum: float | None = 1 / 1024,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps, momentum, affine, device, dtype)
        for name, value in (("momentum", momentum), ("backward_momentum", backward_momentum)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"online: {name}={value}: it is the weight of one new sample, in [0, 1)")
        if compensation not in ("layer_scaling", "clamp", "none"):
            raise ValueError(f'online: compensation="{compensation}": "layer_scaling", "clamp" or "none"')
        self.backward_momentum, self.compensation = backward_momentum, compensation
        self._new_buffer("error_product", num_channels)
        self._new_buffer("error_mean", num_channels)

    def reset_running_stats(self) -> None:
        """As after construction: mean 0, variance 1, no sample seen, no errors."""
        super().reset_running_stats()
        self.error_product.zero_()
        self.error_mean.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if self.is_empty(x):
            return self.empty(x)
        count = self._check(x, 1)
        scaled = self.compensation == "layer_scaling"
        if self.training:
            self._refuse_transforms()
            x = own.lying(x)
            found = moments(x.detach())
            mean, var = (t.to(found[0].dtype) for t in self._take(*found, count))
            rstd = torch.rsqrt(var + self.eps)
            weight = torch.ones_like(rstd[0]) if self.weight is None else self.weight.to(rstd.dtype)
            bias = torch.zeros_like(rstd[0]) if self.bias is None else self.bias.to(rstd.dtype)
            errors = (self.error_product, self.error_mean)
            eps = self.eps if scaled else None
            z = _Controlled.apply(x, weight, bias, mean, rstd, found, errors, self.backward_momentum, eps)
        elif scaled:
            z = self._evaluate_scaled(x)
        else:
            z = evaluate(x, self.running_mean, self.running_var, self.weight, self.bias, self.num_channels, self.eps)
        return z.clamp(-5, 5) if self.compensation == "clamp" else z

    def _evaluate_scaled(self, x: Tensor) -> Tensor:
        """By the running statistics, and divided by the root mean square of each sample's layer."""
        kind = plain.table_type(x)
        # copied: training may move the statistics before the backward of this forward, which is to be by these
        before, spread = (t.to(kind, copy=True) for t in (self.running_mean, self.running_var))
        rstd = torch.rsqrt(spread + self.eps)

        def rule(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            """mean, var: (N, C)."""
            scale = rstd if weight is None else rstd * weight
            shift = -before * scale if bias is None else bias - before * scale
            mean, var = scale * mean + shift, scale.square() * var  # of the output, before it is scaled
            length = torch.rsqrt((var + mean.square()).mean(1, keepdim=True) + self.eps)
            return scale * length, shift * length

        return by_moments(x, rule, self.weight, self.bias)[0]

    @torch.no_grad()
    def _take(self, own_mean: Tensor, own_var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Move the running statistics by the samples' moments (N, C); mean and variance before each sample (N, C)."""
        seen = self.num_batches_tracked
        if self._recalibrated:
            mean = own_mean.mean(0)
            var = own_var.mean(0) + (own_mean - mean).square().mean(0)
            self.running_mean.copy_(mean)
            self.running_var.copy_(var * (count / max(count - 1, 1)))
            seen.add_(len(own_mean))
            return mean.expand_as(own_mean), var.expand_as(own_var)
        if self.momentum is None:
            number = torch.arange(1, len(own_mean) + 1, device=seen.device) + seen
            share = (1 / number.to(own_mean.dtype))[:, None]
        else:
            share = torch.full_like(own_mean[:, :1], self.momentum)
        # a sample that is not finite is passed over: it takes no share
        sound = (own_mean.abs() + own_var).to(self.running_var.dtype) < math.inf
        own_mean, own_var = torch.where(sound, own_mean, self.running_mean), torch.where(sound, own_var, 0)
        share = torch.where(sound, share, 0)
        # means relative to the start, so that nothing large is added up
        away = own_mean - self.running_mean
        before, last = _recurrence(torch.zeros_like(away[0]), 1 - share, share * away)
        spread = own_var + (1 - share) * (away - before).square()
        var, last_var = _recurrence(self.running_var, 1 - share, share * spread)
        mean = self.running_mean + before
        self.running_mean.add_(last)
        # means that are far apart may overflow where no variance does
        self.running_var.copy_(finite_or(last_var.to(self.running_var.dtype), self.running_var))
        seen.add_(len(own_mean))
        return mean, var

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward_momentum={self.backward_momentum}, {self.compensation}"


class _Controlled(torch.autograd.Function):
    """online's affine output, divided by its layer's root mean square or not, and the control process in its backward.

    Both are one linear function of x (and dy) per sample and channel, whose coefficients follow from the moments of
    each sample's channels alone. See OnlineNorm for the equations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
        moments: tuple[Tensor, Tensor],
        errors: tuple[Tensor, Tensor],
        gain: float,
        eps: float | None,
    ) -> Tensor:
        """mean, rstd and moments (own mean and biased variance of each sample): (N, C); eps None: no layer scaling."""
        own_mean, own_var = moments
        mean_y, var_y = (own_mean - mean) * rstd, own_var * rstd.square()
        ctx.save_for_backward(x, weight, bias, mean, rstd, mean_y, var_y)
        ctx.errors, ctx.gain, ctx.eps = errors, gain, eps
        scale, length = rstd * weight, _layer_scale(mean_y, var_y, weight, bias, eps)
        # a view could not be changed in place by an activation after it
        return affine(x, scale * length, torch.addcmul(bias, mean, scale, value=-1) * length).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, mean_y, var_y = ctx.saved_tensors
        dy, gain = grads[0], ctx.gain
        square_y = var_y + mean_y.square()
        length = _layer_scale(mean_y, var_y, weight, bias, ctx.eps)
        count = x.numel() // mean.numel()
        # means over positions of dz * y and dz, dz the gradient of the affine output z
        product, total = (t * (length / count) for t in own.sums(dy, x, mean))
        product = product * rstd
        pull = torch.zeros_like(length)
        if ctx.eps is not None:
            # dz = length * (dy - length * z * mean of dy * length * z)
            pull = length.square() * (weight * product + bias * total).mean(1, keepdim=True)
            product = product - pull * (weight * square_y + bias * mean_y)
            total = total - pull * (weight * mean_y + bias)
        d_weight, d_bias = product.sum(0) * count, total.sum(0) * count
        error_y, error_1 = ctx.errors
        # a sample whose sums the errors' type can not hold is passed over, so that the errors reach those after it
        sound = (square_y.abs() + product.abs() + total.abs() + mean_y.abs()).to(error_y.dtype) < math.inf
        none = torch.zeros_like(product)
        along_y, last_y = _recurrence(
            error_y, torch.where(sound, 1 - gain * square_y, 1), torch.where(sound, weight * product, none)
        )
        rest = rstd * (weight * total - gain * along_y * mean_y)
        along_1, last_1 = _recurrence(
            error_1, torch.where(sound, torch.full_like(rest, 1 - gain), 1), torch.where(sound, rest, none)
        )
        with torch.no_grad():
            for error, last in ((error_y, last_y), (error_1, last_1)):  # large finite samples overflow here
                error.copy_(finite_or(last.to(error.dtype), error))
        dx = None
        if ctx.needs_input_grad[0]:
            # rstd * (weight * dz - gain * along_y * y) - gain * along_1, in terms of dy and y, then of dy and x
            slope = -rstd * (weight.square() * pull + gain * along_y)
            offset = -rstd * weight * bias * pull - gain * along_1
            dx = own.blend(dy, x, rstd * weight * length, mean, slope * rstd, offset)
        return dx, d_weight, d_bias, None, None, None, None, None, None


def _layer_scale(mean_y: Tensor, var_y: Tensor, weight: Tensor, bias: Tensor, eps: float | None) -> Tensor:
    """1 / sqrt(mean over (C, H, W) of (y * weight + bias)^2 + eps) of each sample (N, 1), from moments of y (N, C).

    1 where eps is None: no layer scaling.
    """
    if eps is None:
        return torch.ones_like(mean_y[:, :1])
    square = var_y * weight.square() + torch.addcmul(bias, mean_y, weight).square()
    return torch.rsqrt(square.mean(1, keepdim=True) + eps)


def _recurrence(start: Tensor, keep: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """s_t = keep_t * s_(t-1) + new_t from s_0 = start: s_0 ... s_(N-1), and s_N.

    By doubling: after k rounds each row holds the last 2^k terms of its sum, so log N operations on whole tensors
    take the place of N on rows.

    Args:
        start: (C,).
        keep: (N, C) or (N, 1).
        new: (N, C).
    """
    s = torch.cat((start[None].to(new.dtype), new))
    keep = torch.cat((torch.zeros_like(new[:1]), keep.expand_as(new)))
    step = 1
    while step < len(s):
        s = torch.cat((s[:step], s[step:] + keep[step:] * s[:-step]))
        keep = torch.cat((keep[:step], keep[step:] * keep[:-step]))
        step *= 2
    return s[:-1], s[-1]
