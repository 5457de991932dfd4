"""Animated PNG: each frame is decoded as a PNG of its own, and put onto those before as the file says.

OpenCV decodes animations too, but damaged ones end the process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.images.composing import Left, Piece, as_bgra, composed
from asag_deploy.images.containers import PNG_SIGNATURE, png_chunk, png_chunks
from asag_deploy.images.decoder_log import decoder_log, quiet_opencv

_OF_ANIMATIONS = (b"acTL", b"fcTL", b"fdAT")
_OF_COLOURS = (b"PLTE", b"tRNS")
_CONTROL = struct.Struct(">IIIIIHHBB")
_LEFT_BEHIND: dict[int, Left] = {1: "cleared", 2: "as before"}
_OVER = 1
_DELAYS_ARE_OF = 100
"""A second has so many, where the file says 0."""


@dataclass
class _Piece:
    """What one frame changes: a rectangle of the picture."""

    width: int
    height: int
    left: int
    top: int
    seconds: float
    disposal: int
    blending: int
    compressed: list[bytes] = field(default_factory=list)


def without_animation(data: bytes) -> bytes:
    """Return the PNG that programs show which know no animations."""
    chunks = list(png_chunks(data))
    if not any(kind in _OF_ANIMATIONS for kind, *_ in chunks):
        return data
    still = [(start, size) for kind, start, size, _ in chunks if kind not in _OF_ANIMATIONS]
    return PNG_SIGNATURE + b"".join(data[start - 8 : start + size + 4] for start, size in still)


def apng_frames(data: bytes) -> Iterator[tuple[NDArray[Any], float]]:
    """Yield each frame as it is shown, uint8 or uint16 (H, W, 4) BGRA, and for how many seconds.

    It ends early at a frame that is damaged or not there in whole.
    """
    head, colours, pieces = _parts(data)
    if len(head) < 8:
        return
    width, height = struct.unpack_from(">II", head)
    yield from composed(_decoded_pieces(head, colours, pieces), height, width)


def _decoded_pieces(head: bytes, colours: list[tuple[bytes, bytes]], pieces: list[_Piece]) -> Iterator[Piece]:
    for piece in pieces:
        pixels = _decoded(piece, head, colours)
        if pixels is None:
            return
        behind = _LEFT_BEHIND.get(piece.disposal, "stays")
        yield Piece(pixels, piece.left, piece.top, piece.seconds, behind, piece.blending == _OVER)


def _parts(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], list[_Piece]]:
    """Return what all frames have in common, header and colours, and the frames that are there in whole."""
    head, colours, pieces = b"", list[tuple[bytes, bytes]](), list[_Piece]()
    ended = False
    for kind, start, size, whole in png_chunks(data):
        if not whole:
            break
        content = data[start : start + size]
        if kind == b"IHDR":
            head = content
        elif kind in _OF_COLOURS:
            colours.append((kind, content))
        elif kind == b"fcTL" and size >= _CONTROL.size:
            pieces.append(_piece(content))
        elif pieces and kind == b"IDAT":
            pieces[-1].compressed.append(content)
        elif pieces and kind == b"fdAT":
            pieces[-1].compressed.append(content[4:])
        ended = kind == b"IEND"
    return head, colours, pieces if ended else pieces[:-1]


def _piece(content: bytes) -> _Piece:
    _, width, height, left, top, delay, of, disposal, blending = _CONTROL.unpack_from(content)
    return _Piece(width, height, left, top, delay / (of or _DELAYS_ARE_OF), disposal, blending)


def _decoded(piece: _Piece, head: bytes, colours: list[tuple[bytes, bytes]]) -> NDArray[Any] | None:
    """Decode a frame's rectangle to BGRA; None if it is damaged."""
    own_head = struct.pack(">II", piece.width, piece.height) + head[8:]
    chunks = [(b"IHDR", own_head), *colours, (b"IDAT", b"".join(piece.compressed)), (b"IEND", b"")]
    png = PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)
    try:
        with quiet_opencv(), decoder_log():
            pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if pixels is None or pixels.shape[:2] != (piece.height, piece.width):
        return None
    whole = as_bgra(pixels)
    key = grey_key(png) if pixels.ndim == 2 else None
    if key is not None:
        whole[pixels == key] = 0
    return whole


def grey_key(data: bytes) -> int | None:
    """Return the one value that a grey PNG declares transparent, of 8 or 16 bits as decoded; None if none."""
    stretch = 1
    for kind, start, size, _ in png_chunks(data):
        if kind == b"IHDR" and size >= 9:
            stretch = {1: 255, 2: 85, 4: 17}.get(data[start + 8], 1)
        elif kind == b"tRNS" and size == 2:
            return int.from_bytes(data[start : start + 2], "big") * stretch
        elif kind == b"IDAT":
            break
    return None
