"""Claims: which process works on a folder now. Of this machine or another, on any file system.

A claim is a file made with O_EXCL, which names host, process and start and is renewed while it is held (filelock's
SoftFileLease): locks of the system (flock) hold within one machine alone on some shared file systems.
It is taken over at once where its process is known to be gone, as one of this machine is, and else when it was not
renewed for `LEASE` seconds by the clock of whoever wants it, by an object that has tried for so long; so clocks may
differ. A holder that was suspended for longer learns of it. That holds for whatever stands in the file: an empty one is
left where a machine goes down, or a process is killed, between the making of the file and its first line.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from results import files

CLAIM = ".claim"
"""In the folder of a run: who makes it now. Gone when nobody does."""
LEASE = 60.0
"""Seconds after which a claim that was not renewed is taken over."""
RENEWED = 15.0
"""Seconds between two renewals."""
PATIENCE = LEASE + RENEWED
"""Seconds after which one who waits for a claim has it, or its holder lives."""


class _Claim(SoftFileLease):
    """filelock's lease, which keeps for ever what it can not read as one (an empty file, a lease of another length)."""

    _seen: tuple[tuple[int, int, int], float] | None = None  # the file, and since when it is as it is

    def acquire(self, *args: Any, **options: Any) -> Any:
        try:
            return super().acquire(*args, **options)
        except (Timeout, LeaseSettingsMismatch):
            if self._left():
                with contextlib.suppress(LeaseSettingsMismatch):
                    return super().acquire(*args, **options)
            raise Timeout(self.lock_file) from None

    def _left(self) -> bool:
        """Whether the file was as it is for as long as a claim lasts, and is removed."""
        try:
            mark = _mark(os.lstat(self.lock_file))
        except OSError:
            self._seen = None
            return False
        if self._seen is None or self._seen[0] != mark:
            self._seen = mark, time.monotonic()
        if time.monotonic() - self._seen[1] < LEASE:
            return False
        self._seen = None
        aside = f"{self.lock_file}.{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            os.rename(self.lock_file, aside)
            if _mark(os.lstat(aside))[:2] != mark[:2]:  # of one who was as quick, and has made its own by now
                os.link(aside, self.lock_file)
                mark = (0, 0, 0)
            os.unlink(aside)
        return mark != (0, 0, 0)


def _mark(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def lease(file: Path, lost: Callable[[Any], None] | None = None) -> SoftFileLease:
    """A claim by its file, in a folder that is there.

    Args:
        lost: called, in a thread of its own, with filelock's LeaseCompromise, if a claim that is held is taken over.

    Raises:
        OSError: the file is a link or no file.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
    return _Claim(file, lease_duration=LEASE, heartbeat_interval=RENEWED, on_compromise=lost, thread_local=False)


def folder_lock(folder: Path, lost: Callable[[Any], None] | None = None) -> SoftFileLease:
    """The claim to the folder of a run, which is there. Arguments and errors as `lease`."""
    return lease(folder / CLAIM, lost)


def is_held(folder: Path) -> bool:
    """Whether a process holds the claim to a run's folder now, as far as can be seen from here.

    It is tried for a moment, and only where its file is there: nothing new stands in the folder afterwards.
    """
    if not os.path.lexists(folder / CLAIM):
        return False
    try:
        with folder_lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that can only be read: nobody here can tell
        return False


@dataclass(frozen=True)
class Holder:
    """The process that holds a claim, as its file says.

    Args:
        host: its machine's name.
        process: its number there.
        age: seconds since it was renewed, by the file system's clock beside ours, never below 0.
    """

    host: str
    process: int
    age: float


def holder(folder: Path) -> Holder | None:
    """Who holds the claim to a run's folder; None where nobody does, or nobody can read it."""
    try:
        found = os.lstat(folder / CLAIM)
        lines = files.read_bytes(folder / CLAIM, 4096).decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return None
    said = dict(line.partition("=")[::2] for line in lines)
    process = said.get("pid", "")
    if not process.isdecimal() or not said.get("host"):
        return None
    return Holder(said["host"], int(process), max(0.0, time.time() - found.st_mtime))


class Waited:
    """The folder of a run that another process works on, looked at again and again.

    Args:
        folder: which is there.

    Attributes:
        claim: tried by `acquire(timeout=0)`; it is to be the same object, which knows how long it has tried.
    """

    def __init__(self, folder: Path):
        self.claim = folder_lock(folder)
        self._file = folder / CLAIM
        self._first = self._mark()

    def lives(self) -> bool:
        """Whether the holder is known to live: its claim was renewed, or made, since we look, or it is a process of
        this machine, whose end we would know."""
        found = holder(self._file.parent)
        if found is None or (self._mark() == self._first and found.host != _host()):
            return False
        return found.host != _host() or not _ended(found.process)

    def _mark(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._file)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def _ended(process: int) -> bool:
    """Whether a process of this machine has ended, and nobody has asked yet how (a zombie). Linux; else False."""
    try:
        said = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return False
    return said.rpartition(b")")[2].split()[:1] == [b"Z"]


@functools.cache
def _host() -> str:
    """This machine's name as claims say it."""
    with tempfile.TemporaryDirectory() as folder, folder_lock(Path(folder)).acquire(timeout=0):
        found = holder(Path(folder))
    return "" if found is None else found.host
