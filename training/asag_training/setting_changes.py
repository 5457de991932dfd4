"""Changes of settings as text, `PART.NAME=VALUE`: what `--set` takes."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from asag_deploy.errors import ConfigError

Settings = TypeVar("Settings")

_Tree = dict[str, Any]
"""Changed settings by name: the text of the new value, or for settings of settings a tree of their own."""


def with_changes(settings: Settings, changes: Iterable[str]) -> Settings:
    """A copy of nested frozen dataclasses with some values replaced, e.g. `schedule.epochs=24`.

    Values are JSON; strings may go without quotes.  All changes are made at once, so that their order does
    not matter.  Raises ConfigError for an unknown setting, a value of another type, or one that makes no
    sense.
    """
    tree: _Tree = {}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or "." not in path:
            parts = ", ".join(_types(type(settings)))
            raise ConfigError(f"cannot read the change '{change}': expected PART.NAME=VALUE, PART of {parts}")
        *parents, name = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"'{path}' is changed both as a whole and in part: leave one of them out")
        branch[name] = text
    changed: Settings = _replaced(settings, tree, "")
    return changed


def _replaced(settings: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    known = _types(type(settings))
    new: dict[str, Any] = {}
    for name, change in tree.items():
        path = prefix + name
        if name not in known:
            of = f" of '{prefix[:-1]}'" if prefix else ""
            raise ConfigError(f"unknown setting '{path}'; the settings{of} are {', '.join(known)}")
        before = getattr(settings, name)
        if not isinstance(change, dict):
            new[name] = _value(path, change, known[name], before)
        elif dataclasses.is_dataclass(before):
            new[name] = _replaced(before, change, f"{path}.")
        else:
            raise ConfigError(f"'{path}' is {json.dumps(before)} and has no settings of its own")
    return dataclasses.replace(settings, **new)


def _types(kind: type) -> dict[str, Any]:
    """The settings of a dataclass and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _value(path: str, text: str, kind: Any, before: Any) -> Any:
    """`text` as a value of type `kind`."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError:
        value = text
    try:
        return _as_type(value, kind)
    except TypeError:
        is_group = dataclasses.is_dataclass(before)
        example = f"its settings one by one, as in {path}.NAME=VALUE" if is_group else f"{_name(kind)}"
        raise ConfigError(f"'{text}' is no value for '{path}': expected {example}") from None


def _as_type(value: Any, kind: Any) -> Any:
    """`value` if it is of type `kind`, with lists as tuples and whole numbers as floats; else TypeError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _as_one_of(value, inner)
    if origin is typing.Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list):
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(each) == len(value):
            return tuple(_as_type(item, of) for item, of in zip(value, each, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float, str, bool, type(None)) and type(value) is kind:
        return value
    raise TypeError


def _as_one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return _as_type(value, kind)
        except TypeError:
            continue
    raise TypeError


def _name(kind: Any) -> str:
    """A type in the words of a user."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_name(each) for each in inner)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if typing.get_origin(kind) is tuple:
        number = "numbers" if inner[-1] is Ellipsis else f"{len(inner)} numbers"
        return f"a list of {number}, such as {[1, 2] if inner[-1] is Ellipsis else [1] * len(inner)}"
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
    return words.get(kind, "null")


def _no_number(constant: str) -> str:
    return constant  # NaN and Infinity, which JSON does not have, are words
