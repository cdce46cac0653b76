"""A config's text -> values: the YAML file, and seeds as people write them. Mistakes become lines, never tracebacks."""

from __future__ import annotations

import codecs
import errno
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from norms.values import cut, exact, nearest, shown
from results import files
from suite import yaml_core

CONFIGS = Path(__file__).resolve().parent / "configs"
"""The suite's own configs: in a checkout a link to the folder at its top, in an installed wheel a folder."""

KEYS = ("budget", "norms", "plugins", "seeds", "tasks", "threads")
MOST_SEEDS = 100_000
LARGEST_FILE = 2**20
"""Bytes of a config; all of the suite's own together have 30,000."""
MOST_LINES = 30
LONGEST_LINE = 300
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


class PlanError(ValueError):
    """Mistakes in a config or its overrides, one line each in `lines`: at most MOST_LINES, each cut to LONGEST_LINE."""

    def __init__(self, lines: Iterable[str]):
        self.lines = list(dict.fromkeys(cut(_BREAKS.sub(" ", line), LONGEST_LINE) for line in lines))
        if len(self.lines) > MOST_LINES:
            self.lines[MOST_LINES - 1 :] = [f"and {len(self.lines) - MOST_LINES + 1:,} more mistakes"]
        super().__init__("\n".join(self.lines))


class ManyRuns(PlanError):
    """More runs than are planned without a question; `Overrides.many` allows them."""


def find_config(path: str | Path) -> Path:
    """`path`, or the suite's own config where that is `configs/NAME.yaml` and no such file is here."""
    path = Path(path)
    own = CONFIGS / path.name
    return own if path.parent == Path("configs") and not path.exists() and own.is_file() else path


def folder_of(path: str | Path) -> Path:
    """The folder that paths in a config are relative to: its own, and the working folder where it comes by a pipe."""
    file = find_config(path)
    return Path() if file.is_fifo() or file.parts[:2] in (("/", "dev"), ("/", "proc")) else file.parent


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; `configs/NAME.yaml` is the suite's own where no such file is here.

    YAML 1.2 in UTF-8, or in UTF-16 with a byte order mark; see suite.yaml_core. A pipe, as of `<(sed ... c.yaml)` or
    /dev/stdin, is read to its end, once.

    Raises:
        PlanError: a missing or unreadable file, one of more than LARGEST_FILE bytes, bad YAML, a key given twice.
    """
    return parse_config(config_text(path), path)


def config_text(path: str | Path) -> str:
    """The text of such a file. Raises PlanError where it can not be read."""
    here, own = Path("configs").glob("*.yaml"), CONFIGS.glob("*.yaml")
    return _text(find_config(path), _config(path), [*here, *own])


def parse_config(text: str, path: str | Path) -> dict[str, Any]:
    """The mapping in the text of a config's file. Raises PlanError for what is none."""
    return _mapping(text, _config(path), KEYS)


def read_mapping(path: Path, name: str, keys: Iterable[str], others: Iterable[Path] = ()) -> dict[str, Any]:
    """As `read_config`, of a file that mistakes call by `name`. keys: those it may have; others: files like it."""
    return _mapping(_text(path, name, others), name, keys)


def _config(path: str | Path) -> str:
    return f'config "{cut(str(path), 120)}"'


def _text(path: Path, name: str, others: Iterable[Path]) -> str:
    try:
        content = _content(path)
        return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not a text file in UTF-8"
        near = [f"configs/{file.name}" if file.parent == CONFIGS else str(file) for file in others]
        raise PlanError([f"{name}: {reason}{nearest(str(path)[:200], near)}"]) from error


def _mapping(text: str, name: str, keys: Iterable[str]) -> dict[str, Any]:
    try:
        config = yaml_core.load(text)
    except yaml.YAMLError as error:
        raise PlanError([f"{name}{_said(error, text)}"]) from error
    if not isinstance(config, dict):
        raise PlanError([f"{name}: a mapping with the keys {', '.join(keys)} is needed, not {kind(config)}"])
    return config


def _content(path: Path) -> bytes:
    # the path of a pipe leads through links that name no file, so that only the pipe itself can be opened
    if not path.is_fifo():
        return files.read_bytes(os.path.realpath(path), LARGEST_FILE)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:  # one that nobody writes to is empty
        os.set_blocking(pipe.fileno(), True)
        content = pipe.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise OSError(errno.EFBIG, f"is larger than {LARGEST_FILE / 2**20:g} MiB", str(path))
    return content


