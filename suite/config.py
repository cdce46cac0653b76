"""A config's text -> values: the YAML file, and seeds as people write them. Mistakes become lines, never tracebacks."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from norms.registry import nearest

CONFIGS = Path(__file__).resolve().parent / "configs"
"""The suite's own configs: in a checkout a link to the folder at its top, in an installed wheel a folder."""

KEYS = ("budget", "norms", "seeds", "tasks", "threads")
MOST_SEEDS = 100_000


class PlanError(ValueError):
    """Mistakes in a config or its overrides, one line each in `lines`."""

    def __init__(self, lines: Sequence[str]):
        self.lines = list(dict.fromkeys(lines))
        super().__init__("\n".join(self.lines))


def find_config(path: str | Path) -> Path:
    """`path`, or the suite's own config where that is `configs/NAME.yaml` and no such file is here."""
    path = Path(path)
    own = CONFIGS / path.name
    return own if path.parent == Path("configs") and not path.exists() and own.is_file() else path


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; `configs/NAME.yaml` is the suite's own where no such file is here.

    Raises:
        PlanError: a missing or unreadable file, bad YAML, a key given twice.
    """
    try:
        text = find_config(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not a text file in UTF-8"
        here, own = Path("configs").glob("*.yaml"), CONFIGS.glob("*.yaml")
        near = nearest(str(path), [*map(str, here), *(f"configs/{file.name}" for file in own)])
        raise PlanError([f'config "{path}": {reason}{near}']) from error
    try:
        config = _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise PlanError([f'config "{path}"{where}: {error.problem or error.context}']) from error
    except yaml.YAMLError as error:
        raise PlanError([f'config "{path}": {" ".join(str(error).split())}']) from error
    if not isinstance(config, dict):
        raise PlanError([f'config "{path}": a mapping with the keys {", ".join(KEYS)} is needed, not {kind(config)}'])
    return config


def parse_value(text: str) -> Any:
    """A value as a config would hold it. Raises ValueError for what is not YAML."""
    try:
        return _load(text)
    except yaml.YAMLError as error:
        raise ValueError("the value is not YAML") from error


def parse_seeds(given: Any) -> list[int]:
    """Seeds from a list, one integer, or text such as "0-4" or "0,2,5-7"; in order, each once.

    Raises:
        ValueError: anything else, a range that runs backwards, a negative seed, no seed at all.
    """
    if isinstance(given, str):
        seeds = [seed for part in given.split(",") for seed in _seed_range(part.strip(), given)]
    elif isinstance(given, int) and not isinstance(given, bool):
        seeds = [given]
    elif isinstance(given, list):
        seeds = []
        for item in given:
            if isinstance(item, list):
                raise ValueError(f"seeds {given!r}: a list inside a list")
            seeds += parse_seeds(item)
    else:
        raise ValueError(f'seeds {given!r}: a list of integers or a range such as "0-4" is needed')
    if not seeds:
        raise ValueError("seeds: an empty list leaves nothing to run")
    if min(seeds) < 0:
        raise ValueError(f"seeds {given!r}: {min(seeds)} is negative; 0 and above are allowed")
    return list(dict.fromkeys(seeds))


def _load(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError, also for a list or mapping without an end."""
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
        json.dumps(value, default=str, skipkeys=True)
    except (RecursionError, ValueError) as error:
        raise yaml.YAMLError("lists or mappings are nested too deeply, or inside themselves") from error
    return value


def kind(value: Any) -> str:
    """What a YAML value is, in words for a person."""
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), f"{value!r}")


def _seed_range(part: str, given: str) -> range:
    match = re.fullmatch(r"(\d{1,18})(?:\s*-\s*(\d{1,18}))?", part)
    if match is None:
        raise ValueError(f'seeds "{given}": integers of 0 and above and ranges such as "0-4" are needed')
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f'seeds "{given}": the range {first}-{last} runs backwards; did you mean "{last}-{first}"?')
    if last - first >= MOST_SEEDS:
        raise ValueError(f'seeds "{given}": more than {MOST_SEEDS} seeds')
    return range(first, last + 1)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's later duplicate key silently wins; here it is a mistake with its line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key}" is given twice', key_node.start_mark
                )
            if isinstance(key, typing.Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)
