"""The losses of the methods as functions of features and logits, and the score without labels.

    DANN     Ganin et al. 2016, arXiv:1505.07818     discriminator on features, gradient reversed
    CDAN+E   Long et al. 2018, arXiv:1705.10667      discriminator on features x predictions, certain images count more
    MCD      Saito et al. 2018, arXiv:1712.02560     discrepancy of two classifiers

Axes: N images (source first, then target), F features, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.workers import ALONE, Workers

LARGEST_PRODUCT = 4096
"""Features times classes, above which CDAN draws a random map instead (its paper's section 3.3)."""
RANDOM_DIMENSIONS = 1024


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """x itself, whose gradient comes back times -strength (DANN, equations 14 and 15)."""
    result: Tensor = _Reversed.apply(x, strength)
    return result


def reversal_strength(progress: float) -> float:
    """lambda_p = 2 / (1 + exp(-10 p)) - 1: from 0 to 1 over training (DANN, section 5.2.2)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def domain_loss(judged: Tensor, sources: int, weights: Tensor | None = None, workers: Workers = ALONE) -> Tensor:
    """Binary cross entropy of the discriminator's logits (N,), the first `sources` images being of domain 0.

    Args:
        judged: (N,), high for the target.
        sources: images of the source.
        weights: (N,); the weighted mean is taken over each domain, then the mean of the two. None: over all images.
        workers: that hold the other images of the batch; the mean of their losses, each counted as often as it has
            images, is that of the whole batch.
    """
    truth = torch.zeros_like(judged)
    truth[sources:] = 1
    if weights is None:
        return F.binary_cross_entropy_with_logits(judged, truth)
    losses = F.binary_cross_entropy_with_logits(judged, truth, reduction="none") * weights
    source, target = losses.split([sources, len(judged) - sources])
    of_domains = weights.detach().split([sources, len(judged) - sources])
    of_source, of_target = torch.stack([of_domain.sum() for of_domain in of_domains])
    if not workers.alone:
        # weights of the whole batch, scaled to this worker's part of it: a weighted mean is no mean over samples
        sums = workers.total(torch.stack([of_source, of_target, judged.new_tensor(float(len(judged)))]))
        of_source, of_target = sums[:2] * (len(judged) / sums[2])
    return (source.sum() / of_source + target.sum() / of_target) / 2


def conditioned(features: Tensor, probabilities: Tensor, maps: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The multilinear map of CDAN: every feature times every class probability, (N, K * F).

    Args:
        features: (N, F).
        probabilities: (N, K); no gradient goes through them, as in the published code.
        maps: (F, D) and (K, D), then the randomized map (f R_f) * (g R_g) / sqrt(D), (N, D) (equation 6).
    """
    probabilities = probabilities.detach()
    if maps is None:
        return torch.einsum("nk,nf->nkf", probabilities, features).flatten(1)
    of_features, of_classes = maps
    return (features @ of_features) * (probabilities @ of_classes) / math.sqrt(of_features.shape[1])


def certainty_weights(logits: Tensor, strength: float) -> Tensor:
    """CDAN+E's weights 1 + exp(-H) (N,), H the entropy of each prediction in nats, whose gradient is reversed."""
    return 1 + torch.exp(-reverse_gradient(entropy(logits), strength))


def entropy(logits: Tensor) -> Tensor:
    """Of each prediction, in nats: logits (N, K) -> (N,)."""
    logs = F.log_softmax(logits, dim=1)
    return -(logs.exp() * logs).sum(1)


def discrepancy(one: Tensor, two: Tensor) -> Tensor:
    """MCD's distance of two classifiers: mean |p1 - p2| over images and classes. Logits (N, K)."""
    return (one.softmax(1) - two.softmax(1)).abs().mean()


def information(logits: Tensor) -> float:
    """Information maximization: entropy of the mean prediction less the mean entropy, in nats; in [0, log K].

    High where predictions are certain and all classes occur: a validator without labels (Musgrave et al. 2021,
    arXiv:2111.15672). Logits (N, K).
    """
    logits = logits.double()
    mean = logits.softmax(1).mean(0).clamp(min=1e-300)
    return float(-(mean * mean.log()).sum() - entropy(logits).mean())
