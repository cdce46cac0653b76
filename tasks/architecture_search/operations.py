"""The candidate operations of the DARTS space (Liu et al. 2019, appendix A.1.1), and their weighted mixture.

Every operation maps (N, C, H, W) to (N, C, H / stride, W / stride). Convolutions are relu -> conv -> norm; separable
ones do that twice, and nothing has a bias. In search the norms have no affine, since a scale would hide the mixing
weight, and one more norm follows each pooling.

Difference to the published code: the two halves of `FactorizedReduce` share one weight tensor, cut in the middle, so
that a norm which asks for its convolution's weight gets it (in a derived network: the search network has norms after
poolings, where there is no such weight). The number of parameters is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.factory import NormFactory
from tasks.architecture_search.genotype import CHOICES
from tasks.nets.blocks import ConvNormAct, conv_norm_act

Device = torch.device | str | None


class ReLUConvNorm(nn.Sequential):
    """norm(conv1x1(relu(x))): (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: NormFactory, affine: bool, device: Device = None):
        super().__init__(
            nn.ReLU(),
            conv_norm_act(in_channels, out_channels, 1, norm=norm, activation=None, affine=affine, device=device),
        )


class FactorizedReduce(nn.Sequential):
    """norm([conv1x1(z), conv1x1(z shifted by one pixel)]) with stride 2 and z = relu(x).

    (N, C_in, H, W) -> (N, C_out, H / 2, W / 2); H and W are even. Half of the output channels see the pixels that the
    others leave out.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: NormFactory, affine: bool, device: Device = None):
        conv = nn.Conv2d(in_channels, out_channels, 1, 2, bias=False, device=device)
        super().__init__(nn.ReLU(), _TwoHalves(conv, norm(out_channels, affine=affine, device=device), None))


class _TwoHalves(ConvNormAct):
    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"a reduction halves both sides of a map, so they must be even; given {tuple(x.shape)}")
        one, two = weight.tensor_split(2)
        return torch.cat([F.conv2d(x, one, stride=2), F.conv2d(x[:, :, 1:, 1:], two, stride=2)], dim=1)


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, device: Device) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False, device=device)


def operation(
    name: str, channels: int, stride: int, *, norm: NormFactory, affine: bool, device: Device = None
) -> nn.Module:
    """One operation on C channels.

    Args:
        name: one of genotype.CHOICES.
        channels: C.
        stride: 1 or 2.
        norm: a factory from `make_norm`.
        affine: of its norms. False is the search network, where poolings are followed by a norm.
        device: of all parameters and buffers.

    Raises:
        ValueError: what the norm refuses.
    """

    def pointwise() -> ConvNormAct:
        return conv_norm_act(channels, channels, 1, norm=norm, activation=None, affine=affine, device=device)

    def filtered(kernel: int, dilation: int = 1, stride: int = stride) -> tuple[nn.Module, ...]:
        return nn.ReLU(), _depthwise(channels, kernel, stride, dilation, device), pointwise()

    kind, _, size = name.rpartition("_")
    kernel = int(size[0]) if size in ("3x3", "5x5") else 0
    if kind == "sep_conv":
        return nn.Sequential(*filtered(kernel), *filtered(kernel, stride=1))
    if kind == "dil_conv":
        return nn.Sequential(*filtered(kernel, dilation=2))
    if name == "skip_connect":
        if stride == 1:
            return nn.Identity()
        return FactorizedReduce(channels, channels, norm=norm, affine=affine, device=device)
    pool = nn.MaxPool2d(3, stride, 1) if kind == "max_pool" else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    return pool if affine else nn.Sequential(pool, norm(channels, affine=False, device=device))


class MixedOperation(nn.Module):
    """sum_o weight_o * o(x) over all candidates; `none` adds nothing, so it is not computed.

    The relu with which every convolution begins is the caller's, who has one x for several edges: it is computed once
    per state of a cell and not once per operation (7 % of a search step's time, bn, channels_last, CPU).

    Args:
        channels: C.
        stride: of every candidate.
        norm: a factory from `make_norm`; the norms have no affine.
        device: of all parameters and buffers.
    """

    def __init__(self, channels: int, stride: int, *, norm: NormFactory, device: Device = None):
        super().__init__()
        self.candidates = nn.ModuleList()
        self.takes_relu: list[bool] = []
        for name in CHOICES:
            candidate = operation(name, channels, stride, norm=norm, affine=False, device=device)
            first, *rest = candidate.children() if isinstance(candidate, nn.Sequential) else (candidate,)
            self.takes_relu.append(isinstance(first, nn.ReLU))
            self.candidates.append(nn.Sequential(*rest) if isinstance(first, nn.ReLU) else candidate)

    def forward(self, x: Tensor, positive: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The mixture (N, C, H / stride, W / stride).

        Args:
            x: (N, C, H, W).
            positive: relu(x).
            weights: one scalar per genotype.OPERATIONS.
        """
        terms = [
            weight * candidate(positive if takes_relu else x)
            for weight, candidate, takes_relu in zip(weights[1:], self.candidates, self.takes_relu, strict=True)
        ]
        return sum(terms[1:], terms[0])
