"""Normalization of the channels at each position: pn, layer2d, rms.

    y_c = (x_c - mean) / sqrt(var + eps) * weight_c + bias_c        centred: mean and variance over c
    y_c = x_c / sqrt(mean_c x_c^2 + eps) * weight_c + bias_c        root mean square

One pass over memory each way: the values of a position are read again from the cache. Saved for the backward is x
alone; the moments are computed again there.

Axes: N sample, C channel, * any number of spatial positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.channels import memory_format, transformed
from norms.kernels import native, plain


def normalize_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool = True,
    unbiased: bool = False,
) -> Tensor:
    """Normalize over the channels at each position. Differentiable, twice.

    Right at large means, too: the variance is of values from which one near their mean is subtracted.

    Args:
        x: (N, C, *) floating-point, in any memory layout; no sample, too.
        weight: (C,), and bias likewise, in any floating-point type; or both None.
        eps: added to the variance.
        centred: the mean is subtracted; False: it is taken for 0.
        unbiased: the variance divides by C - 1, with C at least 2; False: by C. Only where it is centred.

    Returns:
        y: as x, in its type and memory layout (contiguous, where x is neither that nor has its channels innermost).
    """
    ready = native.ready(x)
    kind = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(kind) for p in (weight, bias))
    if ready is not None:
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        return _Rows.apply(ready, weight, bias, eps, centred, unbiased)
    if transformed():  # there torch's kernels give wrong second derivatives, without a word
        return _plain(x, weight, bias, eps, centred, unbiased)
    return _by_torch(x, weight, bias, eps, centred, unbiased)


class _Rows(torch.autograd.Function):
    # One method, no setup_context: with it every call inspects a signature, 70 us.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, unbiased: bool
    ) -> Tensor:
        ctx.options = eps, centred, unbiased
        ctx.save_for_backward(x, weight, bias)
        return native.rows(x, weight, bias, eps, centred, unbiased)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        eps, centred, unbiased = ctx.options
        if plain.serves_gradient(*grads):
            with torch.enable_grad():
                y = _plain(x, weight, bias, eps, centred, unbiased)
            found = plain.gradients((y,), (x, weight, bias), grads, again=torch.is_grad_enabled())
            return (*found, None, None, None)
        wanted = ctx.needs_input_grad
        parameters = any(wanted[1:3])
        found = native.rows_backward(grads[0], x, weight, eps, centred, unbiased, wanted[0], parameters)
        return (*found, None, None, None)


def _by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, unbiased: bool
) -> Tensor:
    """By torch's kernels, a third of the time of single operations."""
    wide, channels = plain.wide(x), x.shape[1]
    values = wide.movedim(1, -1)
    if centred:
        if unbiased:  # the kernel takes the biased variance
            biased = (channels - 1) / channels
            eps = eps * biased
            weight = (x.new_ones(channels, dtype=wide.dtype) if weight is None else weight) * math.sqrt(biased)
        y = F.layer_norm(values, (channels,), weight, bias, eps)
    else:
        y = F.rms_norm(values, (channels,), weight, eps)
        y = y if bias is None else y + bias
    return y.movedim(-1, 1).to(x.dtype).contiguous(memory_format=memory_format(x))


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, unbiased: bool) -> Tensor:
    """In differentiable operations."""
    values = plain.wide(x)
    if centred:
        values = values - values.mean(1, keepdim=True)
    divisor = x.shape[1] - 1 if unbiased else x.shape[1]
    y = values * torch.rsqrt(values.square().sum(1, keepdim=True) / divisor + eps)
    shape = (-1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))
