"""Data sets of a few planted images, which the checks run tasks on: one to classify, one of domains, one of parts that
share no class; each as often as wanted with the labels of some of its images dealt out anew.

They are prepared sets below a temporary data folder, known by name as long as the block lasts, so that a task reads
them as it reads any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.data.catalog import forget_dataset, register_dataset
from tasks.data.prepared import Parts, new_folder, write_set
from tasks.data.source import DatasetInfo
from tasks.data.sources.folder import PREFIX, place
from tasks.data.sources.stored import Stored

CLASSES, DISJOINT = "planted", "planted_episodes"
DOMAINS = ("amber", "blue", "coral")
_COUNT = 4  # classes
_SIZES = {"train": 64, "val": 16, "test": 24}
_SIDE, _LARGER_SIDE = 8, 16
Hidden = Collection[tuple[str, str]]
"""(domain, part) of images whose labels are dealt out anew; the domain of a set without is ""."""


@contextlib.contextmanager
def known(folder: Path) -> Iterator[dict[str, str]]:
    """Within the block the planted sets have names: kind ("classes", "domains", "disjoint") -> name."""
    register_dataset(CLASSES, Planted("planted", _COUNT, _SIDE))
    register_dataset(DISJOINT, Planted("planted", 3 * _COUNT, _LARGER_SIDE, is_few_shot=True))
    try:
        yield {"classes": CLASSES, "disjoint": DISJOINT, "domains": f"folder:{folder / 'planted_domains'}"}
    finally:
        forget_dataset(CLASSES)
        forget_dataset(DISJOINT)


@dataclass(frozen=True)
class Planted(Stored):
    """A set that `plant` writes.

    Args:
        title: for tables.
        num_classes: over all parts.
        side: of its images, in pixels.
        is_few_shot: its parts share no class.
    """

    title: str
    num_classes: int
    side: int
    is_few_shot: bool = False

    def info(self, name: str) -> DatasetInfo:
        shape = 3, self.side, self.side
        how = "planted"
        return DatasetInfo(
            name, self.title, "real", self.num_classes, shape, _SIZES, (), False, how, "none", self.is_few_shot
        )


def plant(data_dir: Path, kind: str, name: str, hidden: Hidden = ()) -> Path:
    """Write the set of that kind into a data folder, which is returned."""
    side = _LARGER_SIDE if kind == "disjoint" else _SIDE
    domains = DOMAINS if kind == "domains" else ("",)
    sets = {}
    for number, domain in enumerate(domains):
        parts: Parts = {}
        for position, (part, count) in enumerate(_SIZES.items()):
            first = position * _COUNT if kind == "disjoint" else 0
            images, labels = _draw(count, side, 10 * number + position, first)
            if (domain, part) in hidden:
                labels = np.random.default_rng(99).permutation(labels)
            parts[part] = images, labels
        sets[domain] = parts
    total = 3 * _COUNT if kind == "disjoint" else _COUNT
    facts = {
        "name": name,
        "title": "planted",
        "kind": "synthetic",
        "num_classes": total,
        "class_names": [f"class {i}" for i in range(total)],
        "disjoint_classes": kind == "disjoint",
        "size": side,
    }
    with new_folder(data_dir, place(name, data_dir) if name.startswith(PREFIX) else name) as temporary:
        write_set(temporary, facts, sets)
    return data_dir


def _draw(count: int, side: int, seed: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and a bright bar that stands where the class says. images: (N, 3, side, side)."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % _COUNT
    images = draw.integers(0, 90, (count, 3, side, side), dtype=np.uint8)
    width = side // _COUNT
    for image, label in zip(images, labels, strict=True):
        image[:, :, width * label : width * (label + 1)] += np.uint8(120)
    return images, labels + first
