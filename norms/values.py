"""Values of options, as YAML and JSON tell them apart: true is no number, and neither is text.

Pydantic converts between them by default: `true` into 1, "3" into 3. In a config each such conversion is a mistake that
nobody sees, so every option of a norm or a task passes `exact` first.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

LARGEST = 2**63 - 1
"""Integers are stored in tables' 64-bit columns."""
LONGEST = 4096
"""Characters of a text: as many as a path may have."""

_WORDS = {bool: "true or false", int: "an integer", float: "a number"}
_PLAIN = (*_WORDS, str, type(None))


def exact(annotation: Any, value: Any) -> Any:
    """Check that a value has the type of its option, without conversion between booleans, numbers and text; return it.

    Returns:
        The value; an integral float such as 1e3 as an integer where only integers are allowed, and -0.0 as 0.0, so that
        one value has one key. A value that does not fit in another way is returned as it is, for pydantic to refuse.

    Raises:
        ValueError: true or false for a number, a number for true or false, text for either; a number that is not
            finite or has no place in 64 bits; a text of more than LONGEST characters, or with half a character.
    """
    return _exact(_members(annotation), value)


def sequence_depth(annotation: Any) -> int:
    """The list depth of one value of this type: 0 for int, 1 for tuple[int, ...], the deepest member of a union."""
    return max((_depth(member) for member in _members(annotation)), default=0)


def shown(value: Any, length: int = 60) -> str:
    """A value that somebody gave, as Python writes it (true, false and null as YAML does), cut to `length`."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        return cut(repr(value), length)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits; lists inside themselves
        return f"a {type(value).__name__} that is too large to show"


def cut(text: str, length: int) -> str:
    """`text`, where it is longer with its middle left out; the end often says what to do."""
    if len(text) <= length:
        return text
    tail = (length - 3) // 3
    return f"{text[: length - 3 - tail]}...{text[len(text) - tail :]}"


def _members(annotation: Any) -> list[Any]:
    """The types that a union allows, else the one type."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for each in typing.get_args(annotation) for member in _members(each)]
    return [type(None) if annotation is None else annotation]


def _sequence(member: Any) -> Any:
    """The class of lists that a type stands for, or None."""
    kind = typing.get_origin(member) or member
    if not inspect.isclass(kind) or issubclass(kind, str | bytes | Mapping):
        return None
    return kind if kind is Iterable or issubclass(kind, Collection) else None


def _depth(member: Any) -> int:
    if _sequence(member) is None:
        return 0
    inside = (each for each in typing.get_args(member) if each is not Ellipsis)
    return 1 + max(map(sequence_depth, inside), default=0)


def _exact(members: list[Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        items = [_exact(_items(members, index), item) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _exact(_values(members), item) for key, item in value.items()}
    if not isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, float):
        value = _finite(value)
        if int in members and float not in members and value.is_integer():
            value = int(value)
    if isinstance(value, int):
        _in_64_bits(value)
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"a text of {len(value):,} characters; {LONGEST:,} are allowed")
        _unicode(value)
    if not _fits(members, value):
        raise ValueError(f"{_needed(members)} is needed, not {_called(value)}{_hint(members, value)}")
    return value


def _fits(members: list[Any], value: Any) -> bool:
    """Whether no conversion between true, numbers and text is needed."""
    kind = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))  # true is an int, too
    if kind in members or (kind is int and float in members):
        return True
    if any(type(each) is kind and each == value for member in members for each in _literals(member)):
        return True
    if any(not (member in _PLAIN or _literals(member) or _sequence(member)) for member in members):
        return True  # Any, a path, a model, ...: not for us to judge
    kinds = [*members, *(type(each) for member in members for each in _literals(member))]
    return not any(kind in _WORDS for kind in kinds)  # pydantic turns no number into text


def _items(members: list[Any], index: int) -> list[Any]:
    """The types that may stand at this place of a list."""
    found: list[Any] = []
    for member in members:
        inside = typing.get_args(member)
        if _sequence(member) is None:
            continue
        if not inside:
            found.append(Any)
        elif _sequence(member) is tuple and not (len(inside) == 2 and inside[1] is Ellipsis):
            found += _members(inside[index]) if index < len(inside) else [Any]
        else:
            found += _members(inside[0])
    return found or [Any]


def _values(members: list[Any]) -> list[Any]:
    """The types of a mapping's values; a model checks its own fields."""
    mappings = [member for member in members if typing.get_origin(member) in (dict, Mapping)]
    return [each for member in mappings for each in _members(typing.get_args(member)[1])] or [Any]


def _literals(member: Any) -> tuple[Any, ...]:
    return typing.get_args(member) if typing.get_origin(member) is Literal else ()


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no finite number, and records hold no other")
    return value + 0.0  # -0.0 becomes 0.0


def _unicode(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise ValueError(f"U+{code:04X} is half a character, and files hold no such text") from None


def _in_64_bits(value: int) -> None:
    if abs(value) > LARGEST:
        raise ValueError("an integer of more than 64 bits, and tables hold no such number")


def _called(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "true or false" if isinstance(value, bool) else "a number"


def _needed(members: list[Any]) -> str:
    words = [word for kind, word in _WORDS.items() if kind in members and not (kind is int and float in members)]
    literals = [each for member in members for each in _literals(member)]
    return " or ".join([*words, *(f'"{each}"' if isinstance(each, str) else f"{each}" for each in literals)])


def _hint(members: list[Any], value: Any) -> str:
    """How people write what they meant."""
    if not isinstance(value, str):
        return ""
    word = value.strip().lower()
    if bool in members:
        meant = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
        return f"; write {meant[word]}" if word in meant else ""
    number = word.replace("_", "")
    if re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", number):
        return f"; write {number}" + ("" if "_" in word else " without quotes")
    if re.fullmatch(r"[-+.\de\s]+(,[-+.\de\s]+)+", word):
        return f"; a list is written [{cut(', '.join(part.strip() for part in word.split(',')), 40)}]"
    return ""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """': did you mean "x"?' or ''; the tail of every message about an unknown name."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""
