"""Where the grids of tests.cluster.kill are made, and what can be killed there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from suite.environment import ROOT
from suite.launch.submissions import in_queue
from suite.processes import below
from tests.cluster.kill_log import Attempt, attempts
from tests.cluster.kill_proof import MARK, Grid, command, marked
from tests.parts.watching import until

_UNNOTICED = 20.0  # seconds in which Slurm has to start a process, or to know that it has none
_FRESH = 0.5  # seconds since its last line after which a run is taken to have ended
_EXPECTED = {0, 1, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
"""Exit codes of a command: done; a run failed; stopped; killed by us, before it obeyed signals."""
SIGNALS = {"-9": signal.SIGKILL, "TERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
LAST = 900.0
"""Seconds that the last, undisturbed command may take."""


class Local:
    """This machine: the command itself, twice at a time in part of the time.

    Args:
        token: the value of MARK.
    """

    kinds: ClassVar[dict[str, int]] = {
        "run -9": 5,
        "run TERM": 2,
        "fork server -9": 2,
        "command -9": 2,
        "command TERM": 1,
        "command Ctrl-C": 1,
        "command and its group -9": 2,
    }
    words: tuple[str, ...] = ("--jobs", "2")

    def __init__(self, folder: Path, draw: random.Random, token: str):
        self.folder, self.draw = folder, draw
        self.around = {**os.environ, MARK: token, "OMP_NUM_THREADS": "1"}
        self.wanted = 1
        self.given: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.codes: Counter[int] = Counter()
        self.broken: list[str] = []
        self.marks = [token]
        self._number = 0

    def keep_going(self, grid: Grid) -> None:
        """Give the command again, where fewer than wanted go on."""
        self._collect()
        while len(self.given) < self.wanted:
            self._give(grid)

    def draw_wanted(self) -> None:
        self.wanted = 2 if self.draw.random() < 0.4 else 1

    def hit(self, kind: str, grid: Grid) -> bool:
        """Kill something of this kind; whether there was anything."""
        what, _, how = kind.rpartition(" ")
        found = self.found(what, grid)
        if not found:
            return False
        number, chosen = SIGNALS[how], self.draw.choice(found)
        return _sent(chosen, number, group=what == "command and its group")

    def found(self, what: str, grid: Grid) -> list[int]:
        """Processes of a kind."""
        if what == "run":
            return [each.process for each in self.living(grid)]
        going = [process.pid for process, _ in self.given if process.poll() is None]
        if what == "fork server":
            started = [child for one in going for child in below(one) if _parent(child) == one]
            return [child for child in started if "multiprocessing.forkserver" in _words(child)]
        return going

    def living(self, grid: Grid) -> list[Attempt]:
        """The runs that are being made now."""
        now = time.monotonic()
        return [
            each
            for each in attempts(grid.log, newest=True)
            if not each.ended and now - each.last < _FRESH and each.lives
        ]

    def finish(self, grid: Grid) -> None:
        """Wait for what goes on, then give the command once more, and nobody disturbs it."""
        if not until(lambda: self._collect() == 0, LAST):
            self.broken.append(f"{len(self.given)} commands go on after {LAST:.0f} s")
        process = self._give(grid)
        try:
            code = process.wait(LAST)
        except subprocess.TimeoutExpired:
            self.broken.append(f"the last command goes on after {LAST:.0f} s")
            process.kill()
            return
        if code != 0:
            self.broken.append(f"the last, undisturbed command: exit code {code}")
        self._collect()

    def close(self) -> None:
        for process, _ in self.given:
            process.kill()
            process.wait()

    def _give(self, grid: Grid) -> subprocess.Popen[bytes]:
        self._number += 1
        said = self.folder / f"command-{self._number}.txt"
        with said.open("wb") as stream:
            process = subprocess.Popen(
                command([*grid.words, *self.words]),
                cwd=self.folder,
                env=self.around,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.given.append((process, said))
        return process

    def _collect(self) -> int:
        """Look at the commands that have ended; returns how many go on."""
        for process, said in list(self.given):
            if (code := process.poll()) is None:
                continue
            self.given.remove((process, said))
            self.codes[code] += 1
            text = said.read_text(errors="replace")
            if code not in _EXPECTED or "Traceback" in text:
                self.broken.append(f"{said.name}: exit code {code}: {' '.join(text.split())[-300:]}")
        return len(self.given)


def _running(submitted: Mapping[int, Any]) -> list[Any]:
    """Elements that Slurm takes to be running."""
    return [each for _, elements in submitted.values() for each in elements if each.state == "RUNNING"]


def _sent(process: int, number: int, *, group: bool = False) -> bool:
    try:
        (os.killpg if group else os.kill)(process, number)
    except ProcessLookupError:
        return False
    return True


def _words(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


class OnRay(Local):
    """A Ray cluster of three nodes on this machine."""

    kinds: ClassVar[dict[str, int]] = {
        "run -9": 3,
        "task -9": 4,
        "node away": 4,
        "command -9": 2,
        "command TERM": 1,
        "command Ctrl-C": 1,
        "command and its group -9": 1,
    }

    def __init__(self, folder: Path, draw: random.Random, token: str):
        super().__init__(folder, draw, token)
        self.marks.append(f"{token}-cluster")
        told = {MARK: self.marks[-1], "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ.update(told)
        from ray.cluster_utils import Cluster

        self.around |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        self._memory = {"object_store_memory": 80_000_000}
        head = {"num_cpus": 0, "include_dashboard": False, **self._memory}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1, **self._memory) for _ in range(3)]
        self.words = ("--on", f"ray:{self.cluster.address}")

    def hit(self, kind: str, grid: Grid) -> bool:
        if kind != "node away":
            return super().hit(kind, grid)
        if not self.living(grid):
            return False
        gone = self.nodes.pop(self.draw.randrange(len(self.nodes)))
        self.cluster.remove_node(gone, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1, **self._memory))
        return True

    def found(self, what: str, grid: Grid) -> list[int]:
        if what != "task":
            return super().found(what, grid)
        return [process for process, words in marked(self.marks) if words.startswith("ray::run")]

    def close(self) -> None:
        super().close()
        self.cluster.shutdown()


class OnSlurm(Local):
    """A Slurm of one node and two CPUs on this machine; the command submits arrays of two elements."""

    kinds: ClassVar[dict[str, int]] = {
        "run -9": 3,
        "element's command -9": 3,
        "batch step -9": 2,
        "slurmstepd -9": 1,
        "scancel of an element": 3,
        "scontrol requeue": 2,
        "USR1 as before the limit": 2,
    }
    words = ("--on", "slurm:array=2")

    def __init__(self, folder: Path, draw: random.Random, token: str):
        super().__init__(folder, draw, token)
        self._recipe("start", folder / "started")
        self.around["SLURM_CONF"] = os.environ["SLURM_CONF"] = str(folder / "slurm" / "slurm.conf")
        self._looked = 0.0

    def keep_going(self, grid: Grid) -> None:
        if time.monotonic() - self._looked < 1.0:
            return
        self._looked = time.monotonic()
        submitted = in_queue(grid.out)
        self._begin_now(submitted)
        if len(submitted) < self.wanted:
            self._submit(grid)

    def hit(self, kind: str, grid: Grid) -> bool:
        if kind.endswith(" -9"):
            return super().hit(kind, grid)
        running = _running(in_queue(grid.out))
        if not running or not self.living(grid):
            return False
        chosen = self.draw.choice(running)
        element = f"{chosen.job}_{chosen.index}"
        words = {
            "scancel of an element": ("scancel", element),
            "scontrol requeue": ("scontrol", "requeue", element),
            "USR1 as before the limit": ("scancel", "--batch", "--signal=USR1", element),
        }[kind]
        return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0

    def found(self, what: str, grid: Grid) -> list[int]:
        if what == "run":
            return super().found(what, grid)
        scripts = [process for process, words in marked(self.marks) if "slurm_script" in words]
        if what == "batch step":
            return scripts
        if what == "slurmstepd":
            return [parent for parent in map(_parent, scripts) if "slurmstepd" in _words(parent)]
        commands = [process for process, words in marked(self.marks) if "run_suite.py" in words]
        return [process for process in commands if _parent(process) in scripts]

    def finish(self, grid: Grid) -> None:
        """Wait for what goes on, then submit once more, and nobody disturbs it."""
        if not self._ends(grid):
            self.broken.append(f"elements wait or run after {LAST:.0f} s: {in_queue(grid.out)}"[:300])
        self._submit(grid)
        if not self._ends(grid):
            self.broken.append(f"the last array goes on after {LAST:.0f} s")
        if left := grid.look():
            self.broken.append(f"the last, undisturbed array left {left} runs")

    def close(self) -> None:
        super().close()
        self._recipe("stop", self.folder / "stopped")

    def _recipe(self, verb: str, said: Path) -> None:
        recipe = Path(__file__).with_name("slurm.sh")
        with said.open("wb") as stream:  # no pipe, which its daemons would hold open
            words = ["bash", str(recipe), verb, str(self.folder / "slurm")]
            subprocess.run(words, stdout=stream, stderr=stream, check=True, timeout=300)

    def _submit(self, grid: Grid) -> None:
        process = self._give(grid)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            self.broken.append("a submission takes more than 120 s")
            process.kill()
            process.wait()
        self._collect()

    def _ends(self, grid: Grid) -> bool:
        """Wait until nothing of the grid is in the queue, and no process of an element lives."""
        lived = time.monotonic()

        def over() -> bool:
            nonlocal lived
            time.sleep(0.5)
            submitted = in_queue(grid.out)
            self._begin_now(submitted)
            if marked(self.marks) or not _running(submitted):
                lived = time.monotonic()
            elif time.monotonic() - lived > _UNNOTICED:
                self._end_dead(submitted)
            return not submitted and not marked(self.marks)

        return until(over, LAST)

    def _end_dead(self, submitted: Mapping[int, Any]) -> None:
        """Elements that Slurm shows as running without a process: it does not hear of a slurmstepd that was killed, and
        asks the node minutes later."""
        for each in _running(submitted):
            subprocess.run(("scancel", f"{each.job}_{each.index}"), timeout=60, check=False)

    def _begin_now(self, submitted: Mapping[int, Any]) -> None:
        """Elements that Slurm holds for two minutes, or until somebody releases them, begin now."""
        for _, elements in submitted.values():
            for each in elements:
                if each.state == "PENDING" and each.reason not in ("None", "Resources", "Priority"):
                    element = f"{each.job}_{each.index}" if each.index is not None else each.job
                    for words in (("release", element), ("update", f"jobid={element}", "StartTime=now")):
                        subprocess.run(("scontrol", *words), capture_output=True, timeout=60, check=False)


PLACES: dict[str, type[Local]] = {"local": Local, "ray": OnRay, "slurm": OnSlurm}
