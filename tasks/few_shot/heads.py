"""From embeddings of an episode to logits of its queries. S support images, Q queries, D embedding, W ways."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Head = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""support (S, D), its labels (S,) in 0..W-1, query (Q, D), W -> logits (Q, W)"""


def class_means(support: Tensor, labels: Tensor, way: int) -> Tensor:
    """Mean embedding of each class: (W, D)."""
    member = F.one_hot(labels, way).to(support.dtype)
    return (member.t() @ support) / member.sum(0)[:, None]


def prototypical(support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
    """- ||query - prototype||^2, the prototype a class's mean (Snell et al. 2017, equations 1 and 2)."""
    # differences themselves, not |q|^2 - 2qp + |p|^2: near a prototype that would cancel
    return -(query[:, None] - class_means(support, labels, way)[None]).square().sum(2)


def imprinted(scale: Tensor) -> Head:
    """scale * cosine of query and imprinted weight: the normalized mean of the class's normalized embeddings
    (Qi et al. 2018, equation 7)."""

    def head(support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        weights = F.normalize(class_means(F.normalize(support, dim=1), labels, way), dim=1)
        return scale * F.normalize(query, dim=1) @ weights.t()

    return head


def head_of(net: nn.Module, method: str) -> Head:
    """The head with which a method's network reads an episode."""
    return imprinted(net.classifier.scale.detach()) if method == "imprinting" else prototypical  # type: ignore[union-attr, operator]