def parse_value(text: str) -> Any:
    """A value as a config would hold it. Raises ValueError for what is not YAML."""
    try:
        value = yaml_core.load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML as configs have it: {_said(error, text).partition(': ')[2]}") from error
    if mistakes := form_mistakes(value, "the value"):
        raise ValueError(mistakes[0])
    return value


def form_mistakes(value: Any, where: str = "config") -> list[str]:
    """Mistakes of form anywhere in a config: one line for each place, at most MOST_LINES.

    A key that is no text, a number that is not finite or has more than 64 bits, a text of more than
    `norms.values.LONGEST` characters or with half a character, nesting deeper than `yaml_core.DEEPEST`, more values
    than `yaml_core.MOST_NODES`.
    """
    mistakes: list[str] = []
    count = 0
    waiting = [(value, where, 0)]
    while waiting and len(mistakes) < MOST_LINES:
        item, at, depth = waiting.pop()
        count += 1
        if depth > yaml_core.DEEPEST:
            return [f"{where}: lists or mappings are nested too deeply, or inside themselves"]
        if count > yaml_core.MOST_NODES:
            return [f"{where}: more than {yaml_core.MOST_NODES:,} values"]
        if isinstance(item, Mapping):
            for key, inner in item.items():
                if isinstance(key, str):
                    below = f"{at}: {cut(key, 40)}" if at != "config" else cut(key, 40)
                    waiting += [(inner, below, depth + 1), (key, at, depth + 1)]
                else:
                    mistakes.append(f"{at}: a name is text, not {kind(key)}")
        elif isinstance(item, list | tuple):
            waiting += [(inner, at, depth + 1) for inner in item]
        else:
            try:
                exact(Any, item)
            except ValueError as error:
                mistakes.append(f"{at}: {error}")
    return mistakes


def parse_seeds(given: Any) -> list[int]:
    """Seeds from a list, one integer, or text such as "0-4" or "0,2,5-7"; in order, each once, MOST_SEEDS at most.

    Raises:
        ValueError: anything else, a range that runs backwards, a negative seed, no seed at all.
    """
    if isinstance(given, list) and any(isinstance(item, list) for item in given):
        raise ValueError(f"seeds {shown(given)}: a list inside a list")
    ranges = [each for item in (given if isinstance(given, list) else [given]) for each in _seed_ranges(item)]
    if not ranges:
        raise ValueError("seeds: an empty list leaves nothing to run")
    if sum(map(len, ranges)) > MOST_SEEDS:
        raise ValueError(f"seeds {shown(given)}: more than {MOST_SEEDS:,} seeds")
    return list(dict.fromkeys(seed for each in ranges for seed in each))


def kind(value: Any) -> str:
    """The kind of a YAML value, in words for a person."""
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), shown(value))


def whole(value: Any) -> int | None:
    """The integer that a value is, 1e3 among them; else None."""
    try:
        value = exact(int, value)
    except ValueError:
        return None
    return value if isinstance(value, int) else None


def _seed_ranges(given: Any) -> list[range]:
    if isinstance(given, str):
        return [_seed_range(part.strip(), given) for part in given.split(",")]
    seed = whole(given)
    if seed is None:
        raise ValueError(f'seeds {shown(given)}: a list of integers or a range such as "0-4" is needed')
    if seed < 0:
        raise ValueError(f"seeds {shown(given)}: {seed} is negative; 0 and above are allowed")
    return [range(seed, seed + 1)]


def _seed_range(part: str, given: str) -> range:
    given = cut(given, 60)
    match = re.fullmatch(r"([0-9]{1,18})(?:\s*-\s*([0-9]{1,18}))?", part)
    if match is None:
        raise ValueError(f'seeds "{given}": integers of 0 and above and ranges such as "0-4" are needed')
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f'seeds "{given}": the range {first}-{last} runs backwards; did you mean "{last}-{first}"?')
    return range(first, last + 1)


def _said(error: yaml.YAMLError, text: str) -> str:
    """ " line 2, column 5: what is wrong"."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f" line {line}: the character U+{ord(text[error.position]):04X} has no place in YAML"
    mark = problem = None
    if isinstance(error, yaml.MarkedYAMLError):
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
    where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{where}: {problem or ' '.join(str(error).split())}"
