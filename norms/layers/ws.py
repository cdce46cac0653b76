"""Norms whose convolution's weight is standardized first: ws_gn, ws_bn.

    ws_gn  gn of a convolution with standardized weights    Qiao et al. 2019, arXiv:1903.10520
    ws_bn  bn of one                                        the same

    W' = (W - mean) / (std + 1e-5)        per output filter, std unbiased, both over (C_in / groups, kernel)

Axes of W: O output filter, then input channels and kernel. The caller convolves with `transform_weight(W)` and hands
over the result; the gradient of W goes through the standardization. Where no convolution directly precedes the norm
(after a pooling in a search network) nothing is standardized, and the layer is plain gn or bn.

As in the official code the 1e-5 is added to the standard deviation and not inside a root, and weights of a convolution
without a norm after it are left alone. W' is computed in float32 or better and has W's type.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from norms.layers.bn import BatchNorm
from norms.layers.gn import GroupNorm
from norms.registry import register

WEIGHT_EPS = 1e-5


@fx.wrap  # one step of a graph that torch.fx traces, which could not follow a branch on the shape
def standardized(weight: Tensor) -> Tensor:
    """(W - mean) / (std + 1e-5) of each output filter: weight (O, C_in / groups, *) -> the same shape and type.

    A constant filter becomes zero.

    Raises:
        ValueError: a filter of one weight (a depthwise 1x1 convolution), which has no standard deviation.
    """
    over = tuple(range(1, weight.dim()))
    if weight.shape[1:].numel() < 2:
        raise ValueError(
            f"weight standardization: more than one weight per output filter is needed, given a convolution's "
            f"weight of shape {tuple(weight.shape)}"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    centred = wide - wide.mean(dim=over, keepdim=True)
    return (centred / (centred.std(dim=over, keepdim=True) + WEIGHT_EPS)).to(weight.dtype)


class _StandardizedWeight(nn.Module):
    def transform_weight(self, weight: Tensor) -> Tensor:
        """The convolution's weight, standardized; see `standardized`."""
        return standardized(weight)


@register(
    name="ws_gn",
    source="Qiao et al. 2019, arXiv:1903.10520",
    mixes_samples=False,
    keeps_stats=False,
    axes="CHW",
    variance="biased",
)
class WeightStandardizedGroupNorm(_StandardizedWeight, GroupNorm):
    """Group normalization of a convolution whose weights are standardized per output filter.

        y = gn(conv(x, W')),  W' = (W - mean) / (std + 1e-5)

    Arguments and errors of `norms.layers.gn.GroupNorm`. Called as norm(y) with y already convolved with W'; plain
    gn where no convolution precedes it.
    """


@register(
    name="ws_bn",
    source="Qiao et al. 2019, arXiv:1903.10520",
    mixes_samples=True,
    keeps_stats=True,
    axes="NHW",
    slices_at_once=True,
    variance="biased",
    running_variance="unbiased",
)
class WeightStandardizedBatchNorm(_StandardizedWeight, BatchNorm):
    """Batch normalization of a convolution whose weights are standardized per output filter.

        y = bn(conv(x, W')),  W' = (W - mean) / (std + 1e-5)

    Arguments and errors of `norms.layers.bn.BatchNorm`. Called as norm(y) with y already convolved with W'; plain bn
    where no convolution precedes it.
    """
