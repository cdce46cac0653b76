"""The arguments of Python's functions as a config's values, and what of them a results folder keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results.asked import AskedNotes, asked
from suite.environment import commit, now, own_version


def asked_now(command: Sequence[str], config: Path | None, text: str) -> AskedNotes:
    """The plan that is begun now, for `asked.json`.

    Args:
        command: the words behind the program's name; none from Python.
        config: its file; None: a mapping, or a pipe.
        text: of the config.
    """
    return asked(now(), command, "" if config is None else str(config.resolve()), text, own_version(), commit())


def config_as_text(config: Mapping[str, Any]) -> str:
    """A mapping as JSON, which is YAML; what no config can hold stands in quotes."""
    return json.dumps(plain(config), ensure_ascii=False, default=repr, indent=1)


def texts(settings: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Settings as `Overrides` takes them; JSON is YAML."""
    if not isinstance(settings, Mapping):
        return several(settings)
    try:
        return tuple(f"{name}={json.dumps(plain(value))}" for name, value in settings.items())
    except TypeError as error:
        raise ValueError(f"settings: {error}") from error


def several(given: Sequence[Any] | str | Path | int) -> tuple[Any, ...]:
    """One text, path or number is one thing."""
    return (given,) if isinstance(given, str | Path | int) else tuple(given)


def plain(value: Any) -> Any:
    """A value as a YAML file would give it: tuples and ranges are lists, paths are texts."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
