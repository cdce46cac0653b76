"""Data sets that are others put together: each member, prepared and stored under its own name, is one domain.

Nothing is stored twice: a joined set has no folder of its own, it is prepared when all of its members are. Gray members
repeat their channel three times, so that one network takes every domain.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.base import NotPrepared
from tasks.data.images import ImageData, Split, make_data
from tasks.data.prepared import PARTS, command, is_written, read_labels, read_manifest, read_set
from tasks.data.source import Contents, DatasetInfo, Preparation, Source, check_domain
from tasks.data.sources.downloads import DOWNLOADS, prepare_download


@dataclass(frozen=True)
class Joined:
    """What is known of a joined set.

    Args:
        title: for tables.
        members: names of downloaded sets of equal height and width, whose labels mean the same. They name the domains.
        class_names: one per label, the same for every domain, whatever its publisher calls them.
    """

    title: str
    members: tuple[str, ...]
    class_names: tuple[str, ...]


JOINED = {"mnist_usps_svhn": Joined("MNIST, USPS and SVHN", ("mnist", "usps", "svhn"), tuple("0123456789"))}


class JoinedSets(Source):
    """The sets in JOINED."""

    accepts = ("source",)
    options = ("domain", "classes")

    def info(self, name: str) -> DatasetInfo:
        entry = JOINED[name]
        members = [DOWNLOADS[m] for m in entry.members]
        return DatasetInfo(
            name,
            entry.title,
            "real",
            len(entry.class_names),
            (3, *members[0].image_shape[1:]),
            {part: sum(m.sizes[part] for m in members) for part in members[0].sizes},
            entry.members,
            False,
            command(name),
            ", ".join(f"{m.licence} ({m.title})" for m in members),
        )

    def is_prepared(self, name: str, data_dir: Path) -> bool:
        return not missing_members(name, data_dir)

    def checksum(self, name: str, data_dir: Path) -> str:
        return joined_checksum(name, data_dir)

    def contents(self, name: str, data_dir: Path) -> Contents:
        return Contents(JOINED[name].class_names, JOINED[name].members)

    def labels(self, name: str, data_dir: Path, domain: str | None) -> dict[str, Tensor]:
        member = check_domain(name, domain, JOINED[name].members)
        joined_checksum(name, data_dir)  # names the joined set where a member is missing
        return read_labels(member, data_dir, member)

    def load(self, name: str, data_dir: Path, **options: Any) -> ImageData:
        return load_joined(name, data_dir, **options)

    def prepare(
        self, name: str, data_dir: Path, *, source: Path | None = None, size: int | None = None, force: bool = False
    ) -> Preparation:
        missing = JOINED[name].members if force else missing_members(name, data_dir)
        for member in missing:
            prepare_download(member, data_dir, source=source, replace=force)
        return Preparation(bool(missing))


def load_joined(name: str, data_dir: Path, *, domain: str | None = None, classes: int | None = None) -> ImageData:
    """One domain of a joined set, RGB, every byte verified.

    Raises:
        NotPrepared: some member is not, be it another domain's. ValueError: as read_set.
    """
    entry = JOINED[name]
    member = check_domain(name, domain, entry.members)
    checksum = joined_checksum(name, data_dir)
    data = read_set(member, data_dir, member)
    if data.image_shape[0] not in (1, 3) or data.num_classes != len(entry.class_names):
        raise ValueError(
            f'data set "{member}" in {data_dir} has images {data.image_shape} of {data.num_classes} classes; "{name}" '
            f"needs gray or RGB ones of {len(entry.class_names)}"
        )
    repeats = 3 // data.image_shape[0]
    return make_data(
        f"{name}/{member}",
        data.title,
        {part: _rgb(getattr(data, part)) for part in PARTS},
        kind=data.kind,
        checksum=checksum,
        num_classes=len(entry.class_names),
        classes=classes,
        class_names=entry.class_names,
        moments=(data.mean * repeats, data.std * repeats),
    )


def missing_members(name: str, data_dir: Path) -> list[str]:
    """The members that are not prepared; arrays are not verified here. Raises ValueError for a damaged manifest."""
    return [m for m in JOINED[name].members if not is_written(m, data_dir, m)]


def joined_checksum(name: str, data_dir: Path) -> str:
    """Identity of a joined set: it changes when one member's does.

    Raises:
        NotPrepared: some member is not prepared; names the joined set's command, and what is missing.
        ValueError: as read_manifest.
    """
    members = JOINED[name].members
    if missing := missing_members(name, data_dir):
        raise NotPrepared(
            f'data set "{name}" is not prepared in {data_dir} ({", ".join(missing)} of {", ".join(members)} missing): '
            f"run `{command(name, data_dir)}`"
        )
    text = "/".join(f"{m}={read_manifest(m, data_dir, m)['checksum']}" for m in members)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rgb(split: Split) -> Split:
    return Split(split.images.expand(-1, 3, -1, -1).contiguous(), split.labels)
