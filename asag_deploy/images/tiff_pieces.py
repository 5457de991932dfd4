"""Strips and tiles of a TIFF, decompressed to the rows of bytes that they hold.

libtiff decompresses them, given as those of a grey image whose pixels are the bytes.  It goes on after one
that it cannot decompress and leaves black what is missing, which OpenCV does not tell.  Deflate has check
sums, so it is decompressed here.  In LZW and PackBits only their lengths tell, so these are counted where a
piece ends in black.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import ImageError
from asag_deploy.images.decoder_log import jpeg_complaint

_NONE = 1
LZW, JPEG, DEFLATE, OLD_DEFLATE, PACKBITS = 5, 7, 8, 32946, 32773
"""Values of the tag `Compression`."""
_CLEAR, _END, _FIRST_FREE = 256, 257, 258


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How strips or tiles make up a plane of an image."""

    height: int
    """Of the plane, in pixels."""
    rows: int
    """Of a piece; a last strip may have fewer."""
    columns: int
    """Pieces side by side; 1 for strips."""
    row_bytes: int
    """Of a piece."""
    is_tiled: bool

    def last_row(self, i: int) -> int:
        """Return the last row of the plane that piece `i` has."""
        return min((i // self.columns + 1) * self.rows, self.height) - 1

    def length(self, i: int) -> int:
        """Return the bytes of piece `i`."""
        return self.row_bytes * (self.rows if self.is_tiled else self.last_row(i) % self.rows + 1)


def decompressed(
    parts: list[bytes], compression: int, grid: Grid, fill_order: int, name: str
) -> NDArray[np.uint8]:
    """Return what the pieces hold: uint8 (height, columns, row_bytes).

    compression: none, LZW, Deflate or PackBits; fill_order: 2 where the bits of a byte are the other way
    round.  Raises ImageError for pieces that are missing, too short, or cannot be decompressed.
    """
    if min(grid.rows, grid.row_bytes) < 1 or len(parts) < -(-grid.height // grid.rows) * grid.columns:
        raise ImageError(f"image '{name}' is damaged: its strips or tiles do not fit its size")
    if fill_order == 1 and compression in (DEFLATE, OLD_DEFLATE):
        parts = [_inflated(part, grid.length(i), name) for i, part in enumerate(parts)]
        compression = _NONE
    if fill_order == 1 and compression == _NONE:
        return _assembled(parts, grid, name)
    rows = decoded(_grey_tiff(parts, compression, grid, fill_order), name)
    if rows.shape != (grid.height, grid.row_bytes * grid.columns):
        raise ImageError(f"image '{name}' is damaged: its strips or tiles do not fit its size")
    rows = rows.reshape(grid.height, grid.columns, grid.row_bytes)
    for i, part in enumerate(parts):
        ends_in_black = not rows[grid.last_row(i), i % grid.columns].any()
        if ends_in_black and fill_order == 1:
            _refuse_broken(part, compression, grid.length(i), name)
    return rows


def decoded(data: bytes | bytearray, name: str) -> NDArray[np.uint8]:
    """Decode a TIFF of 8 bits a sample by OpenCV (ImageError if it cannot)."""
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None or image.dtype != np.uint8:
        raise ImageError(f"image '{name}' is damaged, or a TIFF of a kind that OpenCV does not read")
    return cast("NDArray[np.uint8]", image)


def refuse_broken_jpeg(piece: bytes, tables: bytes, name: str) -> None:
    """Raise ImageError if a part of a JPEG is missing; `tables` are those of the whole page."""
    whole = tables.removesuffix(b"\xff\xd9") + piece.removeprefix(b"\xff\xd8") if tables else piece
    if jpeg_complaint(whole) is not None:
        raise ImageError(_BROKEN.format(name=name))


def _assembled(parts: list[bytes], grid: Grid, name: str) -> NDArray[np.uint8]:
    """Put pieces together that are not compressed."""
    whole = [part[: grid.length(i)] for i, part in enumerate(parts)]
    if any(len(part) < grid.length(i) for i, part in enumerate(whole)):
        raise ImageError(_BROKEN.format(name=name))
    pixels = np.frombuffer(b"".join(whole), dtype=np.uint8)
    if not grid.is_tiled:
        return pixels[: grid.height * grid.row_bytes].reshape(grid.height, 1, grid.row_bytes)
    down = -(-grid.height // grid.rows)
    tiles = pixels[: down * grid.columns * grid.length(0)].reshape(
        down, grid.columns, grid.rows, grid.row_bytes
    )
    return tiles.swapaxes(1, 2).reshape(-1, grid.columns, grid.row_bytes)[: grid.height]


def _grey_tiff(parts: list[bytes], compression: int, grid: Grid, fill_order: int) -> bytes:
    """Write pieces as those of a grey image of 8 bits, whose pixels are their bytes."""
    starts = 8 + np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    places = (324, 325) if grid.is_tiled else (273, 279)
    tags: dict[int, Any] = {
        256: [grid.row_bytes * grid.columns],  # width
        257: [grid.height],
        258: [8],  # bits
        259: [compression],
        262: [1],  # black is zero
        266: [fill_order],
        277: [1],  # samples
        places[0]: starts[:-1],
        places[1]: [len(part) for part in parts],
        **({322: [grid.row_bytes], 323: [grid.rows]} if grid.is_tiled else {278: [grid.rows]}),
    }
    directory = int(starts[-1]) + 1 & ~1
    beyond = directory + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag in sorted(tags):
        packed = np.asarray(tags[tag], dtype="<u4").tobytes()
        entries += struct.pack("<HHI", tag, 4, len(packed) // 4)
        entries += packed if len(packed) == 4 else struct.pack("<I", beyond + len(values))
        values += packed if len(packed) > 4 else b""
    end = struct.pack("<H", len(tags)) + entries + bytes(4) + values
    return b"".join([b"II*\0", struct.pack("<I", directory), *parts]).ljust(directory, b"\0") + end


def _inflated(piece: bytes, length: int, name: str) -> bytes:
    """Decompress Deflate to `length` bytes (ImageError if it is damaged or holds fewer)."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(piece, length)
        # The check sum comes after the last byte, and after rows that a last strip may have beyond the image.
        beyond = stream.decompress(stream.unconsumed_tail, length)
    except zlib.error:
        found = beyond = b""
    if len(found) < length or (beyond and not stream.eof):
        raise ImageError(_BROKEN.format(name=name))
    return found


def _refuse_broken(piece: bytes, compression: int, length: int, name: str) -> None:
    """Raise ImageError if LZW or PackBits makes fewer than `length` bytes."""
    if compression == LZW and not piece.startswith(_OLD_LZW):
        is_whole = _lzw_makes(piece, length)
    else:
        is_whole = compression != PACKBITS or _packbits_makes(piece, length)
    if not is_whole:
        raise ImageError(_BROKEN.format(name=name))


_BROKEN = "image '{name}' is damaged: a strip or tile of it cannot be decompressed; copy or download it again"
_OLD_LZW = b"\0\1"
"""How pieces begin that were written with the bits the other way round."""


def _packbits_makes(piece: bytes, length: int) -> bool:
    made = position = 0
    while position < len(piece) and made < length:
        head = piece[position]
        if head < 128:
            made += min(head + 1, len(piece) - position - 1)
            position += head + 2
        else:
            made += 257 - head if head > 128 and position + 1 < len(piece) else 0
            position += 2 if head > 128 else 1
    return made >= length


def _lzw_makes(piece: bytes, length: int) -> bool:
    """Follow the codes, whose strings need not be known for that, only how long each is."""
    lengths = [1] * _FIRST_FREE
    bits, held, have, made = 9, 0, 0, 0
    before: int | None = None
    for byte in piece:
        held, have = (held << 8 | byte) & 0xFFFFFF, have + 8
        if have < bits:
            continue
        have -= bits
        code = held >> have & ((1 << bits) - 1)
        if code == _END:
            break
        if code == _CLEAR:
            del lengths[_FIRST_FREE:]
            bits, before = 9, None
            continue
        if code > len(lengths) or (code == len(lengths) and before is None):
            return False
        if before is not None:
            lengths.append(lengths[before] + 1)
        made += lengths[code]
        if made >= length:
            return True
        before = code
        # Codes grow one early, as the standard has it.
        bits = min(max(9, (len(lengths) + 1).bit_length()), 12)
    return made >= length
