"""One convolution in the place of a convolution and the norm after it, for evaluation.

    norm(conv(x)) = a * (W x + bias) + b = (a W) x + (a * bias + b)          a, b per output channel

Many norms here are such a map a y + b in evaluation: those with running statistics per channel, and `none`. Which ones
is measured on the layer itself and not read from its class or its buffers. torch.nn.utils.fuse_conv_bn_eval does the
latter: it takes every module with running_mean and running_var for batch normalization.

Axes: N samples, C channels, * positions.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from norms.protocol import NormInfo, TransformWeight, hook
from norms.situation import situation

_Conv = TypeVar("_Conv", nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS: tuple[tuple[type[nn.Module], int], ...] = ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3))

_BATCHES = ((3, 4), (1, 5), (2, 1), (1, 1))
"""(N, side) of the inputs that a norm is measured on: one sample and several, one position and several."""

_FAR = 2.0**30
"""Where the scale is measured: the larger, the less of it is lost beside a large shift."""

_TOLERANCE = 1e-10
"""Of float64 results, relative to the terms of a y + b. A norm that computes in float32 is off by 1e-8 or more."""


def fuse(conv: _Conv, norm: nn.Module, *, domain: int | None = None) -> _Conv:
    """The convolution that computes `norm(conv(x))` in evaluation: same class, with a bias, in evaluation mode.

    The norm has to be one scale and shift per channel of its input. That is measured on a copy in float64: over inputs
    of several batch sizes, spatial sizes, magnitudes and means the outputs have to be a y + b with the same a and b.
    So it holds for this layer as it was trained: a norm whose gate is still closed may fuse, and not after training.
    The weight that the norm makes of the convolution's own (`transform_weight`) is folded in, and so is a bias.

    Args:
        conv: nn.Conv1d, nn.Conv2d or nn.Conv3d, in evaluation mode; not changed.
        norm: from `make_norm`, for the convolution's output, in evaluation mode; not changed.
        domain: as `norms.situation` tells it to a norm that needs one; None: the domain that the norm was told before.

    Returns:
        A new module on the convolution's device and in its type, rounded once. Its weight needs a gradient where the
        convolution's did.

    Raises:
        ValueError: a norm that is no such map, with the measurement; training mode; another module than such a
            convolution (transposed, lazy, a subclass with a forward of its own) or a norm of make_norm; forward hooks,
            which the result would not run; another number of channels; weights without values (the meta device) or
            results that the convolution's type can not hold.
    """
    info = _check(conv, norm)
    layer = copy.deepcopy(norm).to("cpu", torch.float64)
    # copied as values: a weight of torch.nn.utils.parametrize is computed on every access
    weight = conv.weight.detach().to("cpu", torch.float64)
    told = contextlib.nullcontext() if domain is None else situation(layer, domain=domain)
    with torch.no_grad(), told:
        try:
            transforms = hook(layer, TransformWeight)
            if transforms is not None:
                weight = transforms.transform_weight(weight)
        except ValueError as error:
            raise ValueError(f'norm "{info.name}": {error}') from error
        inputs = {"weight": weight} if "conv_weight" in info.needs else {}

        def function(y: Tensor) -> Tensor:
            return layer(y, **inputs)

        scale, shift = _affine_map(function, conv.out_channels, weight.dim() - 2, info.name)
        shape = (-1,) + (1,) * (weight.dim() - 1)
        bias = shift if conv.bias is None else shift + scale * conv.bias.to("cpu", torch.float64)
        return _with(conv, weight * scale.view(shape), bias, info.name)


def _check(conv: nn.Module, norm: nn.Module) -> NormInfo:
    """The norm's facts; ValueError for a pair that `fuse` can not take for other reasons than the norm's formula."""
    info = getattr(norm, "norm_info", None)
    if not isinstance(info, NormInfo):
        raise ValueError(f"fuse: the second argument must be a norm built by make_norm, given {type(norm).__name__}")
    kind = next((kind for kind, _ in _KINDS if isinstance(conv, kind)), None)
    if kind is None or isinstance(conv.weight, nn.parameter.UninitializedParameter):
        names = ", ".join(kind.__name__ for kind, _ in _KINDS)
        raise ValueError(f'norm "{info.name}": only {names} can be fused, given {type(conv).__name__}')
    if any(getattr(type(conv), name) is not getattr(kind, name) for name in ("forward", "_conv_forward")):
        raise ValueError(
            f'norm "{info.name}": {type(conv).__name__} has a forward of its own, so it is no plain {kind.__name__}'
        )
    for what, module in (("the convolution", conv), (f'norm "{info.name}"', norm)):
        if any(part.training for part in module.modules()):
            raise ValueError(f"{what} is in training mode; only evaluation can be fused: call eval() first")
        hooks = [
            h for part in module.modules() for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        ]
        if not all(getattr(hook, "only_looks", False) for hook in hooks):
            raise ValueError(f"{what} has forward hooks, which a fused convolution would not run; remove them first")
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise ValueError(f"{what} is on the meta device, where weights have no values")
    channels = getattr(norm, "num_channels", conv.out_channels)
    if channels != conv.out_channels:
        raise ValueError(
            f'norm "{info.name}" is for {channels} channels, and the convolution has {conv.out_channels} outputs'
        )
    return info


def _affine_map(function: Callable[[Tensor], Tensor], channels: int, spatial: int, name: str) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C,), with function(y) = scale * y + shift; ValueError where there are none."""

    def refuse(what: str) -> ValueError:
        return ValueError(f'norm "{name}" is not one scale and shift per channel in evaluation: {what}')

    def called(y: Tensor) -> Tensor:
        try:
            return function(y)
        except (ValueError, RuntimeError) as error:
            raise refuse(f"an input {tuple(y.shape)} gives {' '.join(str(error).split())}") from error

    def at(value: float) -> Tensor:
        """The outputs (C,) of one sample and position among equal inputs."""
        samples, side = _BATCHES[0]
        y = torch.full((samples, channels, *(side,) * spatial), value, dtype=torch.float64)
        return called(y).flatten(2)[0, :, 0]

    scale, shift = (at(_FAR) - at(-_FAR)) / (2 * _FAR), at(0.0)
    shape = (-1,) + (1,) * spatial
    for y in _inputs(channels, spatial):
        expected = scale.view(shape) * y + shift.view(shape)
        size = (scale.view(shape) * y).abs() + shift.view(shape).abs()
        if not ((called(y) - expected).abs() <= _TOLERANCE * size).all():  # nan is no agreement
            raise refuse(_reason(called, y))
    return scale, shift


