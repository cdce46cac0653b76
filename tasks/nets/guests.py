"""Networks that are not the suite's own: a user's function of a norm factory, and timm's with their norms converted.

Such a network is looked at before it is trained: it holds norms of ours and no others, gives logits (N, K), and a norm
that works with the convolution's weight is paired with one.

Axis letters: N samples, C channels, H and W space, K classes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory, factory_info
from norms.protocol import norm_modules
from norms.values import cut, nearest
from tasks.nets.blocks import ConvNormAct

PREFIX = "timm:"
BuildModel = Callable[..., nn.Module]
_ARGUMENTS = ("norm", "num_classes", "in_channels")


@dataclass
class Logits:
    """A forward hook of a network: ValueError unless its output is (N, width), of a floating-point type."""

    model: str
    width: int
    what: str = "logits"

    def __call__(self, net: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        wanted = (len(inputs[0]), self.width)
        if not isinstance(output, Tensor) or output.shape != wanted:
            given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f'model "{self.model}" gives {given} for {wanted[0]} images; {self.what} {wanted} are needed'
            )
        if not output.is_floating_point():
            raise ValueError(
                f'model "{self.model}" gives {output.dtype}; {self.what} of a floating-point type are needed'
            )


def check_signature(name: str, build: BuildModel) -> None:
    """ValueError where a function can not be called with `norm, num_classes, in_channels` alone."""
    try:
        inspect.signature(build).bind(**dict.fromkeys(_ARGUMENTS))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'model "{name}": a function of {", ".join(_ARGUMENTS)} is needed, others with a default: {error}'
        ) from error


def build_guest(
    build: BuildModel, model: str, norm: NormFactory, num_classes: int, in_channels: int, device: torch.device
) -> nn.Module:
    """The network that `build` makes, in training mode on `device`.

    It is built on the CPU and moved, so that its constructors draw the same everywhere; on "meta" it is built there.

    Raises:
        ValueError: the function fails or returns no module, the network holds no norm of `norm` or one of its own, or
            what the norm refuses. One line, which names the model.
    """
    place = device if device.type == "meta" else torch.device("cpu")
    try:
        with place:
            net = build(norm=norm, num_classes=num_classes, in_channels=in_channels)
    except (ValueError, MemoryError):  # of a norm, or of timm: it names itself
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # torch has no class of its own for this on the CPU
            raise
        raise ValueError(f'model "{model}": {said(error)}') from error
    if not isinstance(net, nn.Module):
        raise ValueError(f'model "{model}" returned a {type(net).__name__}; a torch.nn.Module is needed')
    _check_norms(net, model, norm)
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    net.register_forward_hook(Logits(model, num_classes))
    return net.to(device).train()


def _check_norms(net: nn.Module, model: str, norm: NormFactory) -> None:
    from norms.convert import audit_norms  # imports torchvision, which takes a second

    info = factory_info(norm)
    ours = [path for path, _ in norm_modules(net)]
    left = audit_norms(net).left
    if left:
        raise ValueError(
            f'model "{model}" keeps norms of its own, {len(left)} in all: {left[0].path} is a {left[0].old}'
        )
    if not ours:
        raise ValueError(f'model "{model}" has no norm of the factory that it got: norm(channels) builds one')
    for path in ours:
        layer = net.get_submodule(path)
        paired = path and isinstance(net.get_submodule(path.rpartition(".")[0]), ConvNormAct)
        if hasattr(layer, "transform_weight") and not paired and not hasattr(net, "conversion"):
            raise ValueError(
                f'norm "{info.name}" transforms the convolution\'s weight, and model "{model}" has no place for it at '
                f"{path}: tasks.nets.blocks.conv_norm_act pairs the two"
            )


def said(error: BaseException) -> str:
    """The type and the text of an error, in one line."""
    return cut(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)


def conversion(net: nn.Module) -> dict[str, Any]:
    """{"conversion": counts of what was done to the norms of timm's model in `net`}; {} where there is none."""
    found = [module.conversion for module in net.modules() if hasattr(module, "conversion")]
    return {"conversion": found[0]} if found else {}


@functools.cache
def build_timm(model: str) -> BuildModel:
    """A function as `register_model` takes it: timm's model without trained weights, its norms converted."""

    def build(norm: NormFactory, num_classes: int, in_channels: int) -> nn.Module:
        import timm

        from norms.convert import converted

        name = model.removeprefix(PREFIX)
        try:
            net: Any = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f'model "{model}": {said(error)}') from error
        net, audit = converted(net, norm)
        counts = {"swapped": len(audit.swapped), "left": len(audit.left), "changed": len(audit.changed)}
        more = {name: len(getattr(audit, name)) for name in ("removed", "rewired", "plain", "bare", "unhooked")}
        net.conversion = {"timm": timm.__version__, **counts, **{name: n for name, n in more.items() if n}}
        return net

    return build


def check_timm(model: str) -> None:
    """ValueError where timm is not installed, or has no such model (with the nearest)."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'model "{model}" needs timm: {sys.executable} -m pip install timm') from error
    name, known = model.removeprefix(PREFIX), timm.list_models()
    if name.partition(".")[0] not in known:
        near = nearest(model, [f"{PREFIX}{each}" for each in known])
        raise ValueError(f'unknown model "{model}"; timm.list_models() has the names{near}')
