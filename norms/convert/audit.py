"""The audit of the norms of a network: norms of torch, torchvision and timm recognized, swaps and leftovers listed.

Norms of timm are recognized by their structure (this package does not import timm): a norm class of torch with children
`drop` and `act` applies them after its norm; a LayerNorm whose class says "2d" normalizes the channels of (N, C, H, W).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torchvision.ops import FrozenBatchNorm2d

from norms.protocol import NormInfo, norm_modules

LOOKS_LIKE_A_NORM = (
    *(_NormBase, nn.GroupNorm, FrozenBatchNorm2d),
    *(nn.LayerNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.RMSNorm),
)
_NAME = re.compile(r"norm(act)?([123]d)?(fp32)?$")
_FORWARDS = {
    kind.forward for kind in (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm, FrozenBatchNorm2d)
}
_TIMM = re.compile(r"timm\.(models\.)?layers\.norm(_act)?")
_STATISTICS = {"running_mean", "running_var"}


class Swapped(NamedTuple):
    """A norm that was replaced: its path, class and channels, and the names of all that the new layer took over."""

    path: str
    old: str
    num_channels: int
    carried: tuple[str, ...] = ()


class Changed(NamedTuple):
    """A change by a swap beyond the norm: the path of the norm, and the difference between the new one and the old.

    Said are: parameters that train where the old norm did not train all of its own, tied parameters that are untied,
    running statistics that start anew, were constant or are gone where the old norm's meaning does not tell, one image
    without a batch axis that is refused, and lost hooks.
    """

    norm: str
    what: str


class Left(NamedTuple):
    path: str
    old: str
    why: str


class Removed(NamedTuple):
    """An activation that the norm at `norm` now brings: a module's path and class, or a function's name."""

    activation: str
    norm: str


class Rewired(NamedTuple):
    """A convolution whose weight the norm at `norm` transforms, is given, or both."""

    conv: str
    norm: str
    how: str


class Size(NamedTuple):
    """Numbers of elements: of the whole network, and of everything in it that is a norm or looks like one."""

    parameters: int
    buffers: int
    norm_parameters: int
    norm_buffers: int


@dataclass(frozen=True)
class Audit:
    """The norms of a network after a swap.

    Attributes:
        swapped: each norm that was replaced.
        left: (module path, class, why) of each module that looks like a norm and is not ours.
        ours: (module path, registered name) of each norm built by `make_norm`, the swapped ones included.
        removed: activations that the norm before them brings itself.
        rewired: convolutions whose weight goes through or to their norm.
        plain: paths of norms with a `transform_weight` that no convolution directly precedes, so that nothing is
            transformed there.
        bare: paths of norms that fuse an activation and found none directly after the old norm, so that they have none.
        changed: changes by the swaps beyond the norms.
        unhooked: paths of the other modules ("" is the network itself) whose hooks are lost: a rewritten forward calls
            no container, and an activation that a norm brings is called no more.
        before: sizes before the swap (None: nothing is known of it).
        after: sizes now.
    """

    swapped: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    ours: list[tuple[str, str]] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    rewired: list[Rewired] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)
    unhooked: list[str] = field(default_factory=list)
    before: Size | None = field(default=None, compare=False)
    after: Size | None = field(default=None, compare=False)

    @property
    def complete(self) -> bool:
        """Every norm of the network is ours. One that the caller keeps is not."""
        return not self.left

    @property
    def kept(self) -> list[Left]:
        """The norms that were left because the caller keeps them."""
        return [left for left in self.left if left.why == KEPT]

    @property
    def channels_last(self) -> list[Left]:
        """The norms that were left because they normalize the last axis."""
        return [left for left in self.left if left.why == CHANNELS_LAST]


KEPT = "the caller keeps it"
CHANNELS_LAST = "channels-last: normalizes the last axes, where our norms take (N, C, *)"


def audit_norms(net: nn.Module) -> Audit:
    """Every norm of ours in `net`, and every other module that looks like a norm; nothing is changed.

    "Looks like" is: an instance of a norm class of torch or torchvision, or a class whose name ends in norm, norm2d,
    normact2d or the like and that holds neither a convolution nor another norm (timm's ConvNormAct does). A norm that
    is written as a function inside some forward can not be seen.
    """
    inside = inside_ours(net)
    ours = [(path, norm.norm_info.name) for path, norm in norm_modules(net) if isinstance(norm.norm_info, NormInfo)]
    left = [
        Left(path, type(module).__name__, why_left(module) or "not swapped")
        for path, module in net.named_modules()
        if module not in inside and looks_like_a_norm(module)
    ]
    return Audit(left=left, ours=ours, after=size(net))


def size(net: nn.Module) -> Size:
    inside = inside_ours(net)
    norms = [module for module in net.modules() if module in inside or looks_like_a_norm(module)]

    def elements(tensors: Iterable[Tensor]) -> int:
        return sum({id(t): t.numel() for t in tensors if not is_lazy(t)}.values())

    return Size(
        elements(net.parameters()),
        elements(net.buffers()),
        elements(p for norm in norms for p in norm.parameters()),
        elements(b for norm in norms for b in norm.buffers()),
    )


def is_channelwise(module: nn.Module) -> bool:
    """A norm on (N, C, *) that can be swapped: batch, instance and group norms, ConvNeXt's LayerNorm2d, frozen ones."""
    return isinstance(module, _NormBase | nn.GroupNorm) or is_frozen(module) or is_layer2d(module)


def is_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    """torchvision's FrozenBatchNorm2d, or a class that names itself so with the same four buffers and no parameter."""
    buffers = dict(module.named_buffers(recurse=False))
    return isinstance(module, FrozenBatchNorm2d) or (
        "FrozenBatchNorm" in type(module).__name__
        and buffers.keys() == {"weight", "bias", *_STATISTICS}
        and not list(module.parameters(recurse=False))
    )


def is_layer2d(module: nn.Module) -> bool:
    """A LayerNorm over the channels of (N, C, H, W), which torchvision and timm write as a subclass named so."""
    return isinstance(module, nn.LayerNorm) and "2d" in type(module).__name__ and len(module.normalized_shape) == 1


def num_channels(norm: nn.Module) -> int:
    if isinstance(norm, _NormBase):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.LayerNorm):
        return int(norm.normalized_shape[0])
    return len(norm.weight)  # type: ignore[arg-type]


