"""Maximum classifier discrepancy (Saito et al. 2018, arXiv:1712.02560), its three steps on one batch.

    A  features and both classifiers:  min  CE(source)
    B  both classifiers:               min  CE(source) - discrepancy(target)
    C  features, n times:              min  discrepancy(target)

Both domains are forwarded in every step (C alone, with separate forwards, needs the target only), so that in joint
forwards the statistics are those of the same images throughout. Each batch moves what norms keep once, in A; B and C
are forwards of images that have been counted and run under `hold`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.situation import after_update, hold
from norms.workers import ALONE, Workers
from tasks.domain_adaptation.forward import facts, forward_domains, forward_target
from tasks.domain_adaptation.losses import discrepancy
from tasks.domain_adaptation.networks import AdaptationNet
from tasks.domain_adaptation.options import DomainAdaptationOptions
from tasks.step import autocast, update, wide


def mcd_step(
    net: AdaptationNet,
    of_features: torch.optim.Optimizer,
    of_heads: torch.optim.Optimizer,
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    options: DomainAdaptationOptions,
    *,
    progress: float = 0.0,
    step: int = 0,
    workers: Workers = ALONE,
) -> tuple[Tensor, Tensor]:
    """Steps A, B and C on one batch.

    Args:
        net: in training mode, with two heads.
        of_features, of_heads: optimizers of the backbone and of the heads.
        source, target: (N, C, H, W), normalized.
        labels: (N,), of the source.
        options: forward, norm batches, mcd_steps.
        progress: fraction of training that is done after this step.
        step: for messages only.
        workers: that take these steps together, each on its part of the batch.

    Returns:
        Step A's loss and the number of source images that it classified correctly, as tensors.

    Raises:
        Diverged: a loss is not finite.
    """
    one, two = net.heads

    def answers(features: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(source.device, options.precision):
            return wide(one(features)), wide(two(features))

    def supervised(features: Tensor) -> Tensor:
        first, second = answers(features)
        return F.cross_entropy(first, labels) + F.cross_entropy(second, labels)

    def apart(features: Tensor) -> Tensor:
        return discrepancy(*answers(features))

    everything = (of_features, of_heads)
    both, known, what = torch.cat([source, target]), facts(source, target, options, workers), f"step {step}"

    def learn(loss: Tensor, clipped: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        update(loss, net, *optimizers, images=both, options=known, what=what, cleared=everything, clipped=clipped)

    def forward() -> tuple[Tensor, Tensor]:
        return forward_domains(net, source, target, options, workers)

    features, _ = forward()
    with autocast(source.device, options.precision):
        correct = (net.classify(features).detach().argmax(1) == labels).sum()
    first = supervised(features)
    learn(first, net, *everything)
    with hold(net):
        with torch.no_grad():  # the features are not updated here
            of_source, of_target = forward()
        learn(supervised(of_source) - apart(of_target), net.heads, of_heads)
        for _ in range(options.mcd_steps or 1):
            learn(apart(forward_target(net, source, target, options, workers)), net.backbone, of_features)
    after_update(net, forward, progress)
    return first.detach(), correct
