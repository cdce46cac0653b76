"""Names of data sets -> what they are and how they are loaded."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norms.registry import nearest
from tasks.data import fashion, glyphs
from tasks.data.images import ImageData
from tasks.data.store import builtin_digest


@dataclass(frozen=True)
class _Builtin:
    file: str
    rule: int  # raised when the same file is cut into parts in another way: it enters the checksum
    load: Callable[..., ImageData]


_BUILTIN = {
    "fashion_mnist_mini": _Builtin(fashion.FILE, 1, fashion.load_fashion_mnist_mini),
    "glyphs": _Builtin(glyphs.FILE, 1, glyphs.load_glyphs),
}


def dataset_names() -> list[str]:
    """Every name that `load` or `load_domains` knows; any `folder:PATH` is one more."""
    return list(_BUILTIN)


def load(name: str, data_dir: Path, **options: Any) -> ImageData:
    """A data set with its train, val and test parts, as uint8 tensors on the CPU.

    Args:
        name: one of `dataset_names()`.
        data_dir: folder of prepared data sets; built-in ones do not use it.
        options: `classes` (keep the first K classes) for every set, and what the set's own loader names.

    Raises:
        ValueError: unknown name or option (with the nearest), a value out of range, damaged files.
        NotPrepared: the set is not on this machine.
    """
    entry = _entry(name)
    _check_options(name, entry.load, options)
    return entry.load(checksum(name, data_dir), **options)


def checksum(name: str, data_dir: Path) -> str:
    """Identity of a data set: its files and the rule that cuts them. Reads declared digests only, no data."""
    entry = _entry(name)
    return hashlib.sha256(f"{builtin_digest(entry.file)}/{entry.rule}".encode()).hexdigest()[:16]


def _entry(name: str) -> _Builtin:
    if name not in _BUILTIN:
        raise ValueError(
            f'unknown data set "{name}"; allowed: {", ".join(dataset_names())}{nearest(name, dataset_names())}'
        )
    return _BUILTIN[name]


def _check_options(name: str, loader: Callable[..., ImageData], options: dict[str, Any]) -> None:
    known = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(
                f'data set "{name}": unknown option "{option}"; allowed: {", ".join(known)}{nearest(option, known)}'
            )
