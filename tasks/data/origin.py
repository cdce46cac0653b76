"""What a prepared folder was made from, and whether that has changed since.

The manifest of a set says: its folder, how many images, a digest of their paths and sizes, and, for sets held in
memory, one of their bytes. None of it is part of the set's checksum: a moved folder makes the same set.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tasks.data.decoding import DECODING, reason, regular_file
from tasks.data.layout import FolderListing, list_folder
from tasks.data.prepared import read_labels


def source_facts(root: Path, listing: FolderListing, *, content: bool) -> dict[str, Any]:
    """The manifest's entries on where its images come from. content: read every file."""
    source: dict[str, Any] = {"images": len(listing.sizes), "listing": _digest(listing.sizes)}
    if content:
        source["content"] = _digest({path: file_digest(root / path) for path in listing.sizes})
    return {"root": str(root.resolve()), "source": source, "decoding": DECODING}


def check_source(name: str, root: Path, data_dir: Path, folder: str, manifest: dict[str, Any]) -> tuple[str, ...]:
    """Whether data_dir/folder, which `manifest` describes, was made from `root` as it is, and as it is decoded now.

    A manifest of an older version says less: then only the folder and the number of images are compared.

    Returns:
        What a user should know of that, one line each.

    Raises:
        ValueError: it was not, or `root` is no folder of images (any more).
    """
    if not os.path.isdir(root):
        raise ValueError(f'folder "{root}": no such folder')
    # where its own folder is gone, the images themselves say whether it was moved
    if manifest["root"] != str(root.resolve()) and ("source" not in manifest or os.path.isdir(manifest["root"])):
        raise ValueError(
            f'data set "{name}" in {data_dir} was prepared from {manifest["root"]}, not from {root}; '
            "--force makes it again"
        )
    if manifest.get("decoding", DECODING) != DECODING:
        raise ValueError(
            f'data set "{name}" in {data_dir}: this version decodes some images in another way; --force makes it again'
        )
    listing = list_folder(root)
    known = manifest.get("source")
    notes: tuple[str, ...] = ()
    if known is None:
        notes = (
            "an older version prepared it: only the folder and the number of images were compared, "
            "and some images are decoded in another way now; --force makes it again",
        )
        labels = [read_labels(name, data_dir, folder, domain=domain or None) for domain in manifest["domains"]]
        known = {"images": sum(len(part) for parts in labels for part in parts.values())}
    if known["images"] != len(listing.sizes):
        changed = f"{len(listing.sizes)} images, was {known['images']}"
    elif "listing" in known and known["listing"] != _digest(listing.sizes):
        changed = "other file names or sizes"
    elif "content" in known and known != source_facts(root, listing, content=True)["source"]:
        changed = "other content of some files"
    else:
        return notes
    raise ValueError(
        f'data set "{name}" in {data_dir}: {root} has changed since it was prepared ({changed}); --force makes it again'
    )


def file_digest(path: Path, last: int | None = None) -> str:
    """sha256 of a file, or of its last `last` bytes. Raises ValueError where it can not be read; names it."""
    try:
        with regular_file(path) as file:
            if last is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last))
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can not be read: {reason(error)}") from error


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
