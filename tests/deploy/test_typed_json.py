"""Data from JSON read strictly as dataclasses: what is wrong is named, in half a sentence."""

from __future__ import annotations

import dataclasses
import re

import pytest

from asag_deploy.errors import FieldError
from asag_deploy.typed_json import parse_json, read_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    parts: dict[str, Part] = dataclasses.field(metadata={"key": "pieces"})
    newer: float = dataclasses.field(default=0.5, metadata={"may_be_missing": True})


def test_fields_under_other_keys_by_name_and_of_later_releases() -> None:
    assert read_fields(Whole, {"pieces": {"a": {"size": 1}}}) == Whole(parts={"a": Part(size=1)})
    assert read_fields(Whole, {"pieces": {}, "newer": 1}) == Whole(parts={}, newer=1.0)
    for data, sentence in (
        ({"parts": {}}, "`parts` is not a known field"),
        ({"a\nb\udc80": {}}, r"`a\nb\udc80` is not a known field"),
        ({"newer": 1.0}, "`pieces` is missing"),
        ({"pieces": []}, "`pieces` is [], expected an object"),
        ({"pieces": {"a": {"size": "1"}}}, '`pieces.a.size` is "1", expected a whole number'),
    ):
        with pytest.raises(FieldError, match=re.escape(sentence)):
            read_fields(Whole, data)


def test_a_field_that_stands_there_twice() -> None:
    """Parsers take the last; readers of the file see the first."""
    assert parse_json('{"a": {"size": 1}, "b": {"size": 2}}') == {"a": {"size": 1}, "b": {"size": 2}}
    with pytest.raises(FieldError, match="`size` stands there twice"):
        parse_json('{"a": {"size": 1, "size": 2}}')
    for text in ("[" * 100_000, "{", b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
