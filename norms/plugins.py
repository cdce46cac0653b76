"""Users' files of norms, tasks and metrics: executed once, whole or not at all, and never as a text that nobody read.

    load_plugin("my_norm.py")       reads the file, executes it, returns the names of its norms (norms.registry)

What is executed is what was read (norms.source), so the version belongs to the text that runs. The files of its
folder that a plugin imports are read with it, and importing one of their names anywhere afterwards gives that text.
Each module has the `__file__` where it was found, for data that lie beside it.

A room that keeps things by name says so once per name (`registered`); from then on this module knows which plugin a
name is of, takes a plugin's names away before it is loaded anew, and puts everything back where that fails.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, ClassVar

from norms.source import Module, Source, parse, read_source
from norms.values import cut

_PREFIX = "normsuite_plugin_"
_LONGEST = 300  # letters of an error's text in a message
Registry = Callable[[], MutableMapping[str, Any]]


@dataclass(frozen=True)
class Plugin:
    """A user's file that was loaded. A value that travels to other processes, where `offer` takes it.

    Attributes:
        source: what was executed.
        names: (kind, name) of what it registered: ("norm", "mine"), ("task", "segmentation").
    """

    source: Source
    names: tuple[tuple[str, str], ...] = ()

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def version(self) -> str:
        return self.source.version


_REGISTRIES: dict[str, Registry] = {}
_OF: dict[tuple[str, str], Plugin] = {}  # (kind, name) -> the plugin that registered it
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


def plugin_of(kind: str, name: str) -> Plugin | None:
    """The plugin that registered this, or None: the suite itself, or a program, did."""
    return _OF.get((kind, name))


def load(path: str | Path) -> Plugin:
    """Read and execute a user's file, or return what was loaded before where it has not changed since.

    Raises:
        ValueError: see `load_source` and norms.source.read_source.
    """
    return load_source(read_source(path), str(path))


def loaded(path: str | Path) -> Plugin | None:
    """The plugin as it was loaded last from this file, or None; the file is not looked at."""
    plugin = getattr(sys.modules.get(_module_name(Path(path).resolve())), "__plugin__", None)
    return plugin if isinstance(plugin, Plugin) else None


def registered_by(path: str | Path) -> tuple[tuple[str, str], ...]:
    """(kind, name) of what this file registered when it was loaded last."""
    plugin = loaded(path)
    return () if plugin is None else plugin.names


def loaded_here() -> dict[str, str]:
    """What has been loaded in this process: the file's name without .py (all of it, where two share one) -> version."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(_PREFIX)]
    here = [module.__plugin__ for module in modules if hasattr(module, "__plugin__")]
    stems = [plugin.file.stem for plugin in here]
    return {p.file.stem if stems.count(p.file.stem) == 1 else str(p.file): p.version for p in here}


def load_source(source: Source, called: str = "") -> Plugin:
    """Execute what was read. The same version again is a no-op; another one replaces what the file registered before.

    Raises:
        ValueError: it fails, registers a name that is taken, or imports a file beside it whose name another module
            has; nothing of it stays then.
    """
    global _loading
    called = called or str(source.file)
    old = loaded(source.file)
    if old is not None and old.version == source.version:
        return old
    outer, before, plugin = _loading, _State.now(), Plugin(source)
    for kind, each in [key for key, its in _OF.items() if its.file == source.file]:
        _REGISTRIES[kind]().pop(each, None)
        del _OF[kind, each]
    if old is not None:
        _Beside.remove(old.source)
    name = _module_name(source.file)
    own = replace(source.modules[0], name=name)
    _loading = plugin
    try:
        _Beside.add(source, called)
        # before execution: pickling and dataclasses look their module up here
        module = sys.modules[name] = importlib.util.module_from_spec(_spec(own))
        _Loader(own).exec_module(module)
    except BaseException as error:
        _Beside.remove(source)
        before.put_back(plugin)
        if isinstance(error, Exception | SystemExit):
            raise ValueError(f'plugin "{called}": {type(error).__name__}: {_one_line(error)}') from error
        raise
    finally:
        _loading = outer
    plugin = replace(plugin, names=tuple(key for key, its in _OF.items() if its == plugin))
    module.__dict__["__plugin__"] = plugin
    return plugin


