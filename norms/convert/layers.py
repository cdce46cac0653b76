"""One new layer in the place of an old norm; tensors and options that mean the same in both are carried over."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops import FrozenBatchNorm2d

from norms.convert.audit import is_batch, is_frozen, is_layer2d, num_channels, own_parts
from norms.factory import NormFactory, factory_info
from norms.protocol import NormInfo, TransformWeight, hook
from norms.registry import norm_option_defaults

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Softplus),
)
"""Activations that a norm may bring itself. Gates (sigmoid, tanh, hardsigmoid) are none of them: a norm that replaces
the activation by its own would open the gate. Nor is PReLU, whose learned slope has its own place in the network."""


class NormDropAct(nn.Module):
    """act(drop(norm(x))): stands for a norm of timm that applies the two itself, where our norm does not."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module):
        super().__init__()
        self.norm, self.drop, self.act = norm, drop, act

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        return self.act(self.drop(self.norm(x, **inputs)))


_SHAPES = {2: "(N, {})", 3: "(N, {}, L)", 4: "(N, {}, H, W)", 5: "(N, {}, D, H, W)"}
_AXES = {
    nn.BatchNorm1d._check_input_dim: (2, 3),
    nn.BatchNorm2d._check_input_dim: (4,),
    nn.BatchNorm3d._check_input_dim: (5,),
    nn.InstanceNorm1d._check_input_dim: (3,),
    nn.InstanceNorm2d._check_input_dim: (4,),
    nn.InstanceNorm3d._check_input_dim: (5,),
}
"""The numbers of axes that a norm takes, by the method that checks them: a class may bring a check of its own. Instance
norms take one axis less, too, for one image."""


@dataclass(frozen=True)
class AsTheOldNorm:
    """A forward pre-hook of a new layer: it is called as the old norm was, and refuses the shapes that this refused.

    Our layers take x (N, C, *) with any number of axes, so that one image (C, H, W) would be normalized along other
    axes, silently where H = C. A hook, since it serves any class that a plugin registers, and a value, so that the
    layer is copied, pickled and compiled as before.

    Attributes:
        only_looks: see norms.telling.
        old: the old norm's class.
        num_channels: C.
        axes: the numbers of axes that x may have; (): any.
    """

    only_looks: ClassVar[bool] = True
    old: str
    num_channels: int
    axes: tuple[int, ...]

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not args and "input" in kwargs:  # the name that torch's norms give it
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        x = args[0] if args else kwargs.get("x")
        if self.axes and isinstance(x, Tensor) and x.dim() not in self.axes:  # a stand-in of torch.fx has no axes
            shapes = " or ".join(_SHAPES[axes].format(self.num_channels) for axes in self.axes)
            one = "; x[None] gives one image its batch axis" if x.dim() + 1 == min(self.axes) else ""
            raise ValueError(
                f"x must be {shapes}, given {tuple(x.shape)}: {type(layer).__name__} stands in the place of "
                f"{self.old}{one}"
            )
        return args, kwargs


def _axes(old: nn.Module) -> tuple[int, ...]:
    """The numbers of axes that `old` takes; () where that is not known."""
    if is_frozen(old) or is_layer2d(old):  # they are known by their names
        name = type(old).__name__
        return (4,) if "2d" in name or isinstance(old, FrozenBatchNorm2d) else (5,) if "3d" in name else ()
    return _AXES.get(getattr(type(old), "_check_input_dim", None), ())  # type: ignore[arg-type]


