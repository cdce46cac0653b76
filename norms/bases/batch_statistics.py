"""Base class of norms that normalize by the statistics of the batch and keep running ones: bn, bgn and their kin.

    y = (x - mean) / sqrt(var + eps) * weight_c + bias_c        biased variance

Training uses the batch's statistics and moves running ones (unbiased variance); evaluation uses those.
`situation(net, slices=K)` makes a batch K norm batches, norm batch k being x[k::K], computed in one call
(norms.kernels.grouping). Statistics are float32 or better for every input type.

Axes: N sample, C channel, * any number of spatial positions, G group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from norms.bases.running_statistics import RunningStatistics
from norms.channels import PerChannel, check_arguments
from norms.kernels.grouping import evaluate, normalize
from norms.kernels.moments import pooled, union_of_workers
from norms.kernels.plain import table_type
from norms.situation import check_slices
from norms.workers import enough


class BatchStatistics(PerChannel, RunningStatistics):
    """Statistics of the batch per group of a sample's values; bn is the case of one group per channel."""

    syncs = True

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        check_arguments(eps=eps, num_channels=num_channels)
        super().__init__(num_groups, momentum, device, dtype)
        self.add_channels(num_channels, eps, affine, device, dtype)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape and dtype.

        Raises:
            ValueError: another number of channels, a batch that the slices do not divide, fewer than two values per
                statistic in training; bgn: a size that G does not divide, or that differs from training.
        """
        if self.is_empty(x) and self.merging is None:
            if self.training and self.situation.workers is not None:
                self._trained_at(x)  # as the others do, whose parts are not empty
            return self.empty(x)
        self._check_size(x)
        if not self.training:
            return evaluate(x, self.running_mean, self.running_var, self.weight, self.bias, self.num_groups, self.eps)
        slices = self.situation.slices
        count = self.values(x, slices)
        self._trained_at(x)
        return self._normalized(x, self.weight, self.bias, slices, count)

    def train_on(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, slices: int = 1) -> Tensor:
        """Normalize by the batch's statistics, track them, and apply a given affine in place of the layer's own.

        Args:
            x: (N, C, *).
            weight: (C,), and bias likewise; or both None.
            slices: number of norm batches in x.
        """
        return self._normalized(x, weight, bias, slices, self.values(x, slices))

    def _normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, slices: int, count: int) -> Tensor:
        y, mean, var = normalize(x, weight, bias, self.num_groups, slices, self.eps, self.merging)
        self.track(mean, var, count)
        return y

    def values(self, x: Tensor, slices: int = 1) -> int:
        """The number of values that enter one statistic in training; where workers merge theirs, of this one.

        Raises:
            ValueError: there is one only, or `slices` does not divide N. Where workers merge theirs, whoever merges
                them finds that out.
        """
        count = check_slices(x, slices) * math.prod(x.shape[1:]) // self.num_groups
        if count < 2 and self.merging is None:
            what = "channel" if self.num_groups == self.num_channels else "group"
            raise ValueError(
                f"Expected more than 1 value per {what} when training, given {count} from x of shape "
                f"{tuple(x.shape)} in {slices} norm batch(es)"
            )
        return count

    def _check_size(self, x: Tensor) -> None:
        """Refuse a size that this layer can not serve."""

    def _trained_at(self, x: Tensor) -> None:
        """Note the size that the running statistics belong to."""

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}"


class BatchMoments:
    """The part of a norm batch's moments in a layer whose coefficients are per sample: a rule of `by_moments`.

        moments = BatchMoments(layer, x)
        by_moments(x, rule)         # rule(mean, var, ...) calls moments(mean, var)
        moments.track()             # the running statistics, after the forward

    In training these are the moments of each norm batch, or of all workers together; in evaluation the running ones.

    Args:
        layer: which keeps statistics per channel.
        x: (N, C, *), its input.

    Raises:
        ValueError: fewer than two values per channel in training, or slices that do not divide N.
    """

    def __init__(self, layer: BatchStatistics, x: Tensor):
        self.layer, self.merging = layer, layer.merging
        self.slices = layer.situation.slices if layer.training else 1
        self.images, self.positions = check_slices(x, self.slices), math.prod(x.shape[2:])
        self.found: tuple[Tensor, Tensor, Any] | None = None
        if layer.training:
            self.count = layer.values(x, self.slices)
        else:
            # copied: training may move the statistics before the backward of this forward, which is to be by these
            kind = table_type(x)
            self.running = layer.running_mean.to(kind, copy=True), layer.running_var.to(kind, copy=True)

    def per_sample(self, table: Tensor) -> Tensor:
        """(N, C) as (M, K, C): sample n is in norm batch n % K."""
        return table.reshape(self.images, self.slices, table.shape[-1])

    def __call__(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (K, C), of norm batches, from those of samples (N, C); in evaluation (C,)."""
        if not self.layer.training:
            return self.running
        if self.merging is not None:
            union_mean, union_var, images = union_of_workers(mean, var, self.merging)
            total: Any = images * self.positions
        else:
            (union_mean, union_var), total = pooled(mean, var, self.slices), self.count
        if self.found is None:
            self.found = union_mean.detach(), union_var.detach(), total
        return union_mean, union_var

    def track(self) -> None:
        """Move the running statistics, in training."""
        if self.found is None:
            return
        mean, var, total = self.found
        if self.merging is not None:
            enough(self.count, total, self.merging)
        self.layer.track(mean, var * (total / (total - 1)), self.count)
