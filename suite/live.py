"""News of a run while it goes: its parent hears positions and rows, `history.jsonl` in its folder holds them for
everybody else, trackers get the rows.

`history.jsonl`, while a run is not stored: one JSON object per line, and `time` in seconds since 1970 by the clock of
its machine.

    {"format": 1, "spec": {...}, "host": "node17", "process": 4242, "born": "8573", "at": {...}, "time": ...}
    {"row": {"epoch": 1.0, "train_loss": 0.5, ...}, "at": {...}, "time": ...}     a finished epoch; not finite: null
    {"at": {...}, "time": ...}                                                    a place: of a phase, every 10 s

`at` is tasks.journal.Position as a mapping. A process begins the file anew, with the rows of the checkpoint that it
goes on from (without `at` and `time`). The record has the rows, so the file goes once that is stored. A file that can
not be written costs a line, never the run; it is tried again with the next row.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import files
from results.record import MOST_ENTRIES, RunRecord, RunSpec
from results.store import run_folder
from suite.trackers import Trackers

if TYPE_CHECKING:
    from tasks.journal import Journal, Position, Row

HISTORY = "history.jsonl"
FORMAT = 1
News = dict[str, Any]
"""What the parent hears: "fraction", "position", with an epoch "row" and "clock" (steps and seconds so far), and as
"text" at most once from where the run goes on."""

_TELL_EVERY = 0.2  # seconds; a task may report as often as it likes
_NOTE_EVERY = 10.0  # seconds between two lines about one phase
_LARGEST = 8 * 2**20  # bytes of a history that is read whole; its record stays far below results.store.LARGEST


class Live:
    """The news of one run, passed on to the parent process, the file and the trackers.

    Args:
        out: the folder of results; None: there is neither a file nor a tracker.
        spec: of the run.
        send: hears news of the run, a few times a second at most, and every row.
        say: called with a line for the user.
        trouble: called with the reason before this process ends without a record, because a worker of its run is lost
            and it hangs (suite.ranks); None: it is not ended then.

    Attributes:
        clock: (steps, seconds): updates of this process in epochs that it finished, and what these took, with data,
            validation and checkpoints.
    """

    def __init__(
        self,
        out: Path | None,
        spec: RunSpec,
        send: Callable[[News], None] = lambda news: None,
        say: Callable[[str], None] = print,
        trouble: Callable[[str], None] | None = None,
    ):
        self.out, self.spec, self.send, self.say, self.trouble = out, spec, send, say, trouble
        self.fraction = 0.0
        self.clock = (0, 0.0)
        self._journal: Journal | None = None
        self._since: tuple[float, int] | None = None  # when the epoch at hand began, and after which step
        self._written = False  # whether the file holds all rows so far
        self._trackers: Trackers | None = None
        self._phase = ""
        self._told = self._noted = -math.inf
        self._complained = False

    def begin(self, journal: Journal, trackers: Sequence[str] = (), origin: str = "") -> None:
        """A process begins, or goes on with, the run of this journal.

        Args:
            origin: "from epoch 12 of 90" where it goes on.
        """
        self._journal, self._since, self.clock, self._phase = journal, None, (0, 0.0), ""
        if self.out is not None:
            self._open()
            self._trackers = Trackers(self.out, self.spec, trackers, self.say)
            self._trackers.begin(journal.rows)
        if origin:
            self._tell(text=origin)

    def __call__(self, fraction: float) -> None:
        """The finished fraction of the run, from RunContext.report."""
        self.fraction = float(fraction)
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY:
            self._tell()
        if now - self._noted >= _NOTE_EVERY and self._written:
            self._note({"at": asdict(self._position())})

    def tell(self, position: Position, row: Row | None = None) -> None:
        """Where the run stands, from its journal; with the row of an epoch that has just been finished."""
        now = time.perf_counter()
        if row is None:
            self._since = (now, position.step)
            new, self._phase = position.phase != self._phase, position.phase
            if new or time.monotonic() - self._told >= _TELL_EVERY:
                self._tell()
            if new or time.monotonic() - self._noted >= _NOTE_EVERY:
                self._note({"at": asdict(position)})
            return
        if self._since is not None:
            start, step = self._since
            steps, seconds = self.clock
            self.clock, self._since = (steps + position.step - step, seconds + now - start), None
        self._note({"row": finite(row), "at": asdict(position)})  # first, for the record of a run that is killed now
        self._tell(row=finite(row), clock=self.clock)
        if self._trackers is not None:
            self._trackers.row(row)

    def end(self, record: RunRecord) -> None:
        """The record is stored."""
        if self.out is not None:
            remove(run_folder(self.out, self.spec))
        if self._trackers is not None:
            self._trackers.end(record)

    def _position(self) -> Position:
        """Where the journal was told to stand last, with the steps since."""
        assert self._journal is not None
        return replace(self._journal.position, step=self._journal.steps_done, steps=self._journal.total)

    def _tell(self, **more: Any) -> None:
        self._told = time.monotonic()
        position = {} if self._journal is None else {"position": asdict(self._position())}
        self.send({"fraction": self.fraction, **position, **more})

    # The file

    def _open(self) -> None:
        assert self.out is not None
        assert self._journal is not None
        first = {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "host": platform.node(),
            "process": os.getpid(),
            "born": born(os.getpid()),
            "at": asdict(self._position()),
            "time": time.time(),
        }
        lines = [first, *({"row": finite(row)} for row in self._journal.rows)]
        with self._mishaps(), files.open_new(run_folder(self.out, self.spec) / HISTORY) as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def _note(self, line: dict[str, Any]) -> None:
        """Append a line; where the file is missing and an epoch is finished, begin it again."""
        self._noted = time.monotonic()
        if self._written and self.out is not None:
            with self._mishaps():
                text = json.dumps({**line, "time": time.time()}) + "\n"
                files.append(run_folder(self.out, self.spec) / HISTORY, text.encode())
        elif self.out is not None and "row" in line:
            self._open()

    @contextlib.contextmanager
    def _mishaps(self) -> Iterator[None]:
        try:
            yield
            self._written = True
        except OSError as error:
            self._written = False
            if not self._complained:
                self._complained = True
                self.say(f"{HISTORY} can not be written: {error.strerror or error}")


def finite(row: Mapping[str, float | None]) -> dict[str, float | None]:
    """A row as JSON can say it."""
    return {name: None if v is None or not math.isfinite(v) else float(v) for name, v in row.items()}


def rows_of(folder: Path) -> list[dict[str, float | None]]:
    """The finished epochs of a run that has left no record; those that can be read."""
    try:
        content = files.read_bytes(folder / HISTORY, _LARGEST)
    except OSError:
        return []
    found = (row_in(read_line(line)) for line in content.split(b"\n"))
    return [row for row in found if row is not None]


def remove(folder: Path) -> None:
    """Remove the history of a run whose record is stored."""
    with contextlib.suppress(OSError):
        (folder / HISTORY).unlink()


def read_line(line: bytes) -> dict[str, Any]:
    """A line of the file; empty where it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def row_in(line: Mapping[str, Any]) -> dict[str, float | None] | None:
    """The row of a line, None where it holds none that a record could."""
    row = line.get("row")
    if not isinstance(row, dict) or not 0 < len(row) <= MOST_ENTRIES:
        return None
    if not all(value is None or number(value) is not None for value in row.values()):
        return None
    return {name: number(value) for name, value in row.items()}


