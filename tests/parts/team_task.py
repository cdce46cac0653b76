"""A plugin with a task whose workers add up numbers, and fail as they are told to."""

import os

TASK = """
import os
import signal
import time

import torch

from tasks import register_task, task_names
from tasks.base import Options, Outcome, Setting

class TeamOptions(Options):
    workers: int = 1
    parts: int = 3
    fails: str = ""  # "2 raises", "1 dies", "0 hangs, 1 raises": what workers do in the middle of the second part
    seconds: float = 0.0  # of a part

class Team:
    name, version, options, metrics = "team", 1, TeamOptions, ("top1", "test_loss")

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def run(self, norm, options, context):
        workers = context.workers
        print("worker", workers.rank, "prints", flush=True)
        log = context.data_dir / f"worker {workers.rank}"
        log.write_text(f"{os.getpid()}\\n{torch.get_num_threads()}\\n{context.folder}\\n")
        draw = context.generator("numbers")

        def measure(part):
            with log.open("a") as stream:
                stream.write(f"part {part}\\n")
            x = torch.rand(7, generator=draw, dtype=torch.float64)
            total = workers.total(workers.share(x).sum())
            if part == 1 and options.fails:
                how = dict(each.split()[:2] for each in options.fails.split(", ")).get(str(workers.rank), "")
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif how == "leaves":
                    os._exit(3)
                elif how == "hangs":
                    time.sleep(3600)
                elif how == "raises":
                    raise RuntimeError(f"of worker {workers.rank}")
                workers.total(x)
            time.sleep(options.seconds)
            return float(total)

        if workers.rank:
            assert not context.journal.saves
        found = context.journal.each("parts", range(options.parts), measure)
        return Outcome({"top1": sum(found) / 100, "test_loss": float(workers.rank)}, evidence={"data": "synthetic"})

if "team" not in task_names():
    register_task(Team())
"""


def dies(part):
    """The life of a worker's process that ends before it has begun."""
    os._exit(7)
