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
from torch import Tensor

from norms.situation import after_update, hold
from tasks.adaptation.forward import forward_domains, forward_target, told
from tasks.adaptation.losses import discrepancy
from tasks.adaptation.networks import AdaptationNet
from tasks.adaptation.options import DomainAdaptationOptions
from tasks.step import raise_if_diverged


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

    Returns:
        Step A's loss and the number of source images that it classified correctly, as tensors.

    Raises:
        Diverged: a loss is not finite.
    """
    one, two = net.heads

    def supervised(features: Tensor) -> Tensor:
        return F.cross_entropy(one(features), labels) + F.cross_entropy(two(features), labels)

    def apart(features: Tensor) -> Tensor:
        return discrepancy(one(features), two(features))

    def update(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        raise_if_diverged(loss, net, torch.cat([source, target]), told(source, target, options), f"step {step}")
        for optimizer in (of_features, of_heads):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    features, _ = forward_domains(net, source, target, options)
    correct = (net.classify(features).detach().argmax(1) == labels).sum()
    first = supervised(features)
    update(first, of_features, of_heads)
    with hold(net):
        with torch.no_grad():  # the features are not updated here
            of_source, of_target = forward_domains(net, source, target, options)
        update(supervised(of_source) - apart(of_target), of_heads)
        for _ in range(options.mcd_steps or 1):
            update(apart(forward_target(net, source, target, options)), of_features)
    after_update(net, lambda: forward_domains(net, source, target, options), progress)
    return first.detach(), correct
