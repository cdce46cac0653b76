"""The checkpoints of a run on disk: `checkpoint.pt`, the newest, and `checkpoint.before.pt`, the one before.

Each is a file of torch.save (readable with `weights_only=True`) with one more member, `normsuite.json`: the run's key,
where the run stood, and in which parts, on which machines, it was made. That member is read without torch. A new file
is written beside them, synced, and takes its place in one step; the one before stays until then.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from results import files
from results.escape import cut, one_line
from results.record import RunSpec
from results.store import run_folder
from tasks.weights import KEPT_FORMAT, LARGEST_NOTE, WEIGHTS, member, note_in, tensors_in

if TYPE_CHECKING:
    from tasks.base import Trained
    from tasks.journal import Position, State

NEWEST, BEFORE = "checkpoint.pt", "checkpoint.before.pt"
FORMAT = 1
_LONGEST = 200  # characters of a reason


@dataclass(frozen=True)
class Note:
    """The JSON part of a checkpoint, readable without torch.

    Args:
        key: of the run.
        position: tasks.journal.Position, as a mapping, and as `text`.
        seconds: that the parts so far took.
        parts: one mapping for each process that has made a part: its environment, and where it ended.
    """

    key: str
    position: Mapping[str, Any]
    text: str
    seconds: float
    parts: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    @property
    def origin(self) -> str:
        """ "from epoch 12 of 90", "after training"."""
        text = cut(self.text, _LONGEST)
        return text if text.startswith("after ") else f"from {text}"


@dataclass(frozen=True)
class Kept:
    """The JSON part of a finished run's weights, from which tasks.load_network builds the network anew.

    Args:
        key: of the run.
        spec: the RunSpec, as its record has it.
        facts: tasks.base.Trained.facts.
    """

    key: str
    spec: Mapping[str, Any]
    facts: Mapping[str, Any]
    format: int = KEPT_FORMAT


class Unreadable(ValueError):
    """No checkpoint of this run; the message names the file and the reason in one line."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
        key: of its spec.
        part: the environment of this process, for the note.
        say: called with a line for the user.
        clock: seconds that this process has worked on the run.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        part: Mapping[str, Any],
        say: Callable[[str], None],
        clock: Callable[[], float],
    ):
        self.folder, self.key, self.part, self.say, self.clock = folder, key, dict(part), say, clock
        self.note: Note | None = None
        """Of the checkpoint that the run goes on from."""
        self._at = NEWEST  # the file that it goes on from
        self._complaint = ""

    def candidates(self) -> Iterator[State | None]:
        """States from which the run may go on, best first; the last is None, a fresh start. Damaged ones are named and
        passed over."""
        for name in (NEWEST, BEFORE):
            file = self.folder / name
            if not os.path.lexists(file):
                continue
            self._at = name
            try:
                state, self.note = read(file, self.key)
            except Unreadable as error:
                self.pass_over(str(error))
            else:
                yield state
        self.note = None
        yield None

    def pass_over(self, why: str) -> None:
        """Say that the candidate at hand is of no use, and what becomes of the run."""
        older = self._at == NEWEST and os.path.lexists(self.folder / BEFORE)
        self.say(f"{why}; {'the one before it is read' if older else 'the run begins anew'}")
        self._at = BEFORE

    def save(self, state: State, position: Position) -> bool:
        """Store a state. A failure to write is told in a line, and the checkpoint before it stays."""
        parts, seconds = self.parts(str(position)), self.clock()
        note = Note(self.key, asdict(position), str(position), self.seconds + seconds, parts)
        # what could not be read takes nobody's place
        before = self.folder / BEFORE if self._at == NEWEST else None
        try:
            write(self.folder / NEWEST, state, note, before)
        except (OSError, ValueError) as error:
            complaint = _why(error)
            if complaint != self._complaint:  # a disk stays full for long
                self.say(f"no checkpoint at {position}: {complaint}")
            self._complaint = complaint
            return False
        self._at, self._complaint = NEWEST, ""
        return True

    @property
    def seconds(self) -> float:
        """Seconds that earlier processes have worked on the run."""
        return 0.0 if self.note is None else self.note.seconds

    def parts(self, until: str) -> list[dict[str, Any]]:
        """Where the run was made, this process last."""
        before = [] if self.note is None else self.note.parts
        return [*before, {**self.part, "until": until, "seconds": self.clock()}]


