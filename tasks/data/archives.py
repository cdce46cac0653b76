"""Publishers' archives, by the names and md5 that torchvision knows: downloaded or given, verified, read.

torchvision verifies the archives of MNIST and its kin, of EMNIST and of Omniglot, and then trusts whatever lies
unpacked beside them; a USPS file it trusts as soon as there is one. An extraction or a download that was interrupted
would be read as if it were whole. So these are read here, from archives that were verified a moment before.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tasks.data.prepared import scratch_folder


class Archives(Protocol):
    """Where the archives of one set come from.

    Attributes:
        downloads: whether a torchvision class may download what its root lacks.
    """

    downloads: bool

    def file(self, path: str, urls: Sequence[str], md5: str) -> Path:
        """An archive whose content is verified.

        Args:
            path: where torchvision lays it below its root.
            urls, md5: as its publisher states them.

        Raises:
            ValueError: there is none; names the file, and says what was wrong with it.
        """

    def roots(self, kind: Any) -> AbstractContextManager[Callable[[str], Path]]:
        """part ("train", "test") -> the root folder that a torchvision class reads it from, and verifies it in."""


@dataclass(frozen=True)
class Downloaded:
    """Archives that are downloaded into torchvision's root folder, and kept there."""

    root: Path
    downloads = True

    def file(self, path: str, urls: Sequence[str], md5: str) -> Path:
        return fetched(self.root / path, urls, md5)

    @contextlib.contextmanager
    def roots(self, kind: Any) -> Iterator[Callable[[str], Path]]:
        yield lambda part: self.root


@dataclass(frozen=True)
class Given:
    """Archives that lie in a user's folder, in which nothing is written; nothing is downloaded.

    Args:
        folder: holds the files, as torchvision lays them, below a folder of the set's name, or side by side.
        name: of the set.
        data_dir: what has to be unpacked is unpacked below it, and removed when it was read.
    """

    folder: Path
    name: str
    data_dir: Path
    downloads = False

    def file(self, path: str, urls: Sequence[str], md5: str) -> Path:
        from torchvision.datasets.utils import calculate_md5

        last = path.rpartition("/")[2]
        damaged = ""
        for place in dict.fromkeys(root / each for root in self._roots() for each in (path, last)):
            if not place.is_file():
                continue
            found = calculate_md5(str(place))
            if found == md5:
                return place
            damaged = damaged or f"{place} has md5 {found}, the published one is {md5}"
        raise ValueError(
            damaged
            or f"{last} is missing: there is no {' or '.join(dict.fromkeys((path, last)))}, also not below {self.name}/"
        )

    @contextlib.contextmanager
    def roots(self, kind: Any) -> Iterator[Callable[[str], Path]]:
        if not hasattr(kind, "tgz_md5"):  # the files are read as they are published
            yield lambda part: self.file(kind.split_list[part][1], (), kind.split_list[part][2]).parent
            return
        unpacked = [root for root in self._roots() if _is_unpacked(kind, root)]
        if unpacked:
            yield lambda part: unpacked[0]
            return
        archive = self.file(kind.filename, (), kind.tgz_md5)
        with scratch_folder(self.data_dir) as root:
            with tarfile.open(archive) as packed:
                packed.extractall(root, filter="data")
            yield lambda part: root

    def _roots(self) -> list[Path]:
        return [self.folder, self.folder / self.name, self.folder / "downloads" / self.name]


def _is_unpacked(kind: Any, root: Path) -> bool:
    """Whether every file of a packed archive lies unpacked in a root of torchvision, with its published md5."""
    from torchvision.datasets.utils import check_integrity

    lists = [*kind.train_list, *kind.test_list]
    if hasattr(kind, "meta"):
        lists.append((kind.meta["filename"], kind.meta["md5"]))
    with contextlib.suppress(OSError):
        return all(check_integrity(str(root / kind.base_folder / file), md5) for file, md5 in lists)
    return False


def fetched(path: Path, urls: Sequence[str], md5: str) -> Path:
    """`path`, once its content is verified: downloaded where it is missing or damaged, from the first URL that serves.

    Raises:
        ValueError: no URL does; names the file, and says what was wrong with it.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; remove it")
    damaged = path.exists()
    if damaged and check_integrity(path, md5):
        return path
    reasons = []
    for url in urls:
        try:
            download_url(url, str(path.parent), path.name, md5)
        except (OSError, RuntimeError, HTTPException) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        return path
    if not damaged:
        path.unlink(missing_ok=True)  # a part of it serves nobody
    what = "damaged, its md5 is not the published one," if damaged else "missing"
    raise ValueError(f"{path}: {what} and not downloaded ({reasons[-1]})")


def read_gzip(path: Path) -> np.ndarray:
    """The uint8 array of a compressed IDX file (MNIST's format)."""
    with gzip.open(path) as file:
        return _idx(file.read())


def read_gzip_in_zip(path: Path, member: str) -> np.ndarray:
    """As `read_gzip`, of a file that is kept in a zip (EMNIST)."""
    with zipfile.ZipFile(path) as archive:
        return _idx(gzip.decompress(archive.read(member)))


def read_libsvm(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (N, 16, 16), labels (N,)) of a USPS file: lines of a label, 1 to 10, and 256 values, -1 to 1."""
    with bz2.open(path, "rt", encoding="ascii") as file:
        lines = [line.split() for line in file]
    values = np.array([[value.partition(":")[2] for value in line[1:]] for line in lines], np.float32)
    images = ((values.reshape(-1, 16, 16) + 1) / 2 * 255).astype(np.uint8)
    return images, np.array([int(line[0]) - 1 for line in lines])


def images_by_class(path: Path, folder: str) -> Iterator[tuple[str, Image.Image]]:
    """("alphabet/character", image) of every folder/alphabet/character/*.png in a zip (Omniglot), sorted by path."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            top, *between = name.split("/")
            if top == folder and len(between) == 3 and name.endswith(".png"):
                yield "/".join(between[:2]), Image.open(io.BytesIO(archive.read(name)))


def _idx(content: bytes) -> np.ndarray:
    """IDX: two zero bytes, the type (8: uint8), the number of sides, each side as a big-endian uint32, the values."""
    zeros, kind, count = content[:2], content[2], content[3]
    if zeros != b"\0\0" or kind != 8:
        raise ValueError("not an IDX file of uint8 values")
    sides = np.frombuffer(content, ">u4", count, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * count).reshape(sides.tolist())
