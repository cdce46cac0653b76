"""bgn: mean and variance of groups of a sample's values, over the batch; Zhou et al. 2020, arXiv:2012.02782.

"Batch Group Normalization". Axes: N sample, C channel, H W (any number of) spatial positions, G group, D = C*H*W,
S = D / G.

From memory of the paper, not confirmed: that it keeps running statistics as BN does, and its table of G per batch size.
Deliberate differences: `num_groups="auto"` takes a divisor of C, so that it never depends on the resolution; the table
is continued to 1 image (G = 1) and beyond 128 (G = 512).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from norms.bases.batch_statistics import BatchStatistics
from norms.channels import Reading
from norms.registry import register

PAPER_GROUPS = {1: 1, 2: 1, 4: 2, 8: 16, 16: 64, 32: 128, 64: 256, 128: 512}
"""Images per worker -> G on ImageNet, by the BGN paper (the entry for 1 is ours)."""


def bgn_groups(norm_batch_size: int) -> int:
    """The paper's G for a norm batch of this many images: the table's entry, or the next smaller one.

    Raises:
        ValueError: fewer than one image.
    """
    if norm_batch_size < 1:
        raise ValueError(f"norm_batch_size={norm_batch_size}: a norm batch has at least 1 image")
    return PAPER_GROUPS[max(size for size in PAPER_GROUPS if size <= norm_batch_size)]


MOST_AXES = 4
"""Spatial axes that bgn can keep the trained size of."""

ONE = 2**40
"""A size of 1 in bgn's buffer: far from the whole numbers that an average of buffers rounds to."""


@register(
    name="bgn",
    source="Zhou et al. 2020, arXiv:2012.02782",
    mixes_samples=True,
    keeps_stats=True,
    axes="NCHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class BatchGroupNorm(BatchStatistics):
    """Batch group normalization: statistics over the batch and over a group of a sample's D = C*H*W values.

        xg = x as (N, G, S), channel-major      mean_g, var_g over (N, S), biased
        y  = (xg - mean_g) / sqrt(var_g + eps), as (N, C, H, W), * weight_c + bias_c

    G = C is exactly bn; a batch of one with G dividing C has gn's training output; G = 1 is ln pooled over the batch.
    G > C cuts channels: the layer is then tied to the input size that it was trained at.

    Args:
        num_channels: C.
        num_groups: G, taken exactly; "paper": `bgn_groups(norm_batch_size)`, taken exactly; "auto": the largest divisor
            of C not above that.
        norm_batch_size: images that share statistics; a run fills it in.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: average of all batches.
        affine: weight and bias per channel.

    Attributes:
        num_groups: the resolved G.
        trained_size: the spatial size that running statistics belong to where G does not divide C, else None. Kept in
            the buffer `trained_shape`, so that copies and averages of a network have it, too: the sizes, padded with
            zeros, and a 1 after them, all times ONE; zeros before training. An average with zeros, or a rounded one,
            has the same ratios.

    Raises:
        ValueError: "auto" or "paper" without norm_batch_size, G < 1; (forward) D is not a multiple of G, fewer than two
            values per statistic in training; where G does not divide C a size other than the trained one (a compiled
            layer: RuntimeError), or more than MOST_AXES spatial axes.
    """

    trained_shape: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        num_groups: int | Literal["auto", "paper"] = "auto",
        norm_batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if isinstance(num_groups, str):
            if num_groups not in ("auto", "paper"):
                raise ValueError(f'bgn: num_groups="{num_groups}": an integer, "auto" or "paper"')
            if norm_batch_size is None:
                raise ValueError(
                    f'bgn: num_groups="{num_groups}" follows from the norm batch; give norm_batch_size (a run fills it '
                    "in) or an integer num_groups"
                )
            rule = bgn_groups(norm_batch_size)
            if num_groups == "auto":
                rule = max(g for g in range(1, min(rule, max(num_channels, 1)) + 1) if num_channels % g == 0)
            num_groups = rule
        if num_groups < 1:
            raise ValueError(f"bgn: num_groups={num_groups}: at least 1 is needed")
        super().__init__(num_channels, num_groups, eps, momentum, affine, device, dtype)
        self.norm_batch_size = norm_batch_size
        if num_channels % num_groups:
            self.register_buffer("trained_shape", torch.zeros(MOST_AXES + 1, device=device, dtype=torch.long))
        self._reading = Reading()

    @property
    def trained_size(self) -> tuple[int, ...] | None:
        """See the class."""
        shape = self._reading(self.trained_shape) if self.num_channels % self.num_groups else None
        if not shape or not shape[-1]:
            return None
        return tuple(round(side / shape[-1]) for side in shape[:-1] if side)

    @property
    def equivalent_to(self) -> str | None:
        """The registered norm that this layer equals: "bn" where G = C, else None."""
        return "bn" if self.num_groups == self.num_channels else None

    def reset_running_stats(self) -> None:
        """As after construction: mean 0, variance 1, no batch and no size seen."""
        super().reset_running_stats()
        if self.num_channels % self.num_groups:
            self.trained_shape.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        old = state_dict.pop(prefix + "_extra_state", None)  # where versions before 0.6 kept the size
        if isinstance(old, Tensor) and self.num_channels % self.num_groups and len(old) <= MOST_AXES:
            shape = torch.zeros(MOST_AXES + 1, dtype=torch.long)
            shape[: len(old)] = old * ONE
            shape[-1] = ONE * bool(len(old))
            state_dict.setdefault(prefix + "trained_shape", shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_size(self, x: Tensor) -> None:
        values, size = math.prod(x.shape[1:]), tuple(x.shape[2:])
        if values % self.num_groups:
            valid = [g for i in range(1, math.isqrt(values) + 1) if values % i == 0 for g in (i, values // i)]
            near = min(valid, key=lambda g: (abs(g - self.num_groups), g))
            raise ValueError(
                f"bgn: num_groups={self.num_groups} does not divide the {values} values of a sample "
                f"{tuple(x.shape[1:])}; the nearest valid number is {near}"
            )
        if not self.num_channels % self.num_groups:
            return
        if len(size) > MOST_AXES:
            raise ValueError(
                f"bgn: num_groups={self.num_groups} does not divide {self.num_channels} channels; then at most "
                f"{MOST_AXES} spatial axes are known, given x of shape {tuple(x.shape)}"
            )
        why = (
            f"bgn: num_groups={self.num_groups} does not divide {self.num_channels} channels, so its running "
            "statistics belong to positions of the trained size"
        )
        if torch.compiler.is_compiling():
            # values can not be looked at while a graph is made, so the graph is to look
            one = self.trained_shape[-1]
            new = torch.stack([one * side for side in size])
            off = (self.trained_shape[: len(size)] - new).abs()
            torch._assert_async((2 * off <= one).all(), f"{why}, which x has not")
        elif self.trained_size not in (None, size):
            raise ValueError(
                f"{why} {self.trained_size}; given {size}. Call reset_running_stats() to start over at another size"
            )

    def _trained_at(self, x: Tensor) -> None:
        if self.num_channels % self.num_groups and (torch.compiler.is_compiling() or self.trained_size is None):
            with torch.no_grad():
                for axis, side in enumerate(x.shape[2:]):
                    self.trained_shape[axis].fill_(side * ONE)
                self.trained_shape[-1].fill_(ONE)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"
