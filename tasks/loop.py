"""The one loop under all trainings: where a training stands, its rate, clock, first-epoch memory, rows and state.

A task keeps its `for` and its step; the loop keeps the books:

    loop = Loop(context, "training", ends=epoch_ends(options.epochs, per_epoch, total), rates={optimizer: rate},
                keeps={"net": net})
    for epoch in loop.epochs():                             # goes on where an earlier process ended
        for step, (images, labels) in epoch.steps(stream):  # counts, sets rates, reports
            images = prepare(augment(images, draws, options.augmentation))
            with step:                                      # timed
                loss, right = train_step(net, optimizer, images, labels, facts, step=step.number)
            step.saw(len(labels), right, train_loss=loss)
        epoch.row["val_top1"] = evaluate(net, ...).top1

Epochs count from 1. A row holds `epoch`, the means of what its steps saw, `learning_rate` of its last step, `seconds`
(of its training steps alone: neither data nor augmentation nor validation) and what the task adds. It belongs to the
history once the body of the `for` has ended.

Of several workers (RunContext.workers) each has a loop of its own, with its own part of every batch. Rows and states
are alike on all of them but for `seconds`, the clock and memory, each worker's own; the first one's are the run's. None
waits for another between steps, so that the first alone may save, or leave.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import RunContext
from tasks.cost import PeakMemory, StepClock, norm_sizes
from tasks.journal import Position, Row, State, Stateful, Unusable, load_network, restoring
from tasks.schedule import set_learning_rate
from tasks.workers import seed_apart

_REPORT_EVERY = 0.2  # seconds; whoever listens hears no more often


def epoch_ends(epochs: int, per_epoch: int, most: int | None = None) -> list[int]:
    """After how many steps each epoch ends; `most` steps at all, which may cut the last one short."""
    most = epochs * per_epoch if most is None else min(most, epochs * per_epoch)
    return [*range(per_epoch, most, per_epoch), most]


class Step:
    """One update: `with step:` around what is timed, then `saw`.

    Attributes:
        number: from 1, in the whole loop.
        progress: the fraction of the loop that is done after this step.
        epoch: its epoch.
    """

    def __init__(self, epoch: Epoch, number: int):
        self.epoch, self.number = epoch, number
        self.progress = number / epoch.loop.total
        self.before = (number - 1) / epoch.loop.total

    def __enter__(self) -> Step:
        self.epoch.loop.clock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.epoch.loop.clock.__exit__(*error)

    def saw(self, count: int, correct: Tensor | float, **losses: Tensor | float) -> None:
        """Note what the step's forward gave: how many images (or queries), how many of them were right, and means over
        them, each under the name of its column. Of several workers each tells its part; all note what all told."""
        epoch, workers = self.epoch, self.epoch.loop.context.workers
        sums = {name: float(loss.detach() if isinstance(loss, Tensor) else loss) for name, loss in losses.items()}
        sums = {name: value * count if count else 0.0 for name, value in sums.items()}  # a mean over nothing is NaN
        if not workers.alone:
            told = torch.tensor([count, float(correct), *sums.values()], dtype=torch.float64)
            counted, right, *totals = workers.total(told.to(epoch.loop.context.device)).tolist()
            count, correct, sums = int(counted), int(right), dict(zip(sums, totals, strict=True))
        for name, total in sums.items():
            epoch.sums[name] = epoch.sums.get(name, 0.0) + total
        epoch.correct = epoch.correct + correct
        epoch.seen += count


class Epoch:
    """One epoch of a loop.

    Attributes:
        number: from 1.
        row: of the history, to which the task adds; complete once the steps are over.
    """

    def __init__(self, loop: Loop, number: int):
        self.loop, self.number = loop, number
        self.row: Row = {}
        self.sums: dict[str, float] = {}
        self.correct: Tensor | float = torch.zeros((), dtype=torch.int64, device=loop.context.device)
        self.seen = 0
        self.rate = 0.0
        self.seconds = 0.0

    def steps(self, *streams: Any) -> Iterator[tuple[Any, ...]]:
        """The epoch's steps, each with a batch of every stream: (step, batch, ...).

        Args:
            streams: each has `__next__`, `state_dict` and `load_state_dict` (tasks.data.stream); the same ones in every
                epoch of a loop.
        """
        loop, journal = self.loop, self.loop.context.journal
        loop.attach(streams)
        end, start, told = loop.ends[self.number - 1], time.perf_counter(), 0.0
        with journal.busy():
            while loop.step < end:
                if journal.due:
                    loop.wall += time.perf_counter() - start
                    loop.keep(self)
                    if not journal.leaving:
                        journal.save()
                    start = time.perf_counter()
                if journal.leaving:
                    break
                batches = [next(stream) for stream in streams]
                # the middle of the step, so that neither the first nor the last rate is 0
                middle = (loop.step + 0.5) / loop.total
                for position, (optimizer, rate) in enumerate(loop.rates.items()):
                    set_learning_rate(optimizer, value := rate(middle))
                    self.rate = self.rate if position else value
                loop.step += 1
                journal.steps_done += 1
                timed = len(loop.clock.seconds)
                seed_apart(loop.context.workers, loop.context.seed, loop.name, loop.step)
                yield Step(self, loop.step), *batches
                self.seconds += sum(loop.clock.seconds[timed:])
                if (now := time.monotonic()) - told >= _REPORT_EVERY:
                    told = now
                    loop.report()
            loop.wall += time.perf_counter() - start
            loop.read_memory()  # before the first evaluation, whose batches may be larger
            if loop.step == end:
                loop.report()
                self._complete()
                loop.keep(self)

    def _complete(self) -> None:
        loop = self.loop
        counted = {"epoch": float(self.number)} if loop.counts == "epoch" else {"step": float(loop.step)}
        means = {name: total / self.seen for name, total in self.sums.items()}
        if loop.accuracy:
            means[loop.accuracy] = float(self.correct) / self.seen
        self.row = {**counted, **self.row, **means, "learning_rate": self.rate, "seconds": self.seconds}

    def state(self) -> State:
        return {
            "sums": self.sums,
            "correct": self.correct,
            "seen": self.seen,
            "rate": self.rate,
            "seconds": self.seconds,
        }

    def load(self, state: State) -> None:
        self.sums = dict(state["sums"])
        correct = state["correct"]
        self.correct = correct.to(self.loop.context.device) if isinstance(correct, Tensor) else correct
        self.seen, self.rate, self.seconds = state["seen"], state["rate"], state["seconds"]


class Loop:
    """One training of a run.

    Args:
        context: of the run; its journal holds the state and the rows.
        name: one of its kind in the run; "training" where there is one.
        ends: after how many steps each epoch ends, rising; see `epoch_ends`.
        rates: optimizer -> its learning rate at a fraction of the loop. The row shows the first one's.
        keeps: everything else that the steps change and that is no generator and no stream of `steps`: networks, other
            optimizers, statistics. Optimizers in `rates` are kept without being named.
        total: the steps that progress counts; None: the last of `ends`.
        memory: begun before the network was built; read after the first epoch's steps (or at the first checkpoint).
        accuracy: the column of the fraction of right answers; "": none.
        counts: "epoch": rows are epochs; "step": rows say after which step they were made.

    Attributes:
        step: updates that are done.
        clock: of the steps.
        wall: seconds in the epochs' steps with data and augmentation, without what is measured between them.
        peak: megabytes, 10^6 bytes; 0.0 without `memory`.
    """

    def __init__(
        self,
        context: RunContext,
        name: str,
        *,
        ends: Sequence[int],
        rates: Mapping[torch.optim.Optimizer, Callable[[float], float]],
        keeps: Mapping[str, Stateful],
        total: int | None = None,
        memory: PeakMemory | None = None,
        accuracy: str = "train_top1",
        counts: str = "epoch",
    ):
        self.context, self.name, self.ends = context, name, list(ends)
        self.rates, self.total = dict(rates), self.ends[-1] if total is None else total
        self.keeps: dict[str, Stateful] = dict(keeps)
        self.keeps |= {f"optimizer {number}": optimizer for number, optimizer in enumerate(self.rates, 1)}
        self.memory, self.accuracy, self.counts = memory, accuracy, counts
        self.step, self.wall, self.peak = 0, 0.0, 0.0
        self.clock = StepClock(context.device)
        self._streams: tuple[Any, ...] = ()
        self._pending: list[Any] | None = None

    def epochs(self) -> Iterator[Epoch]:
        """The epochs that are left, the first of them perhaps from its middle."""
        journal = self.context.journal
        state = journal.open_loop(self.name)
        first, current = 1, None
        if state is not None:
            with restoring(self.name):
                first, current = self._load(state)
        for number in range(first, len(self.ends) + 1):
            epoch = Epoch(self, number)
            if current is not None:
                with restoring(self.name):
                    epoch.load(current)
                current = None
            journal.at(self._position(number - 1))
            yield epoch
            with journal.busy():
                journal.rows.append(epoch.row)
                journal.at(self._position(number), epoch.row)
                if number == len(self.ends):
                    journal.keep(self.name, lambda: self._state(len(self.ends) + 1, None))

    def report(self) -> None:
        """Tell how much of the run's steps is done."""
        journal = self.context.journal
        self.context.report(min(1.0, journal.steps_done / max(journal.total, self.total)))

    def costs(self, net: nn.Module) -> dict[str, float]:
        """The metrics that every training of one network has: step_seconds (median), peak_memory_mb, and the numbers of
        values in all norms of `net`, norm_parameters and norm_buffers."""
        parameters, buffers = norm_sizes(net)
        return {
            "step_seconds": self.clock.median(),
            "peak_memory_mb": self.peak,
            "norm_parameters": float(parameters),
            "norm_buffers": float(buffers),
        }

    # What an epoch asks for

    def attach(self, streams: tuple[Any, ...]) -> None:
        """The streams of the steps; those of a state that was loaded go on from there."""
        for stream in streams:
            if not (hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")):
                raise TypeError(
                    f"{self.name}: a stream has state_dict and load_state_dict; given a {type(stream).__name__}"
                )
        if self._pending is not None:
            with restoring(self.name):
                for stream, state in zip(streams, self._pending, strict=True):
                    stream.load_state_dict(state)
            self._pending = None
        self._streams = streams

    def keep(self, epoch: Epoch) -> None:
        self.read_memory()  # what is copied next would count
        self.context.journal.keep(self.name, lambda: self._state(epoch.number, epoch))

    def read_memory(self) -> None:
        """Once: later epochs and checkpoints use more than training does."""
        if self.memory is not None:
            self.peak = max(self.peak, self.memory.megabytes())
            self.memory = None

    def _position(self, done: int) -> Position:
        journal = self.context.journal
        if self.counts == "step":
            return Position(self.name, self.step, self.total, journal.steps_done, journal.total, "step")
        return Position(self.name, done, len(self.ends), journal.steps_done, journal.total)

    def _state(self, number: int, epoch: Epoch | None) -> State:
        streams = self._pending if self._pending is not None else [stream.state_dict() for stream in self._streams]
        return {
            "epoch": number,
            "current": None if epoch is None else epoch.state(),
            "ends": self.ends,
            "step": self.step,
            "clock": torch.tensor(self.clock.seconds, dtype=torch.float64),
            "wall": self.wall,
            "peak": self.peak if self.memory is None else None,
            "keeps": {name: kept.state_dict() for name, kept in self.keeps.items()},
            "modes": {name: _modes(kept) for name, kept in self.keeps.items() if isinstance(kept, nn.Module)},
            "streams": streams,
        }

    def _load(self, state: State) -> tuple[int, State | None]:
        """Everything but the streams, which come with the first steps; (epoch to go on with, what it has seen)."""
        if state["ends"] != self.ends:
            raise Unusable(f"its epochs end after {state['ends'][:3]} steps, here after {self.ends[:3]}")
        if state["keeps"].keys() != self.keeps.keys():
            raise Unusable(f"it keeps {sorted(state['keeps'])}, here are {sorted(self.keeps)}")
        for name, kept in self.keeps.items():
            if not isinstance(kept, nn.Module):
                kept.load_state_dict(state["keeps"][name])
            else:
                load_network(kept, state["keeps"][name])
                for module, training in zip(kept.modules(), state["modes"][name], strict=True):
                    module.training = training
        self.step, self.wall = state["step"], state["wall"]
        self.clock.seconds = state["clock"].tolist()
        if state["peak"] is not None:
            self.peak, self.memory = state["peak"], None
        self._pending = state["streams"]
        self.context.journal.surround(state["after"])
        return state["epoch"], state["current"]


def _modes(net: nn.Module) -> list[bool]:
    return [module.training for module in net.modules()]
