"""GIF: each picture is decoded as a GIF of its own, and put onto those before as the file says.

OpenCV reads animations too, but paints with the background's colour where pictures leave transparency, and
takes transparency and delay for a picture that says neither from the one before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.images.composing import Left, Piece, as_bgra, composed
from asag_deploy.images.decoder_log import decoder_log, quiet_opencv
from asag_deploy.images.header import Header

_HEAD = 13
"""Bytes before the colours that all pictures have in common: signature, size of the screen and flags."""
_EXTENSION, _PICTURE, _TRAILER = 0x21, 0x2C, 0x3B
_CONTROL = 0xF9
_LEFT_BEHIND: dict[int, Left] = {2: "cleared", 3: "as before", 4: "as before"}
"""By the number in the file; 4 is what some old programs wrote for 3."""


@dataclass(frozen=True)
class _Block:
    """A whole block of the file."""

    kind: int
    start: int
    end: int


@dataclass
class _Control:
    """What is said of the picture that follows."""

    seconds: float = 0.0
    left_behind: Left = "stays"
    is_transparent: bool = False
    """Whether one of its colours is none."""
    block: bytes = b""


def gif_header(data: Any) -> Header:
    """Walk through the blocks of pictures and extensions to the trailer."""
    width, height = struct.unpack_from("<HH", data, 6) if len(data) >= 10 else (0, 0)
    kinds = [block.kind for block in _blocks(data)]
    frames = kinds.count(_PICTURE)
    return Header(
        format="gif",
        height=height,
        width=width,
        frames=max(frames, 1),
        whole_frames=frames,
        complete=_TRAILER in kinds and frames > 0,
    )


def gif_frames(data: bytes) -> Iterator[tuple[NDArray[Any], float]]:
    """Yield each frame as it is shown, uint8 (H, W, 4) BGRA, and for how many seconds.

    It ends early at a frame that is damaged or not there in whole.
    """
    width, height = struct.unpack_from("<HH", data, 6)
    yield from composed(_pieces(data, height, width), height, width)


def _pieces(data: bytes, height: int, width: int) -> Iterator[Piece]:
    control, background = _Control(), _background(data)
    for block in _blocks(data):
        if block.kind == _EXTENSION and data[block.start + 1] == _CONTROL and block.end - block.start >= 8:
            flags, delay = struct.unpack_from("<BH", data, block.start + 3)
            behind = _LEFT_BEHIND.get(flags >> 2 & 7, "stays")
            control = _Control(delay / 100, behind, bool(flags & 1), data[block.start : block.end])
        elif block.kind == _PICTURE:
            left, top, columns, rows = struct.unpack_from("<HHHH", data, block.start + 1)
            if left + columns > width or top + rows > height:
                return
            pixels = _decoded(data, block, control)
            if pixels is None:
                return
            blank = (0, 0, 0, 0) if control.is_transparent else background
            yield Piece(pixels, left, top, control.seconds, control.left_behind, is_over=True, blank=blank)
            control = _Control()


def _decoded(data: bytes, block: _Block, control: _Control) -> NDArray[Any] | None:
    """Decode one picture to BGRA; None if it is damaged."""
    size = data[block.start + 5 : block.start + 9]
    colours = data[_HEAD : _HEAD + _colours(data[10])]
    head = b"GIF89a" + size + data[10:11] + b"\0\0" + colours
    alone = head + control.block + b",\0\0\0\0" + data[block.start + 5 : block.end] + b";"
    try:
        with quiet_opencv(), decoder_log():
            pixels = cv2.imdecode(np.frombuffer(alone, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    width, height = struct.unpack("<HH", size)
    if pixels is None or pixels.shape[:2] != (height, width):
        return None
    return as_bgra(pixels)


def _background(data: bytes) -> tuple[int, int, int, int]:
    """Return BGRA of what shows where nothing is painted; transparent if the file names no such colour."""
    place = _HEAD + 3 * data[11]
    if data[11] * 3 >= _colours(data[10]):
        return 0, 0, 0, 0
    red, green, blue = data[place : place + 3]
    return blue, green, red, 255


def _blocks(data: Any) -> Iterator[_Block]:
    """Yield the whole blocks up to the trailer."""
    if len(data) < _HEAD:
        return
    position = _HEAD + _colours(data[10])
    while position < len(data):
        kind, start = data[position], position
        if kind == _TRAILER:
            yield _Block(kind, start, start + 1)
            return
        if kind == _EXTENSION:
            position += 2
        elif kind == _PICTURE and position + 10 < len(data):
            position += 11 + _colours(data[position + 9])
        else:
            return
        position = _after_parts(data, position)
        if position < 0:
            return
        yield _Block(kind, start, position)


def _colours(flags: int) -> int:
    """Return the bytes of the colour table that follows, if the flags say that one does."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_parts(data: Any, position: int) -> int:
    """Step over the parts of a block to behind the empty one that ends it; -1 if the file ends before."""
    while position < len(data):
        size = data[position]
        position += size + 1
        if size == 0:
            return position
    return -1