@dataclass(frozen=True)
class _State:
    """All that loading a plugin changes, to be put back where that fails."""

    registries: Mapping[str, Mapping[str, Any]]
    of: Mapping[tuple[str, str], Plugin]
    beside: Mapping[str, Module]
    modules: Mapping[str, ModuleType]

    @classmethod
    def now(cls) -> _State:
        mine = {
            name: module
            for name, module in list(sys.modules.items())
            if name.startswith(_PREFIX) or isinstance(getattr(module, "__loader__", None), _Loader)
        }
        return cls({kind: dict(get()) for kind, get in _REGISTRIES.items()}, dict(_OF), dict(_Beside.known), mine)

    def put_back(self, failed: Plugin) -> None:
        for kind, get in _REGISTRIES.items():
            others = {name: its for name, its in get().items() if _OF.get((kind, name)) != failed}
            _replace(get(), self.registries.get(kind, others))
        _replace(_OF, self.of)
        _replace(_Beside.known, self.beside)
        sys.modules.pop(_module_name(failed.file), None)
        sys.modules.update(self.modules)


def offer(plugins: Iterable[Plugin]) -> None:
    """Plugins that were loaded elsewhere: each is loaded here when something that it registered is first asked for."""
    _offered.update({key: plugin for plugin in plugins for key in plugin.names})


def load_offered(kind: str, name: str) -> bool:
    """Load the plugin on offer that registers this; whether there was one. Raises what `load_source` raises."""
    plugin = _offered.pop((kind, name), None)
    if plugin is None or loaded(plugin.file) is not None:
        return False
    load_source(plugin.source)
    return True


def texts(plugin: Plugin) -> Mapping[str, str]:
    """Every file of a plugin by its path below the plugin's folder, in text."""
    folder = plugin.file.parent
    return {
        module.file.relative_to(folder).as_posix(): importlib.util.decode_source(module.content)
        for module in plugin.source.modules
    }


class _Loader(importlib.abc.InspectLoader):
    """Executes a module from the bytes that were read, whatever its file holds by now."""

    def __init__(self, module: Module):
        self.module = module

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.module.content)

    def get_code(self, fullname: str) -> CodeType:
        file = str(self.module.file)
        # dont_inherit, else this file's own __future__ imports would apply to the user's
        return compile(parse(self.module.content, file), file, "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        return self.module.file.name == "__init__.py"

    def exec_module(self, module: ModuleType) -> None:
        lines = self.get_source(module.__name__).splitlines(keepends=True)
        # Tracebacks show the text that runs: an entry without a time is not compared with the file.
        linecache.cache[str(self.module.file)] = (len(self.module.content), None, lines, str(self.module.file))
        super().exec_module(module)


def _spec(module: Module) -> importlib.machinery.ModuleSpec:
    loader = _Loader(module)
    spec = importlib.machinery.ModuleSpec(
        module.name, loader, origin=str(module.file), is_package=loader.is_package(module.name)
    )
    spec.has_location = True  # so that the module has a __file__
    if spec.submodule_search_locations is not None:
        spec.submodule_search_locations.append(str(module.file.parent))
    return spec


class _Beside(importlib.abc.MetaPathFinder):
    """Finds the modules beside plugins before Python looks along sys.path."""

    known: ClassVar[dict[str, Module]] = {}

    @classmethod
    def add(cls, source: Source, called: str) -> None:
        for name, module in source.beside.items():
            there = sys.modules.get(name)
            other = cls.known[name].file if name in cls.known else getattr(there, "__file__", None)
            if (name in cls.known or there is not None) and (other is None or Path(other) != module.file):
                raise ValueError(
                    f'plugin "{called}": imports "{name}" from its folder, and another module has this name: '
                    f"{other or 'a part of Python'}; rename one"
                )
        cls.known.update(source.beside)
        if source.beside and not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())

    @classmethod
    def remove(cls, source: Source) -> None:
        for name, module in source.beside.items():
            if cls.known.get(name) == module:
                del cls.known[name]
                if isinstance(getattr(sys.modules.get(name), "__loader__", None), _Loader):
                    del sys.modules[name]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return _spec(self.known[fullname]) if fullname in self.known else None


def _replace(mapping: MutableMapping[Any, Any], content: Mapping[Any, Any]) -> None:
    mapping.clear()
    mapping.update(content)


def _one_line(error: BaseException) -> str:
    return cut(" ".join(str(error).split()), _LONGEST)


def _module_name(file: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
