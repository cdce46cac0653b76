"""The sections of a docstring, in the one form that this code has: words, then "Args:" and the like, indented."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Metrics\b.*):$")
_ENTRY = re.compile(r"^([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)$")


@dataclass(frozen=True)
class Parts:
    """What a docstring says.

    Attributes:
        words: everything that is in no section, its paragraphs as they are.
        sections: the section's name without its colon -> name of an entry -> its text on one line. An entry that names
            several things stands under each.
    """

    words: str
    sections: dict[str, dict[str, str]]


def parts_of(thing: Any) -> Parts:
    """The docstring of a class or function; of a value that of its class."""
    lines = inspect.cleandoc(getattr(thing, "__doc__", None) or "").splitlines()
    words: list[str] = []
    held: dict[str, list[str]] = {}
    section = ""
    for line in lines:
        if match := _SECTION.match(line):
            section = match[1]
            held[section] = []
        elif section and (not line or line.startswith(" ")):
            held[section].append(line)
        else:
            section = ""
            words.append(line)
    return Parts(
        re.sub(r"\n{3,}", "\n\n", "\n".join(words)).strip("\n"),
        {name: _entries(textwrap.dedent("\n".join(inside))) for name, inside in held.items()},
    )


def _entries(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if match := _ENTRY.match(line):
            names = match[1].split(", ")
            found.update(dict.fromkeys(names, match[2]))
        elif line.startswith(" ") and names:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        elif line:
            names = []  # a sentence about all of them
    return found


def as_markdown(words: str) -> str:
    """Words of a docstring as Markdown: indented lines (equations) stay as they are, the rest is text."""
    return "\n".join(line if line.startswith("    ") else _spared(line) for line in words.splitlines())


def in_a_cell(text: str) -> str:
    """Words of a docstring in a cell of a table."""
    return _spared(" ".join(text.split()))


def _spared(text: str) -> str:
    """Text in which Markdown finds no markup but code and emphasis of ours."""
    parts = text.split("`")
    outside = [re.sub(r"([|<>$\\\[\]])", r"\\\1", part) for part in parts[::2]]
    outside = [
        re.sub(r"(?<![\w./])((?:[A-Za-z]\w*[./])*[A-Za-z]\w*_\w+(?:[./]\w+)*)", r"`\1`", part) for part in outside
    ]
    outside = [re.sub(r"(?<!\w)\*(\w[^*]*\w)\*(?!\w)|\*", _starred, part) for part in outside]
    inside = [part.replace("|", r"\|") for part in parts[1::2]]
    return "".join(a + (f"`{b}`" if b is not None else "") for a, b in zip(outside, [*inside, None], strict=True))


def _starred(match: re.Match[str]) -> str:
    """Emphasis of whole words stays, a product's star is a star."""
    return match[0] if match[1] else r"\*"
