"""Built-in sets: array files of this repository, always here."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.data.images import ImageData
from tasks.data.manifest import PARTS
from tasks.data.source import Contents, DatasetInfo, Source
from tasks.data.store import builtin_digest


@dataclass(frozen=True)
class Builtin(Source):
    """A set whose arrays are a file of this repository.

    Args:
        described: what is known of it.
        file: name of the file below tasks/data/builtin.
        read: (checksum, options) -> the set; its keyword-only arguments are the options of `load`.
        rule: raised when the same file is cut into parts in another way: it enters the checksum.
        few_shot_options: those with which `read` gives parts that share no class; None where there are none such.
    """

    described: DatasetInfo
    file: str
    read: Callable[..., ImageData]
    rule: int = 1
    few_shot_options: dict[str, str] | None = None
    options: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        known = [p.name for p in inspect.signature(self.read).parameters.values() if p.kind is p.KEYWORD_ONLY]
        object.__setattr__(self, "options", tuple(known))

    def info(self, name: str) -> DatasetInfo:
        return self.described

    def is_prepared(self, name: str, data_dir: Path) -> bool:
        return True

    def checksum(self, name: str, data_dir: Path) -> str:
        return hashlib.sha256(f"{builtin_digest(self.file)}/{self.rule}".encode()).hexdigest()[:16]

    def contents(self, name: str, data_dir: Path) -> Contents:
        # classes by their numbers: their names are read with the arrays
        names = tuple(map(str, range(self.described.num_classes or 0)))
        return Contents(names, self.described.domains, default_domain=True)

    def labels(self, name: str, data_dir: Path, domain: str | None) -> dict[str, Tensor]:
        data = self.load(name, data_dir, **({} if domain is None else {"domain": domain}))
        return {part: getattr(data, part).labels.clone() for part in PARTS}  # a clone holds no images

    def load(self, name: str, data_dir: Path, **options: Any) -> ImageData:
        return self.read(self.checksum(name, data_dir), **options)

    def load_disjoint(self, name: str, data_dir: Path) -> ImageData:
        return self.load(name, data_dir, **(self.few_shot_options or {}))


def described(
    name: str,
    title: str,
    kind: str,
    num_classes: int,
    channels: int,
    sizes: dict[str, int],
    licence: str,
    *,
    domains: tuple[str, ...] = (),
    few_shot: bool = False,
) -> DatasetInfo:
    """What is known of a built-in set of 32x32 images; arguments as DatasetInfo's."""
    shape = channels, 32, 32
    return DatasetInfo(name, title, kind, num_classes, shape, sizes, domains, True, "", licence, few_shot)
