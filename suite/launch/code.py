"""The identity of the code on a machine, and a copy of it that can be sent to others. Needs neither torch nor Ray."""

from __future__ import annotations

import functools
import hashlib
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from suite.environment import ROOT, commit, own_version

PACKAGES = ("suite", "tasks", "norms", "results")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


@functools.cache
def fingerprint() -> str:
    """16 hexadecimal digits of every Python file of the four packages: a checkout of the same commit with changes
    differs from one without."""
    digest = hashlib.sha256()
    for file in _files():
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def here() -> dict[str, str]:
    """The code of this machine: host, version, commit, fingerprint."""
    return {"host": platform.node(), "version": own_version(), "commit": commit(), "fingerprint": fingerprint()}


def in_words(code: Mapping[str, str]) -> str:
    """ "NormSuite 0.10.0, commit 1a2b3c4d5e with changes, files 0123456789abcdef"."""
    revision, _, changes = code["commit"].partition("+")
    where = "" if revision == "unknown" else f", commit {revision[:10]}{' with changes' if changes else ''}"
    return f"NormSuite {code['version']}{where}, files {code['fingerprint']}"


def copy_to(folder: Path) -> None:
    """Copy what runs need of the code, built-in data included. Raises OSError."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=_LEFT_OUT)
    if (ROOT / "pyproject.toml").is_file():  # says the version
        shutil.copy(ROOT / "pyproject.toml", folder)


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))
