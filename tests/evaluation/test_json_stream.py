"""Large JSON objects in pieces: what comes is what `json.loads` gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asag_evaluation.data.json_stream import JsonMembers

SCALARS = (
    st.none() | st.booleans() | st.integers(-9, 10**20) | st.floats(allow_nan=False) | st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["a", "},{", '"', "b"]), VALUES, max_size=3), max_size=6)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES | RECORDS, max_size=4)


def blocks(text: str, size: int) -> Iterator[str]:
    yield from (text[i : i + size] for i in range(0, len(text), size))


def whole(text: str, size: int) -> dict[str, Any]:
    """Put the members of an object together again."""
    found: dict[str, Any] = {}
    for name, value in JsonMembers(blocks(text, size)):
        if isinstance(value, list):
            found.setdefault(name, []).extend(value)
        else:
            found[name] = value
    return found


@settings(deadline=None)
@given(OBJECTS, st.integers(1, 60), st.sampled_from([None, 0, 2]), st.booleans())
def test_the_pieces_are_the_whole(
    content: dict[str, Any], size: int, indent: int | None, escaped: bool
) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=escaped)
    assert whole(text, size) == content


@given(
    OBJECTS,
    st.integers(1, 60),
    st.integers(0, 200),
    st.sampled_from(["", ",", "}", "]", '"', "0", "[{", "x"]),
)
def test_what_is_no_json_is_not_taken_for_it(content: dict[str, Any], size: int, at: int, sign: str) -> None:
    text = json.dumps(content)
    damaged = text[:at] + sign + text[at + 1 :]
    try:
        found = whole(damaged, size)
    except ValueError:
        return  # in doubt it may refuse
    assert found == json.loads(damaged)


def test_a_long_list_comes_in_pieces() -> None:
    records = [{"id": i, "outline": [[0.5] * 20]} for i in range(500)]
    text = json.dumps({"records": records, "more": [{"id": 1}]})
    pieces = [value for name, value in JsonMembers(blocks(text, 2000)) if name == "records"]
    assert [record for piece in pieces for record in piece] == records
    assert max(map(len, pieces)) < 60


def test_elements_that_hold_lists_of_objects_are_told_apart() -> None:
    records = [{"id": i, "parts": [{"x": 1}, {"x": 2}, {"id": 3}]} for i in range(50)]
    assert whole(json.dumps({"records": records}), 300) == {"records": records}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": 1',
        '{"a": 1} x',
        '{"a": 1, "a": 2}',
        '{"a": [1, 2}',
        "{1: 2}",
        '{"a" 1}',
        '{"a": 1,}',
    ],
)
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        whole(text, 3)


def test_another_reader_is_asked_first() -> None:
    text = json.dumps({"records": [{"id": i} for i in range(40)], "others": [{"id": 1}, {"id": 2}]})

    def reader(piece: str) -> Any:
        if '"id": 7}' in piece:
            raise ValueError("not this one")
        return len(json.loads(piece))

    found = [value for name, value in JsonMembers(blocks(text, 60), {"records": reader}) if name == "records"]
    assert {int, list} == {*map(type, found)}
    assert sum(value if isinstance(value, int) else len(value) for value in found) == 40
