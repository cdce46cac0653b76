"""What a shell offers for an argument, by Tab: names and files that are known without torch.

A shell starts the command for every Tab, so nothing slow is imported here. Names that only a plugin or a config knows
are therefore not offered. Where a function offers nothing, bash falls back to the names of files.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_MOST = 500  # names that are looked at in one folder
_HELD_BY_RESULTS = ("runs", "versions.json")  # either stands in every folder of results


def is_asked(argv: Sequence[str]) -> bool:
    """Whether this process is to complete a command, or to print or install a shell's script for that.

    Raises:
        ValueError: a script is asked for, but not of a command that a shell could complete.
    """
    arguments, name = argv[1:], Path(argv[0]).name
    before = itertools.takewhile(lambda argument: argument.startswith("-"), arguments)
    if any(argument in ("--show-completion", "--install-completion") for argument in before):
        if name == "__main__.py":
            raise ValueError("a shell completes the name of a command: run-suite --show-completion gives its script")
        return True
    return f"_{name}_COMPLETE".replace("-", "_").upper() in os.environ


def norms(incomplete: str) -> list[tuple[str, str]]:
    """The suite's norms with what their statistics cover, for the last of several names with commas between."""
    return _last_of(incomplete, {name: about for name, (_, about) in _layers().items()})


def norm(incomplete: str) -> list[tuple[str, str]]:
    return [] if "," in incomplete else norms(incomplete)


def tasks(incomplete: str) -> list[tuple[str, str]]:
    from tasks import task_names

    return _last_of(incomplete, dict.fromkeys(task_names(), ""))


def task(incomplete: str) -> list[tuple[str, str]]:
    return [] if "," in incomplete else tasks(incomplete)


def devices(incomplete: str) -> list[str]:
    return [name for name in ("cpu", "cuda") if name.startswith(incomplete)]


def formats(incomplete: str) -> list[tuple[str, str]]:
    return _last_of(incomplete, dict.fromkeys(("csv", "latex", "markdown"), ""))


def configs(incomplete: str) -> list[str]:
    """Configs: the YAML files here, in configs/ and in a folder that is named, and the suite's own."""
    own = Path(__file__).resolve().parent.parent / "configs"  # of a wheel; suite.config says the same, with torch
    found = [f"configs/{path.name}" for path in _listed(own)] if Path(incomplete).is_absolute() is False else []
    for folder in dict.fromkeys(("", "configs/", _folder_of(incomplete))):
        found += [folder + path.name for path in _listed(Path(folder or "."))]
    return sorted({name for name in found if name.endswith((".yaml", ".yml")) and name.startswith(incomplete)})


def results(incomplete: str) -> list[str]:
    """Folders of results: those in a folder that is named, here, and in runs/."""
    found = []
    for folder in dict.fromkeys(("", "runs/", _folder_of(incomplete))):
        for path in _listed(Path(folder or ".")):
            if any((path / name).exists() for name in _HELD_BY_RESULTS):
                found.append(folder + path.name)
    return sorted({name for name in found if name.startswith(incomplete)})


def python_files(incomplete: str) -> list[str]:
    folder = _folder_of(incomplete)
    names = [folder + path.name for path in _listed(Path(folder or "."))]
    return sorted(name for name in names if name.endswith(".py") and name.startswith(incomplete))


def _layers() -> Mapping[str, tuple[str, str]]:
    """norms.layers.LAYERS. `import norms` imports torch; that file is data, and is read alone."""
    found = importlib.util.find_spec("norms")
    places = (found.submodule_search_locations if found else None) or []
    for place in places:
        layers: Mapping[str, tuple[str, str]] = runpy.run_path(str(Path(place) / "layers" / "__init__.py"))["LAYERS"]
        return layers
    return {}


def _last_of(incomplete: str, known: Mapping[str, str]) -> list[tuple[str, str]]:
    """(all that is typed, with the last name complete; what it is), of the names that are not typed yet."""
    before, comma, last = incomplete.rpartition(",")
    given = set(before.split(","))
    return [
        (before + comma + name, about)
        for name, about in known.items()
        if name.startswith(last.strip()) and name not in given
    ]


def _folder_of(incomplete: str) -> str:
    """The part of a path up to its last slash."""
    return incomplete[: incomplete.rfind("/") + 1]


def _listed(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(_MOST), entries, strict=False):
                yield Path(entry.path)
    except OSError:
        return
