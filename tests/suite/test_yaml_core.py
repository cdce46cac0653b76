"""suite.yaml_core: YAML 1.2's core schema, each key once, nothing that stands for more than a machine holds."""

import json
import math
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.yaml_core import DEEPEST, MOST_NODES, load


def problem(text):
    with pytest.raises(yaml.YAMLError) as caught:
        load(text)
    return getattr(caught.value, "problem", None) or str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0100", 100),
        ("0o10", 8),
        ("0x1F", 31),
        ("+3", 3),
        ("-3", -3),
        ("1e3", 1000.0),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("1.", 1.0),
        ("9223372036854775807", 2**63 - 1),
        *((text, text) for text in ("yes", "no", "on", "off", "Yes", "y", "1:30", "190:20:30", "2001-01-01", "1_000")),
        *((text, text) for text in ("0b11", "0o9", "inf", "nan", "=", ".", "tRUE")),
        ('"3"', "3"),
        ("'true'", "true"),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, False) for text in ("false", "False", "FALSE")),
        *((text, None) for text in ("null", "Null", "NULL", "~", "")),
        ("!!int '3'", 3),
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
        ("!!str yes", "yes"),
        ("[1, 1.0, true, null, a]", [1, 1.0, True, None, "a"]),
        ("|\n  3\n", "3\n"),
    ],
)
def test_plain_scalars_are_what_the_core_schema_says(text, value):
    found = load(text)
    assert (type(found), found) == (type(value), value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(json_values)
def test_json_is_read_as_json(value):
    """Version 1.2 was made so. json escapes all but ASCII, and YAML knows its escapes."""
    text = json.dumps(value)
    if "\\ud" not in text:  # YAML has no surrogate pairs
        assert repr(load(text)) == repr(json.loads(text))


@settings(deadline=None, max_examples=100)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63), 2**63 - 1))
def test_a_number_as_python_writes_it_is_that_number(number, integer):
    assert repr(load(repr(number))) == repr(number)
    assert load(str(integer)) == integer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!bool x", "!!bool does not fit"),
        ("!!bool yes", "!!bool does not fit"),
        ("!!int ''", "!!int does not fit"),
        ("!!int 1:30", "!!int does not fit"),
        ("!!float x", "!!float does not fit"),
        ("!!null x", "!!null does not fit"),
        ("!!str [a]", "!!str does not fit a list"),
        ("!!map [a]", "!!map does not fit a list"),
        ("!!seq {}", "!!seq does not fit a mapping"),
        ("!!timestamp x", "!!timestamp is unknown; allowed: !!map"),
        ("!!timestamp 2001-01-01", "!!timestamp is unknown"),
        ("!!binary aGk=", "!!binary is unknown"),
        ("!!set {a}", "!!set is unknown"),
        ("!!omap [a: 1]", "!!omap is unknown"),
        ("!!pairs [a]", "!!pairs is unknown"),
        ("!mine x", "!mine is unknown"),
        ("!!python/object/apply:os.system [ls]", "!!python/object/apply:os.system is unknown"),
        ("{!!bool x: 1}", "!!bool does not fit"),
        ("9" * 309, "309 digits"),
        ("9" * 5000, "5,000 digits"),
        ("0x" + "f" * 400, "digits"),
        ("1e999", "no finite number"),
        ("-.inf", "no finite number"),
        (".NaN", "no finite number"),
        ("--- a\n--- b", "another document"),
        ("{[a]: b}", "as a key"),
        ("{{a: b}: c}", "as a key"),
    ],
    ids=lambda text: text[:30],
)
def test_what_has_no_place_is_said(text, words):
    assert words in problem(text)


MERGES = [
    ("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", {"b": {"x": 3, "y": 2}}),
    # the mapping that merges stands deeper than its user (and is merged, too)
    (
        "a: &a {x: 1, y: 2}\nl: [&b {<<: *a, x: 3}]\nc: {<<: *b, y: 4}\nd: *b",
        {"c": {"x": 3, "y": 4}, "d": {"x": 3, "y": 2}},
    ),
    (
        "a: &a {x: 1}\nb: {c: {d: &d {<<: *a, x: 2}}}\ne: {<<: *d}\nf: {<<: [*d, *a], x: 3}",
        {"e": {"x": 2}, "f": {"x": 3}},
    ),
    ("a: &a {x: 1}\nb: {x: 2, <<: *a}", {"b": {"x": 2}}),
    ("a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b]}", {"c": {"x": 1, "y": 2}}),
    ("a: &a {x: 1}\nb: [*a, *a, {<<: *a}]", {"b": [{"x": 1}, {"x": 1}, {"x": 1}]}),
    ('{"<<": 1}', {"<<": 1}),
]


@pytest.mark.parametrize(("text", "values"), MERGES, ids=lambda v: str(v)[:30])
def test_a_mapping_that_merges_may_override_at_any_depth(text, values):
    found = load(text)
    assert {key: found[key] for key in values} == values


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "{a: 1, a: 1}",
        "{a: 1, \"a\": 2, 'b': 3}",
        "{1: a, 0x1: b}",
        "{1: a, 1.0: b}",
        "{~: a, null: b}",
        "b: &b {a: 1, c: 2, a: 3}\nd: {<<: *b}\ne: *b",
        "b: {c: [{d: {a: 1, a: 2}}]}",
        "b: &b {a: 1}\nc: {<<: *b, a: 2, a: 3}",
        "b: &b {a: 1}\nc: {<<: *b, <<: *b}",
    ],
)
def test_a_key_given_twice_is_found_wherever_it_stands(text):
    assert "is given twice" in problem(text)


def growing(pattern, first, levels):
    """Anchors a0, a1, ... each made of the one before by `pattern`."""
    return f"a0: &a0 {first}\n" + "".join(f"a{i}: &a{i} {pattern.format(f'*a{i - 1}')}\n" for i in range(1, levels))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (growing("[{0}, {0}]", "[x, x]", 40), "with all aliases more than"),
        (growing("{{<<: [{0}, {0}]}}", "{x: 1}", 40), "with all aliases more than"),
        (growing("{{x: {0}, y: {0}}}", "{x: 1}", 40), "with all aliases more than"),
        (growing("[{0}]", "[x]", 600), "nested too deeply"),
        (growing("{{<<: {0}}}", "{x: 1}", 600), "nested too deeply"),
        ("[" * 1000, "nested too deeply"),
        ("{a: " * 1000, "nested too deeply"),
        ("- " * 100_000, "nested too deeply"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "nested too deeply"),
        ("&e [*e]", "inside themselves"),
        ("a: &e {b: *e}", "inside themselves"),
        ("&e {<<: *e}", "inside themselves"),
    ],
    ids=lambda text: text[:20],
)
def test_what_would_grow_without_end_is_refused_before_it_grows(text, words):
    start = time.monotonic()
    assert words in problem(text)
    assert time.monotonic() - start < 5


def test_the_bounds_leave_room():
    assert load("[" * DEEPEST + "]" * DEEPEST) is not None
    assert len(load("a: &a [" + "1, " * 999 + "]\nb: [" + "*a, " * (MOST_NODES // 1001 - 2) + "]")["b"]) > 190
    assert math.isfinite(load("1e308"))
