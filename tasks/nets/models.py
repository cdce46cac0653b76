"""Every network by name: built with a norm, its weights drawn by name, its last layer taken off.

Differences from the papers: no activation works in place (a norm may need its output for the backward pass), and
initial weights are drawn by parameter name, so that they are the same whatever the norm.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from norms.values import nearest
from tasks.nets.init import initialize, zero_last_gammas
from tasks.nets.resnet import CIFAR_DEPTHS, build_resnet
from tasks.nets.torchvision import TORCHVISION, build_torchvision

MODELS = (*CIFAR_DEPTHS, "resnet18_narrow", "resnet18_cifar", *TORCHVISION)


def build_net(
    model: str,
    norm: NormFactory,
    *,
    num_classes: int,
    in_channels: int,
    width: int | None = None,
    zero_init_last_gamma: bool = False,
    device: torch.device | str = "cpu",
    generator: Callable[[str], torch.Generator] | None = None,
) -> nn.Module:
    """A backbone whose every norm comes from `norm`, in training mode.

    Args:
        model: one of MODELS.
        norm: a factory from `make_norm`.
        num_classes: K, the width of the logits.
        in_channels: channels of the images; torchvision's first convolution is replaced where it expects others.
        width: channels of the first stage of our own nets (None: 16, of resnet18_cifar 64); torchvision's have no such
            option.
        zero_init_last_gamma: start with `weight` = 0 in the last norm of every residual block.
        device: of the parameters; on "meta" nothing is initialized.
        generator: purpose -> CPU generator (RunContext.generator); the parameter at `path` is drawn from
            generator("weights/<path>"). None leaves the constructor's own weights.

    Raises:
        ValueError: unknown model, a width for a torchvision model, what the norm refuses, a norm that needs what
            torchvision's models do not pass, or no last gamma to set to zero.
    """
    check_model(model, width)
    device = torch.device(device)
    # The constructors' own draws are overwritten by name below; they must not move the caller's stream.
    with forked_generators(device):
        if model in TORCHVISION:
            net = build_torchvision(model, norm, num_classes, in_channels, device)
        else:
            net = build_resnet(model, norm, num_classes, in_channels, width, device)
    if generator is not None and device.type != "meta":
        initialize(net, generator)
    if zero_init_last_gamma:
        zero_last_gammas(net, model)
    return net


def without_head(net: nn.Module) -> int:
    """Replace a backbone's last linear layer, which gives the logits, by the identity: (N, C, H, W) -> features (N, F).

    Returns F.
    """
    name, head = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())
    return head.in_features


def check_model(model: str, width: int | None = None) -> None:
    """ValueError for an unknown model (with the nearest), or a width where the model has none."""
    if model not in MODELS:
        raise ValueError(f'unknown model "{model}"; models: {", ".join(MODELS)}{nearest(model, MODELS)}')
    if width is not None and model in TORCHVISION:
        raise ValueError(f'model "{model}" is torchvision\'s and has no width option; leave width unset')
    if width is not None and width < 1:
        raise ValueError(f"width={width}: at least 1 is needed")
