"""ResNet-12, the four-stage embedding of few-shot learning, without DropBlock.

Axis letters: N samples, C channels, H and W space, D embedding.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.factory import NormFactory
from tasks.nets.blocks import conv_norm_act

STAGES = (1.0, 2.5, 5.0, 10.0)
"""Channels of the stages over those of the first: 64-160-320-640."""


class ResNet12Block(nn.Module):
    """max_pool(lrelu(norm(conv(...)) + norm(conv1x1(x)))): (N, C_in, H, W) -> (N, C_out, H // 2, W // 2)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: NormFactory,
        device: torch.device | str | None = None,
    ):
        super().__init__()

        def layer(channels: int, kernel: int, activation: nn.Module | None) -> nn.Module:
            return conv_norm_act(channels, out_channels, kernel, norm=norm, activation=activation, device=device)

        self.first = layer(in_channels, 3, nn.LeakyReLU(0.1))
        self.second = layer(out_channels, 3, nn.LeakyReLU(0.1))
        self.third = layer(out_channels, 3, None)
        self.shortcut = layer(in_channels, 1, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(self.second(self.first(x))) + self.shortcut(x)
        return F.max_pool2d(F.leaky_relu(y, 0.1), 2)


class ResNet12(nn.Module):
    """Four residual blocks and global average pooling: (N, C, H, W) -> (N, 10 * width)."""

    def __init__(self, norm: NormFactory, in_channels: int, width: int, device: torch.device | str | None = None):
        super().__init__()
        widths = [in_channels, *(round(factor * width) for factor in STAGES)]
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(ResNet12Block(cin, cout, norm, device) for cin, cout in pairs))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean(dim=(2, 3))
