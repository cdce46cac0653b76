"""Per-channel parameters and the input checks that all layers share, and questions about the place of a forward."""

from __future__ import annotations

from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from norms.protocol import ResetRunningStats, Situation, hook
from norms.workers import Workers

AUTO_GROUPS = 32
"""The most groups that `num_groups="auto"` takes: the GN paper's number."""


class PerChannel(nn.Module):
    """A module for x (N, C, *). It has no constructor of its own, so that it stands before any other base class.

    Attributes:
        num_channels: C.
        eps: added to the variance.
        weight: ones, (C,), or (D, C) where each of D domains has its own; None without affine. `bias` likewise, zeros.
        situation: facts about the batch that a training loop tells (norms.situation).
    """

    situation: Situation = Situation()
    num_channels: int
    eps: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def add_channels(
        self,
        num_channels: int,
        eps: float,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        num_domains: int | None = None,
    ) -> None:
        """Set the attributes; with `num_domains` the affine is (D, C). To be called after the module's __init__."""
        self.num_channels, self.eps = num_channels, eps
        shape = (num_channels,) if num_domains is None else (num_domains, num_channels)
        for name, start in (("weight", 1.0), ("bias", 0.0)):
            if affine:
                self.add_parameter(name, start, shape, device, dtype)
            else:
                self.register_parameter(name, None)

    def add_parameter(
        self,
        name: str,
        start: float,
        shape: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """A learned parameter that is `start` everywhere, to which `reset_parameters` brings it back."""
        self.register_parameter(name, nn.Parameter(torch.full(shape, start, device=device, dtype=dtype)))
        self.__dict__.setdefault("_starts", {})[name] = start

    def reset_parameters(self) -> None:
        """Parameters and everything that is kept as after construction, as torch's layers do it.

        Needed after `to_empty`, which gives memory to a network that was built on the meta device.
        """
        with torch.no_grad():
            for name, start in self.__dict__.get("_starts", {}).items():
                self.get_parameter(name).fill_(start)
        keeping = hook(self, ResetRunningStats)
        if keeping is not None:
            keeping.reset_running_stats()

    def check_channels(self, x: Tensor) -> None:
        """ValueError where x is not (N, C, *) or holds no floating-point numbers."""
        if not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: x must hold floating-point numbers, given {x.dtype}; convert it first, for "
                "example x.float()"
            )
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"{type(self).__name__} for {self.num_channels} channels: x must be (N, {self.num_channels}, *), "
                f"given {tuple(x.shape)}"
            )

    @property
    def merging(self) -> Workers | None:
        """The workers whose samples enter this forward's statistics; None: those of x alone do.

        With workers an empty x goes the whole way, too, since the others wait for it.
        """
        workers = self.situation.workers
        return workers if workers is not None and workers.sync and self.training else None

    def is_empty(self, x: Tensor) -> bool:
        """Whether x, which is checked, holds no sample: then there is nothing to normalize and nothing to keep."""
        self.check_channels(x)
        return x.shape[0] == 0

    def empty(self, x: Tensor) -> Tensor:
        """The output for a batch of no samples: like x, with a gradient of zeros for x and for every parameter.

        Zeros, where none at all would stop a DistributedDataParallel that waits for every gradient.
        """
        sums = [p.sum().to(x.dtype) for p in self.parameters()]
        total = torch.stack(sums).sum() if sums else x.new_zeros(())
        return (x + 0 * total).contiguous(memory_format=memory_format(x))

    def divisor(self, num_groups: int | Literal["auto"]) -> int:
        """The number of equal groups that the channels are cut into.

        "auto" is the largest divisor of C that is not above AUTO_GROUPS. ValueError for another text, and for a number
        that does not divide C.
        """
        divisors = [g for g in range(1, self.num_channels + 1) if self.num_channels % g == 0]
        if num_groups == "auto":
            return max(g for g in divisors if g <= AUTO_GROUPS)
        if num_groups not in divisors:
            raise ValueError(
                f"num_groups={num_groups} does not divide {self.num_channels} channels; allowed: "
                f'{", ".join(map(str, divisors))}, or "auto"'
            )
        return num_groups


def check_arguments(*, eps: float | None = None, **counts: int) -> None:
    """ValueError, by the argument's name, where a count is below 1 or eps is not positive.

    To be called before the module's __init__: what torch says of a tensor of negative size names no argument.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: at least 1 is needed")
    if eps is not None and eps <= 0:
        raise ValueError(f"eps={eps}: it must be positive")


def transformed() -> bool:
    """Inside torch.func's transforms (vmap, grad, jvp) or forward-mode differentiation, outside compilation.

    There a layer computes in differentiable operations: torch's own derivatives serve them all.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def ordinary(x: Tensor) -> bool:
    """A tensor with memory on a device whose kernels we know, outside compilation and torch.func's transforms."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and not transformed()
    )


def vmapped(*tensors: Tensor) -> bool:
    """Whether torch.func.vmap runs over any of them."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if torch._C._functorch.is_batchedtensor(tensor):
                return True
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def changeable(buffer: Tensor) -> bool:
    """Whether a result with its graph can be written into `buffer`. If not, the result must replace the buffer.

    It can not inside torch.func's transforms, unless they were given the buffer; nor where one has left a tensor of its
    own; nor in a compiled graph.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return torch._C._functorch.is_functorch_wrapped_tensor(buffer)
    return not torch._C._functorch.is_functorch_wrapped_tensor(buffer)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last (2 spatial dimensions), channels_last_3d (3) where x is so and not contiguous; else contiguous.

    Inside torch.func's transforms contiguous: vmap can not be asked.
    """
    if transformed():
        return torch.contiguous_format
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


class Reading:
    """The values of a small integer buffer, read from its device only when it has changed.

    So a guard on a layer's state can stand in a buffer, which travels with state_dict, functional calls and averaged
    models, and does not wait for the device in every forward.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, list[int]] | None = None

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        return Reading, ()  # a copy starts anew: its buffer counts its own changes

    def __call__(self, buffer: Tensor) -> list[int] | None:
        """The values, flat; of a layer that is vmapped over those of its first copy. None where there is nothing to
        look at: in compilation, on the meta device."""
        if torch.compiler.is_compiling():
            return None
        while torch._C._functorch.is_functorch_wrapped_tensor(buffer):
            batched = torch._C._functorch.is_batchedtensor(buffer)
            axis = torch._C._functorch.maybe_get_bdim(buffer)
            buffer = torch._C._functorch.get_unwrapped(buffer)
            buffer = buffer.select(axis, 0) if batched else buffer
        if buffer.is_meta or type(buffer) is not Tensor:
            return None
        if buffer.is_inference():
            return buffer.reshape(-1).tolist()
        if self._last is None or self._last[0] is not buffer or self._last[1] != buffer._version:
            self._last = buffer, buffer._version, buffer.reshape(-1).tolist()
        return self._last[2]
