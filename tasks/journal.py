"""The state of a run: its rows, its finished parts, its generators. A checkpoint holds what the journal keeps.

A journal always has one *state* that the run can go on from. Loops (tasks.loop) bring it up to date between two steps,
at the end of an epoch's steps and at their end; `each` after every finished item. Whatever lies between two states is
done again after an interruption, from the same generators, and gives the same numbers.

Told to leave (a signal), a run that computes steps goes on to the next boundary between two of them; anywhere else it
leaves at once, since the state at hand was copied before. A state holds tensors, numbers, texts, lists, tuples and
mappings alone, so that reading one executes nothing.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

Row = dict[str, float]
State = dict[str, Any]
_T = TypeVar("_T")


class Interrupted(BaseException):
    """The run was told to leave, and its journal has saved what it goes on from. No Exception: nothing catches it by
    accident."""


class Unusable(ValueError):
    """A state that this run can not go on from: of other code or options, or damaged. The message says why."""


class NotPlain(TypeError):
    """Something that a state can not hold; the message names it."""


class Stateful(Protocol):
    """Networks, optimizers, streams, and other objects with a state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class Position:
    """The position of a run.

    Args:
        phase: the name of the loop or of what is measured.
        done, of: epochs (or steps) of the loop that are finished, and all; or items that are measured.
        step, steps: updates of the whole run that are done, and all of them; 0 where their number is not known.
        unit: of the count `of`.
    """

    phase: str
    done: int = 0
    of: int = 0
    step: int = 0
    steps: int = 0
    unit: str = "epoch"

    def __str__(self) -> str:
        """ "epoch 12 of 90": the one that is being made; of other loops than "training" with their name."""
        if not self.of:
            return self.phase
        if self.done >= self.of:
            return f"after {self.phase}"
        number = self.done if self.unit == "step" else min(self.done + 1, self.of)
        where = f"{self.unit} {number} of {self.of}"
        return where if self.phase == "training" else f"{self.phase}, {where}"


class Journal:
    """The journal of one run.

    Args:
        state: saved by an earlier process; None: from the start.
        save: stores a state durably, with the position in it; gives False where it could not. None: nothing is copied
            or saved.
        every: seconds between two saves; the first comes so long after the start.
        tell: called with the position, and with the row where an epoch is finished.
        steps: updates of the whole run, for positions; 0: not known.
        device: whose global generator belongs to the state, beside the CPU's.
        note: called with a line for the user.

    Attributes:
        rows: the history, one mapping of numbers per epoch.
        steps_done: updates so far, in all loops.
        leaving: the run was told to leave.
    """

    def __init__(
        self,
        state: State | None = None,
        *,
        save: Callable[[State, Position], bool | None] | None = None,
        every: float = math.inf,
        tell: Callable[[Position, Row | None], None] = lambda position, row: None,
        steps: int = 0,
        device: torch.device | str = "cpu",
        note: Callable[[str], None] = print,
    ):
        self._save, self.every, self.tell, self.note = save, every, tell, note
        self.device, self.total = torch.device(device), steps
        self.leaving = False
        self.position = Position("start", steps=steps)
        self._busy = 0
        self._saved = time.monotonic()
        self._new = False  # whether the state is another one than what is stored
        self._handed: list[tuple[str, weakref.ref[torch.Generator]]] = []
        self._inside: list[list[str]] = [[]]
        self._names: set[str] = set()
        self._state: State = {"rows": [], "steps": 0, "loops": {}, "results": {}}
        if state is not None:
            self._state = _checked(state)
        self.rows: list[Row] = [dict(row) for row in self._state["rows"]]
        self.steps_done: int = self._state["steps"]

    @property
    def saves(self) -> bool:
        """True if states are kept at all."""
        return self._save is not None

    # Generators

    def hand_out(self, purpose: str, generator: torch.Generator) -> torch.Generator:
        """Remember a generator for as long as it lives: its state is part of every state of the run."""
        self._handed.append((f"{purpose} ({generator.device.type})", weakref.ref(generator)))
        return generator

    def _generators(self) -> Iterator[tuple[str, torch.Generator]]:
        """Those that are alive; of several with one name each has its number. The dead count, too: when they die is the
        garbage collector's choice, which is another one in the next process."""
        counts: dict[str, int] = {}
        for name, ref in self._handed:
            counts[name] = counts.get(name, 0) + 1
            if (generator := ref()) is not None:
                yield (name if counts[name] == 1 else f"{name} #{counts[name]}"), generator

    def surroundings(self) -> State:
        """The states of all generators: those handed out, and the global ones."""
        return {
            "generators": {name: generator.get_state() for name, generator in self._generators()},
            "globals": _global_states(self.device),
        }

    def surround(self, state: State) -> None:
        """Put the generators that are alive, and the global ones, into the states that `surroundings` gave."""
        stored = state["generators"]
        for name, generator in self._generators():
            if name in stored:
                generator.set_state(stored[name])
        _set_global_states(state["globals"], self.device)

    # Parts of a run

    def each(self, name: str, items: Iterable[_T], measure: Callable[[_T], Any]) -> list[Any]:
        """[measure(item) for item in items], where an interruption repeats the item at hand and none before.

        Args:
            name: of the whole, one of its kind in a run.
            items: as many and the same in every process of a run.
            measure: gives tensors, numbers, texts, None, or lists, tuples and mappings of these; it may hold loops.
        """
        items = list(items)
        self._open(name)
        stored = self._state["results"].get(name)
        found: list[Any] = []
        if stored is not None:
            with restoring(name):
                found = list(stored["found"])[: len(items)]
                self.surround(stored["after"])
        for number, item in enumerate(items[len(found) :], len(found)):
            unit = Position(name, number, len(items), self.steps_done, self.total, "part")
            self.at(unit if len(items) > 1 else Position(name, step=self.steps_done, steps=self.total))
            self._inside.append([])
            busy, handed = self._busy, len(self._handed)
            try:
                result = plain(measure(item), name)
            finally:
                self._busy = busy  # of a loop inside that an exception has ended
                inner = self._inside.pop()
                del self._handed[handed:]  # those of the item are done with, and the next may take their names
            with self.busy():
                found.append(result)
                if self.saves:
                    for other in inner:
                        self._state["loops"].pop(other, None)
                        self._state["results"].pop(other, None)
                    self._state["results"][name] = {"found": found, "after": self.surroundings()}
                    self._state |= {"rows": list(self.rows), "steps": self.steps_done}
                    self._new = True
                self._save_if_due()
        return list(found)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """measure(), which an interruption afterwards does not repeat; see `each`."""
        return self.each(name, [None], lambda _: measure())[0]

    # What loops tell (tasks.loop)

    def open_loop(self, name: str) -> State | None:
        """The state of this loop to go on from, if there is one."""
        self._open(name)
        state: State | None = self._state["loops"].get(name)
        # a copy: torch's optimizers take the tensors that they load for their own, and change them in place
        return None if state is None else plain(state, name)

    def keep(self, name: str, state: Callable[[], State]) -> None:
        """Bring the state of the run up to date with a loop's; the caller is busy."""
        if not self.saves:
            return
        try:
            self._state["loops"][name] = plain({**state(), "after": self.surroundings()}, name)
        except NotPlain as error:
            self._save = None
            self.note(f"this run makes no checkpoints: {error}")
            return
        self._state |= {"rows": list(self.rows), "steps": self.steps_done}
        self._new = True

    @property
    def due(self) -> bool:
        """True if a save is due or asked for."""
        return self.saves and (self.leaving or time.monotonic() - self._saved >= self.every)

    def at(self, position: Position, row: Row | None = None) -> None:
        self.position = position
        self.tell(position, row)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Within the block the run does not leave; at its end it does, where it was told to."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
        self.leave_if_told()

    def leave_if_told(self) -> None:
        """Save and raise Interrupted where the run was told to leave and is not busy."""
        if self.leaving and not self._busy:
            self.save()
            raise Interrupted

    def leave(self) -> None:
        """Tell the run to leave: at once, or at the next boundary between two steps. For a signal's handler.

        Raises:
            Interrupted: in the place where the handler runs, if the run can leave there.
        """
        self.leaving = True
        self.leave_if_told()

    def save(self) -> None:
        """Store the state at hand, if it is new; the run can be at another place by now."""
        if self._save is not None and self._new:
            self._busy += 1  # a second signal may not break into this
            try:
                self._new = self._save(self._state, self.position) is False
            finally:
                self._busy -= 1
                self._saved = time.monotonic()

    def _save_if_due(self) -> None:
        if self.due and not self.leaving:
            self.save()

    def _open(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f'"{name}" is the name of two parts of one run')
        self._names.add(name)
        self._inside[-1].append(name)


