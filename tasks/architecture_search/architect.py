"""One search step: the architecture's gradient on held-out images, then one step of the weights.

With weights w, architecture a, losses L_train and L_val on two disjoint batches (Liu et al. 2019, equations 5 to 8):

    first order     d L_val(w, a) / da
    second order    d L_val(w', a) / da   at w' = w - xi (m + dL_train(w, a)/dw + decay * w),   m: momentum's share
                  = d_a L_val(w', a) - xi (d_a L_train(w+, a) - d_a L_train(w-, a)) / (2 e)
                    w+- = w +- e v,   v = d_w' L_val(w', a),   e = 0.01 / |v|

w' is the step that the weights' optimizer would take now (its momentum and decay included, gradient clipping not), xi
its learning rate. First order is the case xi = 0.

Weights are moved in place and put back bit for bit, so the unrolled step holds two copies of them at most: w itself,
and a gradient. Every forward here has a `hold` of its own, so that all start from the same state of the norms; where
running statistics are to move, only the one at w' has, which the published code computes on a copy of the network (for
a norm whose training output depends on its running statistics the difference then contains their movement). A norm that
draws random numbers draws others in each forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.situation import after_update, hold
from tasks.architecture_search.networks import SearchNetwork
from tasks.step import Precision, StepOptions, raise_if_diverged, told, update

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W), normalized, and labels (N,)."""
Loss = Callable[[], Tensor]

BETAS = (0.5, 0.999)
RADIUS = 0.01
"""The length of the step in weight space over which the Hessian-vector product is a difference."""


@dataclass(frozen=True)
class SearchStepOptions:
    """Options of one search step on a pair of batches.

    Args:
        slices: norm batches in each SGD batch; slice k is x[k::slices].
        second_order: see the module's header.
        move_statistics: architecture steps move running statistics.
        gradient_clip: largest norm of the weights' gradient.
        precision: of every forward, see StepOptions.
    """

    slices: int = 1
    second_order: bool = False
    move_statistics: bool = False
    gradient_clip: float = 5.0
    precision: Precision = "float32"

    @property
    def told(self) -> StepOptions:
        return StepOptions(self.slices, precision=self.precision, gradient_clip=self.gradient_clip)


def first_order_gradient(architecture: Sequence[Tensor], held_out_loss: Loss) -> list[Tensor]:
    """d L_val(w, a) / da, one tensor per tensor of `architecture`."""
    return list(torch.autograd.grad(held_out_loss(), architecture))


def second_order_gradient(
    architecture: Sequence[Tensor],
    optimizer: torch.optim.SGD,
    train_loss: Loss,
    held_out_loss: Loss,
) -> list[Tensor]:
    """d L_val(w'(a), a) / da, one tensor per tensor of `architecture`; see the module's header.

    Args:
        architecture: tensors that both losses depend on.
        optimizer: over the weights, w; its rate, momentum and decay say what w' is. Nothing in it changes.
        train_loss: L_train at the weights as they are when it is called.
        held_out_loss: L_val, likewise.
    """
    groups: list[tuple[list[Tensor], dict[str, float]]] = [
        ([p for p in group["params"] if p.requires_grad], group) for group in optimizer.param_groups
    ]
    weights = [p for params, _ in groups for p in params]
    start = [w.detach().clone(memory_format=torch.preserve_format) for w in weights]
    try:
        _descend(optimizer, groups, _gradients(train_loss(), weights))
        loss = held_out_loss()
        gradients = _gradients(loss, [*architecture, *weights])
        direct, vector = gradients[: len(architecture)], gradients[len(architecture) :]
        del loss, gradients
        rates = [group["lr"] for params, group in groups for _ in params]
        with torch.no_grad():
            # u = xi v, so that groups of different rates are one case; e u = (0.01 / |u|) u is e v of the header
            torch._foreach_mul_(vector, rates)
            length = torch.stack(torch._foreach_norm(vector)).norm()
            radius = RADIUS / length.clamp_min(1e-12)  # u = 0 leaves w as it is on both sides, and so adds nothing
            torch._foreach_mul_(vector, radius)
        sides = []
        for sign in (1, -1):
            _set(weights, start)
            with torch.no_grad():
                torch._foreach_add_(weights, vector, alpha=sign)
            sides.append(_gradients(train_loss(), architecture))
    finally:
        _set(weights, start)
    return [d - (plus - minus) / (2 * radius) for d, plus, minus in zip(direct, *sides, strict=True)]


