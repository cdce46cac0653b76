"""Modules of plugins: executed from the bytes that were read, found by name before Python looks for files."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import ClassVar

from norms.source import Module, Source, parse


class Loader(importlib.abc.InspectLoader):
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


def spec_of(module: Module) -> importlib.machinery.ModuleSpec:
    loader = Loader(module)
    spec = importlib.machinery.ModuleSpec(
        module.name, loader, origin=str(module.file), is_package=loader.is_package(module.name)
    )
    spec.has_location = True  # so that the module has a __file__
    if spec.submodule_search_locations is not None:
        spec.submodule_search_locations.append(str(module.file.parent))
    return spec


class Beside(importlib.abc.MetaPathFinder):
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
                if isinstance(getattr(sys.modules.get(name), "__loader__", None), Loader):
                    del sys.modules[name]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return spec_of(self.known[fullname]) if fullname in self.known else None
