"""torchvision's networks through their `norm_layer=`."""

from __future__ import annotations

import torch
from torch import nn

from norms.factory import NormFactory, factory_info
from norms.protocol import TransformWeight, hook, norm_modules

TORCHVISION = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"),
)


def build_torchvision(
    model: str, norm: NormFactory, num_classes: int, in_channels: int, device: torch.device
) -> nn.Module:
    import torchvision  # only where one of its models is asked for: importing it takes a second

    from norms.convert import audit_norms

    info = factory_info(norm)
    missing = sorted(info.needs & {"conv_weight", "activation"})
    if missing:
        raise ValueError(
            f'norm "{info.name}" needs {" and ".join(missing)}, which torchvision\'s "{model}" does not pass to it'
        )

    with torch.device(device):
        net: nn.Module = torchvision.models.get_model(model, weights=None, num_classes=num_classes, norm_layer=norm)
    for _, module in norm_modules(net):
        if hook(module, TransformWeight) is not None:
            raise ValueError(
                f'norm "{info.name}" transforms the convolution\'s weight; torchvision\'s "{model}" has no place for it'
            )
    left = audit_norms(net).left
    if left:
        raise ValueError(f'model "{model}" keeps a norm of its own: {left[0].path} is a {left[0].old}')
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    name, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != in_channels:
        parent, _, attribute = name.rpartition(".")
        replacement = nn.Conv2d(
            in_channels,
            first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
            device=device,
        )
        setattr(net.get_submodule(parent), attribute, replacement)
    return net
