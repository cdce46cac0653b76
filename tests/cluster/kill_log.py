"""The tasks of tests.cluster.kill, and the log that their runs write: who made which run, and when.

Every process that makes a run appends a line at its start, one each 50 ms while it computes, and one at its end, with
O_APPEND, so that lines of several processes stay whole. The clock is CLOCK_MONOTONIC, which all processes of a machine
share.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from suite.live import born

PLUGIN = '''
import contextlib, os, threading, time
from pathlib import Path
from tasks import get_task, register_task, task_names
from tasks.base import Options, Outcome, Setting
from tasks.classification.options import ClassificationOptions

LOG = {log!r}

@contextlib.contextmanager
def logged(grid, task, seed):
    process = os.getpid()
    born = Path(f"/proc/{{process}}/stat").read_text().rpartition(")")[2].split()[19]
    over = threading.Event()

    def line(what):
        clocks = f"{{time.monotonic():.4f}} {{time.time():.4f}}"
        text = f"{{what}} {{grid}} {{task}} {{seed}} {{process}} {{born}} {{clocks}}\\n"
        file = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, text.encode())
        os.close(file)

    def beat():
        while not over.wait(0.05):
            line("beat")

    line("start")
    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
    line("end")

class NothingOptions(Options):
    grid: int
    seconds: float = 0.3

class Nothing:
    name, version, options, metrics = "nothing", 1, NothingOptions, ("top1",)

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def run(self, norm, options, context):
        with logged(options.grid, self.name, context.seed):
            time.sleep(options.seconds)
        return Outcome({{"top1": context.seed / 1000}}, evidence={{"data": "synthetic"}})

class SmallOptions(ClassificationOptions):
    grid: int = 0

class Small(type(get_task("classification"))):
    """Classification, logged."""

    name, options = "small", SmallOptions

    def run(self, norm, options, context):
        with logged(options.grid, self.name, context.seed):
            return super().run(norm, options, context)

if "nothing" not in task_names():
    register_task(Nothing())
    register_task(Small())
'''
"""With the path of the log in the place of {log}: on one machine it is the same place wherever a run is made."""

Name = tuple[int, str, int]
"""A run: the number of its grid, its task, its seed."""
_TAIL = 2**16  # bytes of the log in which what goes on now has a line


@dataclass
class Attempt:
    """A process that made a run, or a part of it.

    Args:
        run: which.
        process, born: its number, and when it began (suite.live.born).
        first, last: of its lines, by the clock that processes share.
        begun: of its first line, in seconds since 1970.
        ended: whether it came to the end of its work.
    """

    run: Name
    process: int
    born: str
    first: float
    last: float
    begun: float
    ended: bool = False

    @property
    def lives(self) -> bool:
        return born(self.process) == self.born and not _is_zombie(self.process)


def attempts(log: Path, *, newest: bool = False) -> list[Attempt]:
    """All attempts so far, in the order of their starts; or those of the newest lines."""
    found: dict[tuple[Name, int, str], Attempt] = {}
    for line in _lines(log, newest):
        what, grid, task, seed, process, start, clock, time = line.split()
        run = (int(grid), task, int(seed))
        each = found.setdefault(
            (run, int(process), start), Attempt(run, int(process), start, float(clock), float(clock), float(time))
        )
        each.last = float(clock)
        each.ended = each.ended or what == "end"
    return sorted(found.values(), key=lambda attempt: attempt.first)


def at_once(made: list[Attempt]) -> list[tuple[Attempt, Attempt]]:
    """Pairs of attempts at one run that went on at the same time."""
    by_run: dict[Name, list[Attempt]] = defaultdict(list)
    for attempt in made:
        by_run[attempt.run].append(attempt)
    return [
        (one, other)
        for each in by_run.values()
        for number, one in enumerate(each)
        for other in each[number + 1 :]
        if other.first < one.last
    ]


def _lines(log: Path, newest: bool) -> list[str]:
    if not log.exists():
        return []
    with log.open("rb") as stream:
        if newest and (begin := log.stat().st_size - _TAIL) > 0:
            stream.seek(begin)
            stream.readline()
        return stream.read().decode().splitlines()


def _is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return True
