"""Conv-4 (Vinyals et al. 2016) and ResNet-12 (Lee et al. 2019, arXiv:1904.03758) with any norm, and their classifiers.

Differences: no convolution has a bias, the norm follows; ResNet-12 has no DropBlock.

Axis letters: N samples, C channels, H and W space, D embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from tasks.data.images import ImageData
from tasks.few_shot.options import FewShotOptions
from tasks.nets.conv4 import Conv4
from tasks.nets.init import initialize
from tasks.nets.resnet12 import STAGES, ResNet12

BASE_WIDTH = 64
INITIAL_SCALE = 10.0


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
        device: of the parameters; on "meta" nothing is initialized.
        generator: as tasks.nets.models.build_net's.

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
            embedding, dimension = ResNet12(norm, channels, width, device), round(STAGES[-1] * width)
        classifier: nn.Module | None = None
        if method == "maml":
            classifier = nn.Linear(dimension, num_classes, device=device)
        elif method == "imprinting":
            classifier = CosineClassifier(dimension, num_classes, device)
        net = FewShotNet(embedding, classifier)
    if generator is not None and device.type != "meta":
        initialize(net, generator)
    return net


def build(
    norm: NormFactory, options: FewShotOptions, image_shape: tuple[int, int, int], classes: int, **where: Any
) -> FewShotNet:
    """The network of a run, in training mode.

    Args:
        norm: a factory from `make_norm`.
        options: of the run.
        image_shape: (C, H, W).
        classes: of the classifier (`outputs`).
        where: device and generator, as build_few_shot_net's.
    """
    net = build_few_shot_net(
        options.model,
        options.method,
        norm,
        image_shape=image_shape,
        num_classes=classes,
        width=options.width,
        **where,
    ).to(memory_format=options.memory_format)
    if options.compile:
        net.embedding.compile()
    return net


def outputs(data: ImageData, options: FewShotOptions) -> int:
    """Classes that a classifier of the method tells apart."""
    return options.way if options.method == "maml" else len(data.train.labels.unique())