def replacement(
    path: str,
    old: nn.Module,
    factory: NormFactory,
    activation: nn.Module | None,
    around: Iterable[nn.Module],
    tied: Collection[nn.Parameter],
) -> tuple[nn.Module, tuple[str, ...], list[str]]:
    """The layer that takes `old`'s place, the names of the tensors and options that it took over, and other
    changes (see audit.Changed).

    Args:
        path: of the old norm, for messages.
        old: a channel-wise norm.
        factory: from `make_norm`.
        activation: the activation that directly follows, if the new norm is to apply it; None for a norm that fuses
            no activation. An activation inside `old` is handled here.
        around: the modules that hold `old`, innermost first: a norm without a tensor of its own has their device and
            dtype.
        tied: parameters that the network holds in several places.

    Raises:
        ValueError: the layer refuses its arguments; with the path.
    """
    tensors = (t for part in (old, *around) for t in (*part.parameters(), *part.buffers()))
    tensor = next((t for t in tensors if t.is_floating_point()), None)
    given: dict[str, Any] = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    fuses = "activation" in factory_info(factory).needs
    drop, act = own_parts(old) or (nn.Identity(), nn.Identity())
    if fuses and own_activation(old) is not None:
        activation, act = own_activation(old), nn.Identity()
    if fuses:
        given["activation"] = activation
    affine = any(getattr(old, name, None) is not None for name in ("weight", "bias"))
    try:
        layer = factory(num_channels(old), affine=affine, **given)
    except ValueError as error:
        raise ValueError(f"{path} ({type(old).__name__}): {error}") from error
    carried = _carry(old, layer)
    changes = _changes(old, layer, carried, tied)
    hook = AsTheOldNorm(type(old).__name__, num_channels(old), _axes(old))
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    layer.train(old.training)
    if does_nothing(drop) and does_nothing(act):
        return layer, carried, changes
    whole = NormDropAct(layer, drop, act)
    whole.training = old.training
    return whole, carried, changes


def own_activation(old: nn.Module) -> nn.Module | None:
    """The activation inside a norm, as a new module that does not work in place, if a fused norm can take it over."""
    parts = own_parts(old)
    if parts is None or not does_nothing(parts[0]) or not isinstance(parts[1], ACTIVATIONS):
        return None
    return out_of_place(parts[1])


def out_of_place(activation: nn.Module) -> nn.Module:
    """The same activation without parameters as a new module: a norm may need its own output for the backward pass."""
    new = copy.deepcopy(activation)
    if hasattr(new, "inplace"):
        new.inplace = False  # type: ignore[assignment]
    return new


@torch.no_grad()
def _carry(old: nn.Module, new: nn.Module) -> tuple[str, ...]:
    """Take over the tensors and options of the old norm that mean the same in the new one; their names.

    weight and bias: in every norm they are scale and shift per channel after the normalization. The new layer holds the
    same Parameters, so that other holders of one (a norm tied to this one, an optimizer) share it, and a frozen one
    stays frozen. A FrozenBatchNorm2d has constants in their place, whose values become Parameters.

    Running statistics: the new layer's mean the same if it keeps a mean and a variance per channel over (N, H, W) of
    its plain input: its declared axes say over what, `transform_weight` would change the input, and a memory over
    iterations has other statistics than its buffers tell.

    eps and momentum: where the new layer is the same function as the old norm, so that the network stays the same
    function; an eps or momentum that was given to the factory counts more.
    """
    info = new.norm_info
    assert isinstance(info, NormInfo)
    carried = []
    for name in ("weight", "bias"):
        before, after = getattr(old, name, None), getattr(new, name, None)
        if isinstance(before, Tensor) and isinstance(after, nn.Parameter) and after.shape == before.shape:
            if isinstance(before, nn.Parameter):
                _exchange(new, after, before)
            else:
                after.copy_(before)
            carried.append(name)
    if _batch_statistics(new, info) and is_batch(old):
        names = ("running_mean", "running_var", "num_batches_tracked")
        before, after = dict(old.named_buffers(recurse=False)), dict(new.named_buffers(recurse=False))
        if all(name in before and after[name].shape == before[name].shape for name in names[:2]):
            for name in names:
                if name in before and name in after:
                    after[name].copy_(before[name])
                    carried.append(name)
    if _same_function(old, new, info):
        defaults = norm_option_defaults(info.name)
        for name in ("eps", "momentum"):
            if name in defaults and hasattr(old, name) and getattr(new, name, None) == defaults[name]:
                setattr(new, name, getattr(old, name))
                carried.append(name)
    return tuple(carried)


