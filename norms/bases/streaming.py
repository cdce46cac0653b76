"""Base class of norms that normalize training by statistics of more than the batch: brn, mabn, online.

None of their backward passes is the derivative of the forward: statistics of other batches are constants, and mabn and
online put statistics of earlier gradients in the place of the batch's. What the backward keeps, it writes into the
buffers that its forward saw, so that a forward inside `hold` never moves the layer's own, whenever its backward comes.
Second derivatives, where they are asked for, hold all statistics fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norms.bases.running_statistics import RunningStatistics
from norms.channels import PerChannel, check_arguments, transformed


class Streaming(PerChannel, RunningStatistics):
    """A norm with C channels, eps, an affine per channel, and running statistics of size C."""

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
