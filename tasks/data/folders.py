"""Folders of images as data sets: `folder:PATH`, and `imagenet`, which is such a folder under a name.

tasks.data.layout says which folders are understood, tasks.data.decoding what becomes of a file. Images are decoded to
RGB, the shorter side is resized to `size`, the middle is kept. Sets up to LARGEST_IN_MEMORY are decoded once, in
`prepare`; larger ones get an index (paths, labels, file sizes) and are decoded while they are read, where training may
take random resized crops of the whole images. Few-shot sets are held in memory only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.data.decoding import DECODING, decode
from tasks.data.duplicates import Shared, same_bytes, same_pixels
from tasks.data.images import channel_moments
from tasks.data.layout import FolderListing, Listing, list_folder
from tasks.data.lazy import FolderImages
from tasks.data.manifest import INDEX
from tasks.data.origin import source_facts
from tasks.data.prepared import PARTS, Parts, new_folder, write_manifest, write_set

LARGEST_IN_MEMORY = 2 * 2**30  # bytes of decoded images
LARGEST_SIZE = 4096  # side of decoded images
MOMENT_IMAGES = 2000  # mean and std of a lazily decoded set are measured on this many training images


def prepare_folder(
    name: str, root: Path, data_dir: Path, folder: str, size: int, *, replace: bool = False
) -> list[str]:
    """Decode the folder into data_dir/folder, or write its index where it is too large for memory.

    Args:
        name: of the set.
        root: of the images.
        data_dir, folder: where the set goes.
        size: side of the decoded images, in pixels.
        replace: a set that is there already, once the new one is complete.

    Returns:
        What a user should know of these images, one line each.

    Raises:
        ValueError: a layout that is not supported, an image that can not be decoded, a size that is not in
            1..LARGEST_SIZE; a few-shot folder that is too large.
    """
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"size {size}: at least 1 pixel, at most {LARGEST_SIZE}")
    listing = list_folder(root)
    count = len(listing.sizes)
    in_memory = count * 3 * size * size <= LARGEST_IN_MEMORY
    if not in_memory and listing.disjoint_classes:
        raise ValueError(
            f'folder "{root}": {count} images at {size}x{size} exceed {LARGEST_IN_MEMORY / 2**30:g} GiB; '
            "episodes are drawn from memory, so choose a smaller size for a few-shot set"
        )
    facts: dict[str, Any] = {
        "name": name,
        "title": root.name if name.startswith("folder:") else name,
        "kind": "real",
        "num_classes": len(listing.class_names),
        "class_names": listing.class_names,
        "disjoint_classes": listing.disjoint_classes,
        "size": size,
        "layout": listing.layout,
        "cut": listing.cut,
        **source_facts(root, listing, content=in_memory),
    }
    with new_folder(data_dir, folder, replace=replace) as temporary:
        if in_memory:
            domains = {domain: _decode_all(root, parts, size) for domain, parts in listing.domains.items()}
            shared = {domain: same_pixels(parts, domains[domain]) for domain, parts in listing.domains.items()}
            write_set(temporary, {**facts, "in_two_parts": _counts(shared)}, domains)
        else:
            shared = {domain: same_bytes(parts, root, listing.sizes) for domain, parts in listing.domains.items()}
            _write_index(temporary, {**facts, "in_two_parts": _counts(shared)}, root, listing)
    return [*listing.notes, *_notes(shared)]


def _write_index(folder: Path, facts: dict[str, Any], root: Path, listing: FolderListing) -> None:
    index = {
        domain: {part: [(path, label, listing.sizes[path]) for path, label in parts[part]] for part in PARTS}
        for domain, parts in listing.domains.items()
    }
    moments = {}
    for domain, parts in index.items():
        train = FolderImages(root, parts["train"], facts["size"])
        sample = range(0, len(train), max(1, len(train) // MOMENT_IMAGES))
        moments[domain] = channel_moments(torch.stack([train[i][0] for i in sample]))
    text = json.dumps({"index": INDEX, "decoding": DECODING, "domains": index})
    (folder / "index.json").write_text(text)
    files = {"index.json": hashlib.sha256(text.encode()).hexdigest()}
    write_manifest(folder, {**facts, "index": INDEX, "domains": list(index), "moments": moments}, files)


def _decode_all(root: Path, parts: Listing, size: int) -> Parts:
    decoded = {}
    for part, images in parts.items():
        pixels = np.empty((len(images), 3, size, size), np.uint8)
        for i, (path, _) in enumerate(images):
            pixels[i] = decode(root / path, size)
        decoded[part] = (pixels, np.array([label for _, label in images]))
    return decoded


def _counts(shared: dict[str, Shared]) -> dict[str, dict[str, int]]:
    """domain -> "val in train" -> images."""
    return {domain: {pair: count for pair, (count, _, _) in pairs.items()} for domain, pairs in shared.items() if pairs}


def _notes(shared: dict[str, Shared]) -> list[str]:
    """One line for each two parts: what all domains share, and one such pair."""
    total: dict[str, tuple[int, str, str]] = {}
    for pairs in shared.values():
        for pair, (count, one, other) in pairs.items():
            before, first, second = total.get(pair, (0, one, other))
            total[pair] = (before + count, first, second)
    notes = []
    for pair, (count, one, other) in total.items():
        later, earlier = pair.split(" in ")
        are = "image of {} is" if count == 1 else "images of {} are"
        notes.append(f'{count} {are.format(later)} also in {earlier}, such as "{one}" and "{other}"')
    return notes
