"""The network that is attacked: from images in [0, 1] to logits, the input's normalization inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from tasks.adversarial.options import AdversarialOptions
from tasks.nets.models import build_net


class Standardized(nn.Module):
    """net((x - mean) / std) per channel: x (N, C, H, W) in [0, 1] -> logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str):
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def build(
    norm: NormFactory,
    options: AdversarialOptions,
    facts: Mapping[str, Any],
    device: torch.device | str = "cpu",
    generator: Callable[[str], torch.Generator] | None = None,
) -> nn.Module:
    """The network of a run, from [0, 1] images to logits, in training mode. `generator`: as build_net's."""
    backbone = options.backbone(facts["num_classes"], facts["in_channels"])
    net = build_net(norm=norm, **backbone, device=device, generator=generator)
    return options.ready(Standardized(net, facts["mean"], facts["std"], device))
