"""The question whether a norm can serve in a network: answered while planning, on zeros, before anything is trained.

A task describes the network as a `Host`, and `refusal` answers (suite.trial asks in a process of its own).

The reasons do not name the norm: wherever one is read, the norm's name stands beside it, and norms that lack the same
share one note under a table.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from norms.factory import NormFactory, factory_info
from norms.protocol import NormInfo, equivalent, norm_modules
from norms.situation import predict, situation
from norms.workers import ALONE, Workers, moved, own_buffers
from norms.workers import refusal as refusal_of_workers
from tasks import data as datasets
from tasks.nets.guests import said
from tasks.nets.models import guest

FEW_VALUES = 50_000
"""Planning tries a norm on images of at most so many values with real zeros, else on the meta device."""
FEW_PARAMETERS = 10_000_000
"""The same of the network: a larger one is built on the meta device, where it takes no memory."""
UNKNOWN_SHAPE, UNKNOWN_CLASSES = (3, 64, 64), 10
"""Assumed of a folder of images while planning. A norm that refuses the true shape fails in its run."""


def in_both_modes(net: nn.Module, images: Tensor, slices: int, *, domain: int | None = None) -> None:
    """Forward images (N, C, H, W) of one domain, in training mode in so many norm batches, then in evaluation mode.

    Raises:
        ValueError: what a norm refuses, or that every norm says it is `none` in this network.
    """
    with situation(net.train(), domain=domain, slices=slices):
        net(images)
    with situation(net.eval(), domain=domain):
        predict(net, images)
    refuse_empty(net)


def refuse_empty(net: nn.Module) -> None:
    """ValueError where every norm says that it is `none` in this place, as a fused one without its activation."""
    if equivalent(net) == "none":
        raise ValueError("no activation follows any norm here, and without one it does nothing but its affine")


@dataclass(frozen=True)
class Host:
    """A network that a task builds with a norm, and the batch that planning forwards through it.

    Two equal hosts are one question, which is asked once; so `build` and `forward` are functions of a module or
    classes, and everything that the answer depends on is in a field.

    Args:
        task: its name, as reasons write it: "few_shot (maml)".
        build: called as build(norm=norm, device=device, **network); gives the network in training mode.
        network: the other keyword arguments of `build`.
        shape: (C, H, W) of an image.
        norm_batch: images that share statistics in training; where a batch holds several domains, those of each.
        slices: norm batches in an SGD batch.
        absent: the facts that norms may need and the task can not tell, of "domain" and "context".
        forward: called as forward(net, images, slices, **told), images (slices * norm_batch, C, H, W); forwards them in
            both modes and raises the ValueError of a norm that refuses them.
        told: the other keyword arguments of `forward`.
        workers: that train the network together; their number and `sync` count.
    """

    task: str
    build: Callable[..., nn.Module]
    network: Mapping[str, Hashable]
    shape: tuple[int, int, int]
    norm_batch: int
    slices: int = 1
    absent: Collection[str] = ("domain", "context")
    forward: Callable[..., None] = in_both_modes
    told: Mapping[str, Hashable] = field(default_factory=dict)
    workers: Workers = ALONE

    @property
    def model(self) -> str:
        """The name of the network, where `tasks.nets.models.build_net` builds it."""
        return str(self.network.get("model", ""))


def refusal(norm: NormFactory, info: NormInfo, host: Host) -> str | None:
    """None if the norm can serve in this network, else the reason in one line.

    Args:
        norm: builds the layers.
        info: the declared facts of the norm.
        host: the network.

    Raises:
        MemoryError: there is not enough for the network.
    """
    if reason := lacking(info, host.task, host.absent, host.slices):
        return reason
    own = json.dumps(norm.options, sort_keys=True)
    network, told = (tuple(sorted(each.items())) for each in (host.network, host.told))
    slices = min(host.slices, 2)  # more than one is all that matters to shapes, and planning has to be fast
    batch = (host.shape, host.norm_batch, slices)
    key = (norm.info, norm.build, own, host.build, network, guest(host.model), batch, host.forward, told, host.workers)
    if key not in _ANSWERS:
        _ANSWERS[key] = _decide(norm, replace(host, slices=slices))
    return _ANSWERS[key]


def lacking(info: NormInfo, task: str, absent: Collection[str] = ("domain", "context"), slices: int = 1) -> str | None:
    """None if the task can give the norm what it needs, else the reason: which of the `absent` facts it needs, or one
    norm batch per update."""
    missing = sorted(info.needs & set(absent))
    if missing:
        return f"needs {' and '.join(missing)}, which {task} has not"
    if slices > 1 and info.across_iterations:
        return (
            f"takes statistics from earlier iterations, and would take each of the {slices} norm batches of an update "
            "for one; lower batch_size together with norm_batch_size"
        )
    return None


def expected(
    dataset: str, classes: int | None, unknown: tuple[int, int, int] = UNKNOWN_SHAPE
) -> tuple[tuple[int, int, int], int]:
    """(C, H, W) and number of classes of a data set before it is read.

    Args:
        dataset: its name.
        classes: the first so many that a run uses; None: all.
        unknown: the shape that is assumed where the name does not tell.
    """
    described = datasets.dataset_info(dataset)
    return described.image_shape or unknown, classes or described.num_classes or UNKNOWN_CLASSES


_ANSWERS: dict[tuple[Hashable, ...], str | None] = {}


def _mixes(layer: nn.Module) -> bool:
    info = layer.norm_info
    assert isinstance(info, NormInfo)
    return info.mixes_samples


def _decide(norm: NormFactory, host: Host) -> str | None:
    # a model that is not the suite's own may fail in any way, which is an answer, too
    foreign = guest(host.model) is not None

    def ask(device: str, norm_batch: int) -> None:
        net = host.build(norm=norm, device=device, **host.network)
        for _, layer in norm_modules(net):
            if reason := refusal_of_workers(layer, host.workers):
                raise ValueError(reason)
        images = torch.zeros(host.slices * norm_batch, *host.shape, device=device)
        used: list[bool] = []
        for _, layer in norm_modules(net) if foreign else ():
            layer.register_forward_hook(lambda *_: used.append(True))
        several = [] if host.workers.alone else [layer for _, layer in norm_modules(net) if _mixes(layer)]
        before = [own_buffers(layer) for layer in several]
        host.forward(net, images, host.slices, **host.told)
        for layer, buffers in zip(several, before, strict=True):
            if reason := moved(layer, buffers):
                raise ValueError(reason)
        if foreign and not used:
            raise ValueError(f'model "{host.model}" has norms of the factory that it got, and its forward uses none')

    # A few real zeros first: the meta device costs the import of torch's compiler, two seconds of every plan. What
    # serves two images per norm batch is taken to serve more; only a refusal is decided at the true size.
    pair = min(host.norm_batch, 2)
    if 2 * pair * math.prod(host.shape) <= FEW_VALUES:
        undecided = (Exception,) if foreign else (ValueError, RuntimeError, MemoryError)
        with contextlib.suppress(*undecided), _few_parameters():
            ask("cpu", pair)
            return None
    for device in ("meta", "cpu"):
        try:
            ask(device, host.norm_batch)
        except ValueError as error:
            return _without_name(norm, str(error).replace("\n", " "))
        except RuntimeError as error:
            if "allocate memory" in str(error):  # torch has no class of its own for this on the CPU
                raise MemoryError(str(error)) from error
            # A layer that looks at values can not run on the meta device: decide with real zeros. What fails there,
            # too, is a defect and no reason to skip: the run is planned, fails, and says why.
            failed: Exception = error
        except Exception as error:
            if not foreign:
                raise
            failed = error
        else:
            return None
    return f'with model "{host.model}": {said(failed)}' if foreign else None


@contextlib.contextmanager
def _few_parameters() -> Iterator[None]:
    """MemoryError at the parameter that makes a network large: before it is filled, and so before it takes memory."""
    values = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal values
        if parameter is not None and not is_lazy(parameter):
            values += parameter.numel()
        if values > FEW_PARAMETERS:
            raise MemoryError(f"more than {FEW_PARAMETERS} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _without_name(norm: NormFactory, text: str) -> str:
    """An error's text as a reason: an error stands alone, so layers begin it with the norm's name or the class's."""
    name = factory_info(norm).name
    layer = getattr(norm.build, "__name__", name)  # a partial has none
    for start in (f'norm "{name}": ', f'norm "{name}" ', f"{name}: ", f"{layer}: "):
        text = text.removeprefix(start)
    return text
