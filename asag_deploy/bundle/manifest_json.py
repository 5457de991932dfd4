"""`manifest.json` as text: written from a `Manifest`, and read back strictly.

Reading takes nothing on trust: every field must be there, no other may be, and each must have the type that
the dataclasses of `asag_deploy.bundle.manifest` declare, whose annotations are the schema.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import types
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from asag_deploy.bundle.manifest import SCHEMA_VERSION, Manifest
from asag_deploy.errors import BundleCorruptError, BundleVersionError

_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    type(None): "null",
}


def export_again(variant: str = "NAME") -> str:
    """Write the half sentence that says how to export a bundle again."""
    return f"export it again with `asag-export --checkpoint FILE --variant {variant} --output-dir DIR`"


def manifest_to_json(manifest: Manifest) -> str:
    """Write the text of `manifest.json`.  Numbers JSON cannot hold (in the parity report) become 'nan'."""
    return json.dumps(_plain(dataclasses.asdict(manifest)), indent=2, allow_nan=False) + "\n"


def manifest_from_json(text: str | bytes, source: str) -> Manifest:
    """Read the text of a `manifest.json`; `source` is the name that messages give it.

    Raises BundleVersionError if a newer or a much older release wrote it, BundleCorruptError (naming the
    field) if it is not a manifest.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise BundleCorruptError(f"'{source}' is not JSON; {export_again()}") from None
    if not isinstance(data, dict):
        raise BundleCorruptError(f"'{source}' holds no JSON object; {export_again()}")
    _check_version(data.get("schema_version"), source)
    try:
        return cast(Manifest, _read(Manifest, data, ""))
    except _FieldError as error:
        raise BundleCorruptError(f"in '{source}', {error}; {export_again()}") from None


def read_fields(cls: type[Any], data: object) -> Any:
    """Read data from JSON as the dataclass `cls`, as strictly as a manifest.

    The metadata of a field may name its `key` in the JSON, where that is not the field's own name, and say
    that it `may_be_missing`; the field then keeps its default.

    Raises BundleCorruptError, whose message is the half sentence naming the field, if it is none.
    """
    try:
        return _read(cls, data, "")
    except _FieldError as error:
        raise BundleCorruptError(str(error)) from None


class _FieldError(Exception):
    """A field is not what the schema says."""


def _check_version(version: object, source: str) -> None:
    """Check the version before anything else, as a later schema may differ in every other field."""
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"'{source}' has schema version {version} and this release reads up to {SCHEMA_VERSION}; "
            "upgrade with `pip install --upgrade asag-deploy`"
        )
    if isinstance(version, int) and version < 1:
        raise BundleCorruptError(f"'{source}' has the impossible schema version {version}; {export_again()}")
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise BundleVersionError(
            f"'{source}' has schema version {version}, of an earlier release whose graphs themselves decide "
            f"where to look; this release reads {SCHEMA_VERSION}; {export_again()}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


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
            raise _FieldError(f"`{_join(path, key)}` is not a known field")
    for key, field in fields.items():
        if key not in value and not field.metadata.get("may_be_missing", False):
            raise _FieldError(f"`{_join(path, key)}` is missing")
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
        raise _FieldError(f"`{path}` has {len(value)} values, expected {len(arguments)}")
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
        except _FieldError:
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
    raise _FieldError(f"`{path}` is {shown if len(shown) <= 40 else shown[:37] + '...'}, expected {what}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
