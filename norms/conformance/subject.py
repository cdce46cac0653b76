"""The shared part of the conformance checks: a norm is made, called and trained, and results are compared.

Axes: N samples, C channels, then space.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from norms.channels import memory_format
from norms.factory import NormFactory
from norms.protocol import MakeRoom, NormInfo, Situation, TransformWeight, hook, norm_modules
from norms.situation import after_update, situation
from norms.values import cut

BATCH = 4
CHANNELS = (8, 16, 32, 64, 128, 256, 512)
"""Tried in turn: the first that the norm can be built for and forwards is used (gn's 32 groups need 32 channels)."""
TIGHT = 1e-9


class Finding(NamedTuple):
    """The result of a fact's function; `ok` None means that declared and measured must be the same text."""

    declared: str
    measured: str
    detail: str = ""
    ok: bool | None = None


@dataclass(frozen=True)
class Subject:
    """A norm and how to make, call and train a layer of it, with everything it declares to need."""

    info: NormInfo
    factory: NormFactory
    channels: int
    configured: bool = False  # with options, which may leave less of what the norm declares
    one_domain: bool = False  # every batch is told one domain, as an integer, in the place of one for each sample

    def layer(self, channels: int | None = None, *, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
        """A layer whose parameters are moved off their start, where many a mistake is multiplied by 0 or 1."""
        layer = self.fresh(channels, dtype=dtype, **kwargs)
        with torch.no_grad():
            for seed, parameter in enumerate(layer.parameters()):
                parameter.add_(noise(parameter.shape, 100 + seed, parameter.dtype), alpha=0.1)
        return layer

    def fresh(self, channels: int | None = None, *, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
        """A layer as the factory builds it."""
        if "activation" in self.info.needs:
            kwargs.setdefault("activation", nn.ReLU())
        channels = channels or self.channels
        layer = self.factory(channels, dtype=dtype, **kwargs)
        _make_room(layer, torch.empty(channels, channels, 1, 1, device="meta"))  # for the weight of `identity`
        return layer

    def x(self, seed: int = 0, *, n: int = BATCH, dtype: torch.dtype = torch.float64) -> Tensor:
        return batch((n, self.channels, 4, 4), seed, dtype)

    def call(
        self,
        layer: nn.Module,
        x: Tensor,
        domain: Tensor | None = None,
        part: str = "context",
        parameters: dict[str, Tensor] | None = None,
        seed: int | None = 0,
        offset: Tensor | None = None,
    ) -> Tensor:
        """One forward of x (N, C, *) after seeding, so that a norm that draws does so alike every time.

        Samples belong to the domains 0, 1, 0, 1, ... unless `domain` says otherwise. `offset` is added to the norm's
        input, after the convolution of a norm that has one.
        """
        if seed is not None:
            torch.manual_seed(seed)
        inputs: dict[str, Tensor] = {}
        if hook(layer, TransformWeight) is not None or "conv_weight" in self.info.needs:
            weight = transformed_weight(layer, identity(x))
            given = x
            x = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3](x, weight)
            with contextlib.suppress(RuntimeError):  # not every device's convolution keeps it; vmap can not be asked
                x = x.contiguous(memory_format=memory_format(given))
            if "conv_weight" in self.info.needs:
                inputs["weight"] = weight
        if offset is not None:
            x = x + offset
        known = next(norm.situation for _, norm in norm_modules(layer))
        assert isinstance(known, Situation)
        with self.told(layer, x, domain, part, known.slices):
            return functional_call(layer, parameters or {}, (x,), inputs) if parameters else layer(x, **inputs)

    def told(
        self, net: nn.Module, x: Tensor, domain: Tensor | None = None, part: str = "context", slices: int = 1
    ) -> contextlib.AbstractContextManager[None]:
        """The situation of a forward of x: samples belong to the domains 0, 1, 0, 1, ... unless `domain` says."""
        labels = torch.arange(len(x)) if domain is None else domain
        labels = labels % (1 if self.factory.options.get("num_domains") == 1 else 2)
        return situation(net, domain=0 if self.one_domain else labels, part=part, slices=slices)

    def bare(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One forward of x, told nothing; without a convolution but where the norm needs one, and x can have one."""
        if "conv_weight" not in self.info.needs:
            return layer(x)
        weight = identity(x)
        return layer(F.conv2d(x, weight) if x.is_floating_point() else x, weight=weight)

    def train(self, layer: nn.Module, *batches: Tensor) -> nn.Module:
        """Training steps without an optimizer, so that statistics and memories fill."""
        layer.train()
        # a norm may take derivatives with respect to its convolution's weight in its forward
        with contextlib.nullcontext() if "conv_weight" in self.info.needs else torch.no_grad():
            for i, x in enumerate(batches):
                self.call(layer, x)
                after_update(layer, lambda x=x: self.call(layer, x), (i + 1) / len(batches))  # type: ignore[misc]
        return layer

    def trained(self, *, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
        """A layer in training mode that has seen three batches."""
        return self.train(self.layer(dtype=dtype, **kwargs), *(self.x(seed, dtype=dtype) for seed in (1, 2, 3)))


class Net(nn.Module):
    """A network of one norm, called as the norm needs it; with `kernel`, a convolution of learned weights before it."""

    weight: nn.Parameter | None

    def __init__(self, subject: Subject, layer: nn.Module, kernel: int = 0):
        super().__init__()
        self.subject, self.norm = subject, layer
        weight = None
        if kernel:
            shape = (subject.channels, subject.channels, kernel, kernel)
            weight = nn.Parameter(noise(shape, 31, torch.float64) / kernel)
            _make_room(layer, weight)
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor, part: str = "context") -> Tensor:
        if self.weight is None:
            return self.subject.call(self.norm, x, part=part)
        weight = transformed_weight(self.norm, self.weight)
        y = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        with self.subject.told(self.norm, x, part=part):
            return self.norm(y, weight=weight) if "conv_weight" in self.subject.info.needs else self.norm(y)


def _make_room(layer: nn.Module, weight: Tensor) -> None:
    """Let a layer know the weight of its convolution, as tasks.nets.blocks does."""
    sized = hook(layer, MakeRoom)
    if sized is not None:
        sized.make_room(weight)


def transformed_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight that the layer wants to be convolved with."""
    transforms = hook(layer, TransformWeight)
    return weight if transforms is None else transforms.transform_weight(weight)


def find_subject(info: NormInfo, factory: NormFactory, configured: bool = False) -> Subject:
    refused: ValueError | None = None
    groups = factory.options.get("num_groups")
    for channels in (*CHANNELS, *([2 * groups] if isinstance(groups, int) else [])):  # 7 divides none of the former
        subject = Subject(info, factory, channels, configured)
        try:
            subject.call(subject.layer(), subject.x())
        except ValueError as error:
            refused = refused or error
        else:
            return subject
    assert refused is not None
    raise refused


def identity(x: Tensor) -> Tensor:
    """The weight of a convolution that changes nothing of x (N, C, *), yet one that autograd sees."""
    kind = x.dtype if x.is_floating_point() else torch.float64
    # made with a gradient: torch.func's transforms do not let a tensor ask for one later
    unit = torch.eye(x.shape[1], dtype=kind, requires_grad=True)
    return unit.reshape(x.shape[1], x.shape[1], *[1] * (x.dim() - 2))


def noise(shape: torch.Size | tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Drawn on the CPU, so that every device sees the same numbers."""
    draw = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")
    return draw.to(torch.get_default_device(), dtype)


def batch(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Samples and channels of different mean and spread, so that statistics over other axes are other numbers."""
    head = (*shape[:2], *[1] * (len(shape) - 2))
    spread, mean = 0.5 + noise(head, seed + 1000, dtype).abs(), noise(head, seed + 2000, dtype)
    return noise(shape, seed, dtype) * spread + mean


def grad(y: Tensor, x: Tensor, pull: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, pull)[0]


def gradients(y: Tensor, inputs: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """dy/dx of a scalar y for every input, zero where y does not depend on it."""
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    grads = torch.autograd.grad(y, inputs, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def close(one: Tensor, two: Tensor, tolerance: float = TIGHT) -> bool:
    scale = max(one.abs().max().item(), two.abs().max().item(), 1e-30)
    return bool(((one - two).abs().max() <= tolerance * scale).item())


def state(layer: nn.Module) -> dict[str, Any]:
    """Copies of everything a layer keeps beside its parameters: buffers and extra state, by name."""
    kept: dict[str, Any] = {name: buffer.detach().clone() for name, buffer in layer.named_buffers()}
    for name, module in layer.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            kept[f"{name}.extra_state".lstrip(".")] = copy.deepcopy(module.get_extra_state())
    return kept


def same(one: Any, two: Any, tolerance: float = 0.0) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key], tolerance) for key in one)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if tolerance and one.is_floating_point() and one.shape == two.shape and one.numel():
            return close(one, two, tolerance)
        return torch.equal(one, two)
    return bool(one == two)


def twins(s: Subject, layer: nn.Module, twin: nn.Module, x: Tensor) -> Finding:
    """Two layers that must be equal bit for bit: evaluated, trained one step, evaluated again."""
    if not same(state(layer), state(twin)):
        return Finding("same", "differs in what it keeps")
    for step in ("evaluation", "training", "evaluation after it"):
        outputs = [s.call(one.train(step == "training"), x) for one in (layer, twin)]
        if not torch.equal(*outputs):
            return Finding("same", f"differs in {step}")
    return Finding("same", "same" if same(state(layer), state(twin)) else "differs in what it keeps")


def yes(value: bool) -> str:
    return "yes" if value else "no"


def mode_name(training: bool) -> str:
    return "training" if training else "evaluation"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def line(error: BaseException) -> str:
    """Type and message in one line; a ValueError, which is written for people, without its type."""
    text = cut(" ".join(str(error).split()), 300)
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
