"""Norms as people write them on one line, and as tables print them: bgn(num_groups=8, eps=0.001)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from results.escape import cut

_FORM = re.compile(r"\s*([^\s()]+)\s*\((.*)\)\s*", re.DOTALL)


def split_outside(text: str) -> list[str]:
    """The parts of a text between its commas; a comma inside brackets separates nothing.

    Raises:
        ValueError: brackets that do not match.
    """
    parts, open_ = [""], ""
    for character in text:
        if character in "([{":
            open_ += character
        elif character in ")]}":
            if open_[-1:] + character not in ("()", "[]", "{}"):
                raise ValueError(f'a "{character}" closes nothing')
            open_ = open_[:-1]
        if character == "," and not open_:
            parts.append("")
        else:
            parts[-1] += character
    if open_:
        raise ValueError(f'a "{open_[-1]}" is not closed')
    return [part.strip() for part in parts]


def has_options(text: str) -> bool:
    return "(" in text


def named_norm(text: str) -> tuple[str, dict[str, Any]]:
    """ "gn(num_groups=4)" -> ("gn", {"num_groups": 4}); "gn" and "gn()" have no options.

    Values are those of a config (suite.yaml_core), with the None of a label as null. Neither the norm nor its options
    are looked up.

    Raises:
        ValueError: not of this form, an option twice, a value that no config could hold.
    """
    from suite.config import parse_value  # which imports torch; splitting names must not

    said = cut(text, 120)
    if not has_options(text):
        return text.strip(), {}
    form = _FORM.fullmatch(text)
    if form is None:
        raise ValueError(f'"{said}": NAME(OPTION=VALUE, ...) is needed, as gn(num_groups=4)')
    options: dict[str, Any] = {}
    try:
        parts = split_outside(form[2]) if form[2].strip() else []
    except ValueError as error:
        raise ValueError(f'"{said}": {error}') from error
    for part in parts:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not option or not value:
            raise ValueError(f'"{said}": OPTION=VALUE is needed, not "{cut(part, 60)}"')
        if option in options:
            raise ValueError(f'"{said}": {option} is given twice')
        try:
            options[option] = None if value == "None" else parse_value(value)
        except ValueError as error:
            raise ValueError(f'"{said}": {option}: {error}') from error
    return form[1], options


def both(name: str, written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a norm's brackets, and those of --option. Raises ValueError for one that stands in both."""
    if twice := [option for option in given if option in written]:
        raise ValueError(f"--option {twice[0]}: {name}(...) gives it, too")
    return {**written, **given}
