"""What every layer here has of its C channels, whatever its statistics: an affine, and inputs that it refuses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from norms.registry import Situation


class PerChannel(nn.Module):
    """A module for x (N, C, *). It has no constructor of its own, so that it stands before any other base class.

    Attributes:
        num_channels: C.
        eps: added to the variance.
        weight: ones, (C,), or (D, C) where each of D domains has its own; None without affine. `bias` likewise, zeros.
        situation: what the forward takes place in (norms.situation).
    """

    situation: Situation = Situation()
    num_channels: int
    eps: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def add_channels(
        self,
        num_channels: int,
        eps: float,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        num_domains: int | None = None,
    ) -> None:
        """Set the attributes; with `num_domains` the affine is (D, C). To be called after the module's __init__."""
        self.num_channels, self.eps = num_channels, eps
        shape = (num_channels,) if num_domains is None else (num_domains, num_channels)
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            start = nn.Parameter(torch.full(shape, value, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, start)

    def check_channels(self, x: Tensor) -> None:
        """ValueError where x is not (N, C, *)."""
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"{type(self).__name__} for {self.num_channels} channels: x must be (N, {self.num_channels}, *), "
                f"given {tuple(x.shape)}"
            )

    def check_groups(self, num_groups: int) -> None:
        """ValueError where the channels can not be cut into so many equal groups."""
        if num_groups < 1 or self.num_channels % num_groups:
            divisors = ", ".join(str(g) for g in range(1, self.num_channels + 1) if self.num_channels % g == 0)
            raise ValueError(
                f"num_groups={num_groups} does not divide {self.num_channels} channels; allowed: {divisors}"
            )


def check_arguments(*, eps: float | None = None, **counts: int) -> None:
    """ValueError, by the argument's name, where a count is below 1 or eps is not positive.

    To be called before the module's __init__: what torch says of a tensor of negative size names no argument.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: at least 1 is needed")
    if eps is not None and eps <= 0:
        raise ValueError(f"eps={eps}: it must be positive")


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last (2 spatial dimensions), channels_last_3d (3) where x is so and not contiguous; else contiguous."""
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format