def _exchange(layer: nn.Module, theirs: nn.Parameter, ours: nn.Parameter) -> None:
    """Let `layer` and its parts hold `ours` wherever they hold `theirs`."""
    for part in layer.modules():
        for name, parameter in part._parameters.items():
            if parameter is theirs:
                part._parameters[name] = ours


def _changes(old: nn.Module, new: nn.Module, carried: Collection[str], tied: Collection[nn.Parameter]) -> list[str]:
    """Changes by the swap that neither the new norm's name nor `carried` tells."""
    info = new.norm_info
    assert isinstance(info, NormInfo)
    before, after, changes = dict(old.named_parameters(recurse=False)), set(new.parameters()), []
    anew = after - set(before.values())
    trained = [name for name, p in before.items() if p.requires_grad]
    trains = [name for name, p in new.named_parameters() if p.requires_grad and p in anew]
    if trains and (not before or len(trained) < len(before)):
        only = f"only {', '.join(trained)}" if trained else "nothing"
        changes.append(f"trains {', '.join(trains)}; the old norm trained {only}")
    untied = [name for name, p in before.items() if p in tied and p not in after]
    if untied:
        changes.append(f"is untied: the old norm shared {', '.join(untied)} with other modules")
    if info.keeps_stats and "running_mean" not in carried:
        unlike = "; the old norm evaluated with those of its batch" if _lacks_statistics(old) else ""
        changes.append(f"starts without running statistics: train or recalibrate before evaluating{unlike}")
    if isinstance(old, _InstanceNorm) and old.running_mean is not None and not info.keeps_stats:
        changes.append("evaluates as it trains; the old norm evaluated with running statistics, which are gone")
    if isinstance(old, _InstanceNorm) and _axes(old):
        one = _SHAPES[_axes(old)[0]].format("C").replace("N, ", "")
        changes.append(f"refuses one image without a batch axis, {one}, which the old norm took")
    if is_frozen(old) and "running_mean" in carried:
        changes.append("normalizes with its batch's statistics in training; those of the old norm were constant")
    if has_hooks(old):
        changes.append("lost the hooks of the old norm")
    return changes


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def _lacks_statistics(old: nn.Module) -> bool:
    """A batch norm that takes its batch's statistics in evaluation, too (track_running_stats=False)."""
    return is_batch(old) and getattr(old, "running_mean", None) is None


def _batch_statistics(new: nn.Module, info: NormInfo) -> bool:
    """The layer's running statistics are those of a batch norm of its input."""
    buffers = dict(new.named_buffers(recurse=False))
    return (
        {"running_mean", "running_var"} <= buffers.keys()
        and (info.axes == "NHW" or _meaning(new, info) == "bn")
        and info.mixes_samples
        and info.keeps_stats
        and not info.across_iterations
        and hook(new, TransformWeight) is None
    )


def _meaning(new: nn.Module, info: NormInfo) -> str:
    """The registered norm that the layer equals as it is configured."""
    return getattr(new, "equivalent_to", None) or info.name


def _same_function(old: nn.Module, new: nn.Module, info: NormInfo) -> bool:
    meaning, groups = _meaning(new, info), getattr(new, "num_groups", None)
    if is_batch(old):
        return meaning == "bn" and not _lacks_statistics(old)
    if isinstance(old, nn.GroupNorm):
        one_each = {1: "ln", old.num_channels: "in"}.get(old.num_groups)
        return meaning == one_each or (meaning == "gn" and groups == old.num_groups)
    if isinstance(old, _InstanceNorm):
        return not old.track_running_stats and (meaning == "in" or (meaning == "gn" and groups == old.num_features))
    return is_layer2d(old) and meaning == "layer2d"


def does_nothing(part: nn.Module) -> bool:
    return isinstance(part, nn.Identity) or (isinstance(part, nn.modules.dropout._DropoutNd) and part.p == 0)
