"""Users' files of norms, tasks, models, ...: executed once, whole or not at all, and never as a text that nobody read.

    load_plugin("my_norm.py")       reads the file, executes it, returns the names of its norms

What is executed is what was read (norms.source), so the version belongs to the text that runs. The files of its
folder that a plugin imports are read with it, and importing one of their names anywhere afterwards gives that text.
Each module has the `__file__` where it was found, for data that lie beside it. A module of an installed package
(`load_installed`) is imported like any other; its version holds that of its distribution, too.

A room that keeps things by name says so once per name (`registered`), or is watched (`watch`: results, which imports
none of ours, keeps metrics). From then on this module knows which plugin a name is of, takes a plugin's names away
before it is loaded anew, and puts everything back where that fails.

One module in spite of its length: loading, taking names away and putting them back share one state, which nobody else
may touch.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from norms.modules import Beside, Loader, spec_of
from norms.source import Module, Source, read_source
from norms.values import cut

_PREFIX = "normsuite_plugin_"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
_LONGEST = 300  # letters of an error's text in a message
Registry = Callable[[], MutableMapping[str, Any]]


@dataclass(frozen=True)
class Plugin:
    """A user's file that was loaded. A value that travels to other processes, where `offer` takes it.

    Attributes:
        source: what was executed.
        names: (kind, name) of what it registered: ("norm", "mine"), ("task", "segmentation").
        module: of an installed package's plugin the name by which it is imported, else "".
        release: "distribution==version" of that package, else "".
    """

    source: Source
    names: tuple[tuple[str, str], ...] = ()
    module: str = ""
    release: str = ""

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def version(self) -> str:
        if not self.release:
            return self.source.version
        return hashlib.sha256(f"{self.release}\0{self.source.version}".encode()).hexdigest()[:16]


_REGISTRIES: dict[str, Registry] = {}
_WATCHED: dict[str, Registry] = {}
_OF: dict[tuple[str, str], Plugin] = {}  # (kind, name) -> the plugin that registered it
_UNDER: dict[
    tuple[str, str], Any
] = {}  # (kind, name) -> what a watched registry held before a plugin put its own there
_offered: dict[tuple[str, str], Plugin] = {}
_loading: Plugin | None = None


def registered(kind: str, name: str, registry: Registry) -> Plugin | None:
    """To be called when something is put into a registry: the plugin that is being loaded, whose it is, or None."""
    _REGISTRIES[kind] = registry
    if _loading is None:
        _OF.pop((kind, name), None)
    else:
        _OF[kind, name] = _loading
    return _loading


def watch(kind: str, registry: Registry) -> None:
    """Watch a registry that does not call `registered`: its new entries belong to the plugin that is being loaded."""
    _REGISTRIES[kind] = _WATCHED[kind] = registry


def check_free(kind: str, name: str, by: str, *, replace: bool, of_the_suite: bool) -> None:
    """To be called where a name is taken: returns if it may be registered anew.

    `replace` is for notebooks, where a cell is executed again: what a plugin or the suite itself has is not replaced,
    since records would then name one thing and mean another.

    Args:
        kind: "norm", "task", "model", ...
        name: what is to be registered.
        by: who has the name, for the message; "": the plugin that registered it, if one did.
        replace: as the caller of register was told.
        of_the_suite: the name is one of the suite's own.

    Raises:
        ValueError: the name stays with who has it.
    """
    plugin = plugin_of(kind, name)
    may = not of_the_suite and plugin is None
    by = by or ("" if plugin is None else str(plugin.file))
    if not (may and replace):
        hint = "; replace=True replaces it" if may else ""
        raise ValueError(f'{kind} "{name}" is already registered{f" by {by}" if by else ""}; choose another name{hint}')


def check_name(kind: str, name: str) -> None:
    """ValueError for what can not be a name in configs, keys and tables."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f'{kind} name "{name!s:.80}": lower case letters, digits and underscores, starting with a letter, '
            "100 characters at most"
        )


def loading() -> bool:
    """Whether a plugin is being loaded: who registers something is it."""
    return _loading is not None


@contextmanager
def of_the_suite() -> Iterator[None]:
    """Within this block, registrations belong to no plugin, even if a plugin that is being loaded caused them."""
    global _loading
    outer, _loading = _loading, None
    try:
        yield
    finally:
        _loading = outer


def plugin_of(kind: str, name: str) -> Plugin | None:
    """The plugin that registered this, or None: the suite itself, or a program, did."""
    return _OF.get((kind, name))


