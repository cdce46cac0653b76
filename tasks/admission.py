"""Whether a norm can serve in a network at all: decided while planning, on zeros, before anything is trained.

The reasons do not name the norm: wherever one is read, the norm's name stands beside it, and norms that lack the same
share one note under a table.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Hashable, Iterator

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from norms.factory import NormFactory, factory_info
from norms.protocol import NormInfo, equivalent
from norms.situation import predict, situation
from tasks.nets.guests import BuildModel, said
from tasks.nets.models import guest

FEW_VALUES = 50_000
"""Planning tries a norm on images of at most so many values with real zeros, else on the meta device."""
FEW_PARAMETERS = 10_000_000
"""The same of the network: a larger one is built on the meta device, where it takes no memory."""


def lacking(info: NormInfo, task: str, absent: Collection[str] = ("domain", "context"), slices: int = 1) -> str | None:
    """None, or that this norm needs what the task has not: any of `absent`, or one norm batch per update."""
    missing = sorted(info.needs & set(absent))
    if missing:
        return f"needs {' and '.join(missing)}, which {task} has not"
    if slices > 1 and info.across_iterations:
        return (
            f"takes statistics from earlier iterations, and would take each of the {slices} norm batches of an update "
            "for one; lower batch_size together with norm_batch_size"
        )
    return None


def try_forward(
    net: nn.Module, shape: tuple[int, int, int], slices: int, shared: int, device: str, domain: int | None = None
) -> None:
    """One batch of zeros (C, H, W) through `net` in both modes, in norm batches of `shared` images of one domain."""
    slices = min(slices, 2)  # more than one is all that matters to shapes, and planning has to be fast
    images = torch.zeros(slices * shared, *shape, device=device)
    with situation(net.train(), domain=domain, slices=slices):
        net(images)
    with situation(net.eval(), domain=domain):
        predict(net, images)
    refuse_empty(net)


def refuse_empty(net: nn.Module) -> None:
    """ValueError where every norm says that it is `none` in this place, as a fused one without its activation."""
    if equivalent(net) == "none":
        raise ValueError("no activation follows any norm here, and without one it does nothing but its affine")


def refusal(
    norm: NormFactory,
    forward: Callable[[str, int], None],
    shared: int,
    shape: tuple[int, int, int],
    network: tuple[Hashable, ...],
    model: str = "",
) -> str | None:
    """Why a norm refuses a network (the text of its ValueError), or None; each question is asked once.

    Args:
        norm: who is asked.
        forward: builds the network on the given device and forwards norm batches of the given size in both modes.
        shared: images that share statistics.
        shape: (C, H, W) of an image.
        network: whatever else the answer can depend on, the task's name first.
        model: its name, where `tasks.nets.models.build_net` builds it. One that is not the suite's own may fail in any
            way, which is an answer, too.

    Raises:
        MemoryError: there is not enough for the network.
    """
    build = guest(model)
    key = (norm.info, norm.build, json.dumps(norm.options, sort_keys=True), shared, shape, model, build, *network)
    if key not in _ANSWERS:
        _ANSWERS[key] = _decide(norm, forward, shared, shape, build, model)
    return _ANSWERS[key]


_ANSWERS: dict[tuple[Hashable, ...], str | None] = {}


def _decide(
    norm: NormFactory,
    forward: Callable[[str, int], None],
    shared: int,
    shape: tuple[int, int, int],
    build: BuildModel | None,
    model: str,
) -> str | None:
    # A few real zeros first: the meta device costs the import of torch's compiler, two seconds of every plan. What
    # serves two images per norm batch is taken to serve more; only a refusal is decided at the true size.
    pair = min(shared, 2)
    if 2 * pair * math.prod(shape) <= FEW_VALUES:
        undecided = (ValueError, RuntimeError, MemoryError) if build is None else (Exception,)
        with contextlib.suppress(*undecided), _few_parameters():
            forward("cpu", pair)
            return None
    for device in ("meta", "cpu"):
        try:
            forward(device, shared)
        except ValueError as error:
            return _without_name(norm, str(error).replace("\n", " "))
        except RuntimeError as error:
            if "allocate memory" in str(error):  # torch has no class of its own for this on the CPU
                raise MemoryError(str(error)) from error
            # A layer that looks at values can not run on the meta device: decide with real zeros. What fails there,
            # too, is a defect and no reason to skip: the run is planned, fails, and says why.
            failed: Exception = error
        except Exception as error:
            if build is None:
                raise
            failed = error
        else:
            return None
    return None if build is None else f'with model "{model}": {said(failed)}'


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
