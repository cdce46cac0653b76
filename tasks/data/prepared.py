"""The cache of prepared data sets: decoded once by `data prepare`, then read as verified uint8 arrays.

One folder per set, data_dir/<folder>/: `manifest.json` and plain .npy files, one per domain, part and field. A set
without domains has the one domain "". The manifest declares the sha256 of every file. It is written into a temporary
folder that is renamed when complete, so an interrupted preparation leaves nothing that could be taken for a data set.

A folder may have been made by anyone, so nothing in it is believed: tasks.data.manifest checks what a manifest says,
arrays are compared with their digests, forms and each other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from tasks.base import NotPrepared
from tasks.data.decoding import DECODING
from tasks.data.images import ImageData, Split, channel_moments, make_data
from tasks.data.manifest import (
    FORMAT,
    INDEX,
    LARGEST_INDEX,
    LARGEST_MANIFEST,
    PARTS,
    IndexParts,
    content_checksum,
    parse_index,
    parse_manifest,
    read_regular,
)
from tasks.data.source import check_domain
from tasks.data.swap import exchange

_T = TypeVar("_T")

DATA_DIR = Path("data")
"""Where commands look for prepared sets, unless they are told another folder."""
FORGOTTEN = 24 * 3600.0
"""Seconds after which a preparation that another machine began, and has not written to since, belongs to nobody."""
Parts = dict[str, tuple[np.ndarray, np.ndarray]]
"""part -> (images uint8 (N, C, H, W), labels (N,))"""
_noted: set[str] | None = None


@contextmanager
def noting() -> Iterator[set[str]]:
    """Within the block, the folders of prepared sets whose manifests are read are put into the set: what another
    machine needs for the same."""
    global _noted
    outer, _noted = _noted, set()
    try:
        yield _noted
    finally:
        _noted = outer


@contextmanager
def new_folder(data_dir: Path, folder: str, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes data_dir/folder when the block ends well, and is removed when it does not.

    What preparations that were killed left in data_dir is removed first.

    Args:
        data_dir, folder: data_dir is made if missing.
        replace: take the place of a folder that is there already, in one step; otherwise the one that is there stays.

    Raises:
        ValueError: data_dir is no folder, can not be written to, or is full; names the path.
    """
    target = data_dir / folder
    temporary = _temporary(data_dir)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        _sweep(data_dir)
        temporary.mkdir(mode=0o700)
        yield temporary
        os.chmod(temporary, 0o755)  # shared data are for other users, too
        try:
            temporary.rename(target)
        except OSError:
            # another process may have finished the same set first; anything else is an error
            if replace and target.is_dir():
                exchange(temporary, target)
            elif not (target / "manifest.json").exists():
                if target.is_dir():
                    raise ValueError(f"{target}: is there, without its manifest.json; --force makes it again") from None
                raise
    except OSError as error:
        # numpy's own for a full disk is without path and reason
        reason = str(error) if error.errno else f"{error}: is the disk full?"
        raise ValueError(f"{target}: can not be written: {reason}; nothing of it was left") from error
    finally:
        if temporary.is_symlink():  # the place of the replaced set was a link: what it leads to is its owner's
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_folder(data_dir: Path) -> Iterator[Path]:
    """A folder on the disk of data_dir that is removed when the block ends, or by the next preparation after a kill."""
    temporary = _temporary(data_dir)
    temporary.mkdir(mode=0o700, parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(data_dir: Path) -> Path:
    return data_dir / f".preparing-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _sweep(data_dir: Path) -> None:
    """Remove the temporary folders whose makers are gone."""
    for left in data_dir.glob(".preparing-*"):
        _, host, process, *_ = [*left.name.split("-"), "", ""]
        with contextlib.suppress(OSError):
            here = host == _host()
            if not _alive(process) if here else time.time() - left.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(left, ignore_errors=True)


def _host() -> str:
    """Tells machines that share a disk apart, in letters that are safe in a folder's name."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):  # no number, or another user's process: not ours to judge
        return True
    return True


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
    text = json.dumps({**facts, "format": FORMAT, "files": files, "checksum": content_checksum(files)}, indent=1)
    (folder / "manifest.json").write_text(text)


def set_root(name: str, data_dir: Path, folder: str, root: Path) -> None:
    """Let the manifest of a prepared set say that its images lie in `root` now; its checksum stays."""
    path = data_dir / folder / "manifest.json"
    text = json.dumps({**read_manifest(name, data_dir, folder), "root": str(root)}, indent=1)
    temporary = path.with_name(f".manifest-{os.getpid()}.json")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: can not be written: {error.strerror}") from error


def read_manifest(name: str, data_dir: Path, folder: str) -> dict[str, Any]:
    """What a prepared set's manifest says; what every set must have is there, in the right form.

    Raises:
        NotPrepared: there is none; the message names the command.
        ValueError: it can not be read or is damaged, or an older version of this code wrote it.
    """
    if _noted is not None:
        _noted.add(folder)
    path = data_dir / folder / "manifest.json"
    try:
        found = path.stat()
    except FileNotFoundError:
        raise NotPrepared(f'data set "{name}" is not prepared in {data_dir}: run `{command(name, data_dir)}`') from None
    except NotADirectoryError:
        wrong = path.parent if data_dir.is_dir() else data_dir
        raise ValueError(f"{wrong}: not a folder") from None
    except OSError as error:
        raise ValueError(f"{path}: can not be read: {error.strerror}") from error
    return _manifest(path, (found.st_mtime_ns, found.st_size))


def is_written(name: str, data_dir: Path, folder: str) -> bool:
    """Whether there is a manifest; other files are not looked at. Raises ValueError where it is damaged."""
    try:
        read_manifest(name, data_dir, folder)
    except NotPrepared:
        return False
    return True


def command(name: str, data_dir: Path = DATA_DIR) -> str:
    """What a user types to prepare a set in `data_dir`; a path may hold blanks."""
    where = "" if data_dir == DATA_DIR else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"python run_suite.py data prepare {shlex.quote(name)}{where}"


def read_index(name: str, data_dir: Path, folder: str) -> tuple[dict[str, Any], dict[str, IndexParts]]:
    """The manifest of a set too large for memory, and what its index lists of each domain.

    Raises:
        NotPrepared, ValueError: as read_manifest; a damaged index, or a set that is held in memory.
    """
    path = data_dir / folder / "index.json"

    def read(manifest: dict[str, Any]) -> dict[str, IndexParts]:
        if "index.json" not in manifest["files"]:
            raise ValueError(f'data set "{name}" fits in memory: use load')
        try:
            content = read_regular(path, LARGEST_INDEX)
            if hashlib.sha256(content).hexdigest() != manifest["files"]["index.json"]:
                raise ValueError("its sha256 is not the declared one")
            return parse_index(content, manifest["num_classes"], manifest["domains"])
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: damaged or missing; delete {path.parent} and prepare the data set again ({_reason(error)})"
            ) from error

    return _whole(name, data_dir, folder, read)


def read_set(
    name: str, data_dir: Path, folder: str, *, domain: str | None = None, classes: int | None = None
) -> ImageData:
    """One domain of a prepared set, every byte verified.

    Raises:
        NotPrepared: as read_manifest. ValueError: damaged files, or `domain` is missing, unknown or not applicable.
    """
    manifest, arrays = _read_arrays(name, data_dir, folder, domain, ("images", "labels"))
    parts = {part: Split(images, labels) for part, (images, labels) in arrays.items()}
    shapes = {split.images.shape[1:] for split in parts.values()}
    if (
        len(shapes) > 1
        or any(len(split.images) != len(split.labels) for split in parts.values())
        or len(manifest["moments"][domain or ""][0]) != next(iter(shapes))[0]
    ):
        raise ValueError(f"{data_dir / folder}: its arrays do not fit each other; {_again(name, data_dir / folder)}")
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
    manifest = read_manifest(name, data_dir, folder)
    if "index.json" in manifest["files"]:
        manifest, index = read_index(name, data_dir, folder)
        parts = index[manifest["domains"][_domain_index(name, manifest, domain)]]
        return {part: torch.tensor([label for _, label, _ in entries]) for part, entries in parts.items()}
    _, arrays = _read_arrays(name, data_dir, folder, domain, ("labels",))
    return {part: labels for part, (labels,) in arrays.items()}


def _whole(name: str, data_dir: Path, folder: str, read: Callable[[dict[str, Any]], _T]) -> tuple[dict[str, Any], _T]:
    """The manifest and read(manifest): of one set, also where `data prepare --force` replaces it while it is read."""
    failed = None
    while True:
        manifest = read_manifest(name, data_dir, folder)
        try:
            return manifest, read(manifest)
        except (ValueError, OSError):
            # twice, since one that was replaced by another and by itself again has the manifest that it had
            if manifest == failed and read_manifest(name, data_dir, folder) == manifest:
                raise
            failed = manifest


def _read_arrays(
    name: str, data_dir: Path, folder: str, domain: str | None, fields: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The manifest, and part -> fields of one domain."""

    def read(manifest: dict[str, Any]) -> dict[str, list[Tensor]]:
        if "index.json" in manifest["files"]:
            raise ValueError(
                f'data set "{name}" is too large to be held in memory; tasks.data.open_folder decodes it lazily'
            )
        index = _domain_index(name, manifest, domain)
        return {
            part: [_read_array(name, data_dir / folder, manifest, index, part, f) for f in fields] for part in PARTS
        }

    return _whole(name, data_dir, folder, read)


def _domain_index(name: str, manifest: dict[str, Any], domain: str | None) -> int:
    """Where the domain stands in the set's order: its files' names begin with it."""
    domains: list[str] = manifest["domains"]
    if domains == [""]:
        if domain is not None:
            check_domain(name, domain, [])
        return 0
    return domains.index(check_domain(name, domain, domains))


def _read_array(name: str, folder: Path, manifest: dict[str, Any], index: int, part: str, field: str) -> Tensor:
    """images, uint8 (N, C, H, W), or labels, int64 (N,), of one part, verified."""
    path = folder / f"{index}_{part}_{field}.npy"
    if not path.is_file():
        raise ValueError(f"{path}: damaged or missing; {_again(name, folder)}")
    try:
        with path.open("rb") as file:  # once: what was verified is what is parsed, also where the set is replaced
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest["files"][path.name]:
                raise ValueError("its sha256 is not the declared one")
            array = _load_array(file, np.dtype(np.uint8) if field == "images" else np.dtype(np.int64))
        if field == "labels" and not ((array >= 0) & (array < manifest["num_classes"])).all():
            raise ValueError(f"a label is not in 0..{manifest['num_classes'] - 1}")
    except Exception as error:  # a header that anyone may have written makes numpy raise whatever it likes
        raise ValueError(f"{path}: damaged or missing; {_again(name, folder)} ({_reason(error)})") from error
    return torch.from_numpy(array)


def _load_array(file: BinaryIO, dtype: np.dtype[Any]) -> np.ndarray:
    """A .npy file of images (uint8) or labels; its header is compared with its size before anything is allocated."""
    file.seek(0)
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, _, found = header(file)
    stored = os.fstat(file.fileno()).st_size - file.tell()
    if found != dtype or len(shape) != (4 if dtype == np.uint8 else 1) or min(shape) < 1:
        raise ValueError(f"an array {found} {shape}")
    if math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"{stored} bytes for an array {found} {shape}")
    file.seek(0)
    return np.asarray(np.load(file, allow_pickle=False))


@functools.lru_cache(maxsize=64)
def _manifest(path: Path, version: tuple[int, int]) -> dict[str, Any]:
    # `version` is part of the cache's key: a plan of 10,000 runs asks for the same file 10,000 times
    try:
        manifest = parse_manifest(read_regular(path, LARGEST_MANIFEST))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {_reason(error)}; delete {path.parent} and prepare the data set again") from error
    if "index.json" in manifest["files"] and (manifest.get("decoding"), manifest.get("index")) != (DECODING, INDEX):
        raise ValueError(
            f"{path}: written by a version that decodes some images in another way; "
            "prepare the data set again with --force"
        )
    return manifest


def _again(name: str, folder: Path) -> str:
    return f"delete {folder} and run `{command(name, folder.parent)}` again"


def _reason(error: Exception) -> str:
    """An error's own words in one short line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:150]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
