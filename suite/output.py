"""The printed output of a run: a file in its folder, of bounded size."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import stat
from pathlib import Path

from results import files

OUTPUT = "output.txt"
"""What a run printed, in its folder; kept only if it printed something."""

LARGEST = 64 * 2**20
"""Bytes of output at which the middle is cut out. A run that prints is not stopped for it."""

_HEAD, _TAIL = 4 * 2**20, 2**20  # bytes that are kept at a cut: from the start, and from before the cut


def print_to(file: Path) -> None:
    """Send everything that this process prints to `file`: C libraries, Python's tracebacks and crashes included."""
    with files.open_new(file) as stream:
        with contextlib.suppress(ImportError):  # no fcntl: not a system where a run's output is cut
            import fcntl

            # What is printed after a cut comes behind it, not where it would have been.
            fcntl.fcntl(stream, fcntl.F_SETFL, fcntl.fcntl(stream, fcntl.F_GETFL) | os.O_APPEND)
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    faulthandler.enable(file=2)  # a crash in C leaves the Python line it came from


def trim(file: Path) -> None:
    """Keep the start and the end of an output that has grown too long; its writer goes on behind them."""
    with contextlib.suppress(OSError):  # none yet, or none any more
        if os.lstat(file).st_size <= LARGEST:
            return
        flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(file, flags)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                tail = os.pread(descriptor, _TAIL, found.st_size - _TAIL)
                os.ftruncate(descriptor, _HEAD)
                note = f"\n[more than {LARGEST >> 20} MiB were printed; left out here: all but the start and the end]\n"
                os.write(descriptor, note.encode() + tail)
        finally:
            os.close(descriptor)


def printed(file: Path) -> bool:
    """Whether a run printed anything that can be looked at."""
    try:
        found = os.lstat(file)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0