def load_network(net: nn.Module, state: Mapping[str, Any]) -> None:
    """`net.load_state_dict(state)` for a network whose buffers need not have the shapes, or be there, as they are in a
    new one: a norm may make them while it trains.

    Raises:
        RuntimeError: parameters, or other entries, do not fit.
    """
    for path, part in net.named_modules():
        for name, buffer in part._buffers.items():
            key = f"{path}.{name}".lstrip(".")
            if name in part._non_persistent_buffers_set or not (key in state or buffer is not None):
                continue
            stored = state.get(key)
            if stored is None:
                part._buffers[name] = None
            elif buffer is None or (buffer.shape, buffer.dtype) != (stored.shape, stored.dtype):
                device = next((p.device for p in net.parameters()), stored.device)
                part._buffers[name] = torch.empty_like(stored, device=device)
    net.load_state_dict(state)


def plain(value: Any, what: str = "a state") -> Any:
    """A copy that can be stored and read without executing anything: tensors, on the CPU, in their memory format.

    Raises:
        NotPlain: for anything else than tensors, numbers, texts, None, lists, tuples, sets of these and mappings.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
    if value is None or type(value) in (bool, int, float, str, bytes, torch.dtype, torch.Size):
        return value
    if isinstance(value, Mapping):
        return {plain(k, what): plain(v, f"{what}/{k}") for k, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(plain(v, what) for v in value)
    raise NotPlain(f"{what} holds a {type(value).__module__}.{type(value).__qualname__}, which can not be stored")


@contextlib.contextmanager
def restoring(what: str) -> Iterator[None]:
    """Within the block every error becomes Unusable: the state that is read is at fault."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, Unusable) else f"{type(error).__name__}: "
        raise Unusable(f"{what}: {kind}{error}") from error


def _checked(state: Any) -> State:
    """A state of this form, with containers of its own."""
    with restoring("the state"):
        kinds: Sequence[tuple[str, type]] = (("rows", list), ("steps", int), ("loops", dict), ("results", dict))
        for key, kind in kinds:
            if not isinstance(state[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        return {
            "rows": [{str(k): float(v) for k, v in row.items()} for row in state["rows"]],
            "steps": state["steps"],
            "loops": dict(state["loops"]),
            "results": dict(state["results"]),
        }


def _global_states(device: torch.device) -> State:
    import numpy

    kind, keys, at, has_gauss, gauss = numpy.random.get_state(legacy=True)
    states: State = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(numpy.asarray(keys, dtype="int64")), int(at), int(has_gauss), float(gauss)),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_global_states(states: State, device: torch.device) -> None:
    import numpy

    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, at, has_gauss, cached = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), at, has_gauss, cached))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
