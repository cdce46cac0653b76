"""Convolution, norm and activation in one block; no other module pairs them.

Axis letters: N samples, C channels, H and W space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.factory import NormFactory, factory_info
from norms.protocol import MakeRoom, NormInfo, TransformWeight, hook


class ConvNormAct(nn.Module):
    """activation(norm(conv(x))): x (N, C_in, H, W) -> (N, C_out, H', W'). Build it with `conv_norm_act`.

    The convolution's weight first goes through `norm.transform_weight` where the norm has one, and reaches the norm as
    `norm(y, weight=w)` where its info says so. It is passed by call and never stored: a cloned network would see the
    stale one.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, activation: nn.Module | None):
        super().__init__()
        info = norm.norm_info
        assert isinstance(info, NormInfo)
        self.conv, self.norm = conv, norm
        self.activation = None if "activation" in info.needs else activation
        self._passes_weight = "conv_weight" in info.needs
        self._transforms_weight = hook(norm, TransformWeight) is not None

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.conv.weight
        if self._transforms_weight:
            weight = self.norm.transform_weight(weight)  # type: ignore[operator]
        y = self.convolve(x, weight)
        y = self.norm(y, weight=weight) if self._passes_weight else self.norm(y)
        return y if self.activation is None else self.activation(y)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of x with `weight`, which is its own or what the norm made of it."""
        conv = self.conv
        if weight is conv.weight:
            return conv(x)  # as a module, so that hooks see it
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    *,
    norm: NormFactory,
    activation: nn.Module | None,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    affine: bool = True,
    device: torch.device | str | None = None,
) -> ConvNormAct:
    """A convolution without bias, its norm, and the activation that directly follows.

    Args:
        in_channels: C_in.
        out_channels: C_out, the channels that the norm sees.
        kernel: side of the square kernel.
        stride: of the convolution.
        norm: a factory from `make_norm`. One that fuses the activation is built with it and no other is applied.
        activation: None where none follows directly (the last norm of a residual block).
        padding: None keeps the size at stride 1.
        dilation: of the convolution.
        groups: of the convolution.
        affine: handed to the norm.
        device: of all parameters and buffers.

    Raises:
        ValueError: what the norm refuses, a missing activation included.
    """
    if padding is None:
        padding = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False, device=device)
    fused = activation if "activation" in factory_info(norm).needs else None
    layer = norm(out_channels, affine=affine, device=device, activation=fused)
    sized = hook(layer, MakeRoom)
    if sized is not None:
        sized.make_room(conv.weight)
    return ConvNormAct(conv, layer, activation)
