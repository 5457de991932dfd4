"""Names of image files as annotation tools write them, and what may be meant by them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

_KEYS = ("file_name", "filename", "coco_url", "path")
"""Where the name of a file may stand, the likeliest first."""


def said_name(entry: Mapping[str, Any]) -> str:
    """Return what an entry of `images` calls its file; empty if it does not."""
    return next((entry[key] for key in _KEYS if isinstance(entry.get(key), str) and entry[key].strip()), "")


def meant_names(name: str) -> Iterator[str]:
    """Yield what may be meant by a name, the likeliest first, each once.

    It may have the folders of the machine that it was annotated on, that machine's way to separate them, and
    be an address, in which signs are escaped.
    """
    seen = set()
    address = urlsplit(name).path if "://" in name else name
    for spelled in (name, address, unquote(address)):
        plain = spelled.replace("\\", "/") if "\\" in spelled else spelled
        parts = [part for part in PurePosixPath(plain).parts if part not in ("/", ".", "..")]
        whole = [spelled, plain] if "://" not in spelled else []
        for candidate in (*whole, *("/".join(parts[i:]) for i in range(len(parts)))):
            if candidate and candidate not in seen:
                seen.add(candidate)
                yield candidate


def alike(name: str) -> str:
    """Return the same for names that differ in the size of their letters, or in how accents are stored."""
    return unicodedata.normalize("NFC", name).casefold()
