"""What `data list` shows: every named data set, and what else lies prepared in a folder of data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tasks.data.catalog import dataset_info, dataset_names, is_prepared
from tasks.data.prepared import read_manifest
from tasks.data.sources.folder import PREFIX


@dataclass(frozen=True)
class Listed:
    """One line of `data list`.

    Args:
        name: for `load`.
        here: "yes", "no" or "damaged".
        what: what it is; of a damaged set what is wrong with it.
    """

    name: str
    here: str
    what: str


def listed(data_dir: Path) -> list[Listed]:
    """Every named data set, then what else lies prepared in data_dir: folders of images. Arrays are not verified."""
    lines = []
    for name in dataset_names():
        try:
            here, what = ("yes" if is_prepared(name, data_dir) else "no"), str(dataset_info(name))
        except ValueError as error:  # of one set; the others are listed all the same
            here, what = "damaged", str(error)
        lines.append(Listed(name, here, what))
    return lines + [_listed_folder(folder, data_dir) for folder in _others(data_dir)]


def _others(data_dir: Path) -> list[str]:
    """Folders of data_dir that hold a prepared set under none of the fixed names."""
    named = set(dataset_names())
    try:
        return sorted(
            f
            for f in os.listdir(data_dir)
            if f[0] != "." and f not in named and (data_dir / f / "manifest.json").is_file()
        )
    except OSError:
        return []


def _listed_folder(folder: str, data_dir: Path) -> Listed:
    try:
        manifest = read_manifest(folder, data_dir, folder)
    except ValueError as error:
        return Listed(folder, "damaged", str(error))
    facts = [manifest["title"], manifest["kind"], f"{manifest['num_classes']} classes"]
    if "size" in manifest:
        facts.append(f"3x{manifest['size']}x{manifest['size']}")
    if "source" in manifest:
        facts.append(f"{manifest['source']['images']} images")
    if domains := [domain for domain in manifest["domains"] if domain]:
        facts.append(f"domains {', '.join(domains)}")
    if "root" in manifest:
        gone = "" if os.path.isdir(manifest["root"]) else ", which is gone"
        facts.append(f"prepared from {manifest['root']}{gone}")
    name = f"{PREFIX}{manifest['root']}" if manifest["name"].startswith(PREFIX) else manifest["name"]
    return Listed(name, "yes", " · ".join(facts))
