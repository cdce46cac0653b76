"""The network of domain adaptation: one backbone, its classifiers, a discriminator where the method has one.

Heads are the same for every method, two linear layers, so that a gain over source-only is the method's. They and the
discriminator hold no norm: a norm is met by images, in the backbone, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from tasks.domain_adaptation.losses import LARGEST_PRODUCT, RANDOM_DIMENSIONS
from tasks.domain_adaptation.options import DomainAdaptationOptions
from tasks.nets.init import initialize
from tasks.nets.models import build_net, without_head


class AdaptationNet(nn.Module):
    """x (N, C, H, W) -> logits (N, K), the mean over the heads (MCD has two).

    Attributes:
        backbone: images -> features (N, F).
        heads: features -> logits, each.
        discriminator: -> (N, 1), high for the target; None where the method has none.
        maps: CDAN's random matrices where features times classes are too many; else None.
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        classes: int,
        options: DomainAdaptationOptions,
        device: torch.device | str,
    ):
        super().__init__()
        self.backbone = backbone
        count = 2 if options.method == "mcd" else 1
        self.heads = nn.ModuleList(_layers(features, features, classes, device=device) for _ in range(count))
        self.discriminator: nn.Sequential | None = None
        self.randomized = options.method == "cdan_e" and features * classes > LARGEST_PRODUCT
        if self.randomized:
            for name, size in (("feature_map", features), ("class_map", classes)):
                self.register_buffer(name, torch.zeros(size, RANDOM_DIMENSIONS, device=device))
        if options.discriminator_width is not None:
            given = features * classes if options.method == "cdan_e" else features
            width = options.discriminator_width
            given = RANDOM_DIMENSIONS if self.randomized else given
            self.discriminator = _layers(given, width, width, 1, device=device)

    @property
    def maps(self) -> tuple[Tensor, Tensor] | None:
        return (self.get_buffer("feature_map"), self.get_buffer("class_map")) if self.randomized else None

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, F)."""
        return torch.stack([head(features) for head in self.heads]).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.backbone(x))


def build(
    norm: NormFactory,
    options: DomainAdaptationOptions,
    *,
    channels: int,
    classes: int,
    device: torch.device | str = "cpu",
    generator: Callable[[str], torch.Generator] | None = None,
) -> AdaptationNet:
    """The network in training mode, its weights drawn by name.

    Args:
        norm: a factory from `make_norm`.
        options: model, width and method.
        channels, classes: of the images.
        device: of the parameters; on "meta" nothing is drawn.
        generator: purpose -> CPU generator (RunContext.generator).

    Raises:
        ValueError: what the norm refuses.
    """
    backbone = build_net(norm=norm, **options.backbone(classes, channels), device=device, generator=generator)
    net = AdaptationNet(backbone, without_head(backbone), classes, options, device)
    if generator is not None and torch.device(device).type != "meta":
        for name, part in (("heads", net.heads), ("discriminator", net.discriminator)):
            if part is not None:
                initialize(part, lambda purpose, name=name: generator(f"{name}/{purpose}"))  # type: ignore[misc]
        for name in ("feature_map", "class_map") if net.randomized else ():
            matrix = net.get_buffer(name)
            matrix.copy_(torch.randn(matrix.shape, generator=generator(f"cdan {name}")))
    options.ready(net.backbone)  # steps forward it without the rest
    return net.to(memory_format=options.memory_format)


def _layers(*sizes: int, device: torch.device | str) -> nn.Sequential:
    """Linear layers with a ReLU between."""
    layers: list[nn.Module] = []
    for given, made in itertools.pairwise(sizes):
        layers += [nn.ReLU()] * bool(layers) + [nn.Linear(given, made, device=device)]
    return nn.Sequential(*layers)
