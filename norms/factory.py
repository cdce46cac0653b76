"""Factories of normalization layers: a norm and its options, bound, ready for a number of channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from norms.constructor import constructor_parameters
from norms.generators import forked_generators
from norms.protocol import AfterUpdate, CheckChannels, NormInfo, Situation, hook
from norms.telling import Once, Telling


@dataclass(frozen=True, eq=False)  # compared and hashed as an object: libraries put what they are given into sets
class Layers:
    """Builds layers of one norm with one set of options; see NormFactory, which binds it. `once`: see norms.telling."""

    info: NormInfo
    build: Callable[..., nn.Module]
    options: Mapping[str, Any]
    once: Once = field(default_factory=Once, repr=False)

    @property
    def __name__(self) -> str:
        return f"norms.{self.info.name}"  # timm looks for a norm that it knows under a name; it is to find none

    def __call__(
        self,
        num_channels: int,
        *,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: nn.Module | Callable[[Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """See NormFactory."""
        return _build(self, num_channels, affine, device, dtype, activation)


class NormFactory(functools.partial[nn.Module]):
    """Builds layers of one norm with one set of options; what `make_norm` returns.

        factory(num_channels, *, affine=True, device=None, dtype=None, activation=None) -> nn.Module

    The layer is for x (N, num_channels, *), keeps its shape, and is stamped with `norm_info` and a neutral `situation`.

    A partial that binds no arguments: timm accepts nothing but classes, functions and partials as `norm_layer=`, and
    takes a partial apart into `func` and keywords. It gets what builds the layers, whole. `func` is no function on
    purpose, since timm takes a function for a norm with the activation in it, and would leave the activation out.

    Args of a call:
        num_channels: C.
        affine: weight and bias per channel.
        device: of parameters and buffers; None: torch's default.
        dtype: of the parameters; None: torch's default.
        activation: what directly follows the norm, for a norm that fuses one; None: nothing does.

    Attributes:
        info: the declared facts of the norm.
        build: its class, or what was registered in the place of one.
        options: every option of the norm with its value.

    Raises:
        ValueError: (a call) a number of channels that is no whole number of at least 1; an activation for a norm that
            fuses none; what the layer refuses.
    """

    func: Layers

    @property
    def info(self) -> NormInfo:
        return self.func.info

    @property
    def build(self) -> Callable[..., nn.Module]:
        return self.func.build

    @property
    def options(self) -> Mapping[str, Any]:
        return self.func.options

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"make_norm({self.info.name!r}{options})"


def factory_info(norm: NormFactory) -> NormInfo:
    """The declared facts of the norm that a factory from `make_norm` builds. ValueError for any other callable."""
    if not isinstance(norm, NormFactory):
        raise ValueError(f"{norm!r} is not a factory from make_norm")
    return norm.info


def _build(
    layers: Layers,
    num_channels: int,
    affine: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    activation: nn.Module | Callable[[Tensor], Tensor] | None,
) -> nn.Module:
    info, build, options = layers.info, layers.build, layers.options
    if isinstance(num_channels, bool) or not hasattr(num_channels, "__index__"):
        raise ValueError(f'norm "{info.name}": num_channels={num_channels!r}: a whole number of channels is needed')
    parameters = constructor_parameters(build)
    contract: dict[str, Any] = {"affine": affine}
    contract |= {k: v for k, v in (("device", device), ("dtype", dtype)) if k in parameters}
    if "activation" in info.needs:
        contract["activation"] = activation  # None says that no activation follows, so a default must not step in
    elif activation is not None:
        raise ValueError(f'norm "{info.name}" fuses no activation, so it takes none at build')
    where = torch.device(device or torch.get_default_device())
    with forked_generators(where), where:
        module = build(num_channels, **contract, **options)
    if dtype is not None and "dtype" not in parameters:
        module = module.to(dtype)
    module.norm_info = info  # type: ignore[assignment]
    module.situation = Situation()  # type: ignore[assignment]
    # By a name like this torch.fx and what is built on it (feature extractors of torchvision and timm) know torch's own
    # norms to be one step, and do not look into their forwards. Ours branch on shapes, which can not be followed.
    module.__dict__["__module__"] = f"torch.nn.{type(module).__module__}"
    if hook(module, CheckChannels) is None:
        module.register_forward_pre_hook(_RefuseOtherTypes())
    if info.keeps_stats and hook(module, AfterUpdate) is not None:
        telling = module.__dict__["telling"] = Telling(layers.once)
        module.register_forward_pre_hook(telling)
    return module


class _RefuseOtherTypes:
    """A forward pre-hook of a user's norm: integers would come out as rounded numbers, without a word."""

    only_looks = True

    def __call__(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and not inputs[0].is_floating_point():
            raise ValueError(
                f"{type(norm).__name__}: x must hold floating-point numbers, given {inputs[0].dtype}; convert it "
                "first, for example x.float()"
            )
