"""What a prepared set's manifest.json and index.json hold, and whether a file of that name holds it.

A manifest is checked by hand, since names of folders may hold bytes that are no Unicode, which JSON carries as lone
surrogates and models of pydantic refuse.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 1  # raised when the same source is cut or decoded in another way: it enters the checksum
INDEX = 2  # raised when what an index names is read in another way: it enters the checksum, and older ones are refused
PARTS = ("train", "val", "test")
LARGEST_MANIFEST, LARGEST_INDEX = 64 * 2**20, 2 * 2**30
"""Bytes of the largest file that is parsed; the index of 14 million images is half of it."""
IndexParts = dict[str, list[tuple[str, int, int]]]
"""part -> (path below the set's root, label, size in bytes) of each image"""
_TYPES: dict[str, type] = {
    "name": str,
    "title": str,
    "kind": str,
    "num_classes": int,
    "class_names": list,
    "disjoint_classes": bool,
    "domains": list,
    "moments": dict,
    "files": dict,
    "checksum": str,
}


def content_checksum(files: Mapping[str, str]) -> str:
    """Identity of a prepared set: its format, and the sha256 of each of its files by name."""
    return hashlib.sha256(json.dumps([FORMAT, files], sort_keys=True).encode()).hexdigest()[:16]


def read_regular(path: Path, largest: int) -> bytes:
    """The content of a regular file. Raises OSError for a pipe, a device, or more than `largest` bytes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a regular file")
    if found.st_size > largest:
        raise OSError(f"larger than {largest / 2**20:g} MiB")
    return path.read_bytes()


def parse_manifest(content: bytes) -> dict[str, Any]:
    """The facts in a manifest's text; those beside the required ones are their writers' own, and not looked at.

    Raises:
        ValueError: not JSON, another format, or a fact that is missing or in the wrong form; says which.
    """
    try:
        manifest = _parse(content)
    except ValueError as error:
        raise ValueError(f"damaged ({error})") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise ValueError("damaged (no object with a format)")
    if manifest["format"] != FORMAT:
        raise ValueError(f"written as format {str(manifest['format'])[:20]}, this is format {FORMAT}")
    if mistake := _mistake(manifest):
        raise ValueError(f"damaged ({mistake})")
    return manifest


def parse_index(content: bytes, num_classes: int, domains: list[str]) -> dict[str, IndexParts]:
    """domain -> part -> (path below the set's root, label, size in bytes) of each image.

    Raises:
        ValueError: another form, other domains, a label out of range, or a path that leaves the root.
    """
    index = _parse(content)
    found = index.get("domains") if isinstance(index, dict) else None
    if not isinstance(found, dict) or list(found) != domains:
        raise ValueError("its domains are not those of the manifest")
    return {domain: _parse_parts(parts, num_classes) for domain, parts in found.items()}


def _parse_parts(index: Any, num_classes: int) -> IndexParts:
    if not isinstance(index, dict) or sorted(index) != sorted(PARTS):
        raise ValueError(f"no object with parts {', '.join(PARTS)}")
    for part, entries in index.items():
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{part} is no list of images")
        for entry in entries:
            if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, int]:
                raise ValueError(f"an entry of {part} is not [path, label, bytes]")
            path, label, size = entry
            if not 0 <= label < num_classes or not 0 <= size < 2**63:
                raise ValueError(f"a label of {part} is not in 0..{num_classes - 1}, or a size is none")
            if path.startswith("/") or (".." in path and ".." in PurePosixPath(path).parts) or "\0" in path:
                raise ValueError(f"a path of {part} leaves the folder")
    return {part: [(path, label, size) for path, label, size in index[part]] for part in PARTS}


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _mistake(manifest: dict[str, Any]) -> str | None:
    """What a manifest lacks, or has in the wrong form; None where nothing."""
    for key, kind in _TYPES.items():
        if type(manifest.get(key)) is not kind:
            return f"{key} is no {kind.__name__}" if key in manifest else f"no {key}"
    names, domains, moments, files = (manifest[key] for key in ("class_names", "domains", "moments", "files"))
    if not 1 <= manifest["num_classes"] == len(names) or not all(isinstance(name, str) for name in names):
        return "class_names are not as many names as num_classes says"
    if not domains or not all(isinstance(d, str) for d in domains) or len(set(domains)) < len(domains):
        return "domains are not names"
    if sorted(moments) != sorted(domains) or not all(_are_moments(pair) for pair in moments.values()):
        return "moments are not mean and deviation for each domain"
    if not all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in files.values()):
        return "files are not names with their sha256"
    if "index.json" in files:
        if "root" not in manifest or "size" not in manifest:
            return "an index needs root and size"
    else:
        needed = {f"{i}_{p}_{f}.npy" for i in range(len(domains)) for p in PARTS for f in ("images", "labels")}
        if set(files) != needed:
            return "files are not the images and labels of every part"
    if mistake := _mistake_of_source(manifest):
        return mistake
    if manifest["checksum"] != content_checksum(files):
        return "checksum is not that of the files"
    return None


def _mistake_of_source(manifest: dict[str, Any]) -> str | None:
    """As _mistake, of what a folder's manifest says of where it comes from, as far as it does."""
    root, size, source = manifest.get("root", ""), manifest.get("size", 1), manifest.get("source", {"images": 0})
    if type(root) is not str or "\0" in root or type(size) is not int or not 1 <= size < 2**16:
        return "root or size can not be"
    if not isinstance(source, dict) or type(source.get("images")) is not int:
        return "source does not say how many images"
    layout, cut = manifest.get("layout", ""), manifest.get("cut")
    if type(layout) is not str or not (cut is None or _is_cut(cut)):
        return "layout or cut can not be"
    return None


def _is_cut(cut: Any) -> bool:
    """Whether it says a rule, a salt, and a fraction for each part."""
    if not isinstance(cut, dict) or not all(type(cut.get(key)) is str for key in ("rule", "salt")):
        return False
    fractions = cut.get("fractions")
    return isinstance(fractions, dict) and all(type(share) in (int, float) for share in fractions.values())


def _are_moments(pair: Any) -> bool:
    """Whether it is [means, deviations], a finite number each per channel, deviations above 0."""
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, list) and side for side in pair):
        return False
    means, deviations = pair
    if len(means) != len(deviations) or not all(type(value) in (int, float) for value in (*means, *deviations)):
        return False
    return all(abs(value) <= 1 for value in means) and all(0 < value <= 1 for value in deviations)
