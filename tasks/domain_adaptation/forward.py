"""The forwards of source and target through the backbone, together or one after the other, and the domains told."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from norms.workers import ALONE, Workers
from tasks.domain_adaptation.networks import AdaptationNet
from tasks.domain_adaptation.options import SOURCE, TARGET, DomainAdaptationOptions
from tasks.step import StepOptions, told


def forward_domains(
    net: AdaptationNet, source: Tensor, target: Tensor, options: DomainAdaptationOptions, workers: Workers = ALONE
) -> tuple[Tensor, Tensor]:
    """Features (N, F) of source and target images (N, C, H, W).

    Of several workers each forwards its part of both.

    Joint: one forward of [source; target], every norm batch with equally many of both. Separate: the source first, so
    that running statistics shared by the domains end with the target's.
    """
    if options.forward == "joint":
        both, workers = torch.cat([source, target]), replace(workers, blocks=2)
        with told(net, both, facts(source, target, options, workers)):
            of_source, of_target = net.backbone(both).split([len(source), len(target)])
            return of_source, of_target
    per_step = options.told_with(workers)
    with told(net, source, per_step, domain=SOURCE):
        of_source = net.backbone(source)
    with told(net, target, per_step, domain=TARGET):
        return of_source, net.backbone(target)


def forward_target(
    net: AdaptationNet, source: Tensor, target: Tensor, options: DomainAdaptationOptions, workers: Workers = ALONE
) -> Tensor:
    """Features of the target as `forward_domains` gives them, without the source where it has no part in them."""
    if options.forward == "joint":
        return forward_domains(net, source, target, options, workers)[1]
    with told(net, target, options.told_with(workers), domain=TARGET):
        features: Tensor = net.backbone(target)
        return features


def facts(source: Tensor, target: Tensor, options: DomainAdaptationOptions, workers: Workers = ALONE) -> StepOptions:
    """The options of an update on a batch [source; target]."""
    # on the CPU, where norms look at it without waiting for the device
    domains = torch.tensor([SOURCE, TARGET]).repeat_interleave(torch.tensor([len(source), len(target)]))
    return replace(options.told_with(workers), domain=domains)
