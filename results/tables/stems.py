"""Names of tables as names of files and labels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

_LONGEST = 150  # characters of a file's name without its ending


def file_stem(name: str) -> str:
    """A table's name as that of a file, short enough for every file system."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".") or "table"
    return stem if len(stem) <= _LONGEST else f"{stem[: _LONGEST - 9]}-{_digest(name)}"


def file_stems(names: Sequence[str]) -> list[str]:
    """The stem of each name, told apart where two would be one file: by a few letters behind the later one."""
    taken = {"all_tables"}
    stems = []
    for name in names:
        stem = file_stem(name)
        if stem.casefold() in taken:  # some file systems do not tell capitals apart
            stem = f"{stem[: _LONGEST - 9]}-{_digest(name)}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
