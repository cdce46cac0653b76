"""Conv-4 (Vinyals et al. 2016) and ResNet-12 (Lee et al. 2019, arXiv:1904.03758) with any norm, and their classifiers.

Differences: no convolution has a bias, the norm follows; ResNet-12 has no DropBlock.

Axis letters: N samples, C channels, H and W space, D embedding, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import NormFactory, forked_generators
from tasks.nets import conv_norm_act, initialize

BASE_WIDTH = 64
RESNET12 = (1.0, 2.5, 5.0, 10.0)
"""Channels of the stages over those of the first: 64-160-320-640."""
INITIAL_SCALE = 10.0


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
        widths = [in_channels, *(round(factor * width) for factor in RESNET12)]
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(ResNet12Block(cin, cout, norm, device) for cin, cout in pairs))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean(dim=(2, 3))


class CosineClassifier(nn.Module):
    """scale * cosine of embedding and class weight (Qi et al. 2018, equations 2 and 5): (N, D) -> (N, K)."""

    def __init__(self, dimension: int, num_classes: int, device: torch.device | str | None = None):
        super().__init__()
        self.linear = nn.Linear(dimension, num_classes, bias=False, device=device)
        self.scale = nn.Parameter(torch.full((), INITIAL_SCALE, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=1) @ F.normalize(self.linear.weight, dim=1).t()


class FewShotNet(nn.Module):
    """An embedding and the classifier that is trained on it.

    Args:
        embedding: (N, C, H, W) -> (N, D).
        classifier: (N, D) -> (N, K); None: the embedding is all there is.
    """

    def __init__(self, embedding: nn.Module, classifier: nn.Module | None):
        super().__init__()
        self.embedding = embedding
        self.classifier = nn.Identity() if classifier is None else classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embedding(x))


def build_few_shot_net(
    model: str,
    method: str,
    norm: NormFactory,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    width: int | None = None,
    device: torch.device | str = "cpu",
    generator: Callable[[str], torch.Generator] | None = None,
) -> FewShotNet:
    """The network of a method, in training mode.

    Args:
        model: "conv4" or "resnet12".
        method: "prototypical" (no classifier), "maml" (a linear one), "imprinting" (a cosine classifier).
        norm: a factory from `make_norm`.
        image_shape: (C, H, W), at least 16 x 16.
        num_classes: K of the classifier.
        width: channels of the first stage; None: 64.
        device: where it is built; on "meta" nothing is initialized.
        generator: as tasks.nets.build_net's.

    Raises:
        ValueError: images that four poolings leave nothing of, or what the norm refuses.
    """
    channels, height, side = image_shape
    if min(height, side) < 16:
        raise ValueError(f"images of {height}x{side}: {model} halves them four times and needs 16x16 at least")
    device, width = torch.device(device), width or BASE_WIDTH
    with forked_generators(device):
        embedding: nn.Module
        if model == "conv4":
            embedding, dimension = Conv4(norm, channels, width, device), width * (height // 16) * (side // 16)
        else:
            embedding, dimension = ResNet12(norm, channels, width, device), round(RESNET12[-1] * width)
        classifier: nn.Module | None = None
        if method == "maml":
            classifier = nn.Linear(dimension, num_classes, device=device)
        elif method == "imprinting":
            classifier = CosineClassifier(dimension, num_classes, device)
        net = FewShotNet(embedding, classifier)
    if generator is not None and device.type != "meta":
        initialize(net, generator)
    return net
