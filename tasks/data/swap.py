"""Two folders change places, so that whoever opens one of them by its path finds the old or the new, never neither."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2 (Linux) and RENAME_SWAP of renamex_np (macOS)
_HERE = -100  # AT_FDCWD: paths are taken as open() takes them


def exchange(one: Path, other: Path) -> None:
    """Both exist, on one file system. Atomic on Linux and macOS where the file system can (ext4, xfs, btrfs, APFS).

    Elsewhere (NFS) in two renames, between which `other` is missing; an error in the second undoes the first.

    Raises:
        OSError: neither worked.
    """
    if _exchanged(os.fsencode(one), os.fsencode(other)):
        return
    aside = one.with_name(f"{one.name}-old")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _exchanged(one: bytes, other: bytes) -> bool:
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(one, other, ctypes.c_uint(_EXCHANGE)) == 0)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return bool(library.renameat2(_HERE, one, _HERE, other, ctypes.c_uint(_EXCHANGE)) == 0)
    return False
