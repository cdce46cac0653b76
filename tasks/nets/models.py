"""Every network by name: built with a norm, its weights drawn by name, its last layer taken off.

Differences from the papers: no activation works in place (a norm may need its output for the backward pass), and
initial weights are drawn by parameter name, so that they are the same whatever the norm.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from norms import plugins
from norms.factory import NormFactory
from norms.generators import forked_generators
from norms.values import nearest
from tasks.nets.guests import PREFIX, BuildModel, Logits, build_guest, build_timm, check_signature, check_timm
from tasks.nets.init import initialize, zero_last_gammas
from tasks.nets.resnet import CIFAR_DEPTHS, build_resnet
from tasks.nets.torchvision import TORCHVISION, build_torchvision

MODELS = (*CIFAR_DEPTHS, "resnet18_narrow", "resnet18_cifar", *TORCHVISION)
"""The suite's own, and torchvision's."""

_REGISTERED: dict[str, BuildModel] = {}


def register_model(name: str, *, replace: bool = False) -> Callable[[BuildModel], BuildModel]:
    """Decorator of a function `(norm, num_classes, in_channels) -> nn.Module`: `model: NAME` then builds it.

    The network maps images (N, in_channels, H, W) to logits (N, num_classes). Every norm in it is built by `norm`, as
    `norm(channels)`; a norm that works with the convolution's weight, or brings the activation, serves where
    `tasks.nets.blocks.conv_norm_act` pairs the three. Weights of convolutions and linear layers are drawn anew by their
    parameters' names, as ours are, and no activation works in place. Domain adaptation takes the last `nn.Linear` off,
    so its output must be the logits there.

    Args:
        name: lower case letters, digits and underscores.
        replace: replace one that was registered at the prompt, or by a program; for notebooks.

    Raises:
        ValueError: the name is malformed or taken; the function can not be called with these three arguments.
    """
    plugins.check_name("model", name)

    def add(build: BuildModel) -> BuildModel:
        check_signature(name, build)
        if name in MODELS or name in _REGISTERED:
            plugins.check_free("model", name, "", replace=replace, of_the_suite=name in MODELS)
        plugins.registered("model", name, lambda: _REGISTERED)
        _REGISTERED[name] = build
        return build

    return add


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
        model: one of MODELS, one that was registered, or timm:NAME.
        norm: a factory from `make_norm`.
        num_classes: K, the width of the logits.
        in_channels: channels of the images; torchvision's first convolution is replaced where it expects others.
        width: channels of the first stage of our own nets (None: 16, of resnet18_cifar 64); other models have no such
            option.
        zero_init_last_gamma: start with `weight` = 0 in the last norm of every residual block.
        device: of the parameters; on "meta" nothing is initialized.
        generator: purpose -> CPU generator (RunContext.generator); the parameter at `path` is drawn from
            generator("weights/<path>"). None leaves the constructor's own weights.

    Raises:
        ValueError: unknown model, a width for a model that is not ours, what the norm refuses, a norm that needs what
            torchvision's models do not pass, a registered model that fails or ignores its norm, a model of timm in
            which a norm of its own remains, or no last gamma to set to zero.
    """
    check_model(model, width)
    device = torch.device(device)
    # The constructors' own draws are overwritten by name below; they must not move the caller's stream.
    with forked_generators(device):
        if model in TORCHVISION:
            net = build_torchvision(model, norm, num_classes, in_channels, device)
        elif (build := guest(model)) is not None:
            if generator is not None:  # for what is drawn by the constructors of layers that `initialize` does not know
                torch.manual_seed(generator("weights").initial_seed())
            net = build_guest(build, model, norm, num_classes, in_channels, device)
        else:
            net = build_resnet(model, norm, num_classes, in_channels, width, device)
    if generator is not None and device.type != "meta":
        initialize(net, generator)
    if zero_init_last_gamma:
        if guest(model) is not None:
            raise ValueError(
                f'zero_init_last_gamma: model "{model}" is not the suite\'s own; build it with such weights'
            )
        zero_last_gammas(net, model)
    return net


def without_head(net: nn.Module) -> int:
    """Replace a backbone's last linear layer, which gives the logits, by the identity: (N, C, H, W) -> features (N, F).

    Returns F.

    Raises:
        ValueError: the network has no linear layer, or is one.
    """
    linear = [(name, module) for name, module in net.named_modules() if name and isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("the network has no nn.Linear whose input could be the features; its last layer must be one")
    name, head = linear[-1]
    parent, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())
    for hook in net._forward_hooks.values():
        if isinstance(hook, Logits):
            hook.width, hook.what = head.in_features, f"the features that its last nn.Linear, {name}, takes"
    return head.in_features


def guest(model: str) -> BuildModel | None:
    """What builds a model that is not the suite's own: the function that a user registered, or one that calls timm."""
    return build_timm(model) if model.startswith(PREFIX) else _REGISTERED.get(model)


def check_model(model: str, width: int | None = None) -> None:
    """ValueError for an unknown model (with the nearest), or a width where the model has none."""
    if model.startswith(PREFIX):
        check_timm(model)
    elif model not in MODELS and model not in _REGISTERED and not plugins.load_offered("model", model):
        known = (*MODELS, *_REGISTERED)
        raise ValueError(f'unknown model "{model}"; models: {", ".join(known)}, timm:NAME{nearest(model, known)}')
    if width is not None and (model in TORCHVISION or guest(model) is not None):
        whose = "torchvision's" if model in TORCHVISION else "not the suite's own"
        raise ValueError(f'model "{model}" is {whose} and has no width option; leave width unset')
    if width is not None and width < 1:
        raise ValueError(f"width={width}: at least 1 is needed")
