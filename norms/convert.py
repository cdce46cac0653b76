"""Swap the norms of any existing model for a registered one, and say what was swapped and what was not.

A model of another library is comparable only if every one of its norms is ours: `convert_norms` replaces what it knows
how to replace and lists the rest with the reason, `audit_norms` reads a network without changing it. Swapped layers
start anew (weight 1, bias 0): learned parameters and statistics of the old norms are not carried over. Biases of
convolutions before a norm are left as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from norms.registry import NormFactory, NormInfo, factory_info, norm_modules

CHANNELWISE = (_NormBase, nn.GroupNorm, LayerNorm2d, FrozenBatchNorm2d)
"""Norms on (N, C, *): batch norms (1d, 2d, 3d, synchronized), instance norms, group norm, and torchvision's two."""

LOOKS_LIKE_A_NORM = (*CHANNELWISE, nn.LayerNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.RMSNorm)


class Swapped(NamedTuple):
    path: str
    old: str
    num_channels: int


class Left(NamedTuple):
    path: str
    old: str
    why: str


@dataclass(frozen=True)
class Audit:
    """What stands in the place of norms in a network.

    Attributes:
        swapped: (module path, old class, number of channels) of each norm that was replaced.
        left: (module path, class, why) of each module that looks like a norm and is not ours.
        ours: (module path, registered name) of each norm built by `make_norm`, the swapped ones included.
    """

    swapped: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    ours: list[tuple[str, str]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every norm of the network is ours."""
        return not self.left


def convert_norms(net: nn.Module, factory: NormFactory[nn.Module]) -> Audit:
    """Replace, in place, every channel-wise norm of `net` by a layer of `factory`.

    The new layer has the old one's number of channels, device, dtype, mode and `affine` (a FrozenBatchNorm2d, whose
    affine is constant, becomes a learned one); a norm that is used in several places stays one shared layer. Norms
    built by `make_norm` are left as they are. All layers are built before the first is put in, so a layer that refuses
    leaves `net` unchanged.

    Args:
        net: any module; itself a norm only if it holds it as a child (`nn.Sequential(norm)`).
        factory: from `make_norm`.

    Raises:
        ValueError: `net` itself is such a norm, a factory that is not from `make_norm`, or what a layer refuses
            (with the path of the norm it was to replace).
    """
    factory_info(factory)
    if isinstance(net, CHANNELWISE) and not _stamped(net):
        raise ValueError(f"{type(net).__name__} is a norm itself and has no parent to be swapped in; wrap it")
    inside = _inside_ours(net)
    new: dict[nn.Module, nn.Module] = {}
    places: list[tuple[str, nn.Module, str, nn.Module]] = []
    swapped = []
    for parent_path, parent in list(net.named_modules(remove_duplicate=False)):
        for name, child in list(parent.named_children()) if parent not in inside else ():
            path = f"{parent_path}.{name}" if parent_path else name
            if child in inside or _why_left(child) is not None or not isinstance(child, CHANNELWISE):
                continue
            if child not in new:
                new[child] = _replacement(path, child, factory)
                swapped.append(Swapped(path, type(child).__name__, _num_channels(child)))
            places.append((path, parent, name, new[child]))
    for _, parent, name, layer in places:
        setattr(parent, name, layer)
    found = audit_norms(net)
    return Audit(swapped, found.left, found.ours)


def audit_norms(net: nn.Module) -> Audit:
    """Every norm of ours in `net`, and every other module that looks like a norm; nothing is changed.

    "Looks like" is: an instance of a norm class of torch or torchvision, or a class whose name ends in norm, norm1d,
    norm2d or norm3d. A norm that is written as a function inside some forward can not be seen.
    """
    inside = _inside_ours(net)
    ours = [(path, norm.norm_info.name) for path, norm in norm_modules(net) if isinstance(norm.norm_info, NormInfo)]
    left = [
        Left(path, type(module).__name__, _why_left(module) or "not swapped")
        for path, module in net.named_modules()
        if module not in inside and _looks_like_a_norm(module)
    ]
    return Audit(left=left, ours=ours)


def _replacement(path: str, old: nn.Module, factory: NormFactory[nn.Module]) -> nn.Module:
    tensor = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
    where = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    affine = isinstance(old, FrozenBatchNorm2d) or getattr(old, "weight", None) is not None
    try:
        layer = factory(_num_channels(old), affine=affine, **where)
    except ValueError as error:
        raise ValueError(f"{path} ({type(old).__name__}): {error}") from error
    return layer.train(old.training)


def _num_channels(norm: nn.Module) -> int:
    if isinstance(norm, _NormBase):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, FrozenBatchNorm2d):
        return len(norm.weight)
    assert isinstance(norm, LayerNorm2d)
    return int(norm.normalized_shape[0])


def _why_left(module: nn.Module) -> str | None:
    """Why a module that looks like a norm is not swapped; None where it can be, or is no norm."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "its number of channels is not known before a first forward"
    if isinstance(module, CHANNELWISE):
        return None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "normalizes the last axes, and where the channels lie can not be read from the module"
    if isinstance(module, nn.LocalResponseNorm | nn.CrossMapLRN2d):
        return "local response normalization takes no per-channel statistics"
    return (
        "not a norm class of torch or torchvision, so its meaning is not known" if _looks_like_a_norm(module) else None
    )


def _looks_like_a_norm(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, LOOKS_LIKE_A_NORM) or name.endswith(("norm", "norm1d", "norm2d", "norm3d"))


def _stamped(module: nn.Module) -> bool:
    return isinstance(getattr(module, "norm_info", None), NormInfo)


def _inside_ours(net: nn.Module) -> set[nn.Module]:
    """Our norms and their parts, which may themselves be norms of torch."""
    return {part for _, norm in norm_modules(net) for part in norm.modules()}
