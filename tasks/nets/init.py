"""Initial weights, the same whatever the norm: each is drawn from a generator named by its parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from norms.protocol import NormInfo, norm_modules
from tasks.nets.resnet import BasicBlock
from tasks.nets.torchvision import TORCHVISION


@torch.no_grad()
def initialize(net: nn.Module, generator: Callable[[str], torch.Generator]) -> None:
    """Draw every convolution's and linear layer's weight from a CPU generator named by the parameter's path.

    Convolutions: He et al. 2015, normal with variance 2 / fan_out; linear layers: uniform within 1 / sqrt(fan_in);
    their biases are zero. Norms and all other parameters keep what their constructors gave them.
    """
    inside_norms = {id(part) for _, norm in norm_modules(net) for part in norm.modules()}
    for name, module in net.named_modules():
        if id(module) in inside_norms or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight
        draw = torch.empty(weight.shape, dtype=torch.float32)
        if isinstance(module, nn.Conv2d):
            fan_out = weight.shape[0] * weight[0, 0].numel() // module.groups
            draw.normal_(0, math.sqrt(2 / fan_out), generator=generator(f"weights/{name}.weight"))
        else:
            bound = 1 / math.sqrt(weight.shape[1])
            draw.uniform_(-bound, bound, generator=generator(f"weights/{name}.weight"))
        weight.copy_(draw)
        if module.bias is not None:
            module.bias.zero_()


def zero_last_gammas(net: nn.Module, model: str) -> None:
    for norm in _last_norms(net.modules(), model):
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, nn.Parameter):
            info = norm.norm_info
            assert isinstance(info, NormInfo)
            raise ValueError(f'norm "{info.name}" has no parameter named weight, which zero_init_last_gamma sets')
        nn.init.zeros_(weight)


def _last_norms(modules: Iterable[nn.Module], model: str) -> list[nn.Module]:
    found: list[nn.Module] = []
    for module in modules:
        if isinstance(module, BasicBlock):
            found.append(module.last_norm)
        elif model in TORCHVISION and hasattr(module, "downsample") and hasattr(module, "bn2"):
            found.append(module.bn3 if hasattr(module, "bn3") else module.bn2)  # type: ignore[arg-type]
    if not found:
        raise ValueError(f'zero_init_last_gamma: model "{model}" has no residual block with a known last norm')
    return found
