"""YAML by the core schema of version 1.2 (yaml.org/spec/1.2.2, section 10.3), and within bounds.

PyYAML reads version 1.1, where `yes` is true, 010 is eight, 1:30 is ninety and 1e-3 is text. Only its scanner, parser
and composer are used here: they make a graph of nodes, which is measured before any value is made of it, since aliases
of aliases can stand for more than a machine holds. Of version 1.1 there remains `<<`, which merges mappings.

Deliberate differences: infinity and NaN are refused, which no record can hold; so are integers of more digits than 64
bits have, and a tag that is none of the core schema's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MOST_NODES = 200_000
"""Values of a document, those that an alias repeats included."""
DEEPEST = 50

_CORE = "tag:yaml.org,2002:"
_MAP, _SEQ, _STR, _MERGE = (f"{_CORE}{name}" for name in ("map", "seq", "str", "merge"))


class _Loader(
    yaml.reader.Reader,
    yaml.scanner.Scanner,
    yaml.parser.Parser,
    yaml.composer.Composer,
    yaml.resolver.BaseResolver,
):
    """Text -> graph of nodes, plain scalars tagged by the core schema."""

    def __init__(self, text: str):
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)


def _integer(text: str) -> int:
    digits = text.lstrip("+-")
    if len(digits.lstrip("0ox")) > 22:  # octal digits of 64 bits
        raise ValueError(f"an integer of {len(digits):,} digits is more than 64 bits hold")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    if text.lstrip("+-.").lower() in ("inf", "nan") or not math.isfinite(float(text)):
        raise ValueError(f"{text} is no finite number, and records hold no other")
    return float(text)


_SCALARS: dict[str, tuple[re.Pattern[str], str, Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), "~nN", lambda text: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF", lambda text: text[0] in "tT"),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789", _integer),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
        _float,
    ),
    "str": (re.compile(r"", re.DOTALL), "", str),
}
"""name -> (what it may look like, how it may begin, text -> value)"""

for _name, (_pattern, _first, _) in _SCALARS.items():
    if _name != "str":
        _Loader.add_implicit_resolver(f"{_CORE}{_name}", _pattern, [*_first, *([""] if _name == "null" else [])])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])


def load(text: str) -> Any:
    """The value of a document: mappings, lists, text, numbers, True, False, None.

    Raises:
        yaml.YAMLError: not one YAML document; a key twice in one mapping; nesting deeper than DEEPEST, or inside
            itself; more than MOST_NODES values; an unknown tag or one that its content does not fit.
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
        if root is None:
            return None
        _measure(root, {})
        return _value(root)
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None


def _measure(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, depth) of a node with all that its aliases repeat; each node is looked at once."""
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise yaml.MarkedYAMLError(
                problem="lists or mappings are nested inside themselves", problem_mark=node.start_mark
            )
        return measured
    known[id(node)] = None
    size, depth = 1, 0
    if isinstance(node, MappingNode):
        _check_keys(node)
    if not isinstance(node, ScalarNode):
        for child in node.value if isinstance(node, SequenceNode) else (part for pair in node.value for part in pair):
            more, deeper = _measure(child, known)
            size, depth = size + more, max(depth, deeper + 1)
    if size > MOST_NODES:
        raise yaml.MarkedYAMLError(
            problem=f"with all aliases more than {MOST_NODES:,} values", problem_mark=node.start_mark
        )
    if depth > DEEPEST:
        raise yaml.MarkedYAMLError(
            problem=f"lists or mappings are nested too deeply: more than {DEEPEST}", problem_mark=node.start_mark
        )
    known[id(node)] = size, depth
    return size, depth


def _check_keys(node: MappingNode) -> None:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, ScalarNode):
            raise yaml.MarkedYAMLError(problem="a list or mapping as a key", problem_mark=key_node.start_mark)
        merge = key_node.tag == _MERGE
        key = "<<" if merge else _value(key_node)
        if key in seen:
            hint = "; several mappings are merged with <<: [*a, *b]" if merge else ""
            raise yaml.MarkedYAMLError(
                problem=f'the key "{key}" is given twice{hint}', problem_mark=key_node.start_mark
            )
        seen.add(key)


def _value(node: Node) -> Any:
    if isinstance(node, ScalarNode):
        return _scalar(node)
    expected = _MAP if isinstance(node, MappingNode) else _SEQ
    if node.tag != expected:
        raise _wrong_tag(node, "a mapping" if isinstance(node, MappingNode) else "a list")
    if isinstance(node, SequenceNode):
        return [_value(item) for item in node.value]
    own: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag != _MERGE:
            own[_value(key_node)] = _value(value_node)
            continue
        for source in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
            if not isinstance(source, MappingNode):
                raise yaml.MarkedYAMLError(
                    problem="<< merges a mapping or a list of mappings, as <<: *name", problem_mark=source.start_mark
                )
            merged = _value(source) | merged  # of several the first wins
    return merged | own


def _scalar(node: ScalarNode) -> Any:
    pattern, _, make = _SCALARS.get(node.tag.removeprefix(_CORE), (None, "", str))
    if node.tag == _MERGE:
        return "<<"
    if pattern is None or not pattern.match(node.value):
        raise _wrong_tag(node, "this value")
    try:
        return make(node.value)
    except ValueError as error:
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


def _wrong_tag(node: Node, what: str) -> yaml.MarkedYAMLError:
    tag = node.tag.replace(_CORE, "!!")
    known = ", ".join(f"!!{name}" for name in ("map", "seq", *_SCALARS))
    problem = (
        f"the tag {tag} does not fit {what}"
        if tag.removeprefix("!!") in (*_SCALARS, "map", "seq")
        else (f"the tag {tag} is unknown; allowed: {known}")
    )
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