def number(value: Any) -> float | None:
    """A finite number that somebody else has written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return found if math.isfinite(found := float(value)) else None
    except OverflowError:
        return None


def where(position: Mapping[str, Any]) -> str:
    """A position in words, the item at hand counted: "epoch 3/10", "search, epoch 3/10", "after training", "attack pgd
    0", "test episodes 120/600"."""
    phase, of, done = (position.get(name) for name in ("phase", "of", "done"))
    phase = phase if isinstance(phase, str) else ""
    if not isinstance(of, int) or not isinstance(done, int) or of < 1:
        return phase
    unit = position.get("unit")
    if done >= of:
        return f"after {phase}"
    count = f"{min(max(done, 0) + (unit != 'step'), of)}/{of}"
    if unit not in ("epoch", "step"):
        return f"{phase} {count}"
    return f"{unit} {count}" if phase == "training" else f"{phase}, {unit} {count}"


def telling(row: Mapping[str, float | None]) -> list[tuple[str, float | None]]:
    """The columns of a run's last row that a line about it shows: loss and validation, else the first two."""
    names = [name for name in row if name not in ("epoch", "step", "seconds", "learning_rate")]
    loss = next((n for n in names if n == "train_loss"), next((n for n in names if "loss" in n), None))
    validation = next((n for n in names if n.startswith("val") and n != loss), None)
    chosen = [n for n in (loss, validation) if n is not None] or names[:2]
    return [(name, row[name]) for name in chosen]


def born(process: int) -> str:
    """When a process of this machine began, in its system's own words, to tell it from a later one of its number; ""
    where the system does not say, or there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