def _inputs(channels: int, spatial: int) -> Iterator[Tensor]:
    """(N, C, *) in float64: normal values of several magnitudes, around means that differ by channel."""
    draws = torch.Generator().manual_seed(0)
    for samples, side in _BATCHES:
        for magnitude, offset in ((1.0, 0.0), (1.0, 1e3), (1e-3, 0.0), (1e3, 0.0)):
            shape = (samples, channels, *range(side, side + spatial))
            mean = torch.randn(1, channels, *(1,) * spatial, dtype=torch.float64, generator=draws)
            yield magnitude * torch.randn(shape, dtype=torch.float64, generator=draws) + offset * mean


def _reason(function: Callable[[Tensor], Tensor], y: Tensor) -> str:
    """The dependence of an output on other values than its own, in words; y: (N, C, *)."""
    if not function(y).isfinite().all():
        return "it gives values that are not finite"
    draws = torch.Generator().manual_seed(1)
    samples = torch.arange(y.shape[0]).view(-1, *(1,) * (y.dim() - 1))
    channels = torch.arange(y.shape[1]).view(1, -1, *(1,) * (y.dim() - 2))
    positions = torch.arange(y[0, 0].numel()).view(1, 1, *y.shape[2:])
    for what, index in (("samples", samples), ("channels", channels), ("positions", positions)):
        first = (index == 0).expand_as(y)
        other = torch.where(first, y, torch.randn(y.shape, dtype=y.dtype, generator=draws))
        if not torch.equal(function(y)[first], function(other)[first]):
            return f"an output depends on other {what}"
    return "an output is not linear in its value, or not the same function at every position"


def _with(conv: _Conv, weight: Tensor, bias: Tensor, name: str) -> _Conv:
    """A convolution like `conv`, with these tensors."""
    kind: type[_Conv] = next(kind for kind, _ in _KINDS if isinstance(conv, kind))  # type: ignore[assignment]
    fused = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        bias=True,
        padding_mode=conv.padding_mode,
        device="meta",  # nothing is drawn
    )
    for key, value in (("weight", weight), ("bias", bias)):
        rounded = value.to(conv.weight.device, conv.weight.dtype)
        if not rounded.isfinite().all():
            raise ValueError(f'norm "{name}": the fused {key} has values that {conv.weight.dtype} can not hold')
        setattr(fused, key, nn.Parameter(rounded, requires_grad=conv.weight.requires_grad))
    return fused.eval()
