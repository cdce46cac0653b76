"""The same image in two parts of one domain: counted when a folder is prepared, and told, since a test of a training
image shows nothing. It is no error: published sets have some.

In a set held in memory images are compared by their decoded pixels, which finds copies in other formats, too; in a
larger one by their files' bytes, of which only those are read whose sizes and last bytes agree.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

from torch import Tensor

from tasks.data.layout import Listing
from tasks.data.origin import file_digest
from tasks.data.prepared import PARTS, Parts

_LAST = 4096  # bytes
Shared = dict[str, tuple[int, str, str]]
""""val in train" -> how many images of val are also in train, and the paths of one such pair"""


def same_pixels(listing: Listing, parts: Parts) -> Shared:
    """By pixels: listing and parts hold the same images in one order."""
    keys = {p: [hashlib.sha256(image.tobytes()).hexdigest() for image in parts[p][0]] for p in PARTS}
    return _shared({p: list(zip(keys[p], (path for path, _ in listing[p]), strict=True)) for p in PARTS})


def same_bytes(listing: Listing, root: Path, sizes: dict[str, int]) -> Shared:
    """By files' bytes. sizes: path below the root -> bytes."""
    images = {p: [path for path, _ in listing[p]] for p in PARTS}
    images = _in_several(images, sizes.__getitem__)
    images = _in_several(images, lambda path: file_digest(root / path, _LAST))
    return _shared({p: [(file_digest(root / path), path) for path in images[p]] for p in PARTS})


def same_images(images: Mapping[str, Tensor]) -> list[tuple[tuple[str, int], tuple[str, int], int]]:
    """Of arrays, images uint8 (N, C, H, W) by part: ((later part, position), (earlier part, position), count) for each
    two parts that share an image; the positions are of one such pair, the count is of the later part's images."""
    keys = {p: [hashlib.sha256(image.tobytes()).digest() for image in images[p].numpy()] for p in PARTS}
    first = {part: {key: i for i, key in reversed(list(enumerate(keys[part])))} for part in PARTS}
    found = []
    for earlier, later in itertools.combinations(PARTS, 2):
        both = [(i, first[earlier][key]) for i, key in enumerate(keys[later]) if key in first[earlier]]
        if both:
            found.append(((later, both[0][0]), (earlier, both[0][1]), len(both)))
    return found


def _in_several(images: dict[str, list[str]], key: Callable[[str], Hashable]) -> dict[str, list[str]]:
    """Those images whose key is also that of an image in another part."""
    keys = {part: [key(path) for path in paths] for part, paths in images.items()}
    parts_of: dict[Hashable, set[str]] = defaultdict(set)
    for part in PARTS:
        for k in keys[part]:
            parts_of[k].add(part)
    return {p: [path for path, k in zip(images[p], keys[p], strict=True) if len(parts_of[k]) > 1] for p in PARTS}


def _shared(images: dict[str, list[tuple[str, str]]]) -> Shared:
    first = {part: dict(reversed(images[part])) for part in PARTS}
    found: Shared = {}
    for earlier, later in itertools.combinations(PARTS, 2):
        both = [(path, first[earlier][key]) for key, path in images[later] if key in first[earlier]]
        if both:
            found[f"{later} in {earlier}"] = (len(both), *both[0])
    return found
