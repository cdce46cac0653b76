"""Folders of images as data sets: `folder:PATH`, and `imagenet`, whose folder is named when it is prepared.

A prepared folder is found by the real path of its images. Where nothing was prepared from that path, it is found by the
folder's name, as long as it can be nothing else: the path leads nowhere, or the prepared folder's own images are gone
and those at the path are the same. So a set stays known where its images were moved or removed, or
where data_dir was copied to another machine; another folder of one name is another set.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tasks.base import NotPrepared
from tasks.data import folders, lazy
from tasks.data.layout import list_folder
from tasks.data.origin import check_source, source_facts
from tasks.data.prepared import command, read_manifest, set_root
from tasks.data.source import DatasetInfo, Preparation
from tasks.data.sources.stored import Stored

PREFIX = "folder:"
SIZE = 64  # side in pixels of a prepared folder's images, unless said otherwise
IMAGENET_SIZE = 224


class Folder(Stored):
    """Any `folder:PATH`."""

    accepts: Collection[str] = ("size",)
    size = SIZE

    def info(self, name: str) -> DatasetInfo:
        title = Path(name.removeprefix(PREFIX)).name
        return DatasetInfo(name, title, "real", None, None, {}, (), False, command(name), "its owner's")

    def place(self, name: str, data_dir: Path) -> str:
        return place(name, data_dir)

    def domains(self, name: str, data_dir: Path) -> tuple[str, ...]:
        return self.contents(name, data_dir).domains

    def in_memory(self, name: str, data_dir: Path) -> bool:
        return "index.json" not in self._manifest(name, data_dir)["files"]

    def open(self, name: str, data_dir: Path, **options: Any) -> lazy.FolderData:
        data = lazy.open_folder(name, data_dir, self.place(name, data_dir), **options)
        root = folder_root(name)
        if not data.train.root.is_dir() and root.is_dir():  # moved since: `place` compared them
            for part in (data.train, data.val, data.test):
                part.root = root
        return data

    def mending(self, domain: str, class_name: str) -> str:
        # what is prepared is not read again by itself
        return f"; give {domain}/{class_name} 3 images or more and prepare it again with --force"

    def prepare(
        self, name: str, data_dir: Path, *, source: Path | None = None, size: int | None = None, force: bool = False
    ) -> Preparation:
        before = self._before(name, data_dir, force)
        root = self.root(name, source, before)
        where = self.place(name, data_dir)
        if before and not force:
            if size not in (None, before["size"]):
                raise ValueError(
                    f'data set "{name}" in {data_dir} is prepared with another size, {before["size"]}; '
                    "--force makes it again"
                )
            notes = check_source(name, root, data_dir, where, before)
            if before["root"] != str(root.resolve()):
                set_root(name, data_dir, where, root.resolve())
            return Preparation(False, notes, _layout(before))
        size = before.get("size", self.size) if size is None else size
        notes = tuple(folders.prepare_folder(name, root, data_dir, where, size, replace=force))
        return Preparation(True, notes, _layout(read_manifest(name, data_dir, where)))

    def root(self, name: str, source: Path | None, before: dict[str, Any]) -> Path:
        """Where the images lie. before: the manifest of what is prepared, or nothing."""
        return folder_root(name)

    def _before(self, name: str, data_dir: Path, force: bool) -> dict[str, Any]:
        """The manifest of a folder that is prepared; empty where there is none, or none that is whole and `force`."""
        try:
            manifest = self._manifest(name, data_dir)
            if "root" not in manifest or "size" not in manifest:
                where = data_dir / self.place(name, data_dir)
                raise ValueError(f"{where}: not prepared from a folder; --force makes it again")
            return manifest
        except NotPrepared:
            return {}
        except ValueError:
            if force:
                return {}
            raise


class ImageNet(Folder):
    """ImageNet in its usual folders train/ and val/, which `data prepare imagenet --source FOLDER` is told."""

    accepts = ("source", "size")
    size = IMAGENET_SIZE

    def info(self, name: str) -> DatasetInfo:
        how = f"{command(name)} --source FOLDER (with train/ and val/; not downloaded)"
        return DatasetInfo(name, "ImageNet", "real", None, None, {}, (), False, how, "non-commercial research only")

    def place(self, name: str, data_dir: Path) -> str:
        return name

    def open(self, name: str, data_dir: Path, **options: Any) -> lazy.FolderData:
        return lazy.open_folder(name, data_dir, self.place(name, data_dir), **options)

    def root(self, name: str, source: Path | None, before: dict[str, Any]) -> Path:
        if source is None and "root" not in before:
            raise ValueError(f"{name} is not downloaded: give the folder that holds its train/ and val/ as source")
        return Path(before["root"]) if source is None else source


def folder_root(name: str) -> Path:
    """The path of a `folder:PATH`, `~` expanded. Raises ValueError where there is no such home."""
    return expanded(Path(name.removeprefix(PREFIX)), f'data set "{name}"')


def expanded(path: Path, what: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what}: {error}") from error


def place(name: str, data_dir: Path) -> str:
    """The folder of a prepared `folder:PATH` below data_dir; where none is, the one that its path would have.

    Raises:
        ValueError: several with other images have its name, and nothing tells which is meant.
    """
    given = folder_root(name)
    try:
        root = given.resolve()
    except RuntimeError as error:  # links that lead in a circle
        raise ValueError(f'data set "{name}": {error}') from error
    usual = f"folder-{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    if (data_dir / usual).is_dir():
        return usual
    found: dict[str, tuple[str, str]] = {}  # checksum -> (folder, root) of the first with it
    for other in _prepared(data_dir):
        with contextlib.suppress(ValueError, NotPrepared):  # damaged ones are somebody else's, or will be made again
            manifest = read_manifest(name, data_dir, other)
            if {root.name, given.name} & _names(manifest) and _is_of(manifest, root):
                if manifest.get("root") == str(root):
                    return other
                found.setdefault(manifest["checksum"], (other, manifest.get("root", "")))
    if len(found) > 1:
        roots = " and ".join(f"{data_dir / other} (from {origin})" for other, origin in found.values())
        raise ValueError(
            f'data set "{name}": {root} does not exist, and folders of this name with different images are prepared: '
            f"{roots}; give the path of one of them"
        )
    return next(iter(found.values()))[0] if found else usual


def _prepared(data_dir: Path) -> list[str]:
    """The folders below data_dir of prepared `folder:PATH`s."""
    try:
        return sorted(each for each in os.listdir(data_dir) if each.startswith("folder-"))
    except OSError:
        return []


def _names(manifest: dict[str, Any]) -> set[str]:
    """What a prepared folder is called: the last part of its path, and of the link by which it was prepared."""
    return {Path(manifest.get("root", "")).name, Path(manifest["name"].removeprefix(PREFIX)).name} - {""}


def _is_of(manifest: dict[str, Any], root: Path) -> bool:
    """Whether a set that was prepared elsewhere can be taken for the one of the images in `root`."""
    if manifest.get("root") == str(root) or not root.exists():
        return True
    source = manifest.get("source", {})
    if "listing" not in source or os.path.isdir(manifest.get("root", "")):
        return False
    return _source_of(root, "content" in source) == source


@functools.lru_cache(maxsize=64)
def _source_of(root: Path, content: bool) -> dict[str, Any] | None:
    """What a manifest would say of the images in `root`, or None where they are no set of images."""
    # once in a process: a plan of 10,000 runs asks for the same folder 10,000 times
    try:
        facts: dict[str, Any] = source_facts(root, list_folder(root), content=content)["source"]
    except ValueError:
        return None
    return facts


def _layout(manifest: dict[str, Any]) -> str:
    """How a folder was understood, as its manifest says; empty where an older version wrote it."""
    layout, how = manifest.get("layout"), manifest.get("cut")
    if not isinstance(layout, str):
        return ""
    line = f"layout {layout}: {manifest['num_classes']} classes"
    domains = [domain for domain in manifest["domains"] if domain]
    line += f" in {len(domains)} domains" if domains else ""
    if not isinstance(how, dict):
        return f"{line}; parts as the folders say"
    shares = " : ".join(f"{100 * share:g}" for share in how["fractions"].values())
    return f'{line}; each class cut {shares} into {", ".join(how["fractions"])} (salt "{how["salt"]}")'
