"""Mean and biased variance: per sample and channel, of the batch, of sets of samples, and of earlier batches.

Axes: N sample, C channel, K row of a table (samples that share a statistic), B batch of the past.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norms.kernels import native, plain
from norms.workers import Workers


def moments(x: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x (N, C, *) per sample and channel, or per channel of several samples.

    Differentiable, twice. Right at large means, too: sums are of values around one that is near their mean.

    Args:
        x: floating-point, in any memory layout.
        rows: K, a divisor of N: sample n counts in row n % K, which is how a batch is K norm batches
            (norms.situation); 1: the whole batch. None: N, every sample by itself.

    Returns:
        mean, var: (K, C), in float64 (float32 on a device that has no other), so that algebra on them loses nothing.

    Raises:
        ValueError: x is not (N, C, *) or holds no floating-point numbers, or K does not divide N.
    """
    rows = checked_rows(x, rows)
    given = native.ready(x)
    return plain.moments(x, rows) if given is None else _Moments.apply(given, rows)


def checked_rows(x: Tensor, rows: int | None) -> int:
    """`rows`, or N where that is None; ValueError where x or they are of another kind than `moments` says."""
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"floating-point x (N, C, *) is needed, given {x.dtype} of shape {tuple(x.shape)}")
    if rows is None:
        return x.shape[0]
    if rows != x.shape[0] and (rows < 1 or x.shape[0] % rows):  # no samples: no rows
        raise ValueError(f"rows={rows}: a divisor of the {x.shape[0]} samples is needed")
    return rows


class _Moments(torch.autograd.Function):
    # One method, no setup_context: with it every call inspects a signature, 70 us.
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        mean, var = native.moments(x, rows)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        x, mean = ctx.saved_tensors
        if plain.serves_gradient(*grads):
            with torch.enable_grad():
                found = plain.moments(x, len(mean))
            return plain.gradients(found, (x,), grads, again=torch.is_grad_enabled())[0], None
        d_mean, d_var = (g.resolve_neg().contiguous() for g in grads)
        return native.blend(None, x, None, moments=(mean, d_mean, d_var)), None


def batch_moments(x: Tensor, workers: Workers | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, *) over samples and positions, with gradient, in float32 or better.

    With `workers` those of all their values; x may then be empty.
    """
    mean, var = (t[0] for t in moments(x, 1))
    if workers is not None:
        mean, var, _ = workers.merge(mean, var, x.numel() // max(1, x.shape[1]))
    wide = torch.promote_types(x.dtype, torch.float32)
    return mean.to(wide), var.to(wide)


def pooled(mean: Tensor, var: Tensor, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C) of the rows n % K of a table (N, C), each of equally many values.

    By Chan's formula, so that nothing large is subtracted; with gradient.

    Args:
        mean: (N, C), and var likewise, biased.
        rows: K, a divisor of N; 1: all rows together.
    """
    mean, var = (t.reshape(-1, rows, t.shape[1]) for t in (mean, var))
    spread, union = torch.var_mean(mean, 0, correction=0)
    return union, var.mean(0) + spread


def of_groups(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, G, 1) of groups of channels, from the moments (N, C) of equally many values each.

    By Chan's formula, so that nothing large is subtracted; with gradient.
    """
    mean, var = (t.view(t.shape[0], groups, -1) for t in (mean, var))
    union = mean.mean(2, keepdim=True)
    return union, (var + (mean - union).square()).mean(2, keepdim=True)


def union_of_workers(mean: Tensor, var: Tensor, workers: Workers) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (1, *) of all samples of all workers, with gradient, and the number of samples ().

    Args:
        mean: (M, *) of each sample's equally many values, M from 0.
        var: (M, *) likewise, biased.
        workers: all of which call this.
    """
    if len(mean):
        union = mean.mean(0, keepdim=True)
        spread = var.mean(0, keepdim=True) + (mean - union).square().mean(0, keepdim=True)
    else:
        union, spread = mean.sum(0, keepdim=True), var.sum(0, keepdim=True)
    return workers.merge(union, spread, len(mean))


def moments_of_sets(
    mean: Tensor, var: Tensor, where: Tensor, sets: int, workers: Workers | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (E, C) of E sets of samples, with gradient, and the number of samples (E,) of each.

    Without asking which samples belong to which: sums are a matrix product. Moments of a set follow from those of its
    samples by Chan's formula, so no large sums are subtracted. A set of no sample has zeros.

    Args:
        mean: (N, C) of each sample's equally many values, and var likewise, biased, in float32 or better.
        where: (N,), the set of each sample.
        sets: E.
        workers: whose samples are in the sets, too.
    """
    member = (where[:, None] == torch.arange(sets, device=mean.device)).to(mean.dtype)  # (N, E)
    images = member.sum(0)
    share = (member / images.clamp(min=1)).T  # (E, N): the mean over the samples of a set
    # autocast would take products in 16 bits; the meta device has none
    exact = contextlib.nullcontext() if mean.is_meta else torch.autocast(mean.device.type, enabled=False)
    with exact:
        union = share @ mean
        spread = share @ (var + (mean - union[where]).square())
    if workers is not None:
        union, spread, total = workers.merge(union, spread, images[:, None])
        images = total[:, 0]
    return union, spread, images


class Past(NamedTuple):
    """Earlier batches as one, without gradient."""

    total: Tensor  # (C,) or (1,), their weight, where the batch itself has 1
    mean: Tensor  # (C,)
    var: Tensor  # (C,)

    @classmethod
    def of(cls, means: Tensor, variances: Tensor, weights: Tensor) -> Past:
        """means, variances: (B, C); weights: (B, C) or (B, 1), all zero where there is nothing."""
        total = weights.sum(0)
        share = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
        mean = (share * means).sum(0)
        return cls(total, mean, (share * (variances + (means - mean).square())).sum(0))

    def joined_by(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """M - mean and V, both (C,), of these together with the batch's mean and var (C,)."""
        share = self.total / (1 + self.total)
        step = self.mean - mean
        return share * step, (1 - share) * var + share * (self.var + (1 - share) * step.square())
