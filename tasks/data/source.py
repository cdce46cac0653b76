"""What the catalog needs of a data set. Each kind of set is one Source, in tasks.data.sources or in a plugin.

The catalog asks a source what it can do and never what it is called. A source serves one name or several, so every
method is told the name and the folder of prepared sets, `data_dir`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from norms.values import nearest
from tasks.data.images import ImageData

if TYPE_CHECKING:
    from tasks.data.lazy import FolderData


@dataclass(frozen=True)
class DatasetInfo:
    """What `data list` shows.

    Args:
        name, title: as for `load`, and for tables.
        kind: "real", "synthetic", or both where domains differ (each loaded domain is one of the two).
        num_classes, image_shape: as loaded; None where they depend on the folder.
        sizes: images by part; for a downloaded set "train" still includes what becomes val.
        domains: names for `load_domains`; empty for most.
        builtin: part of the repository.
        how: how to prepare it; empty for a built-in set.
        licence: as its publishers state it.
        few_shot: its parts share no class, or can be cut so.
    """

    name: str
    title: str
    kind: str
    num_classes: int | None
    image_shape: tuple[int, int, int] | None
    sizes: dict[str, int]
    domains: tuple[str, ...]
    builtin: bool
    how: str
    licence: str
    few_shot: bool = False

    def __str__(self) -> str:
        """One line for lists."""
        facts = [self.title, self.kind]
        facts += [f"{self.num_classes} classes"] if self.num_classes else []
        facts += ["x".join(map(str, self.image_shape))] if self.image_shape else []
        facts += [" + ".join(f"{count} {part}" for part, count in self.sizes.items())] if self.sizes else []
        facts += [f"domains {', '.join(self.domains)}"] if self.domains else []
        return " · ".join([*facts, "built in" if self.builtin else self.how, f"licence: {self.licence}"])


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did.

    Args:
        made: False where nothing was to do.
        notes: what a user should know of the images, one line each.
        layout: how a folder was understood and cut into parts, one line; empty for other sets.
    """

    made: bool
    notes: tuple[str, ...] = ()
    layout: str = ""


@dataclass(frozen=True)
class Contents:
    """What is known of a set's content without reading images.

    Args:
        class_names: one per label.
        domains: of a set that `load` gives one domain of.
        default_domain: `load` gives some domain where none is named, so that one classifier can be trained.
        disjoint_classes: the parts that `load` gives share no class.
    """

    class_names: tuple[str, ...]
    domains: tuple[str, ...] = ()
    default_domain: bool = False
    disjoint_classes: bool = False


class Source(Protocol):
    """A kind of data set. Classes that derive from this one write the methods without a body; the others have one.

    Every method that reads raises NotPrepared where the set is not on this machine (it names the command that prepares
    it), and ValueError in one line where what is here is damaged or can not be read.

    Attributes:
        accepts: what `data prepare` may be given for it: "source", a folder; "size", the side of images in pixels.
        options: the names that `load` takes: "classes", the first K classes only, and "domain" where there are domains.
    """

    accepts: Collection[str] = ()
    options: tuple[str, ...] = ("classes",)

    def info(self, name: str) -> DatasetInfo:
        """What is known before anything is read."""

    def is_prepared(self, name: str, data_dir: Path) -> bool:
        """Whether `load` would find the set; arrays are not verified here."""

    def checksum(self, name: str, data_dir: Path) -> str:
        """Identity of the set's content and of the rule that cuts it into parts; a part of every run's key."""

    def contents(self, name: str, data_dir: Path) -> Contents:
        """What is in it; no image is read."""

    def labels(self, name: str, data_dir: Path, domain: str | None) -> dict[str, Tensor]:
        """Part ("train", "val", "test") -> labels, int64 (N,), of one domain (None: as `load` without a domain)."""

    def load(self, name: str, data_dir: Path, **options: Any) -> ImageData:
        """The set, or one domain of it, in memory. options: some of `self.options`."""

    def prepare(
        self, name: str, data_dir: Path, *, source: Path | None = None, size: int | None = None, force: bool = False
    ) -> Preparation:
        """Download or decode it into data_dir; nothing is to do where the set needs none of that."""
        return Preparation(False)

    def domains(self, name: str, data_dir: Path) -> tuple[str, ...]:
        """Names for `load`, in the set's order; empty where it has no domains."""
        return self.info(name).domains

    def in_memory(self, name: str, data_dir: Path) -> bool:
        """Whether `load` holds it; otherwise `open` decodes it while it is read."""
        return True

    def few_shot(self, name: str, data_dir: Path) -> bool:
        """Whether `load_disjoint` gives parts that share no class."""
        return self.info(name).few_shot

    def load_disjoint(self, name: str, data_dir: Path) -> ImageData:
        """The set cut into parts that share no class; asked only where `few_shot` says so."""
        return self.load(name, data_dir)

    def open(self, name: str, data_dir: Path, *, workers: int | None = None, **options: Any) -> FolderData:
        """The set, or one domain of it, decoded while it is read; asked where it is not held in memory.

        workers: processes that decode; None: as many as are usual. options: as of `load`.
        """
        raise ValueError(f'data set "{name}" is not a folder of images: use load')

    def mending(self, domain: str, class_name: str) -> str:
        """Advice to the owner of the images if a part lacks a class; empty if there is none to give."""
        return ""


def check_domain(name: str, domain: str | None, domains: Collection[str]) -> str:
    """`domain`, where it is one of `domains`.

    Raises:
        ValueError: it is None or unknown; the message names those allowed, and the nearest.
    """
    if domain is None:
        raise ValueError(
            f'data set "{name}" has domains; give domain= one of {", ".join(domains)}, or use load_domains'
        )
    if domain not in domains:
        allowed = ", ".join(domains) or "none, it has no domains"
        raise ValueError(f'data set "{name}": unknown domain "{domain}"; allowed: {allowed}{nearest(domain, domains)}')
    return domain
