"""Conv-4, the four-block embedding of Vinyals et al. 2016, arXiv:1606.04080, as Snell et al. 2017 use it.

Axis letters: N samples, C channels, H and W space, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from tasks.nets.blocks import conv_norm_act


class Conv4(nn.Module):
    """Four times convolution, norm, ReLU, max-pooling: (N, C, H, W) -> (N, width * (H // 16) * (W // 16))."""

    def __init__(self, norm: NormFactory, in_channels: int, width: int, device: torch.device | str | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, width, width, width):
            layers.append(conv_norm_act(channels, width, 3, norm=norm, activation=nn.ReLU(), device=device))
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)
