"""The content of an annotation file: a JSON object in any encoding that JSON knows, or what it is instead."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from asag_deploy.errors import DataError
from asag_evaluation.data.other_formats import other_list, other_object, other_text


@contextmanager
def open_annotation_file(path: Path) -> Iterator[BufferedReader]:
    """Open a file to be read.  Raises DataError if it is not there, or an OSError comes of reading it."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(
            f"there is no annotation file '{path}': check the data folder and the name of the split"
        ) from None
    except OSError as error:
        raise DataError(f"annotation file '{path}' cannot be read: {error.strerror}") from None


def content_of(data: bytes, path: Path) -> Mapping[str, Any]:
    """Return the object in the bytes of a file.

    Raises DataError if they are no JSON, or known to be of another format, which is named then.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, in no such encoding, or nested without end
        raise DataError(_no_json(path, data, error)) from None
    except MemoryError:
        raise DataError(f"annotation file '{path}' is larger than memory: split it up") from None
    if isinstance(content, list):
        raise DataError(f"'{path}' is not a COCO annotation file: {other_list(content)}")
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is not a COCO annotation file: it holds a {type(content).__name__}")
    other = other_object(content)
    if other is not None:
        raise DataError(f"'{path}' is not a COCO annotation file: {other}")
    repeated = _list_there_twice(data)
    if repeated is not None:
        raise DataError(
            f"annotation file '{path}' has two lists of {repeated}, of which only one would count: join them"
        )
    return content


_LISTS = ("images", "annotations", "categories")


def _list_there_twice(data: bytes) -> str | None:
    """Return which of COCO's lists an object has twice, of which JSON readers keep the last."""
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        keys = Counter(key for key, _ in pairs)
        found.extend(key for key in _LISTS if keys[key] > 1)

    if any(data.count(f'"{key}"'.encode()) > 1 for key in _LISTS):
        json.loads(data, object_pairs_hook=note)
    return found[0] if found else None


def _no_json(path: Path, data: bytes, error: Exception) -> str:
    if data.startswith((b"\x1f\x8b", b"PK\3\4", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return f"annotation file '{path}' is compressed: unpack it"
    other = other_text(data[:_BEGINNING].decode(json.detect_encoding(data), errors="replace"))
    if other is not None:
        return f"'{path}' is not a COCO annotation file: {other}"
    if isinstance(error, UnicodeDecodeError):
        return f"annotation file '{path}' is not written in UTF-8 ({error}): save it in that encoding"
    ends = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
    remedy = "it ends early, copy it again" if ends else "mend it, or export it again"
    return f"annotation file '{path}' is not valid JSON ({error}): {remedy}"


_BEGINNING = 65536
