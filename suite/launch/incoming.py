"""What comes back of a run that is made elsewhere (suite.launch.far): written under its claim, and told to the engine.

Messages are numbered: one that comes twice is passed over. After one that is missing, a file whose parts were on their
way is dropped; a record is whole or not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from filelock import SoftFileLease

from results import files
from results.claims import CLAIM
from results.record import DONE, RECORD, RecordError, RunSpec, parse_record
from results.store import run_folder, write_record
from suite import checkpoints, live
from suite.checkpoints import BEFORE, NEWEST
from suite.launch.far import TRACKING
from suite.launch.launcher import LOST, Kind, LaunchError
from suite.launch.making import trouble
from suite.output import OUTPUT, printed

_OURS = {RECORD, CLAIM}  # which no message may write
News = tuple[Kind, Any]


class _Dropped(Exception):
    pass


class Incoming:
    """The messages of one run.

    Args:
        out: the folder of results.
        spec: of the run.
        claim: held until the last message.

    Attributes:
        ended: the last news was told, the claim is free.
    """

    def __init__(self, out: Path, spec: RunSpec, claim: SoftFileLease):
        self.out, self.spec, self.claim = out, spec, claim
        self.folder = run_folder(out, spec)
        self.ended = False
        self._seen = 0
        self._part: tuple[str, ExitStack, BinaryIO] | None = None  # the file whose parts come
        self._complaint = ""

    def hear(self, number: int, kind: str, value: Any) -> Iterator[News]:
        """The news in a message. Raises LaunchError where a node makes no runs of this command."""
        if self.ended or number <= self._seen:
            return
        missing, self._seen = number > self._seen + 1, number
        if missing:
            self._drop()
        if not self.claim.is_lock_held_by_us:  # this command was suspended, and another one makes the run
            yield from self._end(LOST)
        elif kind in ("started", "note", "progress", "trouble"):
            yield kind, value  # type: ignore[misc]
        elif kind == "refused":
            raise LaunchError(str(value))
        elif kind in ("grown", "part"):
            try:
                self._write(kind, value)
            except OSError as error:
                self._drop()
                if (said := f"{value['file']} did not come back: {trouble(error)}") != self._complaint:
                    self._complaint = said
                    yield "note", said
        elif kind == "end":
            yield from self._finish(value)

    def lost(self, how: int | str) -> Iterator[News]:
        """No message will come any more: an exit code, or how the run was lost."""
        if not self.ended:
            yield from self._end(how)

    def _finish(self, value: Mapping[str, Any]) -> Iterator[News]:
        if not printed(self.folder / OUTPUT):
            with contextlib.suppress(OSError):
                (self.folder / OUTPUT).unlink()
        if value["record"] is None:
            if value["left"]:
                yield "left", None
            yield from self._end(value["code"])
            return
        try:
            record = parse_record(self.folder / RECORD, value["record"].encode())
            if record.spec.key != self.spec.key:
                raise RecordError("the record of another run came back")
            write_record(self.out, record)
        except RecordError as error:
            yield "trouble", str(error)
            yield from self._end(1)
        except OSError as error:
            yield "trouble", trouble(error)
            yield from self._end(1)
        else:
            if record.status in DONE:
                checkpoints.remove(self.folder)
            live.remove(self.folder)
            yield "stored", None
            yield from self._end(0)

    def _end(self, how: int | str) -> Iterator[News]:
        self.ended = True
        self._drop()
        with contextlib.suppress(OSError):
            self.claim.release()
        yield "ended", how

    # Files

    def _write(self, kind: str, value: Mapping[str, Any]) -> None:
        file = self._place(value["file"])
        if kind == "grown":
            if value["first"]:
                file.parent.mkdir(parents=True, exist_ok=True)
                files.open_new(file).close()
            files.append(file, value["data"])
            return
        if value["first"]:
            self._drop()
            file.parent.mkdir(parents=True, exist_ok=True)
            stack = ExitStack()
            before = file.with_name(BEFORE) if file == self.folder / NEWEST and whole(file, self.spec.key) else None
            self._part = value["file"], stack, stack.enter_context(files.replacing(file, before))
        if self._part is None or self._part[0] != value["file"]:
            return  # its beginning is missing
        self._part[2].write(value["data"])
        if value["last"]:
            _, stack, _ = self._part
            self._part = None
            stack.close()

    def _drop(self) -> None:
        """Nothing becomes of the file whose parts came."""
        if self._part is not None:
            _, stack, _ = self._part
            self._part = None
            with contextlib.suppress(_Dropped, OSError):
                error = _Dropped()
                if not stack.__exit__(_Dropped, error, None):
                    raise error

    def _place(self, name: str) -> Path:
        """Where a file goes: into the run's folder, or to its trackers'. Raises OSError for any other."""
        path = PurePosixPath(name)
        own = self.folder.relative_to(self.out).parts
        tracked = path.parts[:1] == (TRACKING,) and path.parts[2:5] == own[1:]
        inside = path.parts[: len(own)] == own and len(path.parts) > len(own)
        if ".." in path.parts or not (inside or tracked) or path.name in _OURS or path.name.startswith("."):
            raise OSError(None, f"no file of this run: {name!r:.200}")
        place = self.out
        for part in path.parts[:-1]:
            place = place / part
            if place.is_symlink() and len(place.relative_to(self.out).parts) > len(own):
                raise OSError(None, f"its folder is a link: {name!r:.200}")
        return self.out / path


def newest(folder: Path, key: str) -> Path | None:
    """The checkpoint that a run elsewhere goes on from: the newest whose bytes are whole, None without one."""
    return next((folder / name for name in (NEWEST, BEFORE) if whole(folder / name, key)), None)


def whole(file: Path, key: str) -> bool:
    """Whether a file is a checkpoint of this run, every byte as it was written; without torch."""
    import zipfile

    try:
        checkpoints.read_note(file, key)
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # noqa: BLE001 - of zip, of zlib, of the note: each has its own
        return False
