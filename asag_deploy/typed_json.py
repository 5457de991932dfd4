"""Data from JSON as typed values: dataclasses, whose annotations are the schema.

Reading takes nothing on trust: every field must be there, no other may be, and each must have the type that
is declared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from asag_deploy.errors import FieldError

_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    type(None): "null",
}
_LONGEST_NAME = 60


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which no object names a field twice, as of which one alone would be read.

    Raises ValueError if it is none, and FieldError, whose message is the half sentence naming the field, if
    one stands there twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_fields(cls: type[Any], data: object) -> Any:
    """Read data from JSON as the dataclass `cls`, strictly.

    The metadata of a field may name its `key` in the JSON, where that is not the field's own name, and say
    that it `may_be_missing`; the field then keeps its default.

    Raises FieldError, whose message is the half sentence naming the field, if it is none.
    """
    return _read(cls, data, "")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FieldError(f"`{_printable(twice)}` stands there twice")
    return found


def _read(hint: Any, value: Any, path: str) -> Any:
    """Read `value` as the annotation `hint` says; `path` is where it stands, such as `graphs[2].sha256`."""
    if hint in _NAMES:  # which most values are
        return _read_plain(hint, value, path)
    if dataclasses.is_dataclass(hint):
        return _read_object(cast(type, hint), value, path)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return _read_list(arguments, value, path)
    if origin is dict:
        return _read_mapping(arguments[1], value, path)
    if origin is Literal:
        # `True in (1,)` holds, hence the types.
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            _expected(_named(hint), value, path)
        return value
    if origin in (types.UnionType, Union):  # the second if a Literal is in it
        return _read_union(arguments, value, path)
    return _read_plain(origin or hint, value, path)


def _read_object(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        _expected("an object", value, path)
    hints = _hints(cls)
    fields = {field.metadata.get("key", field.name): field for field in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise FieldError(f"`{_join(path, key)}` is not a known field")
    for key, field in fields.items():
        if key not in value and not field.metadata.get("may_be_missing", False):
            raise FieldError(f"`{_join(path, key)}` is missing")
    return cls(
        **{
            field.name: _read(hints[field.name], value[key], _join(path, key))
            for key, field in fields.items()
            if key in value
        }
    )


def _read_mapping(hint: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _expected("an object", value, path)
    return value if hint is Any else {key: _read(hint, item, _join(path, key)) for key, item in value.items()}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass, which take long to evaluate."""
    return get_type_hints(cls)


def _read_list(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _expected("a list", value, path)
    if arguments[-1] is Ellipsis:
        hints = [arguments[0]] * len(value)
    elif len(value) != len(arguments):
        raise FieldError(f"`{path}` has {len(value)} values, expected {len(arguments)}")
    else:
        hints = list(arguments)
    return tuple(
        _read(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _read_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, arguments)):
        arguments = tuple(filter(dataclasses.is_dataclass, arguments))
        return _read(arguments[0], value, path)
    for hint in arguments:
        try:
            return _read(hint, value, path)
        except FieldError:
            continue
    return _expected(" or ".join(_named(hint) for hint in arguments), value, path)


def _read_plain(kind: Any, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    # Not isinstance: True is an int to Python, not to us.
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        _expected(_NAMES[kind], value, path)
    return value


def _named(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"'{choice}'" for choice in get_args(hint))
    return _NAMES.get(hint, str(hint))


def _expected(what: str, value: Any, path: str) -> NoReturn:
    shown = json.dumps(value)
    raise FieldError(f"`{path}` is {shown if len(shown) <= 40 else shown[:37] + '...'}, expected {what}")


def _join(path: str, name: str) -> str:
    name = _printable(name)
    return f"{path}.{name}" if path else name


def _printable(name: str) -> str:
    """Return a name as it may stand in a sentence, whatever is in it."""
    if not name.isprintable():
        name = json.dumps(name)[1:-1]
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
