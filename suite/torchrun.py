"""Workers that torchrun has started, on one machine or several.

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:PORT run_suite.py run CONFIG

starts eight copies of one command. The copy of rank 0 is the invocation: it plans, claims, makes the runs one after the
other, stores and prints. The others plan the same runs and take part in each that rank 0 begins (suite.ranks). They
hear of it through the store that torchrun's agent keeps, so no file need be shared between the machines; code, config
and data must be the same on all of them, and a run that a copy has not planned ends it with a line that says so.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from results.escape import cut
from suite.meeting import Meeting, connect

if TYPE_CHECKING:
    from torch import distributed as dist

    from results.record import RunSpec

_END = "end"  # in the place of a key: no run follows
_POLL = 0.1  # seconds between two looks for the next run
_LOST = 5.0  # seconds in which a number that was drawn gets its run; else its process was killed in between


@dataclass(frozen=True)
class Place:
    """The place of this process among those that torchrun has started.

    Args:
        rank: of all.
        local_rank: on this machine; the device it computes on.
        size: how many there are.
        host, port: of torchrun's store.
        name: of this start of torchrun's; another one where it has started the workers again.
    """

    rank: int
    local_rank: int
    size: int
    host: str
    port: int
    name: str

    def check(self, runs: Sequence[RunSpec], jobs: int | None = None) -> None:
        """ValueError for runs that these workers can not make together, and for several runs at a time."""
        others = [spec for spec in runs if workers_of(spec) != self.size]
        if others:
            first = others[0]
            raise ValueError(
                f"torchrun has started {self.size} workers, and {len(others)} of {len(runs)} runs ask for others "
                f"(workers: {workers_of(first)} in {first.task}): --set {first.task}.workers={self.size} asks for "
                "these; without torchrun each run starts its own workers on one machine"
            )
        if jobs is not None and jobs > 1:
            raise ValueError(f"--jobs {jobs}: torchrun's workers make one run at a time")

    def store(self) -> dist.Store:
        """ValueError where torchrun's store is not there."""
        from torch import distributed as dist

        try:
            return dist.PrefixStore(self.name, connect(self.host, self.port))
        except dist.DistError as error:
            raise ValueError(f"torchrun's store at {self.host}:{self.port} does not answer") from error

    def meeting(self, number: int, backend: str, timeout: float) -> Meeting:
        """Where the workers of the run of this number meet."""
        name = f"{self.name}/run {number}"
        return Meeting(self.host, self.port, name, self.size, backend, timeout, local=False)

    def announce(self, word: str) -> int:
        """Tell the other copies the key of the next run; returns its number, from 1."""
        store = self.store()
        number = int(store.add("runs", 1))
        store.set(f"run {number}", word)
        return number

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Around all that the copy of rank 0 makes: at its end the others are told to leave. Nothing in the others."""
        try:
            yield
        finally:
            if self.rank == 0:
                with contextlib.suppress(ValueError):  # torchrun has gone, and they with it
                    self.announce(_END)

    def announced(self, meanwhile: Callable[[], None]) -> Iterator[tuple[int, str]]:
        """(number, key) of each run that rank 0 begins, until there is none any more.

        Args:
            meanwhile: called while there is nothing new; it may raise.

        Raises:
            ValueError: torchrun's store is gone.
        """
        from torch import distributed as dist

        store, number = self.store(), 1
        since: float | None = None
        try:
            while True:
                if store.check([f"run {number}"]):
                    word = store.get(f"run {number}").decode()
                    if word == _END:
                        return
                    yield number, word
                elif store.add("runs", 0) > number:
                    since = since or time.monotonic()
                    if time.monotonic() - since < _LOST:
                        time.sleep(_POLL)
                        continue
                else:
                    meanwhile()
                    time.sleep(_POLL)
                    continue
                number, since = number + 1, None
        except dist.DistError as error:
            raise ValueError(f"torchrun's store at {self.host}:{self.port} is gone") from error


def torchrun_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun has given this process, or one above it; None where it has given none.

    RANK alone, which other launchers set too, is no such place.

    Raises:
        ValueError: torchrun's variables are not all there, or are no numbers.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    try:
        rank, local, size, port = (
            int(environment[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
        )
        host = environment["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"torchrun's environment is damaged: {cut(str(error), 80)}") from error
    start = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(rank, local, size, host, port, f"normsuite/{environment['TORCHELASTIC_RUN_ID']}/{start}")


def workers_of(spec: RunSpec) -> int:
    """How many workers make a run together: its task's option `workers`, 1 where the task has none."""
    found = spec.task_options.get("workers", 1)
    return found if type(found) is int and found > 1 else 1
