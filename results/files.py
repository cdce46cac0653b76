"""Files on disks as people have them: written whole or not at all, read only where they are what they should be.

The last part of a path is never followed where it is a link: a link called `record.json` or `output.txt` would let a
write go over the file it points to. Folders may be links, since large disks are mounted that way.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import platform
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

LARGEST = 256 * 2**20
"""Bytes of the largest file that is read at once; no record or note of a grid comes near."""

_FORGOTTEN = 24 * 3600.0  # seconds after which a temporary file of another machine belongs to nobody
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.[0-9]+\.[0-9a-f]+$")  # host, process, anything
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def read_bytes(file: str | Path, largest: int = LARGEST) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it is missing, a link, a folder, a pipe or a device, or larger than `largest` bytes; `strerror` says
            which.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | _NO_FOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link; a regular file is needed", str(file)) from None
        raise
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise OSError(errno.EISDIR, "is a directory", str(file))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
        if found.st_size > largest:
            raise OSError(errno.EFBIG, f"is larger than {largest / 2**20:g} MiB", str(file))
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            content = stream.read(largest + 1)
    finally:
        os.close(descriptor)
    if len(content) > largest:  # it has grown
        raise OSError(errno.EFBIG, f"is larger than {largest / 2**20:g} MiB", str(file))
    return content


def open_new(file: str | Path) -> BinaryIO:
    """An empty file to write to, in the place of what had this name; where that was a link, its target stays.

    Raises:
        OSError: the name is that of a folder, or the folder above can not be written to.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(file)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.fdopen(os.open(file, flags, 0o666), "wb")


def append(file: str | Path, content: bytes) -> None:
    """Write behind the end of a regular file that is there; it is closed afterwards, so that other machines see it.

    Raises:
        OSError: it is missing, a link, a folder, a pipe or a device, or the disk is full: a part may then be written.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0) | _NO_FOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


def write_text(file: str | Path, text: str) -> Path:
    """Replace `file` as `replacing` does."""
    with replacing(file) as stream:
        stream.write(text.encode())
    return Path(file)


@contextlib.contextmanager
def replacing(file: str | Path, before: str | Path | None = None) -> Iterator[BinaryIO]:
    """What is written to the stream inside the block takes the place of `file` in one step that survives a power cut;
    a link of this name is replaced, not followed. Nothing changes where the block raises.

    What writers that were killed left behind for the same name is removed.

    Args:
        file: the name.
        before: the name that the file which is replaced shall have from then on.
    """
    file = Path(file)
    sweep(file)
    temporary = file.with_name(f".{file.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if before is not None:
            with contextlib.suppress(FileNotFoundError):
                os.replace(file, before)
        os.replace(temporary, file)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a full disk, while writing
            error.filename = str(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(file.parent)


def sweep(file: Path) -> None:
    """Remove the temporary files of `write_text` for this name whose writers are gone."""
    _sweep(file.parent.glob(f".{glob.escape(file.name)}.*.*.*"))


def sweep_folder(folder: Path) -> None:
    """The same for every name in a folder, those that nobody will write again among them."""
    _sweep(folder.glob(".*.*.*.*"))


def _sweep(found: Iterable[Path]) -> None:
    for left in found:
        if not _TEMPORARY.search(left.name):
            continue
        *_, host, process, _ = left.name.split(".")
        with contextlib.suppress(OSError):
            if (host == _host() and not _alive(process)) or time.time() - left.stat().st_mtime > _FORGOTTEN:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system can: SMB, sshfs and others refuse to sync a folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):  # the rename is done by now
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _host() -> str:
    """Tells machines that share a disk apart, in letters that are safe in a file's name."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):  # another user's process, or no number: not ours to judge
        return True
    return True
