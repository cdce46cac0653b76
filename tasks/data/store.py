"""Array files that are written reproducibly and read only after their bytes were verified. Nothing here unpickles.

An array file is a plain .npz (a zip of .npy). Two writes of equal arrays give equal bytes: member order, dates,
attributes and compression are fixed, which numpy's own writer does not promise.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

BUILTIN = Path(__file__).parent / "builtin"
_DATE = (1980, 1, 1, 0, 0, 0)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, compress: bool = True) -> str:
    """Write `arrays` as an .npz whose bytes depend on the arrays alone. Returns the file's sha256.

    Text is stored as a numpy unicode array; object arrays are refused (they would be pickled).
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", _DATE)
            member.create_system = 3  # the same "made by" byte on every system
            member.external_attr = 0o644 << 16
            member.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            archive.writestr(member, buffer.getvalue(), compresslevel=9 if compress else None)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_arrays(path: Path, digest: str) -> dict[str, np.ndarray]:
    """The arrays of a file whose sha256 is `digest`; the bytes that are verified are the bytes that are parsed.

    Raises:
        ValueError: the file is missing or its bytes are not the ones that were written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: the data file is missing") from None
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"{path}: the data file is damaged: sha256 {found[:16]}..., expected {digest[:16]}...")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def builtin_digest(file: str, folder: Path = BUILTIN) -> str:
    """The sha256 that CHECKSUMS declares for a built-in file; the file itself is not read."""
    checksums = folder / "CHECKSUMS"
    try:
        modified = checksums.stat().st_mtime_ns
    except FileNotFoundError:
        raise ValueError(f"{checksums}: missing; it declares the sha256 of every built-in data file") from None
    declared = _checksums(checksums, modified)
    if file not in declared:
        raise ValueError(f"{checksums}: no line for {file}")
    return declared[file]


def read_builtin(file: str, folder: Path = BUILTIN) -> dict[str, np.ndarray]:
    """The arrays of a built-in file, verified against CHECKSUMS."""
    return read_arrays(folder / file, builtin_digest(file, folder))


@functools.lru_cache(maxsize=8)
def _checksums(path: Path, modified: int) -> dict[str, str]:
    # `modified` is part of the cache's key: a plan of 10,000 runs asks for the same file 10,000 times
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if any(len(line) != 2 or len(line[0]) != 64 for line in lines):
        raise ValueError(f"{path}: every line is `sha256  file`")
    return {file: digest for digest, file in lines}