def own_parts(norm: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(drop, act) of a norm that applies them itself, as those of timm do; None for any other."""
    children = dict(norm.named_children())
    return (children["drop"], children["act"]) if children.keys() >= {"drop", "act"} else None


def why_left(module: nn.Module) -> str | None:
    """Why a module that looks like a norm is not swapped; None where it can be, or is no norm."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "its number of channels is not known before a first forward"
    if is_channelwise(module):
        if not _has_known_forward(module):
            return "has a forward of its own, which would be lost"
        computed = _computed(module)
        return f"computes its {' and '.join(computed)} anew in each forward, which would be lost" if computed else None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.normalized_shape) == 1:
            return CHANNELS_LAST
        return "normalizes several last axes, and where the channels lie can not be read from the module"
    if isinstance(module, nn.LocalResponseNorm | nn.CrossMapLRN2d):
        return "local response normalization takes no per-channel statistics"
    return (
        "not a norm class of torch or torchvision, so its meaning is not known" if looks_like_a_norm(module) else None
    )


def _has_known_forward(norm: nn.Module) -> bool:
    """It does what its class says: a forward of torch, torchvision or timm, or one that its structure tells.

    The structure is: a class named as a FrozenBatchNorm or a LayerNorm2d, or a norm that applies `drop` and `act`.
    """
    forward = type(norm).forward
    return "forward" not in vars(norm) and (
        forward in _FORWARDS
        or _TIMM.fullmatch(forward.__module__) is not None
        or is_frozen(norm)
        or is_layer2d(norm)
        or own_parts(norm) is not None
    )


def _computed(norm: nn.Module) -> list[str]:
    """Which of weight and bias follow from other parameters (a parametrization, pruning, weight or spectral norm)."""
    held = {**norm._parameters, **norm._buffers}
    return [name for name in ("weight", "bias") if name not in held and isinstance(getattr(norm, name, None), Tensor)]


def looks_like_a_norm(module: nn.Module) -> bool:
    if isinstance(module, LOOKS_LIKE_A_NORM):
        return True
    named_so = _NAME.search(type(module).__name__.lower())
    if not named_so or type(module).__module__.startswith("torch.nn.utils."):  # weight and spectral norm
        return False
    parts = [part for part in module.modules() if part is not module]
    return not any(isinstance(part, nn.modules.conv._ConvNd) or looks_like_a_norm(part) for part in parts)


def is_ours(module: nn.Module) -> bool:
    return isinstance(getattr(module, "norm_info", None), NormInfo)


def inside_ours(net: nn.Module) -> set[nn.Module]:
    """Our norms and their parts, which may themselves be norms of torch."""
    return {part for _, norm in norm_modules(net) for part in norm.modules()}
