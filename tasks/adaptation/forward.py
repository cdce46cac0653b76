"""How source and target reach the backbone: together or one after the other, and what its norms are told."""

from __future__ import annotations

import torch
from torch import Tensor

from norms.situation import situation
from tasks.adaptation.networks import AdaptationNet
from tasks.adaptation.options import SOURCE, TARGET, DomainAdaptationOptions
from tasks.step import StepOptions


def forward_domains(
    net: AdaptationNet, source: Tensor, target: Tensor, options: DomainAdaptationOptions
) -> tuple[Tensor, Tensor]:
    """Features (N, F) of source and target images (N, C, H, W).

    Joint: one forward of [source; target], every norm batch with equally many of both. Separate: the source first, so
    that running statistics shared by the domains end with the target's.
    """
    if options.forward == "joint":
        with situation(net, _domains(source, target), slices=options.slices):
            of_source, of_target = net.backbone(torch.cat([source, target])).split([len(source), len(target)])
            return of_source, of_target
    with situation(net, SOURCE, slices=options.slices):
        of_source = net.backbone(source)
    with situation(net, TARGET, slices=options.slices):
        return of_source, net.backbone(target)


def forward_target(net: AdaptationNet, source: Tensor, target: Tensor, options: DomainAdaptationOptions) -> Tensor:
    """Features of the target as `forward_domains` gives them, without the source where it has no part in them."""
    if options.forward == "joint":
        return forward_domains(net, source, target, options)[1]
    with situation(net, TARGET, slices=options.slices):
        features: Tensor = net.backbone(target)
        return features


def told(source: Tensor, target: Tensor, options: DomainAdaptationOptions) -> StepOptions:
    """What norms are told of a batch [source; target]."""
    return StepOptions(options.slices, domain=_domains(source, target))


def _domains(source: Tensor, target: Tensor) -> Tensor:
    # on the CPU, where norms look at it without waiting for the device
    return torch.tensor([SOURCE, TARGET]).repeat_interleave(torch.tensor([len(source), len(target)]))
