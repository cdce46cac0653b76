"""Where the grids of tests.cluster.kill are made, and what can be killed there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from suite.processes import below
from tests.cluster.kill_log import Attempt, attempts
from tests.cluster.kill_proof import MARK, Grid, command
from tests.parts.watching import until

_FRESH = 0.5  # seconds since its last line after which a run is taken to have ended
_EXPECTED = {0, 1, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
"""Exit codes of a command: done; a run failed; stopped; killed by us, before it obeyed signals."""
LAST = 900.0
"""Seconds that the last, undisturbed command may take."""


class Local:
    """This machine: the command itself, twice at a time in part of the time.

    Args:
        token: the value of MARK.
    """

    kinds: dict[str, int] = {
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
        number = {"-9": signal.SIGKILL, "TERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}[how]
        if what == "run":
            living = self.living(grid)
            return bool(living) and _sent(self.draw.choice(living).process, number)
        going = [process for process, _ in self.given if process.poll() is None]
        if not going:
            return False
        chosen = self.draw.choice(going).pid
        if what == "command":
            return _sent(chosen, number)
        if what == "command and its group":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(chosen, number)
                return True
            return False
        servers = [
            pid for pid in below(chosen) if "multiprocessing.forkserver" in _words(pid) and _parent(pid) == chosen
        ]
        return bool(servers) and _sent(servers[0], number)

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


def _sent(process: int, number: int) -> bool:
    try:
        os.kill(process, number)
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


PLACES: dict[str, type[Any]] = {"local": Local}
