"""Folders of images as data sets: `folder:PATH`, and `imagenet`, which is such a folder under a name.

Two layouts, told apart by the names below the root:

- root/<split>/<class>/*: splits are train, test and optionally val (or valid, validation). Without val, a tenth of
  every training class becomes val. With train and val only, val is the test part: ImageNet's convention. If no class
  is in two splits the set is a few-shot one (mini-ImageNet, CUB) and needs all three splits.
- root/<domain>/<class>/*: any other names, two domains at least (Office-31, Office-Home, PACS), the same classes in
  each. Every class of every domain is cut 70 : 10 : 20 into train, val and test.

Images are decoded to RGB, the shorter side is resized to `size`, the middle is kept. Sets up to LARGEST_IN_MEMORY are
decoded once, in `prepare`; larger ones get an index (paths, labels, file sizes) and are decoded while they are read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from norms.registry import nearest
from tasks.data.images import channel_moments, stratified
from tasks.data.lazy import FolderImages, decode
from tasks.data.prepared import PARTS, Parts, new_folder, write_manifest, write_set

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
VALIDATION_FRACTION = 0.1
DOMAIN_FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
LARGEST_IN_MEMORY = 2 * 2**30  # bytes of decoded images
MOMENT_IMAGES = 2000  # mean and std of a lazily decoded set are measured on this many training images

Listing = dict[str, list[tuple[str, int]]]
"""part -> (path below the root, label) of every image, sorted by path"""


@dataclass(frozen=True)
class FolderListing:
    """What a folder holds, before anything is decoded: domain -> part -> images. No domains: the one domain ""."""

    class_names: list[str]
    domains: dict[str, Listing]
    disjoint_classes: bool


def list_folder(root: Path) -> FolderListing:
    """Look at a folder's layout.

    Raises:
        ValueError: no such folder, or a layout that is not one of the two above; says what was found and expected.
    """
    if not root.is_dir():
        raise ValueError(f'folder "{root}": no such folder')
    tops = _subfolders(root)
    if not tops:
        raise ValueError(f'folder "{root}": no subfolders; expected root/split/class/* or root/domain/class/*')
    splits = [top for top in tops if top.lower() in SPLITS]
    if splits and len(splits) < len(tops):
        raise ValueError(
            f'folder "{root}": {", ".join(tops)} mixes splits ({", ".join(SPLITS)}) with other names; '
            "expected splits only, or domains only"
        )
    kind = "split" if splits else "domain"
    found = {top: _classes(root, top, kind) for top in tops}
    return _as_splits(root, found) if splits else _as_domains(root, found)


def prepare_folder(name: str, root: Path, data_dir: Path, folder: str, size: int) -> None:
    """Decode the folder into data_dir/folder, or write its index where it is too large for memory.

    Raises:
        ValueError: a layout that is not supported, an image that can not be decoded, a size below 1; a folder of
            domains that is too large.
    """
    if size < 1:
        raise ValueError(f"size {size}: at least 1 pixel")
    listing = list_folder(root)
    facts: dict[str, Any] = {
        "name": name,
        "title": root.name if name.startswith("folder:") else name,
        "kind": "real",
        "num_classes": len(listing.class_names),
        "class_names": listing.class_names,
        "disjoint_classes": listing.disjoint_classes,
        "root": str(root.resolve()),
        "size": size,
    }
    count = sum(len(images) for parts in listing.domains.values() for images in parts.values())
    if count * 3 * size * size <= LARGEST_IN_MEMORY:
        with new_folder(data_dir, folder) as temporary:
            write_set(temporary, facts, {d: _decode_all(root, parts, size) for d, parts in listing.domains.items()})
        return
    if list(listing.domains) != [""] or listing.disjoint_classes:
        raise ValueError(
            f'folder "{root}": {count} images at {size}x{size} exceed {LARGEST_IN_MEMORY / 2**30:g} GiB; '
            "domains and few-shot splits are held in memory, so choose a smaller size"
        )
    parts = listing.domains[""]
    index = {part: [(p, label, (root / p).stat().st_size) for p, label in parts[part]] for part in PARTS}
    train = FolderImages(root, index["train"], size)
    sample = range(0, len(train), max(1, len(train) // MOMENT_IMAGES))
    facts["moments"] = {"": channel_moments(torch.stack([train[i][0] for i in sample]))}
    with new_folder(data_dir, folder) as temporary:
        text = json.dumps(index)
        (temporary / "index.json").write_text(text)
        write_manifest(temporary, {**facts, "domains": [""]}, {"index.json": hashlib.sha256(text.encode()).hexdigest()})


def _as_splits(root: Path, found: dict[str, dict[str, list[str]]]) -> FolderListing:
    splits = {SPLITS[top.lower()]: classes for top, classes in found.items()}
    if len(splits) < len(found):
        raise ValueError(f'folder "{root}": {", ".join(found)} name one split twice')
    if "train" not in splits or len(splits) < 2:
        raise ValueError(f'folder "{root}": found {", ".join(found)}; expected train and test (or val)')
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    names = sorted({c for classes in splits.values() for c in classes})
    parts: Listing = {
        part: [(path, names.index(c)) for c in sorted(classes) for path in classes[c]]
        for part, classes in splits.items()
    }
    if sum(len(classes) for classes in splits.values()) == len(names):
        if "val" not in splits:
            raise ValueError(f'folder "{root}": train and test share no class (few-shot), so a val folder is needed')
        return FolderListing(names, {"": parts}, disjoint_classes=True)
    for part, classes in splits.items():
        unknown = sorted(set(classes) - set(splits["train"]))
        if unknown:
            raise ValueError(f'folder "{root}": class "{unknown[0]}" is in {part} but not in train')
    if "val" not in parts:
        fractions = {"train": 1 - VALIDATION_FRACTION, "val": VALIDATION_FRACTION}
        images = parts["train"]
        where = stratified(np.array([label for _, label in images]), fractions, "folder")
        parts |= {part: [images[i] for i in index] for part, index in where.items()}
    return _checked(root, FolderListing(names, {"": parts}, disjoint_classes=False))


def _as_domains(root: Path, found: dict[str, dict[str, list[str]]]) -> FolderListing:
    if len(found) < 2:
        raise ValueError(
            f'folder "{root}": one subfolder, "{next(iter(found))}"; '
            f"expected splits ({', '.join(SPLITS)}) or at least two domains"
        )
    names = sorted({c for classes in found.values() for c in classes})
    for domain, classes in found.items():
        lacking = [c for c in names if c not in classes]
        if lacking:
            having = next(d for d in found if lacking[0] in found[d])
            # another spelling of the class is one that some other domain lacks in turn
            odd = [c for c in classes if any(c not in others for others in found.values())]
            raise ValueError(
                f'folder "{root}": domain "{domain}" has no class folder "{lacking[0]}", which domain "{having}" has; '
                "all domains need the same classes (root/class/* without splits is not a supported layout)"
                f"{nearest(lacking[0], odd)}"
            )
    domains = {}
    for domain, classes in found.items():
        images = [(path, label) for label, c in enumerate(names) for path in classes[c]]
        labels = np.array([label for _, label in images])
        where = stratified(labels, DOMAIN_FRACTIONS, f"folder/{domain}")
        domains[domain] = {part: [images[i] for i in index] for part, index in where.items()}
    return _checked(root, FolderListing(names, domains, disjoint_classes=False))


def _checked(root: Path, listing: FolderListing) -> FolderListing:
    if len(listing.class_names) < 2:
        raise ValueError(f'folder "{root}": one class, "{listing.class_names[0]}"; expected two or more')
    for domain, parts in listing.domains.items():
        for part in PARTS:
            if not parts[part]:
                where = f'domain "{domain}" of ' if domain else ""
                raise ValueError(f'{where}folder "{root}": too few images per class to cut a {part} part')
    return listing


def _decode_all(root: Path, parts: Listing, size: int) -> Parts:
    decoded = {}
    for part, images in parts.items():
        pixels = np.empty((len(images), 3, size, size), np.uint8)
        for i, (path, _) in enumerate(images):
            pixels[i] = decode(root / path, size)
        decoded[part] = (pixels, np.array([label for _, label in images]))
    return decoded


def _classes(root: Path, top: str, kind: str) -> dict[str, list[str]]:
    """class -> its images, of one split or domain; ValueError where there are no classes, or one has no image."""
    names = _subfolders(root / top)
    if not names:
        raise ValueError(
            f'folder "{root}": {kind} "{top}" has no class folders; expected root/split/class/* or root/domain/class/*'
        )
    found = {c: _images(root, root / top / c) for c in names}
    empty = [c for c, images in found.items() if not images]
    allowed = f"allowed: {', '.join(sorted(SUFFIXES))}"
    if len(empty) == len(names) > 1:
        raise ValueError(
            f'folder "{root}": {kind} "{top}" has {len(names)} class folders and no image in any of them ({allowed})'
        )
    if empty:
        raise ValueError(
            f'folder "{root}": no image in "{top}/{empty[0]}" ({kind} "{top}", class "{empty[0]}"; {allowed})'
        )
    return found


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(root: Path, folder: Path) -> list[str]:
    files = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p.relative_to(root).as_posix() for p in files)
