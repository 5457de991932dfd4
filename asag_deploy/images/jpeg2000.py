"""JPEG 2000: its size, depth and end, and a colour space that OpenCV converts by another formula."""

from __future__ import annotations

import struct
from typing import Any

from asag_deploy.images.containers import boxes
from asag_deploy.images.header import Header

CODESTREAM = b"\xff\x4f\xff\x51"
"""The beginning of a file without boxes around it."""
_END = b"\xff\xd9"
_SRGB, _SYCC = 16, 18


def jpeg2000_header(data: Any) -> Header:
    """Look for the codestream, its size and its end marker, which can be nothing else within it."""
    start = data.find(CODESTREAM)
    height = width = 0
    bits, damage = None, None
    if start >= 0 and start + 43 <= len(data):
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        width, height = max(0, right - left), max(0, bottom - top)
        depth = data[start + 42]
        bits = (depth & 0x7F) + 1
        damage = "its samples are signed" if depth & 0x80 else None
    complete = (start == 0 or boxes(data)[1]) and data.rfind(_END) > start >= 0
    return Header(format="jpeg2000", height=height, width=width, bits=bits, complete=complete, damage=damage)


def said_to_be_rgb(data: bytes) -> bytes | None:
    """Return a file in sYCC as one that says sRGB, so that it is decoded as it is stored; None for others."""
    for kind, start, size in boxes(data)[0]:
        if kind == b"colr" and size == 7 and data[start] == 1:
            (space,) = struct.unpack_from(">I", data, start + 3)
            return (
                data[: start + 3] + struct.pack(">I", _SRGB) + data[start + 7 :] if space == _SYCC else None
            )
    return None
