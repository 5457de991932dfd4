"""Clients' texts and numbers as they stand in sentences."""

from __future__ import annotations

import math

_LONGEST_ECHO = 40


def shown(text: str, most: int = _LONGEST_ECHO) -> str:
    """Return a client's text as it may stand in a sentence, or elsewhere with so many characters at most."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= most else f"{plain[:most]}..."


def mebibytes(count: int) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / 2**20:g} MiB"


def megapixels(count: int) -> str:
    """Return a number of pixels in millions, rounded up."""
    return f"{math.ceil(count / 1e4) / 100:g} million pixels"