def remove(folder: Path) -> None:
    """Remove the checkpoints and temporary files of a run whose record is stored; the caller holds the run's lock."""
    left = (folder.glob(f".{name}.*") for name in (NEWEST, BEFORE))
    for file in (folder / NEWEST, folder / BEFORE, *itertools.chain(*left)):
        with contextlib.suppress(OSError):
            file.unlink()


def keep_weights(folder: Path, spec: RunSpec, trained: Trained) -> None:
    """Leave the network of a finished run in its folder. Raises OSError, or TypeError or ValueError: no such file."""
    from tasks.journal import plain

    try:
        kept = Kept(spec.key, spec.model_dump(mode="json"), dict(trained.facts))
        write(folder / WEIGHTS, plain(trained.weights, "the network"), kept)
    except BaseException:
        remove_weights(folder)
        raise


def remove_weights(folder: Path) -> None:
    """Remove the weights that an earlier run left in this folder."""
    with contextlib.suppress(OSError):
        (folder / WEIGHTS).unlink()


def write(file: Path, state: Any, note: Note | Kept, before: Path | None = None) -> None:
    """Store tensors and values in `file`; the file of that name before is `before` from then on.

    Raises:
        OSError: of the disk.
        TypeError, ValueError: the note is no JSON, or larger than is read.
    """
    import torch

    text = json.dumps(asdict(note))
    if len(text) > LARGEST_NOTE:
        raise ValueError(f"a note of {len(text)} bytes; {LARGEST_NOTE} are read")
    with files.replacing(file, before) as stream:
        told: Any = _Told(stream)
        try:
            torch.save(state, told)
        except RuntimeError as error:  # torch's word for a disk that is full: its own numbers, another at each try
            raise told.error or OSError(errno.EIO, one_line(str(error)), str(file)) from error
        with zipfile.ZipFile(stream, "a") as archive:
            archive.writestr(member(archive), text)


class _Told:
    """A stream for torch.save, which forgets what the disk said."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.flush = stream, stream.flush
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.stream.write(content)
        except OSError as error:
            self.error = self.error or error
            raise


def read_note(file: Path, key: str) -> Note:
    """The note of a checkpoint, without torch. Raises Unreadable."""
    try:
        found = Note(**note_in(file))
        seconds, kinds = found.seconds, (found.key, found.text, found.position, found.parts)
        if [type(part) for part in (*kinds, *found.parts)] != [str, str, dict, list, *(dict for _ in found.parts)]:
            raise TypeError("its note is another's")
        if not (type(seconds) in (int, float) and math.isfinite(seconds) and seconds >= 0):
            raise ValueError("its note has no time")
    except Exception as error:  # of zip, of json: each has its own
        raise Unreadable(f"{file}: not a checkpoint ({_why(error)})") from error
    if found.format != FORMAT or found.key != key:
        raise Unreadable(f"{file}: a checkpoint of {'another run' if found.format == FORMAT else 'another version'}")
    return found


def read(file: Path, key: str) -> tuple[State, Note]:
    """A checkpoint, every byte of it checked. Raises Unreadable."""
    note = read_note(file, key)
    try:
        state = tensors_in(file)
    except Exception as error:  # of torch, of pickle, of zlib: each has its own
        raise Unreadable(f"{file}: not a checkpoint ({_why(error)})") from error
    return state, note


def found(folder: Path, key: str) -> Note | None:
    """The note of the checkpoint from which an unfinished run would go on, or None. Needs no torch."""
    for name in (NEWEST, BEFORE):
        with contextlib.suppress(Unreadable):
            return read_note(folder / name, key)
    return None


def going_on(out: Path, specs: Iterable[RunSpec]) -> dict[str, str]:
    """key -> "from epoch 12 of 90", of the runs that go on from a checkpoint."""
    notes = {spec.key: found(run_folder(out, spec), spec.key) for spec in specs}
    return {key: note.origin for key, note in notes.items() if note is not None}


def _why(error: Exception) -> str:
    return cut(one_line(str(getattr(error, "strerror", None) or error) or type(error).__name__), _LONGEST)
