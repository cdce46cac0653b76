"""Base class of norms that normalize by the statistics of the batch and keep running ones: bn, bgn and their kin.

    y = (x - mean) / sqrt(var + eps) * weight_c + bias_c        biased variance

Training uses the batch's statistics and moves running ones (unbiased variance); evaluation uses those.
`situation(net, slices=K)` makes a batch K norm batches, norm batch k being x[k::K], computed in one call
(norms.kernels.grouping). Statistics are float32 or better for every input type.

Axes: N sample, C channel, * any number of spatial positions, G group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norms.bases.running_statistics import RunningStatistics
from norms.channels import PerChannel, check_arguments
from norms.kernels.grouping import evaluate, normalize
from norms.situation import check_slices


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
