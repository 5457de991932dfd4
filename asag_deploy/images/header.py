"""What the first bytes of an image file say, before any pixel is decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Format = Literal["avif", "bmp", "gif", "jpeg", "jpeg2000", "png", "pnm", "sun", "tiff", "webp"]

ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, kw_only=True)
class Header:
    """Facts about an image file that need no decoding."""

    format: Format
    height: int
    """As stored, in pixels; 0 where the file does not get as far as to say."""
    width: int
    orientation: int = 1
    """As in EXIF, 1 to 8: how the stored pixels are to be turned."""
    bits: int | None = None
    """Of a sample, where decoders leave values that need fewer than their type has; None for all of them."""
    frames: int = 1
    """Frames or pages that the file says it has, or that are there if it does not say."""
    whole_frames: int = 1
    """How many of them are there from beginning to end."""
    complete: bool = True
    """False where the end of the file is missing."""
    damage: str | None = None
    """What is wrong with it otherwise, as far as can be told without decoding."""


def truncated(name: str) -> str:
    """Say that the end of a file is missing."""
    return f"image '{name}' is truncated: its end is missing, so copy or download it again"


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation (1 to 8) that EXIF data states in its first directory; None if it states none.

    exif: from its byte order mark (`II` or `MM`) on; a heading `Exif` before it is stepped over.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:2] not in (b"II", b"MM"):
        return None
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(offset: int, size: int) -> int:
        return int.from_bytes(exif[offset : offset + size], order)

    start = number(4, 4)
    for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(exif) - 11), 12):
        if number(entry, 2) == ORIENTATION_TAG:
            # A LONG instead of the SHORT that the standard asks for is what some programs write.
            value = number(entry + 8, {1: 1, 4: 4}.get(number(entry + 2, 2), 2))
            return value if 1 <= value <= 8 else 1
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """Return the orientation (1 to 8) that an XMP packet states as an attribute or element; None for none."""
    found = _IN_XMP.search(xmp)
    return int(found[1]) if found is not None else None


_IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


def stated(exif: int | None, xmp: int | None) -> int:
    """Return the orientation that counts: that of EXIF where it states one, as viewers and Pillow hold it."""
    return exif if exif is not None else xmp or 1