def of_this_process(kind: str, name: str) -> bool:
    """Whether a program, a notebook or a module that one of them imported registered this: no plugin, not the suite."""
    found = _REGISTRIES[kind]().get(name) if kind in _REGISTRIES else None
    if found is None or plugin_of(kind, name) is not None:
        return False
    if kind == "task":  # the registry holds the suite's own, too, once they are asked for
        found = type(found)
    home = str(getattr(getattr(found, "build", found), "__module__", ""))
    return kind not in ("norm", "task") or home.partition(".")[0] not in ("norms", "tasks")


def load_plugin(path: str | Path) -> list[str]:
    """Execute a user's file of norms, tasks, models, ...; their version is that of the file's syntax tree.

    Returns the names of the norms it registered (none, where the file adds other things). Loading the same file twice
    is a no-op that returns the same names; loading it after an edit replaces what it registered before. Files of its
    folder that it imports are part of it, and of its version.

    Raises:
        ValueError: the file is missing, fails to import or registers a name that is taken; nothing of it stays then.
    """
    return [name for kind, name in load(path).names if kind == "norm"]


def load(path: str | Path) -> Plugin:
    """Read and execute a user's file, or return what was loaded before where it has not changed since.

    Raises:
        ValueError: see `load_source` and norms.source.read_source.
    """
    return load_source(read_source(path), str(path))


def loaded(path: str | Path) -> Plugin | None:
    """The plugin as it was loaded last from this file, or None; the file is not looked at."""
    file = Path(path).resolve()
    return next((plugin for plugin in _loaded() if plugin.file == file), None)


def registered_by(path: str | Path) -> tuple[tuple[str, str], ...]:
    """(kind, name) of what this file registered when it was loaded last."""
    plugin = loaded(path)
    return () if plugin is None else plugin.names


def loaded_here() -> dict[str, str]:
    """What has been loaded in this process: the file's name without .py (all of it, where two share one) -> version."""
    here = _loaded()
    stems = [plugin.file.stem for plugin in here]
    return {p.file.stem if stems.count(p.file.stem) == 1 else str(p.file): p.version for p in here}


def _loaded() -> list[Plugin]:
    marks = [getattr(module, "__dict__", {}).get("__plugin__") for module in list(sys.modules.values())]
    return [mark for mark in marks if isinstance(mark, Plugin)]


def load_installed(module: str, release: str) -> Plugin:
    """Import a module of an installed package as a plugin, once in a process.

    Args:
        module: its name, as an entry point gives it.
        release: "distribution==version", which is part of the plugin's version.

    Raises:
        ValueError: it can not be found, read or imported, or registers a name that is taken; nothing of it stays then.
    """
    called = f"{module} of {release}"
    spec = _spec_of(module)
    if spec is None or not spec.has_location or spec.origin is None:
        raise ValueError(f'plugin "{called}": no such module')
    there = getattr(sys.modules.get(module), "__plugin__", None)
    if isinstance(there, Plugin):
        return there
    plugin = Plugin(read_source(spec.origin), module=module, release=release)
    if module in sys.modules:  # imported by a program before: what it registered then is its own all the same
        for kind, name in _without_plugin(module):
            _OF[kind, name] = plugin
        return _named(plugin, sys.modules[module])

    def execute() -> ModuleType:
        modules, package = set(sys.modules), module.partition(".")[0]
        try:
            return importlib.import_module(module)
        except BaseException:
            for name in set(sys.modules) - modules:
                if name.partition(".")[0] == package:
                    del sys.modules[name]
            raise

    return _load(plugin, called, execute)


