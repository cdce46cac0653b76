"""A user's file as it was read: its text, that of the files beside it that it imports, and a version of the two.

The version is a hash of syntax trees and not of text: comments, blank lines, layout, quotes and docstrings change no
number, so they change no version. The trees are written out here, since `ast.dump` differs between Pythons.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LARGEST = 2**20
"""Bytes of the largest file that is read as a plugin; twenty thousand lines."""

_NEVER_BESIDE = sys.stdlib_module_names | {"norms", "tasks", "suite", "results"}
_LEFT_OUT = frozenset({"ctx", "kind", "type_comment", "type_ignores"})  # follow from the rest, or change nothing


@dataclass(frozen=True)
class Module:
    """One file of a plugin.

    Attributes:
        name: as it is imported; "" is the plugin's own file.
        file: where it stood.
        content: its bytes.
        tree: hash of its syntax tree.
    """

    name: str
    file: Path
    content: bytes
    tree: str


@dataclass(frozen=True)
class Source:
    """A plugin's file, and those in its folder that it imports by `import` statements, as they were read.

    Attributes:
        file: where the plugin stands.
        modules: its own file first, then the others by name.
    """

    file: Path
    modules: tuple[Module, ...]

    @property
    def version(self) -> str:
        """16 hexadecimal digits that change with what the files do, wherever they lie and however they are laid out."""
        text = "".join(f"{module.name}\0{module.tree}\n" for module in self.modules)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def beside(self) -> Mapping[str, Module]:
        """name -> module of the files beside the plugin's own."""
        return {module.name: module for module in self.modules if module.name}


def read_source(path: str | Path) -> Source:
    """Read a plugin's file and, from its folder, what it imports. Nothing is executed.

    A name that Python finds elsewhere (its library, this suite, what is installed) is not looked for in the folder.

    Raises:
        ValueError: one of them is missing, no regular file, too large, or no Python.
    """
    file = Path(path)
    try:
        file = file.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError until Python 3.13
        raise ValueError(f'plugin "{path}": {getattr(error, "strerror", None) or "links that end nowhere"}') from error
    if file.suffix not in (".py", ".pyw") and file.is_file():
        raise ValueError(f'plugin "{path}": not a Python file')
    own, tree = _module("", file, str(path))
    found, todo, elsewhere = {"": own}, [(tree, "")], _Elsewhere(file.parent)
    while todo:
        tree, package = todo.pop()
        for name in sorted(_imported(tree, package)):
            beside = None if name in found or name.split(".")[0] in elsewhere else _beside(file.parent, name)
            if beside is not None:
                found[name], tree_beside = _module(name, beside, str(beside))
                is_package = beside.name == "__init__.py"
                todo.append((tree_beside, name if is_package else name.rpartition(".")[0]))
    return Source(file, tuple(found[name] for name in sorted(found)))


def parse(content: bytes, called: str) -> ast.Module:
    """The syntax tree of a file. Raises ValueError, one line, for what is no Python."""
    try:
        return ast.parse(content, called)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
        raise ValueError(f'plugin "{called}": {type(error).__name__}{line}: {said or "nested too deeply"}') from error


def tree_hash(tree: ast.AST) -> str:
    """sha256 of what a tree says, the same in every Python that can read it."""
    digest = hashlib.sha256()
    for part in _written(tree):
        digest.update(part.encode())
    return digest.hexdigest()


def _module(name: str, file: Path, called: str) -> tuple[Module, ast.Module]:
    content = read_file(file, f'plugin "{called}"')
    tree = parse(content, called)
    return Module(name, file, content, tree_hash(tree)), tree


def read_file(file: Path, called: str) -> bytes:
    """The content of a user's file of Python. Raises ValueError, beginning with `called`, for what is none."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(file, flags)  # a pipe that nobody writes to would block without O_NONBLOCK
    except FileNotFoundError as error:
        raise ValueError(f"{called}: no such file") from error
    except OSError as error:
        raise ValueError(f"{called}: {error.strerror or error}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{called}: not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            content = stream.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"{called}: {error.strerror or error}") from error
    finally:
        os.close(descriptor)
    if len(content) > LARGEST:
        raise ValueError(f"{called}: larger than {LARGEST // 2**20} MiB")
    return content


def _imported(tree: ast.Module, package: str) -> set[str]:
    """Every dotted name that the statements of a module may import, with the packages above it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*above, node.module or ""]))
            names.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    parts = [name.split(".") for name in names if name]
    return {".".join(part[: length + 1]) for part in parts for length in range(len(part))}


class _Elsewhere:
    """The names that Python finds outside a folder, so that none of the folder's files is meant by them."""

    def __init__(self, folder: Path):
        self.path = [each for each in sys.path if Path(each).resolve() != folder]
        self.installed = str(folder) in sysconfig.get_paths().values()  # the plugin itself, and so all beside it
        self.known: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        if name not in self.known:
            found = self.installed or name in _NEVER_BESIDE
            self.known[name] = found or importlib.machinery.PathFinder.find_spec(name, self.path) is not None
        return self.known[name]


def _beside(folder: Path, name: str) -> Path | None:
    place = folder.joinpath(*name.split("."))
    for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if file.is_file():
            return file
    return None


def _written(tree: ast.AST) -> Iterator[str]:
    """A tree in words, part by part; by a stack, since trees may be deeper than Python's calls may be."""
    stack: list[object] = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, _Text):
            yield item
        elif isinstance(item, ast.JoinedStr):
            stack += [_Text("f)"), *reversed(_joined(item)), _Text("f(")]
        elif isinstance(item, ast.AST):
            yield f"{type(item).__name__}("
            stack.append(_Text(")"))
            for field, value in reversed(list(ast.iter_fields(item))):
                nothing = value is None or value == [] or (isinstance(value, ast.JoinedStr) and not _joined(value))
                if field not in _LEFT_OUT and not (nothing and field != "value"):
                    stack += [value, _Text(f"{field}=")]
        elif isinstance(item, list):
            yield "["
            kept = [each for each in item if not _says_nothing(each)]
            stack += [_Text("]"), *(part for each in reversed(kept) for part in (_Text(","), each))]
        else:
            yield _value(item)


class _Text(str):
    """Part of what is written, among the values still to write."""

    __slots__ = ()


def _says_nothing(node: object) -> bool:
    """A docstring, or another text that stands alone as a statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _joined(text: ast.JoinedStr) -> list[object]:
    """An f-string's parts. Pythons cut the text between its fields differently."""
    parts: list[object] = []
    for value in text.values:
        if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            parts += [value, ""]
        elif parts and isinstance(parts[-1], str):
            parts[-1] += value.value
        else:
            parts.append(value.value)
    return [part for part in parts if part != ""]


def _value(value: object) -> str:
    """A constant with its type: True, 1, 1.0 and 1j are four."""
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)  # no limit on digits
    return ascii(value)  # which letters repr shows differs between Pythons
