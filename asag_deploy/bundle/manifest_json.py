"""`manifest.json` as text: written from a `Manifest`, and read back strictly.

The dataclasses of `asag_deploy.bundle.manifest` are the schema.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, cast

from asag_deploy.bundle.manifest import SCHEMA_VERSION, Manifest
from asag_deploy.errors import BundleCorruptError, BundleVersionError, FieldError
from asag_deploy.typed_json import parse_json, read_fields


def export_again(manifest: Manifest | None = None) -> str:
    """Write the half sentence that says how to make a bundle again.

    manifest: the bundle's, where it can be read: it tells which program made it.  No variant is named: the
    checkpoint's file says it, and not every variant of a bundle is one that `asag-export` knows by name.
    """
    if manifest is not None and manifest.precision == "int8":
        return "quantise its float32 bundle again with `asag-quantize BUNDLE --images PATH --output-dir DIR`"
    return "export it again with `asag-export --checkpoint FILE --output-dir DIR`"


def export_with(manifest: Manifest, options: str) -> str:
    """Write the half sentence that says how to make a bundle again so that it can do more.

    options: of `asag-export`, such as `--anchor-cap 300`.
    """
    if manifest.precision == "int8":
        return f"export its float32 bundle again with `asag-export {options}`, and quantise that again"
    return f"export it again with `asag-export {options}`"


def manifest_to_json(manifest: Manifest) -> str:
    """Write the text of `manifest.json`.  Numbers JSON cannot hold (in the parity report) become 'nan'."""
    return json.dumps(_plain(dataclasses.asdict(manifest)), indent=2, allow_nan=False) + "\n"


def manifest_from_json(text: str | bytes, source: str) -> Manifest:
    """Read the text of a `manifest.json`; `source` is the name that messages give it.

    Raises BundleVersionError if a newer or a much older release wrote it, BundleCorruptError (naming the
    field) if it is not a manifest.
    """
    try:
        data = parse_json(text)
    except FieldError as error:
        raise BundleCorruptError(f"in '{source}', {error}; {export_again()}") from None
    except ValueError:
        raise BundleCorruptError(f"'{source}' is not JSON; {export_again()}") from None
    if not isinstance(data, dict):
        raise BundleCorruptError(f"'{source}' holds no JSON object; {export_again()}")
    _check_version(data.get("schema_version"), source)
    try:
        return cast(Manifest, read_fields(Manifest, data))
    except FieldError as error:
        raise BundleCorruptError(f"in '{source}', {error}; {export_again()}") from None


def _check_version(version: object, source: str) -> None:
    """Check the version before anything else, as a later schema may differ in every other field."""
    if type(version) is int and version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"'{source}' has schema version {version} and this release reads up to {SCHEMA_VERSION}; "
            "upgrade asag-deploy"
        )
    if type(version) is int and version < 1:
        raise BundleCorruptError(f"'{source}' has the impossible schema version {version}; {export_again()}")
    if type(version) is int and version < SCHEMA_VERSION:
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
