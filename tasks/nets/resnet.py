"""Our own ResNets for small images.

`resnet8` ... `resnet110`: the CIFAR ResNets of He et al. 2015 (arXiv:1512.03385, section 4.2): 6n+2 layers, three
stages 16-32-64 wide, shortcuts without parameters (option A: every second pixel, missing channels zero).
`resnet18_narrow`: ResNet-18's four stages of two blocks, 16-32-64-128 wide, with a 3x3 stem of stride 2 and projection
shortcuts; at 32x32 its last maps are 2x2.
`resnet18_cifar`: the same with a stem of stride 1 and 64-128-256-512 channels (11,173,962 parameters for 10 classes),
as adversarial training on CIFAR-10 uses it.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.factory import NormFactory
from tasks.nets.blocks import conv_norm_act

CIFAR_DEPTHS = {f"resnet{depth}": (depth - 2) // 6 for depth in (8, 20, 32, 44, 56, 110)}
BASE_WIDTH = 16
"""Channels of the first stage of our own nets where no width is given; of resnet18_cifar 64."""


class PadShortcut(nn.Module):
    """Option A of He et al. 2015: every `stride`-th pixel, and zeros for the channels that x has not.

    x: (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        missing = out_channels - in_channels
        self.stride, self.pad = stride, (missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)): (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        norm: NormFactory,
        projection: bool,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        self.first = conv_norm_act(in_channels, out_channels, 3, stride, norm=norm, activation=nn.ReLU(), device=device)
        self.second = conv_norm_act(out_channels, out_channels, 3, norm=norm, activation=None, device=device)
        self.shortcut: nn.Module
        if same:
            self.shortcut = nn.Identity()
        elif projection:
            self.shortcut = conv_norm_act(
                in_channels, out_channels, 1, stride, norm=norm, activation=None, device=device
            )
        else:
            self.shortcut = PadShortcut(in_channels, out_channels, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.second.norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images: (N, C, H, W) -> logits (N, K).

    Args:
        blocks: blocks per stage.
        widths: channels per stage.
        norm: a factory from `make_norm`.
        in_channels: C.
        num_classes: K.
        stem_stride: stride of the 3x3 stem; stages after the first begin with stride 2.
        projection: shortcuts that change the shape are a 1x1 convolution with its norm; else `PadShortcut`.
        device: of all parameters and buffers.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        norm: NormFactory,
        in_channels: int,
        num_classes: int,
        stem_stride: int = 1,
        projection: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.stem = conv_norm_act(
            in_channels, widths[0], 3, stem_stride, norm=norm, activation=nn.ReLU(), device=device
        )
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(BasicBlock(channels, width, stride, norm=norm, projection=projection, device=device))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def build_resnet(
    model: str,
    norm: NormFactory,
    num_classes: int,
    in_channels: int,
    width: int | None,
    device: torch.device,
) -> nn.Module:
    cifar = model == "resnet18_cifar"
    eighteen = cifar or model == "resnet18_narrow"
    base = width or (64 if cifar else BASE_WIDTH)
    return ResNet(
        (2, 2, 2, 2) if eighteen else (CIFAR_DEPTHS[model],) * 3,
        [base * 2**stage for stage in range(4 if eighteen else 3)],
        norm=norm,
        in_channels=in_channels,
        num_classes=num_classes,
        stem_stride=2 if model == "resnet18_narrow" else 1,
        projection=eighteen,
        device=device,
    )