def _spec_of(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module would be imported from; unlike importlib.util.find_spec it imports no package above it."""
    name, spec, path = "", None, None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        if spec is not None and path is None:
            return None
        spec = next((each for finder in sys.meta_path if (each := finder.find_spec(name, path)) is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _without_plugin(module: str) -> list[tuple[str, str]]:
    found = []
    for kind, registry in _REGISTRIES.items():
        for name, its in registry().items():
            home = str(getattr(getattr(its, "build", its), "__module__", ""))
            if (kind, name) not in _OF and (home == module or home.startswith(f"{module}.")):
                found.append((kind, name))
    return found


def load_source(source: Source, called: str = "") -> Plugin:
    """Execute what was read. The same version again is a no-op; another one replaces what the file registered before.

    Raises:
        ValueError: it fails, registers a name that is taken, or imports a file beside it whose name another module
            has; nothing of it stays then.
    """
    called = called or str(source.file)
    old = loaded(source.file)
    if old is not None and old.version == source.version:
        return old

    def execute() -> ModuleType:
        if old is not None:
            Beside.remove(old.source)
        name = _module_name(source.file)
        own = replace(source.modules[0], name=name)
        Beside.add(source, called)
        # before execution: pickling and dataclasses look their module up here
        module = sys.modules[name] = importlib.util.module_from_spec(spec_of(own))
        Loader(own).exec_module(module)
        return module

    return _load(Plugin(source), called, execute)


def _load(plugin: Plugin, called: str, execute: Callable[[], ModuleType]) -> Plugin:
    """Whole or not at all: what `execute` registers is the plugin's."""
    global _loading
    outer, before = _loading, _State.now()
    _take_away(plugin.file)
    watched = {kind: dict(get()) for kind, get in _WATCHED.items()}
    _loading = plugin
    try:
        module = execute()
        for kind, get in _WATCHED.items():
            new = [name for name, its in get().items() if watched[kind].get(name) is not its]
            for name in new:
                if (other := plugin_of(kind, name)) is not None:
                    raise ValueError(f'the {kind} of "{name}" is that of {other.file} already')
            _OF.update({(kind, name): plugin for name in new})
            _UNDER.update({(kind, name): watched[kind][name] for name in new if name in watched[kind]})
    except BaseException as error:
        if not plugin.module:
            Beside.remove(plugin.source)
        before.put_back(plugin)
        if isinstance(error, Exception | SystemExit):
            raise ValueError(f'plugin "{called}": {type(error).__name__}: {_one_line(error)}') from error
        raise
    finally:
        _loading = outer
    return _named(plugin, module)


def _take_away(file: Path) -> None:
    """What a file has registered so far, and what stood in a watched registry before it did."""
    for key in [key for key, its in _OF.items() if its.file == file]:
        kind, name = key
        _REGISTRIES[kind]().pop(name, None)
        if key in _UNDER:
            _REGISTRIES[kind]()[name] = _UNDER.pop(key)
        del _OF[key]


def _named(plugin: Plugin, module: ModuleType) -> Plugin:
    """The plugin with the names of what is its own, which `module` then bears."""
    plugin = replace(plugin, names=tuple(key for key, its in _OF.items() if its == plugin))
    module.__dict__["__plugin__"] = plugin
    return plugin


@dataclass(frozen=True)
class _State:
    """All that loading a plugin changes, to be put back where that fails."""

    registries: Mapping[str, Mapping[str, Any]]
    of: Mapping[tuple[str, str], Plugin]
    under: Mapping[tuple[str, str], Any]
    beside: Mapping[str, Module]
    modules: Mapping[str, ModuleType]

    @classmethod
    def now(cls) -> _State:
        mine = {
            name: module
            for name, module in list(sys.modules.items())
            if name.startswith(_PREFIX) or isinstance(getattr(module, "__loader__", None), Loader)
        }
        return cls(
            {kind: dict(get()) for kind, get in _REGISTRIES.items()}, dict(_OF), dict(_UNDER), dict(Beside.known), mine
        )

    def put_back(self, failed: Plugin) -> None:
        for kind, get in _REGISTRIES.items():
            before = self.registries.get(kind, {})
            # what was registered beside it stays: a part of the suite that it was the first to import
            others = {} if kind in _WATCHED else get()
            others = {name: its for name, its in others.items() if _OF.get((kind, name)) != failed}
            _replace(get(), {**before, **others})
        _replace(_OF, self.of)
        _replace(_UNDER, self.under)
        _replace(Beside.known, self.beside)
        sys.modules.pop(failed.module or _module_name(failed.file), None)
        sys.modules.update(self.modules)


def offer(plugins: Iterable[Plugin]) -> None:
    """Plugins that were loaded elsewhere: each is loaded here when something that it registered is first asked for."""
    _offered.update({key: plugin for plugin in plugins for key in plugin.names})


def load_offered(kind: str, name: str) -> bool:
    """Load the plugin on offer that registers this; whether there was one. Raises what `load_source` raises."""
    plugin = _offered.pop((kind, name), None)
    if plugin is None or loaded(plugin.file) is not None:
        return False
    if plugin.module:
        load_installed(plugin.module, plugin.release)
    else:
        load_source(plugin.source)
    return True


def texts(plugin: Plugin) -> Mapping[str, str]:
    """Every file of a plugin by its path below the plugin's folder, in text."""
    folder = plugin.file.parent
    return {
        module.file.relative_to(folder).as_posix(): importlib.util.decode_source(module.content)
        for module in plugin.source.modules
    }


def _replace(mapping: MutableMapping[Any, Any], content: Mapping[Any, Any]) -> None:
    mapping.clear()
    mapping.update(content)


def _one_line(error: BaseException) -> str:
    return cut(" ".join(str(error).split()), _LONGEST)


def _module_name(file: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
