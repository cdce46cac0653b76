"""norms.values: an option is what was written, never what it could be converted to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from norms.values import LARGEST, LONGEST, cut, exact, sequence_depth, shown


@pytest.mark.parametrize(
    ("annotation", "value", "needed"),
    [
        (int, True, "an integer is needed, not true or false"),
        (int, "3", "an integer is needed, not text; write 3 without quotes"),
        (int, "1_000", "write 1000"),
        (int, "2,3", "a list is written [2, 3]"),
        (int, "yes", "an integer is needed, not text"),
        (int, 1.5, "an integer is needed"),
        (int | None, False, "an integer is needed"),
        (float, True, "a number is needed"),
        (float, "1e-3", "a number is needed, not text; write 1e-3 without quotes"),
        (float, "0.1, 0.2", "a list is written [0.1, 0.2]"),
        (bool, 1, "true or false is needed, not a number"),
        (bool, 0.0, "true or false is needed, not a number"),
        (bool, "yes", "true or false is needed, not text; write true"),
        (bool | None, "off", "write false"),
        (bool, "true", "write true"),
        (int | Literal["auto"], "8", 'an integer or "auto" is needed'),
        (int | Literal["auto"], True, 'an integer or "auto" is needed'),
        (Literal[1, 2], True, "1 or 2 is needed"),
        (tuple[int, ...], [1, True], "an integer is needed, not true or false"),
        (tuple[int, ...], [1, "2"], "write 2 without quotes"),
        (tuple[bool, int], [1, 2], "true or false is needed"),
        (list[list[int]] | None, [[1], ["2"]], "an integer is needed"),
        (Sequence[float], ["x"], "a number is needed"),
        (dict[str, float], {"a": "1"}, "a number is needed"),
        (Annotated[int | None, Field(ge=1)], "3", "an integer is needed"),
        (Any, float("nan"), "no finite number"),
        (float, float("inf"), "no finite number"),
        (float, LARGEST + 1, "64 bits"),
        (Any, [-LARGEST - 2], "64 bits"),
        (str, "x" * (LONGEST + 1), "characters"),
    ],
)
def test_a_conversion_is_a_mistake_that_says_what_is_needed(annotation, value, needed):
    with pytest.raises(ValueError, match=r"needed|finite|bits|characters|write") as caught:
        exact(annotation, value)
    assert needed in str(caught.value)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("annotation", "value", "result"),
    [
        (int, 1e3, 1000),
        (int | None, 8.0, 8),
        (tuple[int, ...], [1.0, 2], [1, 2]),
        (int | float, 8.0, 8.0),
        (float, 1, 1),  # pydantic's own step, so that keys stay
        (float, -0.0, 0.0),
        (Any, {"a": [-0.0]}, {"a": [0.0]}),
        (str, "3", "3"),
        (int | str, "3", "3"),
        (int | Literal["auto"], "auto", "auto"),
        (Path | int, "3", "3"),
        (bool | None, None, None),
        (Any, True, True),
    ],
)
def test_what_needs_none_passes(annotation, value, result):
    assert repr(exact(annotation, value)) == repr(result)


scalars = st.booleans() | st.integers() | st.floats() | st.text() | st.none()


@given(st.sampled_from([int, float, bool, str, int | None, float | str, bool | int, int | Literal["a"]]), scalars)
def test_what_passes_has_a_type_that_is_allowed(annotation, value):
    try:
        found = exact(annotation, value)
    except ValueError:
        return
    assert found == value
    if annotation in (int, float, bool) and isinstance(found, bool | int | float | str):
        assert type(found) is annotation or (annotation is float and type(found) is int)


@pytest.mark.parametrize(
    ("annotation", "depth"),
    [
        (int | None, 0),
        (str, 0),
        (Any, 0),
        (None, 0),
        (list, 1),
        (Sequence[int] | None, 1),
        (set[int], 1),
        (tuple[tuple[int, int], ...] | int, 2),
        (dict[str, list[int]], 0),
        (Literal["a"], 0),
    ],
)
def test_how_deep_lists_are_in_one_value(annotation, depth):
    assert sequence_depth(annotation) == depth


@given(st.text(), st.integers(10, 50))
def test_cut_keeps_the_ends(text, length):
    short = cut(text, length)
    assert len(short) <= length or short == text
    assert short == text or (text.startswith(short[:3]) and "..." in short)
    assert len(shown(text * 100)) <= 60
