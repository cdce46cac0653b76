"""W processes of torch.distributed (gloo, which meet by a file) for tests: `together(W, function, *args)`.

Processes are forks of the suite's server, which has imported torch once (3 s of CPU in the first call of a session);
a worker more takes 0.2 s. Still a test file best calls `together` once for each W, with a function that
goes over all its cases and returns what they gave, and its tests look at the results.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from suite.launch.server import start_server

SECONDS = 60
"""How long a worker waits for the others in one collective, and `together` for one more worker to end."""


def together(size: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What `function(rank, *args)` returns in each of `size` processes, in the order of ranks.

    Inside, torch.distributed is initialized with gloo; `norms.workers.Workers(rank, size)` speaks through it.

    Args:
        size: W.
        function: of the top level of a module that can be imported by its name: one of tests/parts, no test file. What
            it returns is sent back, so tensors are best given as numpy arrays or lists.
        args: sent to each process.
        seconds: that one collective may take, so that a deadlock fails.

    Raises:
        AssertionError: a process raised, with its traceback, or did not end in time. The others are killed.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would have its autograd's threads
    start_server()  # the suite's, since a process has one only, and other tests count on what it does for runs
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, store, rank, size, seconds, function, args))
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        found: list[Any] = [None] * size
        faults = {}
        try:
            waiting = dict(enumerate(pipes))
            while waiting:
                ready = multiprocessing.connection.wait(list(waiting.values()), timeout=seconds + 60)
                if not ready:
                    faults.update(dict.fromkeys(waiting, "did not end in time"))
                    break
                for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                    try:
                        kind, value = waiting.pop(rank).recv()
                    except EOFError:
                        kind, value = "fault", "ended without a word"
                    if kind == "fault":
                        faults[rank] = value
                    found[rank] = value
                if faults:  # the others wait for it in vain
                    break
        finally:
            for process in processes:
                if faults:
                    process.kill()
                process.join()
    assert not faults, "\n".join(f"worker {rank} of {size}: {text}" for rank, text in faults.items())
    return found


def _work(pipe: Any, store: str, rank: int, size: int, seconds: float, function: Callable[..., Any], args: Any) -> None:
    try:
        import torch
        from torch import distributed as dist

        torch.set_num_threads(1)
        wait = timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=wait)
        warnings.simplefilter("error")  # as in the tests' own process
        try:
            value = function(rank, *args)
            dist.barrier()  # nobody leaves while another still speaks to it
        finally:
            dist.destroy_process_group()
        pipe.send(("value", value))
    except BaseException:  # noqa: BLE001  of whatever kind, the test is to show it
        pipe.send(("fault", traceback.format_exc()))
