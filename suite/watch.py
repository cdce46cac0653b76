"""A folder of results as it is now: the runs that are being made, from their `history.jsonl` (suite.live), and how many
records there are. Needs no torch, and works beside the grid, in another terminal or on another machine that shares the
disk.

Of a run on this machine its process tells whether it goes on; of one elsewhere the age of its last sign does. Locks are
left alone: one can not be looked at without taking it, and a run whose lock a reader holds counts as taken.

All that is read here may be damaged, huge, or somebody else's: of a history the first line and the end are read, of a
link nothing, and every text is shown with `visible`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from results import files
from results.escape import cut, visible
from results.record import RunSpec
from results.store import LARGEST, RECORD, record_files
from suite.live import FORMAT, HISTORY, born, number, read_line, row_in, telling, where
from suite.progress import Names, columns, duration, number_text

_HEAD = _TAIL = 2**20  # bytes of a history that are read: its first line, and its end
_SILENT = 120.0  # seconds without a sign after which a run elsewhere is marked; steps give one every 10 s
_LONGEST = 80  # characters of a text in a row
_STATUSES = ("ok", "diverged", "failed", "skipped")


@dataclass(frozen=True)
class Seen:
    """A run that has a history.

    Args:
        spec: None where the file does not say.
        place: task, norm and key, from its path.
        state: "runs", "left" (its process is gone), "silent" (elsewhere, and no sign of it for long).
        at: its last position, a tasks.journal.Position as a mapping; perhaps empty.
        row: of its last finished epoch; perhaps empty.
        row_age, sign_age: seconds since that, and since it wrote anything. None: not known.
        left: seconds until its steps are made, at the pace so far. None: not known.
        host: where its process is, or was; "" where the file does not say.
    """

    spec: RunSpec | None
    place: tuple[str, str, str]
    state: str
    at: Mapping[str, Any]
    row: Mapping[str, float | None]
    row_age: float | None
    sign_age: float
    left: float | None
    host: str = ""


class Watch:
    """Looks at a folder again and again; what has not changed is not read twice.

    Args:
        folder: of results.

    Raises:
        ValueError: it is no folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f'"{folder}": {"is a file" if folder.exists() else "does not exist"}; a folder is needed')
        self.folder = folder
        self._statuses: dict[Path, tuple[tuple[int, int, int], str]] = {}

    def lines(self) -> Iterator[str]:
        """The table of the runs that go on, and how many records there are."""
        runs = sorted(self.runs(), key=lambda seen: seen.place)
        names = Names([seen.spec for seen in runs if seen.spec is not None])
        if runs:
            yield from columns(
                [("run", "where", "steps", "last epoch", "its age", "left"), *(_row(r, names) for r in runs)]
            )
        counts = self.statuses()
        shown = [f"{counts[status]} {status}" for status in (*_STATUSES, "damaged") if counts[status]]
        states = Counter(seen.state for seen in runs)
        words = {"runs": "being made", "silent": "without a sign", "left": "left by their process, to go on with"}
        shown += [f"{states[state]} {word}" for state, word in words.items() if states[state]]
        yield f"{', '.join(shown) or 'no run'} in {self.folder}"

    def places(self) -> dict[tuple[str, str, str], str]:
        """(task, norm, key) -> status, of the records that the last `statuses` found."""
        return {(*file.parts[-4:-2], file.parts[-2]): status for file, (_, status) in self._statuses.items()}  # type: ignore[misc]

    def runs(self) -> Iterator[Seen]:
        """The runs that have a history and no newer record."""
        for file in self.folder.glob(f"runs/*/*/*/{HISTORY}"):
            seen = _seen(file)
            if seen is not None:
                yield seen

    def statuses(self) -> Counter[str]:
        """How many records there are of each status, "damaged" ones included."""
        before, self._statuses = self._statuses, {}
        for file in record_files(self.folder):
            with contextlib.suppress(OSError):  # gone meanwhile
                found = os.lstat(file)
                mark = found.st_ino, found.st_mtime_ns, found.st_size
                known = before.get(file)
                self._statuses[file] = known if known and known[0] == mark else (mark, _status(file))
        return Counter(status for _, status in self._statuses.values())


