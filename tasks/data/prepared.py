"""The cache of prepared data sets: decoded once by `data prepare`, then read as verified uint8 arrays.

One folder per set, data_dir/<folder>/: `manifest.json` and plain .npy files, one per domain, part and field. A set
without domains has the one domain "". The manifest declares the sha256 of every file. It is written into a temporary
folder that is renamed when complete, so an interrupted preparation leaves nothing that could be taken for a data set.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from norms.registry import nearest
from tasks.base import NotPrepared
from tasks.data.decoding import DECODING
from tasks.data.images import ImageData, Split, channel_moments, make_data
from tasks.data.swap import exchange

FORMAT = 1  # raised when the same source is cut or decoded in another way: it enters the checksum
PARTS = ("train", "val", "test")
Parts = dict[str, tuple[np.ndarray, np.ndarray]]
"""part -> (images uint8 (N, C, H, W), labels (N,))"""


@contextmanager
def new_folder(data_dir: Path, folder: str, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes data_dir/folder when the block ends well, and is removed when it does not.

    replace: take the place of a folder that is there already, in one step; otherwise the one that is there stays.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".preparing-", dir=data_dir))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp's own mode would hide shared data from other users
        try:
            temporary.rename(data_dir / folder)
        except OSError:
            # another process may have finished the same set first; anything else is an error
            if replace and (data_dir / folder).is_dir():
                exchange(temporary, data_dir / folder)
            elif not (data_dir / folder / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_set(folder: Path, facts: dict[str, Any], domains: dict[str, Parts]) -> None:
    """Write the arrays and the manifest. facts: what ImageData needs beside the arrays, as JSON values."""
    files, moments = {}, {}
    for index, (domain, parts) in enumerate(domains.items()):
        for part in PARTS:
            images, labels = parts[part]
            for field, array in (("images", images), ("labels", labels.astype(np.int64))):
                path = folder / f"{index}_{part}_{field}.npy"
                np.save(path, np.ascontiguousarray(array), allow_pickle=False)
                files[path.name] = _digest(path)
        moments[domain] = channel_moments(torch.from_numpy(parts["train"][0]))
    write_manifest(folder, {**facts, "domains": list(domains), "moments": moments}, files)


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, str]) -> None:
    """manifest.json: the facts, the digests of `files`, and the checksum over both digests and format."""
    checksum = hashlib.sha256(json.dumps([FORMAT, files], sort_keys=True).encode()).hexdigest()[:16]
    text = json.dumps({**facts, "format": FORMAT, "files": files, "checksum": checksum}, indent=1)
    (folder / "manifest.json").write_text(text)


def read_manifest(name: str, data_dir: Path, folder: str) -> dict[str, Any]:
    """What a prepared set's manifest says.

    Raises:
        NotPrepared: there is none; the message names the command.
        ValueError: it can not be read, or an older version of this code wrote it.
    """
    path = data_dir / folder / "manifest.json"
    try:
        modified = path.stat().st_mtime_ns
    except FileNotFoundError:
        raise NotPrepared(f'data set "{name}" is not prepared in {data_dir}: run `{command(name)}`') from None
    return _manifest(path, modified)


def command(name: str) -> str:
    """What a user types to prepare a set; a path may hold blanks."""
    return f"python run_suite.py data prepare {shlex.quote(name)}"


def read_set(
    name: str, data_dir: Path, folder: str, *, domain: str | None = None, classes: int | None = None
) -> ImageData:
    """One domain of a prepared set, every byte verified.

    Raises:
        NotPrepared: as read_manifest. ValueError: damaged files, or `domain` is missing, unknown or not applicable.
    """
    manifest, arrays = _read_arrays(name, data_dir, folder, domain, ("images", "labels"))
    parts = {part: Split(images, labels) for part, (images, labels) in arrays.items()}
    return make_data(
        f"{name}/{domain}" if domain else name,
        manifest["title"],
        parts,
        kind=manifest["kind"],
        checksum=manifest["checksum"],
        num_classes=manifest["num_classes"],
        classes=classes,
        class_names=manifest["class_names"],
        disjoint_classes=manifest["disjoint_classes"],
        moments=manifest["moments"][domain or ""],
    )


def read_labels(name: str, data_dir: Path, folder: str, *, domain: str | None = None) -> dict[str, Tensor]:
    """part -> labels, int64 (N,), of one domain of a prepared set, verified; no image is read. Raises as read_set."""
    _, arrays = _read_arrays(name, data_dir, folder, domain, ("labels",))
    return {part: labels for part, (labels,) in arrays.items()}


def check_domain(name: str, domain: str | None, domains: Sequence[str]) -> str:
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


def _in_memory_manifest(name: str, data_dir: Path, folder: str) -> dict[str, Any]:
    manifest = read_manifest(name, data_dir, folder)
    if "index.json" in manifest["files"]:
        raise ValueError(
            f'data set "{name}" is too large to be held in memory; tasks.data.open_folder decodes it lazily'
        )
    return manifest


def _domain_index(name: str, manifest: dict[str, Any], domain: str | None) -> int:
    """Where the domain stands in the set's order: its files' names begin with it."""
    domains: list[str] = manifest["domains"]
    if domains == [""]:
        if domain is not None:
            check_domain(name, domain, [])
        return 0
    return domains.index(check_domain(name, domain, domains))


def _read_arrays(
    name: str, data_dir: Path, folder: str, domain: str | None, fields: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The manifest, and part -> fields of one domain: all of one set, also where `prepare` replaces it meanwhile."""
    while True:
        manifest = _in_memory_manifest(name, data_dir, folder)
        index = _domain_index(name, manifest, domain)
        try:
            return manifest, {
                part: [_read_array(name, data_dir / folder, manifest, index, part, field) for field in fields]
                for part in PARTS
            }
        except (ValueError, OSError):
            if _in_memory_manifest(name, data_dir, folder) == manifest:
                raise


def _read_array(name: str, folder: Path, manifest: dict[str, Any], index: int, part: str, field: str) -> Tensor:
    path = folder / f"{index}_{part}_{field}.npy"
    try:
        with path.open("rb") as file:  # once: what was verified is what is read, also where the set is replaced
            if hashlib.file_digest(file, "sha256").hexdigest() == manifest["files"].get(path.name):
                file.seek(0)
                return torch.from_numpy(np.load(file, allow_pickle=False))
    except FileNotFoundError:
        pass
    raise ValueError(f"{path}: damaged or missing; delete {folder} and run `{command(name)}` again")


@functools.lru_cache(maxsize=64)
def _manifest(path: Path, modified: int) -> dict[str, Any]:
    # `modified` is part of the cache's key: a plan of 10,000 runs asks for the same file 10,000 times
    try:
        manifest = json.loads(path.read_text())
        current = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete {path.parent} and prepare the data set again") from error
    if not current:
        raise ValueError(
            f"{path}: written as format {manifest['format']}, this is format {FORMAT}; delete {path.parent} "
            "and prepare the data set again"
        )
    if "index.json" in manifest["files"] and manifest.get("decoding") != DECODING:
        raise ValueError(
            f"{path}: written by a version that decodes some images in another way; "
            "prepare the data set again with --force"
        )
    return dict(manifest)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
