"""FGSM and PGD in an L-infinity ball, and the objective that they climb.

FGSM: Goodfellow et al. 2015, arXiv:1412.6572. PGD: Madry et al. 2018, arXiv:1706.06083. FGSM with random start: Wong et
al. 2020, arXiv:2001.03994. (The objective of TRADES is in trades.py.)

Images are in [0, 1] and input normalization is inside the network. Every draw is made by the caller, so that an image
has the same start whatever the norm, and whichever other images are attacked beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.data.batches import Share
from tasks.step import wide

Objective = Callable[[Tensor], Tensor]
"""logits (N, K) -> a scalar that the attack makes large."""


def cross_entropy(labels: Tensor) -> Objective:
    """Summed over images, so that no image's gradient depends on how many there are."""
    return lambda logits: F.cross_entropy(logits, labels, reduction="sum")


def uniform_start(images: Tensor, epsilon: float, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """A perturbation drawn uniformly from the ball, (N, C, H, W) like `images`, from a CPU generator.

    share: the part of a batch that the images are, whose starts are drawn for all of it; None: they are all of it.
    """
    share = share or Share(len(images))
    draw = torch.empty(share.count, *images.shape[1:]).uniform_(-epsilon, epsilon, generator=generator)
    return share.of(draw).to(images.device)


def pgd(
    net: nn.Module,
    images: Tensor,
    objective: Objective,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Projected sign-gradient ascent; call it inside `crafting`, which sets the mode.

        x_0 = P(x + start)      x_{k+1} = P(x_k + step_size * sign(grad objective(net(x_k))))

    with P the projection on the ball and on [0, 1]. FGSM is one step of size epsilon without a start.

    Args:
        net: images (N, C, H, W) in [0, 1] -> logits (N, K).
        images: the centres of the balls.
        objective: the scalar that the attack makes large.
        epsilon, step_size: in units of the images.
        steps: forwards and backwards.
        start: first perturbation; None: zero.

    Returns:
        The last iterate, detached.

    Raises:
        ValueError: no gradient reaches the images.
    """
    images = images.detach()
    low, high = (images - epsilon).clamp_(min=0), (images + epsilon).clamp_(max=1)
    x = images if start is None else (images + start).clamp_(low, high)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        gradient = input_gradient(net, x, objective)
        x = torch.add(x.detach(), gradient.sign_(), alpha=step_size).clamp_(low, high)
    return x.detach()


def input_gradient(net: nn.Module, x: Tensor, objective: Objective) -> Tensor:
    """The gradient of the objective with respect to x (N, C, H, W), which requires one.

    Raises:
        ValueError: there is none: something between images and logits detaches.
    """
    with torch.enable_grad():
        value = objective(wide(net(x)))
    if not value.requires_grad:
        raise ValueError(
            "no gradient reaches the images: the network, or a norm in it, detaches its input; it can not be attacked"
        )
    return torch.autograd.grad(value, x)[0]
