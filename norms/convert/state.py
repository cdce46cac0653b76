"""The tensors, attributes and random generators of a network: remembered, compared and put back.

A trace runs a forward once (norms.convert.trace). Nothing of that one run may stay in the network.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass
class _Held:
    """A tensor as it was: `version` counts its changes in place (None: an inference tensor, which counts none)."""

    name: str
    tensor: Tensor
    before: Tensor
    version: int | None

    def differs(self) -> bool:
        """Changed in place; the bits are compared, too, since a change through `.data` is counted nowhere."""
        if _version(self.tensor) != self.version or self.tensor.is_meta:
            return _version(self.tensor) != self.version
        now, then = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (self.tensor, self.before))
        return not torch.equal(now, then)


class State:
    """The tensors and attributes of a network and the generators that it may draw from, to be compared and put back.

    Followed are the attributes of its modules, parameters and buffers among them, and plain containers in them.
    """

    def __init__(self, net: nn.Module):
        self._containers: list[tuple[str, Any, Any]] = []
        self._tensors: dict[int, _Held] = {}
        self._generators: list[tuple[Any, bytes]] = []
        self._seen: dict[int, Any] = {}  # with the object, so that no other gets its id
        for path, module in net.named_modules():
            self._take(path, vars(module))
        for generator in (random._inst, np.random.mtrand._rand, torch.default_generator):
            self._take("", generator)
        self._take("", list(torch.cuda.default_generators))

    def changed(self) -> list[str]:
        """Names of the attributes and tensors that are no longer what they were."""
        names = {held.name for held in self._tensors.values() if held.differs()}
        names |= {_joined(name, key) for name, *container in self._containers for key in changed_keys(*container)}
        return sorted(names)

    def drawn(self) -> list[str]:
        """The kinds of the generators that have moved on."""
        kinds = [type(generator) for generator, before in self._generators if _read(generator) != before]
        return sorted({f"{kind.__module__}.{kind.__qualname__}" for kind in kinds})

    def restore(self) -> list[Tensor]:
        """Put everything back; the tensors that had been changed."""
        for _, container, before in self._containers:
            if changed_keys(container, before):
                container.clear()
                container.extend(before) if isinstance(container, list | deque) else container.update(before)
        touched = [held for held in self._tensors.values() if held.differs()]
        for held in touched:
            held.tensor.data.copy_(held.before)
        for generator, state in self._generators:
            if _read(generator) != state:
                _write(generator, state)
        return [held.tensor for held in touched]

    def settle(self, tensors: Iterable[Tensor]) -> None:
        """These were changed and put back: their count of changes is no sign of another value."""
        for tensor in tensors:
            if id(tensor) in self._tensors:
                self._tensors[id(tensor)].version = _version(tensor)

    def _take(self, name: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, _GENERATORS):
            self._generators.append((value, _read(value)))
        elif isinstance(value, Tensor) and not is_lazy(value):
            self._tensors[id(value)] = _Held(name, value, value.detach().clone(), _version(value))
        elif isinstance(value, dict | list | set | deque):
            self._containers.append((name, value, copy.copy(value)))
            parts = value.items() if isinstance(value, dict) else ((None, part) for part in value)
            for key, part in parts:
                self._take(_joined(name, key), part)


def _joined(name: str, key: Any) -> str:
    """The path of a member of an attribute or container: parameters and buffers are named as `net` names them."""
    return name if key in (None, "_parameters", "_buffers", "_modules") else f"{name}.{key}" if name else str(key)


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, bool | int | float | str) and one == other)


def changed_keys(container: Any, before: Any) -> list[Any]:
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
