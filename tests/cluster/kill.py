"""Kill things at random while a grid is made, give the same command again, and prove that nothing is lost.

    python -m tests.cluster.kill --on local|ray|slurm --kills 100 [--seed N] [--out FOLDER] [--seconds S]

Two tasks: one that does nothing for 0.3 s, and classification by a ResNet-8 that saves a checkpoint each second. When a
grid is done before the kills are, another one is begun. At the end the command is given once more and left alone, and
the folders, the log that the runs write (tests.cluster.kill_log) and the table of processes are looked at: one line per
claim with its counts, exit code 1 where one is false.

`--seed` draws the kinds of the kills and the pauses between them; what a kill meets depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.cluster.kill_log import attempts
from tests.cluster.kill_places import LAST, PLACES
from tests.cluster.kill_proof import Grid, Proof, command, marked
from tests.parts.watching import until

NOTHING, SMALL = 60, 6
"""Runs of the two tasks in a grid."""
_PAUSE = 3.0  # seconds before a kill, at most
_END = 20.0  # seconds in which what was told to end has to have ended
_WITHIN = 0.7  # part of the kills that wait until a run is being made; the others come at any time
_TARGET = 60.0  # seconds in which something of the kind has to be there


class Campaign:
    """Grids, one after the other, and the kills."""

    def __init__(self, place: Any, folder: Path, draw: random.Random, sizes: tuple[int, int]):
        self.place, self.folder, self.draw, self.sizes = place, folder, draw, sizes
        self.grids: list[Grid] = []
        self.kills: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()

    def run(self, kills: int, end: float) -> None:
        kinds, weights = [*self.place.kinds], [*self.place.kinds.values()]
        while self.kills.total() < kills and time.monotonic() < end:
            kind, pause = self.draw.choices(kinds, weights)[0], self.draw.uniform(0, _PAUSE)
            within = self.draw.random() < _WITHIN
            self._watch(pause)
            hit = until(lambda kind=kind, within=within: self._hit(kind, within), _TARGET)
            (self.kills if hit else self.missed)[kind] += 1
            self.place.draw_wanted()
            done = self.kills.total()
            if hit and (done % 10 == 0 or done == kills):
                grid = self.grids[-1]
                stored = f"{len(grid.stored)} of {len(grid.specs)} records stored"
                print(f"  {done} kills, grid {len(self.grids)}: {stored}", flush=True)
        if self.kills.total() < kills:
            print(f"  time is over after {self.kills.total()} kills", flush=True)
        self.place.finish(self.grids[-1])
        self.grids[-1].look()

    def _hit(self, kind: str, within: bool) -> bool:
        """within: only while a run is being made."""
        self._keep_going()
        grid = self.grids[-1]
        return (not within or bool(self.place.living(grid))) and self.place.hit(kind, grid)

    def _watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._keep_going()
            time.sleep(0.05)

    def _keep_going(self) -> None:
        """Keep a grid going, and look at its records."""
        if not self.grids or not self.grids[-1].look():
            if self.grids:
                self.place.finish(self.grids[-1])
            self.grids.append(Grid(len(self.grids) + 1, self.folder, *self.sizes))
        self.place.keep_going(self.grids[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=sorted(PLACES), required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder, which is kept")
    parser.add_argument("--seconds", type=float, help="for the kills; default: 15 each, and 300 more")
    parser.add_argument("--runs", type=int, nargs=2, default=(NOTHING, SMALL), metavar=("NOTHING", "SMALL"))
    given = parser.parse_args()
    folder = (given.out or Path(tempfile.mkdtemp(prefix="normsuite-kill-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    token, sizes = secrets.token_hex(8), tuple(given.runs)
    print(f"{given.kills} kills on {given.on}, seed {given.seed}, in {folder}", flush=True)
    draw, proof = random.Random(given.seed), Proof()
    whole = Grid(0, folder, 0, max(1, sizes[1]))
    subprocess.run(
        command([*whole.words, "--jobs", "1"]), check=True, stdout=subprocess.DEVNULL, timeout=LAST, cwd=folder
    )
    place = PLACES[given.on](folder, draw, token)
    campaign = Campaign(place, folder, draw, sizes)
    try:
        campaign.run(given.kills, start + (given.seconds or 15 * given.kills + 300))
        made = attempts(whole.log)
        until(lambda: not any(attempt.lives for attempt in made), _END)
        proof.look_for_processes([token], made)  # before the cluster itself goes, and would take them along
    finally:
        place.close()
    until(lambda: not marked(place.marks), _END)
    proof.look_for_processes(place.marks[1:], [])
    for grid in campaign.grids:
        proof.look_at(grid, whole.records())
    proof.bad["broken"] += place.broken
    print(f"{campaign.kills.total()} kills: {_counted(campaign.kills)}")
    if campaign.missed:
        print(f"nothing to kill: {_counted(campaign.missed)}")
    print(f"commands by their exit codes: {_counted(place.codes)}")
    print(f"{len(campaign.grids)} grids, {time.monotonic() - start:.0f} s")
    for line in proof.lines():
        print(line)
    if given.out is None and proof.holds:
        shutil.rmtree(folder)
    return 0 if proof.holds and campaign.kills.total() else 1


def _counted(counts: Counter[Any]) -> str:
    return ", ".join(f"{what}: {number}" for what, number in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
