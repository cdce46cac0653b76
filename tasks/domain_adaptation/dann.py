"""DANN (Ganin et al. 2016, arXiv:1505.07818) and CDAN+E (Long et al. 2018, arXiv:1705.10667): one update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.situation import after_update
from norms.workers import ALONE, Workers
from tasks.domain_adaptation.forward import facts, forward_domains
from tasks.domain_adaptation.losses import (
    certainty_weights,
    conditioned,
    domain_loss,
    reversal_strength,
    reverse_gradient,
)
from tasks.domain_adaptation.networks import AdaptationNet
from tasks.domain_adaptation.options import DomainAdaptationOptions
from tasks.step import autocast, update, wide


def adversarial_step(
    net: AdaptationNet,
    optimizer: torch.optim.Optimizer,
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    options: DomainAdaptationOptions,
    *,
    progress: float = 0.0,
    step: int = 0,
    workers: Workers = ALONE,
) -> tuple[Tensor, Tensor]:
    """One update by DANN's or CDAN+E's loss: CE(source) + trade_off * domain loss, the gradient of which comes back
    reversed, with a strength that grows with `progress`, to the features (and to CDAN+E's weights).

    Arguments and results as `tasks.domain_adaptation.mcd.mcd_step`.
    """

    def forward() -> tuple[Tensor, Tensor]:
        return forward_domains(net, source, target, options, workers)

    assert net.discriminator is not None
    strength = reversal_strength(progress)
    with autocast(source.device, options.precision):
        features = torch.cat(forward())
        logits = wide(net.classify(features))
        if options.method == "cdan_e":
            given = conditioned(reverse_gradient(features, strength), logits.softmax(1), net.maps)
            weights: Tensor | None = certainty_weights(logits, strength)
        else:
            given, weights = reverse_gradient(features, strength), None
        domains = wide(net.discriminator(given))[:, 0]
    of_source = logits[: len(source)]
    of_domain = domain_loss(domains, len(source), weights, workers)
    loss = F.cross_entropy(of_source, labels) + (options.trade_off or 0.0) * of_domain
    both, known = torch.cat([source, target]), facts(source, target, options, workers)
    update(loss, net, optimizer, images=both, options=known, what=f"step {step}")
    after_update(net, forward, progress)
    return loss.detach(), (of_source.detach().argmax(1) == labels).sum()
