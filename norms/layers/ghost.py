"""ghost: bn on sub-batches of a norm batch; Hoffer et al. 2017, arXiv:1705.08741."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norms.kernels import affine, moments
from norms.kernels.grouping import normalize
from norms.kernels.moments import moments_of_sets
from norms.layers.bn import BatchNorm
from norms.registry import register
from norms.situation import check_slices
from norms.workers import Workers


@register(
    name="ghost",
    source="Hoffer et al. 2017, arXiv:1705.08741",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class GhostBatchNorm(BatchNorm):
    """Ghost batch normalization: bn on virtual sub-batches, with one set of running statistics.

        y = (x - mean_bc) / sqrt(var_bc + eps) * weight_c + bias_c        mean, var of channel c over sub-batch b

    A batch of N images is cut into B = N // ghost_batch_size sub-batches (at least 1), of which number b is x[b::B]:
    none is smaller than asked for, and where there is a remainder, their sizes differ by one at most. Running
    statistics move as if they had come one after the other, which is the paper's weighted update. A batch of less than
    two sub-batches is one whole, and the layer is then bn.

    The official code takes chunks of consecutive images of a shuffled batch. There it makes no difference; but a batch
    that is sorted, by class or by domain, would be normalized class by class or domain by domain.

    A sub-batch is a part of a norm batch: of slice k, x[k::K], where `situation` says K slices.

    Args:
        num_channels: C.
        ghost_batch_size: images in a sub-batch.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all sub-batches.
        affine: weight and bias per channel.

    Raises:
        ValueError: a sub-batch of less than one image; (forward, training) one value per channel of a sub-batch.
    """

    tracks_parts = True
    syncs = True

    def __init__(
        self,
        num_channels: int,
        *,
        ghost_batch_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        if ghost_batch_size < 1:
            raise ValueError(f"ghost: ghost_batch_size={ghost_batch_size}: a sub-batch has at least 1 image")
        self.ghost_batch_size = ghost_batch_size

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        if self.merging is not None:
            self.check_channels(x)
            return self._together(x, self.merging)
        if self.is_empty(x):
            return self.empty(x)
        slices = self.situation.slices
        images = check_slices(x, slices)
        # norm batch k is x[k::K], and its sub-batch b is x[k + K b :: K B]
        parts = max(1, images // self.ghost_batch_size)
        count = self.values(x[: images // parts])
        y, mean, var = normalize(x, self.weight, self.bias, self.num_channels, parts * slices, self.eps)
        longer = images % parts  # the first sub-batches of each norm batch have one image more
        mean, var = (t.view(parts, slices, -1).transpose(0, 1) for t in (mean, var))  # in the order of norm batches
        if not longer:
            self.track(mean.flatten(0, 1), var.flatten(0, 1), count)
            return y
        more = count // (images // parts) * (images // parts + 1)
        for means, variances in zip(mean, var, strict=True):
            self.track(means[:longer], variances[:longer], more)
            self.track(means[longer:], variances[longer:], count)
        return y

    def _together(self, x: Tensor, workers: Workers) -> Tensor:
        """Training on x[r::W] of all workers' batch: a sample's sub-batch follows from its place in the whole."""
        images = int(workers.total(torch.tensor(x.shape[0], device=x.device)))
        parts = max(1, images // self.ghost_batch_size)
        positions = math.prod(x.shape[2:])
        if images // parts * positions < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, given {images // parts * positions} in a "
                f"sub-batch of {images} images of all {workers.size} workers"
            )
        where = workers.places(x.shape[0], images, x.device) % parts
        mean, var, held = moments_of_sets(*moments(x), where, parts, workers)
        count = (held * positions)[:, None]
        self.track(mean.detach(), var.detach() * (count / (count - 1)), images // parts * positions)
        scale = torch.rsqrt(var + self.eps) if self.weight is None else torch.rsqrt(var + self.eps) * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return affine(x, scale[where], shift[where])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"