def architecture_step(
    net: SearchNetwork,
    weights: torch.optim.Optimizer,
    architecture: torch.optim.Optimizer,
    training: Batch,
    held_out: Batch,
    options: SearchStepOptions,
    step: int = 0,
) -> Tensor:
    """One step of the architecture; weights, and unless asked for running statistics, stay as they are.

    `weights` is the optimizer over the body's weights: SGD where the order is the second.

    Returns:
        The loss on the held-out batch whose gradient was taken.

    Raises:
        Diverged: that loss is not finite.
    """
    parameters = list(net.architecture.parameters())
    seen: list[Tensor] = []

    def loss_on(batch: Batch, move: bool = options.move_statistics) -> Tensor:
        with contextlib.nullcontext() if move else hold(net), told(net, batch[0], options.told):
            return F.cross_entropy(net(batch[0]).float(), batch[1])

    def held_out_loss() -> Tensor:
        loss = loss_on(held_out, options.move_statistics and not options.second_order)
        raise_if_diverged(loss, net, held_out[0], options.told, f"step {step}, architecture")
        seen.append(loss.detach())
        return loss

    if options.second_order:
        assert isinstance(weights, torch.optim.SGD)  # the options model admits no other
        gradients = second_order_gradient(parameters, weights, lambda: loss_on(training), held_out_loss)
    else:
        gradients = first_order_gradient(parameters, held_out_loss)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    architecture.step()
    architecture.zero_grad()
    return seen[0]


def weights_step(
    net: SearchNetwork,
    optimizer: torch.optim.Optimizer,
    training: Batch,
    options: SearchStepOptions,
    *,
    progress: float = 0.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One step of the weights with the architecture as it is.

    Returns:
        The loss before the update (mean over N) and the number of images it classified correctly.

    Raises:
        Diverged: the loss is not finite.
    """
    images, labels = training
    with torch.no_grad():
        mixing = net.architecture()  # constants here: their gradients would cost a pass over every operation's output

    def forward() -> Tensor:
        with told(net, images, options.told):
            return net.body(images, mixing)

    logits = forward()
    loss = F.cross_entropy(logits.float(), labels)
    # clips the body's gradients alone: the architecture has none
    update(loss, net, optimizer, images=images, options=options.told, what=f"step {step}")
    optimizer.zero_grad()  # now, so that the architecture's step does not hold gradients that nobody reads
    after_update(net, forward, progress)
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def architecture_optimizer(net: SearchNetwork, learning_rate: float, weight_decay: float) -> torch.optim.Adam:
    """Adam with the published betas."""
    return torch.optim.Adam(net.architecture.parameters(), lr=learning_rate, betas=BETAS, weight_decay=weight_decay)


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, each in memory of its own, so that they may be changed in place.

    Autograd hands one tensor to both summands of a sum, and expanded ones where a gradient is constant.
    """
    found: list[Tensor] = []
    taken: set[int] = set()
    for gradient in torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True):
        shared = 0 in gradient.stride() or (gradient.device.type != "meta" and gradient.data_ptr() in taken)
        found.append(gradient.clone() if shared else gradient)
        taken.add(0 if gradient.device.type == "meta" else gradient.data_ptr())
    return found


@torch.no_grad()
def _descend(
    optimizer: torch.optim.SGD, groups: Sequence[tuple[list[Tensor], dict[str, float]]], gradients: list[Tensor]
) -> None:
    """Change the weights as `optimizer.step()` would with these gradients, and not its momentum; `gradients` is used
    up."""
    at = 0
    for params, group in groups:
        own = gradients[at : at + len(params)]
        at += len(params)
        torch._foreach_add_(own, params, alpha=group["weight_decay"])
        for parameter, step in zip(params, own, strict=True):
            momentum = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
            if momentum is not None:
                step.add_(momentum, alpha=group["momentum"])
        torch._foreach_add_(params, own, alpha=-group["lr"])


@torch.no_grad()
def _set(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(weights), list(values))
