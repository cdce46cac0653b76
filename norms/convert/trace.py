"""A forward traced by torch.fx that leaves the network as it was, and what such a trace does not keep.

torch.fx runs the forward once with stand-ins for tensors and records what is done to them. All else happens then and
never again: a counter that counts, a buffer that is updated, a random number that is drawn, a block of `torch.no_grad`
or `torch.autocast`. Whatever the forward changed is put back, and it is told what a rewritten forward would lose.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import random
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from norms.convert.audit import is_channelwise, is_ours
from norms.convert.layers import ACTIVATIONS, HOOKS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Trace(NamedTuple):
    """What was read of a forward.

    Attributes:
        graph: what is done to tensors.
        constants: tensors that the forward computed from no input, by the attribute of the network under which the
            graph expects them.
        scopes: each node's module path.
        blocks: paths of modules whose forward works under `torch.no_grad`, `torch.autocast` or the like.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    scopes: dict[fx.Node, str]
    blocks: list[str]


def trace(net: nn.Module) -> Trace:
    """Trace the forward of `net` in its current mode; `net`, its tensors and all random generators stay as they are.

    Hooks do not run: they were written for tensors.

    Raises:
        ValueError: the forward can not be traced, since it depends on values or shapes (with torch.fx's own words), or
            it changes something or draws random numbers while traced.
    """
    name = type(net).__name__
    with _without_hooks(net):
        state = _State(net)
        try:
            # gradients on, whatever the caller's mode: else a forward's own no_grad could not be told from it
            with torch.inference_mode(False), torch.enable_grad():
                tracer = _Tracer()
                graph = tracer.trace(net, concrete_args=_defaults(net))
            constants = {key: vars(net).pop(key) for key in tracer.constants}
            changed, drawn = state.changed(), state.drawn()
        except Exception as error:
            raise ValueError(
                f"{name} can not be traced by torch.fx, so what surrounds its norms is not known: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        finally:
            state.restore()
    if changed:
        raise ValueError(
            f"the forward of {name} changes {', '.join(changed)}, which torch.fx does not follow; {_KEPT_WHOLE}"
        )
    if drawn:
        raise ValueError(
            f"the forward of {name} draws random numbers ({', '.join(drawn)}) that depend on no tensor, which would "
            f"be the same ever after; {_KEPT_WHOLE}"
        )
    return Trace(graph, constants, tracer.scopes, list(tracer.blocks))


_KEPT_WHOLE = (
    "let a module of its own do that, one without convolutions, norms and activations (such modules are kept whole), "
    "or take a norm that needs no more than x"
)


def is_looked_for(module: nn.Module) -> bool:
    return is_ours(module) or is_channelwise(module) or isinstance(module, CONVOLUTIONS + ACTIVATIONS)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.constants: list[str] = []
        self.scopes: dict[fx.Node, str] = {}
        self.blocks: dict[str, None] = {}
        self.outside = _blocks_around()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_looked_for(m)
            or super().is_leaf_module(m, module_qualified_name)
            or not any(is_looked_for(part) for part in m.modules())
        )

    def get_fresh_qualname(self, prefix: str) -> str:
        name = super().get_fresh_qualname(prefix)
        self.constants.append(name)
        return name

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.scopes[node] = self.scope.module_path
        if _blocks_around() != self.outside:
            self.blocks[self.scope.module_path] = None
        return node


def _blocks_around() -> tuple[bool, bool, int]:
    # counted, since a block that switches autocast off, or one for a device that is absent, leaves no other sign
    torch.autocast_increment_nesting()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.autocast_decrement_nesting()


def _defaults(net: nn.Module) -> dict[str, Any]:
    """The forward's own defaults, so that `if mask is not None` is decided as in a plain call."""
    parameters = inspect.signature(type(net).forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}


@contextlib.contextmanager
def _without_hooks(net: nn.Module) -> Iterator[None]:
    held = [hooks for module in net.modules() for name in HOOKS if (hooks := getattr(module, name))]
    kept = [dict(hooks) for hooks in held]
    try:
        for hooks in held:
            hooks.clear()
        yield
    finally:
        for hooks, before in zip(held, kept, strict=True):
            hooks.update(before)


class _State:
    """What a network holds and what random generators it may draw from, to be compared and put back.

    Followed are the attributes of its modules, parameters and buffers among them, and plain containers in them.
    """

    def __init__(self, net: nn.Module):
        self._containers: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, Tensor, Tensor, int | None]] = []
        self._generators: list[tuple[Any, bytes]] = []
        self._seen: dict[int, Any] = {}  # with the object, so that no other gets its id
        for path, module in net.named_modules():
            self._take(path, vars(module))
        for generator in (random._inst, np.random.mtrand._rand, torch.default_generator):
            self._take("", generator)
        self._take("", list(torch.cuda.default_generators))

    def changed(self) -> list[str]:
        """Names of the attributes and tensors that are no longer what they were."""
        names = {name for name, tensor, before, version in self._tensors if _differs(tensor, before, version)}
        names |= {_joined(name, key) for name, *container in self._containers for key in _changed_keys(*container)}
        return sorted(names)

    def drawn(self) -> list[str]:
        """The kinds of the generators that have moved on."""
        kinds = [type(generator) for generator, before in self._generators if _read(generator) != before]
        return sorted({f"{kind.__module__}.{kind.__qualname__}" for kind in kinds})

    def restore(self) -> None:
        for _, container, before in self._containers:
            if _changed_keys(container, before):
                container.clear()
                container.extend(before) if isinstance(container, list | deque) else container.update(before)
        for _, tensor, before, version in self._tensors:
            if _differs(tensor, before, version):
                tensor.data.copy_(before)
        for generator, state in self._generators:
            if _read(generator) != state:
                _write(generator, state)

    def _take(self, name: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, _GENERATORS):
            self._generators.append((value, _read(value)))
        elif isinstance(value, Tensor) and not is_lazy(value):
            self._tensors.append((name, value, value.detach().clone(), _version(value)))
        elif isinstance(value, dict | list | set | deque):
            self._containers.append((name, value, copy.copy(value)))
            parts = value.items() if isinstance(value, dict) else ((None, part) for part in value)
            for key, part in parts:
                self._take(_joined(name, key), part)


def _joined(name: str, key: Any) -> str:
    """The path of what an attribute or container holds: parameters and buffers are named as `net` names them."""
    return name if key in (None, "_parameters", "_buffers", "_modules") else f"{name}.{key}" if name else str(key)


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, bool | int | float | str) and one == other)


def _changed_keys(container: Any, before: Any) -> list[Any]:
    """The keys of a dict whose values are others; of a list or set, None if it is another."""
    if isinstance(container, dict):
        absent = object()
        keys = dict.fromkeys([*before, *container])
        return [key for key in keys if not _same(container.get(key, absent), before.get(key, absent))]
    if isinstance(container, set):
        return [None] * (container != before)
    return [None] * (len(container) != len(before) or not all(map(_same, container, before)))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _differs(tensor: Tensor, before: Tensor, version: int | None) -> bool:
    """Changed in place; the bits are compared, too, since a change through `.data` is counted nowhere."""
    if _version(tensor) != version or tensor.is_meta:
        return _version(tensor) != version
    now, then = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (tensor, before))
    return not torch.equal(now, then)


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def _read(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    holder = generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator
    return pickle.dumps(holder.state)


def _write(generator: Any, state: bytes) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        generator.setstate(pickle.loads(state))  # noqa: S301  # written by _read
    else:
        holder = generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator
        holder.state = pickle.loads(state)  # noqa: S301
