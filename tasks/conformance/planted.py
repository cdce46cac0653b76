"""Data sets of a few planted images, which the checks run tasks on: one to classify, one of domains, one of parts that
share no class; each as often as wanted with the labels of some of its images dealt out anew.

They are prepared sets below a temporary data folder, known by name as long as the block lasts, so that a task reads
them as it reads any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from tasks.data import catalog
from tasks.data.downloads import DOWNLOADS, Download
from tasks.data.prepared import Parts, new_folder, write_set

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
    facts = {"licence": "none", "read": _unread}
    sets = {
        CLASSES: Download("planted", _COUNT, (3, _SIDE, _SIDE), _SIZES, **facts),  # type: ignore[arg-type]
        DISJOINT: Download(
            "planted", 3 * _COUNT, (3, _LARGER_SIDE, _LARGER_SIDE), _SIZES, disjoint_classes=True, **facts  # type: ignore[arg-type]
        ),
    }  # fmt: skip
    DOWNLOADS.update(sets)
    try:
        yield {"classes": CLASSES, "disjoint": DISJOINT, "domains": f"folder:{folder / 'planted_domains'}"}
    finally:
        for name in sets:
            del DOWNLOADS[name]


def plant(data_dir: Path, kind: str, name: str, hidden: Hidden = ()) -> Path:
    """Write the set of that kind into a data folder, which is returned."""
    side = _LARGER_SIDE if kind == "disjoint" else _SIDE
    domains = DOMAINS if kind == "domains" else ("",)
    sets = {}
    for number, domain in enumerate(domains):
        parts: Parts = {}
        for place, (part, count) in enumerate(_SIZES.items()):
            first = place * _COUNT if kind == "disjoint" else 0
            images, labels = _draw(count, side, 10 * number + place, first)
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
    with new_folder(data_dir, catalog._folder(name)) as temporary:
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


def _unread(root: Path) -> tuple[Parts, list[str]]:
    raise ValueError("planted images are not downloaded")
