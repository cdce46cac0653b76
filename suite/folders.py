"""Folders of images in a run's options, by their names and not by their paths.

A run's key must be the same wherever a folder lies and however its path is written, so a spec holds `folder:NAME`, and
the data's checksum says what is in it. Where the folder is here, the plan knows and tells the Runner.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.base import NotPrepared
from tasks.data import checksum

FOLDER = "folder:"


class Folders:
    """The folders that the options of a plan name.

    Attributes:
        paths: "folder:NAME" -> "folder:PATH", absolute; of several paths with one name the first.
    """

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self._all: dict[str, dict[str, str]] = {}  # name -> real path -> data set as it was spelt

    def named(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a task with every folder by its name."""
        return _each_folder(options, self._named)

    def _named(self, dataset: str) -> str:
        path = os.path.join(os.getcwd(), os.path.expanduser(dataset.removeprefix(FOLDER)))
        name = f"{FOLDER}{_called(path)}"
        self.paths.setdefault(name, f"{FOLDER}{path}")
        self._all.setdefault(name, {}).setdefault(os.path.realpath(path), dataset)
        return name

    def mistakes(self, data_dir: Path) -> list[str]:
        """One line for each name that two folders with different images have: their runs would share it."""
        lines = []
        for name, spelt in self._all.items():
            contents: dict[str, str] = {}
            for dataset in spelt.values() if len(spelt) > 1 else ():
                try:
                    contents.setdefault(checksum(dataset, data_dir), dataset)
                except NotPrepared:  # said elsewhere
                    continue
            if len(contents) > 1:
                one, other, *_ = contents.values()
                lines.append(
                    f'"{one}" and "{other}" hold different images, and tables would call both {name}; rename one, or '
                    "give a link to it that has another name"
                )
        return lines


def located(options: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """The options of a spec with every folder by its path here. paths: Folders.paths; a name without one stays."""
    return _each_folder(options, lambda dataset: paths.get(dataset, dataset))


def _called(path: str) -> str:
    """The last name in an absolute path as it is written: that of a link, not of its target."""
    name = Path(path).name
    return Path(os.path.realpath(path)).name if name == ".." else name


def _each_folder(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value) if value.startswith(FOLDER) else value
    if isinstance(value, Mapping):
        return {key: _each_folder(item, change) for key, item in value.items()}
    return [_each_folder(item, change) for item in value] if isinstance(value, list | tuple) else value
