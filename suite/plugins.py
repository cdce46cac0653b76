"""Users' files and installed packages with norms, tasks, models, ...: found, loaded, and their mistakes as lines.

Plugins come from the command line (--plugin FILE), from a config (plugins: [FILE, ...], relative to the config) and
from installed packages that offer the entry point `normsuite.plugins`:

    [project.entry-points."normsuite.plugins"]
    mine = "my_package.norms"        # a module; it is imported, and what it registers is there

A file may end its process, or never return: on Linux another one imports it first (suite.trial.survives).

norms is imported where something is loaded, since it imports torch and `tables` must not wait for that.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import metrics
from results.escape import cut
from suite.environment import PLUGIN_GROUP

if TYPE_CHECKING:
    from norms.plugins import Plugin
    from results.record import RunSpec


@dataclass(frozen=True)
class Loaded:
    """Plugins that were loaded, and one line for each that could not be."""

    plugins: tuple[Plugin, ...] = ()
    mistakes: tuple[str, ...] = ()

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the norms in them."""
        names = [name for plugin in self.plugins for what, name in plugin.names if what == "norm"]
        return tuple(dict.fromkeys(names))


def load_plugins(files: Sequence[str | Path] | None) -> tuple[str, ...]:
    """Load the user's files, and what installed packages offer; returns the names of the norms in the files.

    Raises:
        ValueError: plugins that can not be loaded, one line each.
    """
    installed, given = load_installed(), load_files(files or ())
    if mistakes := (*installed.mistakes, *given.mistakes):
        raise ValueError("\n".join(mistakes))
    return given.norms


def watch_metrics() -> None:
    """results imports none of ours, so norms.plugins is told here where metrics are kept."""
    from norms import plugins

    plugins.watch("metric", lambda: metrics.METRICS)
    plugins.watch("primary metric", lambda: metrics.RANKS)
    plugins.watch("validation metric", lambda: metrics.VALIDATES)


def load_files(files: Iterable[str | Path], tried: bool = True) -> Loaded:
    """Load users' files; all that can not be loaded are named at once, a missing one with the nearest name.

    `tried`: another process imports each first (Linux), which may end in the place of this one.
    """
    return _load([(f'plugin "{file}"', functools.partial(_load_file, Path(file))) for file in files], tried)


def load_installed(tried: bool = True) -> Loaded:
    """Load the modules that installed packages offer as plugins; a line about one names its distribution."""
    found = sorted(metadata.entry_points(group=PLUGIN_GROUP), key=lambda entry: (entry.value, entry.name))
    return _load([(f'plugin "{_called(entry)}"', functools.partial(_load_entry, entry)) for entry in found], tried)


def load_configured(config: Mapping[str, Any], folder: Path, tried: bool = True) -> Loaded:
    """Load the files under `plugins:` of a config that lies in `folder`."""
    from suite.config import kind

    given = config.get("plugins", [])
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(file, str) for file in given):
        wrong = given if not isinstance(given, list) else next(file for file in given if not isinstance(file, str))
        return Loaded(mistakes=(f"plugins: a list of files is needed, relative to the config, not {kind(wrong)}",))
    return load_files([folder / file for file in given], tried)


def _load(these: Sequence[tuple[str, Callable[[], Plugin]]], tried: bool) -> Loaded:
    if not these:
        return Loaded()
    from suite.trial import surroundings_kept, survives

    watch_metrics()
    loaded: dict[Path, Plugin] = {}
    mistakes = []
    for called, load in these:
        with surroundings_kept():
            try:
                if tried and (ended := survives(load)):
                    mistakes.append(f"{called}: {ended} while it was imported")
                else:
                    plugin = load()
                    loaded[plugin.file] = plugin
            except ValueError as error:
                mistakes.append(" ".join(str(error).split()))
    return Loaded(tuple(loaded.values()), tuple(mistakes))


def _load_file(file: Path) -> Plugin:
    from norms import plugins
    from norms.values import nearest

    try:
        return plugins.load(file)
    except ValueError as error:
        if os.path.lexists(file):
            raise
        names = [each.name for each in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ValueError(f"{error}{nearest(file.name, names)}") from error


def _load_entry(entry: metadata.EntryPoint) -> Plugin:
    if entry.attr or not entry.module:
        raise ValueError(f'plugin "{_called(entry)}": an entry point of {PLUGIN_GROUP} names a module, without ":"')
    from norms import plugins

    return plugins.load_installed(entry.module, _release(entry))


def _called(entry: metadata.EntryPoint) -> str:
    return cut(f"{entry.value} of {_release(entry)}", 120)


def _release(entry: metadata.EntryPoint) -> str:
    return "?" if entry.dist is None else f"{entry.dist.name}=={entry.dist.version}"


def refuse_what_workers_lack(runs: Sequence[RunSpec]) -> None:
    """ValueError for norms, tasks, models, optimizers and data sets that were registered in a notebook's cells or at a
    prompt: the processes of runs can not import them. They do import a script, but a model or optimizer has no version
    of its own there, so that an edit of it would go unseen in the keys of runs."""
    from norms.plugins import of_this_process
    from suite.trial import asked_for

    script = getattr(sys.modules.get("__main__"), "__file__", None) is not None
    asked = dict.fromkeys(key for spec in runs for key in asked_for(spec))
    here = [key for key in asked if of_this_process(*key) and (not script or key[0] in ("model", "optimizer"))]
    if here:
        names = ", ".join(f'{kind} "{name}"' for kind, name in here)
        where = "this session, which the processes of runs can not import"
        if script:
            where = "a script, where no version tells one edit from the next"
        raise ValueError(f'{names}: defined in {where}; write the definition into a file and give plugins=["FILE"]')


def distinct(these: Sequence[Plugin]) -> tuple[Plugin, ...]:
    """Each file once."""
    return tuple({plugin.file: plugin for plugin in these}.values())