def _row(seen: Seen, names: Names) -> tuple[str, ...]:
    place = where(seen.at)
    if seen.state != "runs":
        place = f"{seen.state} for {duration(seen.sign_age)}{', ' + place if place else ''}"
    return cells(seen, names, place)


def cells(seen: Seen, names: Names, place: str) -> tuple[str, ...]:
    """A run in a table: name, the given words for where it stands, steps, last epoch, its age, time left."""
    name = names.run(seen.spec) if seen.spec is not None else visible(" ".join(seen.place))
    step, steps = (number(seen.at.get(key)) for key in ("step", "steps"))
    count = "-" if not step and not steps else f"{step or 0:.0f}" + (f"/{steps:.0f}" if steps else "")
    row = "  ".join(f"{column} {number_text(value)}" for column, value in telling(seen.row)) or "-"
    age = "-" if seen.row_age is None else duration(seen.row_age)
    left = "-" if seen.left is None else duration(seen.left)
    return tuple(cut(visible(text), _LONGEST) for text in (name, place or "-", count, row, age, left))


def _seen(file: Path) -> Seen | None:
    try:
        head, tail, written = _ends(file)
    except OSError:
        return None
    first = read_line(head.partition(b"\n")[0])
    first = first if first.get("format") == FORMAT else {}
    lines = [first, *map(read_line, tail.split(b"\n"))]
    now = time.time()
    at: dict[str, Any] = next((line for line in reversed(lines) if isinstance(line.get("at"), dict)), {})
    row: dict[str, Any] = next((line for line in reversed(lines) if row_in(line)), {})
    state = _state(first, sign := max(0.0, now - written))
    if state != "runs":
        with contextlib.suppress(OSError):  # a record that came later: it is all done
            if os.lstat(file.parent / RECORD).st_mtime >= written:
                return None
    made, place = number(row.get("time")), (file.parts[-4], file.parts[-3], file.parts[-2])
    return Seen(
        spec=_spec(first, *place[:2]),
        place=place,
        state=state,
        at=at.get("at", {}),
        row=row_in(row) or {},
        row_age=None if made is None else max(0.0, now - made),
        sign_age=sign,
        left=_left(first, at) if state == "runs" else None,
        host=host if isinstance(host := first.get("host"), str) else "",
    )


def _ends(file: Path) -> tuple[bytes, bytes, float]:
    """(beginning, end without the beginning's first line, when it was written). Raises OSError for all but a file."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(file, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{file}: is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            head = stream.read(_HEAD)
            stream.seek(max(0, found.st_size - _TAIL))
            tail = stream.read(_TAIL)
    finally:
        os.close(descriptor)
    if found.st_size <= _TAIL:
        tail = tail.partition(b"\n")[2]
    return head, tail, found.st_mtime


def _state(first: Mapping[str, Any], sign_age: float) -> str:
    process = first.get("process")
    if first.get("host") == platform.node() and isinstance(process, int):
        return "runs" if _alive(process, first.get("born")) else "left"
    return "runs" if sign_age < _SILENT else "silent"


def _alive(process: int, since: Any) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        pass
    except (OSError, OverflowError):
        return False
    return not since or born(process) == since


def _spec(first: Mapping[str, Any], task: str, norm: str) -> RunSpec | None:
    """The spec in a first line, where it is one of the folder's."""
    try:
        spec = RunSpec.model_validate(first.get("spec"))
    except (ValidationError, RecursionError):
        return None
    return spec if (spec.task, spec.norm) == (task, norm) else None


def _left(first: Mapping[str, Any], last: Mapping[str, Any]) -> float | None:
    """Seconds until the steps are made, at the pace of the process since its beginning."""
    begun, at = (line["at"] if isinstance(line.get("at"), dict) else {} for line in (first, last))
    times = number(first.get("time")), number(last.get("time"))
    before, step, steps = number(begun.get("step")), number(at.get("step")), number(at.get("steps"))
    if None in times or before is None or step is None or not steps or step <= before:
        return None
    seconds = max(0.0, times[1] - times[0])  # type: ignore[operator]
    return max(0.0, steps - step) * seconds / (step - before)


def _status(file: Path) -> str:
    try:
        found = json.loads(files.read_bytes(file, LARGEST))
        status = found["status"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "damaged"
    return status if status in _STATUSES else "damaged"
