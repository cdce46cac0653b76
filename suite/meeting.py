"""Where the workers of one run meet: a store of torch.distributed, and what they leave there for each other.

On one node the run's own process opens the store, on the loopback address alone; torchrun brings one along. A worker
that fails says so in the store before it lets go of its connections, so that of several failures the first is the
reason and the others (a connection that was closed) follow from it. Nothing is pickled: texts are JSON, the state of a
run is a file of torch.save in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import distributed as dist

    from norms.workers import Workers
    from tasks.journal import State

_CONNECT = 60.0  # seconds in which a store that is there answers
_AGREE = 60.0  # seconds by which one worker may find a state unusable later than another


@dataclass(frozen=True)
class Failure:
    """The failure of one worker.

    Args:
        rank: of the worker.
        reason: in one line, without the worker.
        trace: the traceback; "" where its process was killed.
        silent: its process ended without a word; what the other workers say then follows from it, even if it was heard
            before.
    """

    rank: int
    reason: str
    trace: str = ""
    silent: bool = False

    def __str__(self) -> str:
        """ "worker 2: RuntimeError: ...", "worker 2 was killed by SIGKILL ..."; of rank 0 the reason alone."""
        if not self.rank:
            return self.reason
        return f"worker {self.rank}{':' if self.trace else ''} {self.reason}"


@dataclass(frozen=True)
class Meeting:
    """The place where the workers of one run meet. A value that travels to their processes.

    Args:
        host, port: of the store.
        prefix: of this run's keys in it.
        size: how many workers.
        backend: "gloo" or "nccl".
        timeout: seconds that one worker waits for another.
        local: all of them are on this machine.
    """

    host: str
    port: int
    prefix: str
    size: int
    backend: str
    timeout: float
    local: bool

    def store(self) -> dist.Store:
        """A connection of one's own: who waits in one keeps no other thread waiting. Raises as `connect`."""
        from torch import distributed as dist

        return dist.PrefixStore(self.prefix, connect(self.host, self.port))

    def join(self, rank: int, store: dist.Store, device: str) -> None:
        """Make this process worker `rank` of the default group of torch.distributed; returns once all are in it."""
        import torch
        from torch import distributed as dist

        where = torch.device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        with _loopback() if self.local else contextlib.nullcontext():
            dist.init_process_group(
                self.backend,
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=self.size,
                timeout=timedelta(seconds=self.timeout),
                device_id=where if self.backend == "nccl" else None,
            )


def host_store() -> tuple[dist.TCPStore, int]:
    """A store of this process that no other machine reaches, and its port."""
    from torch import distributed as dist

    with socket.socket() as listening:  # torch itself would listen on all addresses of the machine
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        port = listening.getsockname()[1]
        wait = timedelta(seconds=_CONNECT)
        store = dist.TCPStore(
            "127.0.0.1", port, None, True, wait, wait_for_workers=False, master_listen_fd=os.dup(listening.fileno())
        )
    return store, port


def connect(host: str, port: int) -> dist.TCPStore:
    """A connection to a store. Raises torch.distributed.DistNetworkError where there is none."""
    from torch import distributed as dist

    return dist.TCPStore(host, port, None, False, timedelta(seconds=_CONNECT))


def post(store: dist.Store, failure: Failure) -> None:
    """Leave a failure for the other workers; whoever adds first has failed first."""
    number = store.add("failures", 1)
    store.set(f"failure {number}", json.dumps(asdict(failure)))


def posted(store: dist.Store) -> list[Failure]:
    """The failures so far, in the order in which they were left."""
    names = [f"failure {number + 1}" for number in range(store.add("failures", 0))]
    return [Failure(**json.loads(store.get(name))) for name in names if store.check([name])]


def first_cause(failures: Sequence[Failure]) -> tuple[Failure, bool]:
    """The failure from which the others follow, of one or more, and whether nothing that is still to be heard can
    precede it."""
    silent = next((failure for failure in failures if failure.silent), None)
    return silent or failures[0], silent is not None


def pass_over(store: dist.Store, workers: Workers, error: Exception) -> None:
    """Return once no worker can use the state that all were to go on from, as this one can not.

    Raises:
        RuntimeError: one worker can use it, and so waits elsewhere for this one; or it has not said so in time.
    """
    from torch import distributed as dist

    turn = store.add(f"unusable to {workers.rank}", 1)
    store.set(f"unusable {turn} {workers.rank}", "")
    names = [f"unusable {turn} {each}" for each in range(workers.size)]
    try:
        store.wait(names, timedelta(seconds=_AGREE))
    except dist.DistError:
        others = [each for each, name in enumerate(names) if not store.check([name])]
        raise RuntimeError(
            f"a checkpoint can be used by workers {others}, and not by worker {workers.rank}: {error}"
        ) from error


def leave_group() -> None:
    """Let go of the default group, whatever has become of the others in it."""
    from torch import distributed as dist

    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError, ValueError):  # another thread has done it
        if dist.get_backend() == "nccl":  # which would wait for the others
            dist.group.WORLD.abort()  # type: ignore[union-attr]
        dist.destroy_process_group()


def share_state(workers: Workers, device: str, state: State | None = None) -> State | None:
    """The state that a run goes on from, given by rank 0 to all workers; None: from the start.

    Args:
        device: of this worker.
        state: of rank 0; what others give is not looked at.
    """
    import torch
    from torch import distributed as dist

    content = io.BytesIO()
    if workers.rank == 0 and state is not None:
        torch.save(state, content)
    where = torch.device(device)
    size = torch.tensor([len(content.getbuffer())], device=where)
    dist.broadcast(size, 0)
    if not size:
        return None
    if workers.rank == 0:
        dist.broadcast(torch.frombuffer(content.getbuffer(), dtype=torch.uint8).to(where), 0)
        return state
    got = torch.empty(int(size), dtype=torch.uint8, device=where)
    dist.broadcast(got, 0)
    found: State = torch.load(io.BytesIO(got.cpu().numpy().data), map_location="cpu", weights_only=True)
    return found


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """gloo talks on the loopback interface: a machine's name may lead nowhere, and nobody else has to hear it."""
    name = "GLOO_SOCKET_IFNAME"
    found = [each for _, each in socket.if_nameindex() if each in ("lo", "lo0")]
    if name in os.environ or not found:
        yield
        return
    os.environ[name] = found[0]
    try:
        yield
    finally:
        del os.environ[name]
