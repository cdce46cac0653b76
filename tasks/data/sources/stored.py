"""Sets that `data prepare` wrote into a folder of data_dir (see tasks.data.prepared): the methods that these share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.data.images import ImageData
from tasks.data.prepared import is_written, read_labels, read_manifest, read_set
from tasks.data.source import Contents, Source


class Stored(Source):
    """A set in data_dir/<place>, with a manifest. What derives from it says `info`, and how it is prepared."""

    options = ("domain", "classes")

    def place(self, name: str, data_dir: Path) -> str:
        """The folder of the set below data_dir."""
        return name

    def is_prepared(self, name: str, data_dir: Path) -> bool:
        return is_written(name, data_dir, self.place(name, data_dir))

    def checksum(self, name: str, data_dir: Path) -> str:
        return str(self._manifest(name, data_dir)["checksum"])

    def contents(self, name: str, data_dir: Path) -> Contents:
        manifest = self._manifest(name, data_dir)
        return Contents(
            tuple(manifest["class_names"]),
            tuple(domain for domain in manifest["domains"] if domain),
            disjoint_classes=manifest["disjoint_classes"],
        )

    def labels(self, name: str, data_dir: Path, domain: str | None) -> dict[str, Tensor]:
        return read_labels(name, data_dir, self.place(name, data_dir), domain=domain)

    def load(self, name: str, data_dir: Path, **options: Any) -> ImageData:
        return read_set(name, data_dir, self.place(name, data_dir), **options)

    def few_shot(self, name: str, data_dir: Path) -> bool:
        return self.contents(name, data_dir).disjoint_classes

    def _manifest(self, name: str, data_dir: Path) -> dict[str, Any]:
        return read_manifest(name, data_dir, self.place(name, data_dir))
