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
from norms.protocol import HOOKS, Activation, AfterUpdate, CheckChannels, NormInfo, Situation, hook
from norms.telling import Once, Telling


class NormFactory(functools.partial[nn.Module]):
    """One norm with one set of options, as a value that builds layers when called; `make_norm` returns it.

        factory(num_channels, *, affine=True, device=None, dtype=None, activation=None) -> nn.Module

    The layer is for x (N, num_channels, *), keeps its shape, and is stamped with `norm_info` and a neutral `situation`.

    Args of a call:
        num_channels: C.
        affine: weight and bias per channel.
        device: of parameters and buffers; None: torch's default.
        dtype: of the parameters; None: torch's default.
        activation: the activation that directly follows the norm, for a norm that fuses one; None: none follows.

    Attributes:
        info: the declared facts of the norm.
        build: its class, or the callable that was registered in the place of one.
        options: every option of the norm with its value, as a new dict.

    A factory can be pickled and copied, and its repr is the call that makes it. Two factories are equal only where they
    are one object: libraries put `norm_layer` into sets, whose members options (a dict) can not be, and each factory
    gives its warning once (norms.telling). To ask whether two build alike, compare `info`, `build` and `options`.

    It is a functools.partial for the sake of timm, and binds no arguments. timm accepts nothing but classes, functions
    and partials as `norm_layer=`, and takes a partial apart into `func` and keywords. `func` builds the layers. It is
    an object and no function on purpose, since timm takes a function for a norm with the activation in it, and would
    leave the activation out.

    Raises:
        ValueError: (a call) a number of channels that is no whole number of at least 1; an activation for a norm that
            fuses none; the layer refuses its arguments.
    """

    func: Layers

    @property
    def info(self) -> NormInfo:
        return self.func.info

    @property
    def build(self) -> Callable[..., nn.Module]:
        return self.func.build

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.func.options)

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"make_norm({self.info.name!r}{options})"


@dataclass(frozen=True, eq=False)  # compared and hashed as an object, see NormFactory
class Layers:
    """The part of a NormFactory that builds layers, with the factory's fields; `once`: see norms.telling."""

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
        activation: Activation | None = None,
    ) -> nn.Module:
        """See NormFactory."""
        info, build = self.info, self.build
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
            module = build(num_channels, **contract, **self.options)
        if dtype is not None and "dtype" not in parameters:
            module = module.to(dtype)
        _stamp(module, info, self.once)
        return module


def factory_info(norm: NormFactory) -> NormInfo:
    """The declared facts of the norm that a factory from `make_norm` builds. ValueError for any other callable."""
    if not isinstance(norm, NormFactory):
        raise ValueError(f"{norm!r} is not a factory from make_norm")
    return norm.info


def _stamp(module: nn.Module, info: NormInfo, once: Once) -> None:
    """Make a norm known as one, to the suite and to torch.fx, and give it the hooks that look at its forwards."""
    module.norm_info = info  # type: ignore[assignment]
    module.situation = Situation()  # type: ignore[assignment]
    # By a name like this torch.fx and what is built on it (feature extractors of torchvision and timm) know torch's own
    # norms to be one step, and do not look into their forwards. Ours branch on shapes, which can not be followed.
    module.__dict__["__module__"] = f"torch.nn.{type(module).__module__}"
    if not hasattr(module, HOOKS[CheckChannels]):  # None, too, says that the layer looks at its input itself
        module.register_forward_pre_hook(_RefuseOtherTypes())
    if info.keeps_stats and hook(module, AfterUpdate) is not None:
        telling = module.__dict__["telling"] = Telling(once)
        module.register_forward_pre_hook(telling)


class _RefuseOtherTypes:
    """A forward pre-hook of a user's norm: integers would come out as rounded numbers, without a word."""

    only_looks = True

    def __call__(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and not inputs[0].is_floating_point():
            raise ValueError(
                f"{type(norm).__name__}: x must hold floating-point numbers, given {inputs[0].dtype}; convert it "
                "first, for example x.float()"
            )
