"""Image files of kinds that Pillow and OpenCV do not write, made of the samples that they are to hold."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed(samples: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Pack samples (H, n) of fewer bits than they have here into rows of bytes (H, m)."""
    places = np.arange(bits - 1, -1, -1)
    single = (samples[..., None].astype(np.int64) >> places & 1).astype(np.uint8)
    return np.packbits(single.reshape(len(samples), -1), axis=1)


def tiff(
    samples: NDArray[Any],
    photometric: int,
    *,
    bits: int | None = None,
    order: str = "<",
    compressed: bool = False,
    planes: bool = False,
    tile: int | None = None,
    rows: int | None = None,
    tags: Mapping[int, Sequence[int]] | None = None,
) -> bytes:
    """Write samples (H, W, n), uint8 or uint16, as a TIFF of so many `bits` (None: those of their type).

    planes: each sample in strips of its own; tile: in squares of this side instead of strips; rows: of a
    strip; tags: more of them, or others, as numbers of 16 bits.
    """
    height, width, count = samples.shape
    depth = bits or samples.itemsize * 8
    parts = [samples[..., i : i + 1] for i in range(count)] if planes else [samples]
    pieces = [piece for part in parts for piece in _pieces(part, tile, rows or height)]
    data = [_bytes(piece, depth, order) for piece in pieces]
    data = [zlib.compress(piece) for piece in data] if compressed else data
    starts = 8 + np.concatenate([[0], np.cumsum([len(piece) for piece in data])])
    lengths = [len(piece) for piece in data]
    values: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [depth] * count),
        259: ("H", [8 if compressed else 1]),
        262: ("H", [photometric]),
        277: ("H", [count]),
        284: ("H", [2 if planes else 1]),
        **{tag: ("H", value) for tag, value in (tags or {}).items()},
    }
    if tile is None:
        values |= {273: ("I", starts[:-1].tolist()), 278: ("I", [rows or height]), 279: ("I", lengths)}
    else:
        values |= {322: ("I", [tile]), 323: ("I", [tile])}
        values |= {324: ("I", starts[:-1].tolist()), 325: ("I", lengths)}
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join([mark, struct.pack(f"{order}I", int(starts[-1])), *data])
    return body + _directory(values, order, len(body))


def png(samples: NDArray[Any], bits: int, colour: int, chunks: Mapping[bytes, bytes] | None = None) -> bytes:
    """Write samples (H, W, n) as a PNG of a colour type, with `chunks` before the pixels."""
    height, width, _ = samples.shape
    flat = samples.reshape(height, -1)
    rows = flat.astype(">u2").view(np.uint8) if bits == 16 else packed(flat, bits)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = {b"IHDR": head, **(chunks or {}), b"IDAT": zlib.compress(lines), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts.items())


def bmp(
    rows: NDArray[Any],
    bits: int,
    *,
    width: int,
    masks: Sequence[int] = (),
    header: int = 40,
    palette: bytes = b"",
) -> bytes:
    """Write rows of whole words, from top to bottom, as a BMP with the masks of red, green, blue, opacity."""
    data = rows[::-1].tobytes()
    height = len(rows)
    if header == 12:
        info = struct.pack("<IHHHH", header, width, height, 1, bits)
    else:
        method = 3 if masks else 0
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, method, len(data), 0, 0, 0, 0)
        info = struct.pack("<I", header) + info[4:] + struct.pack(f"<{len(masks)}I", *masks)
        info = info.ljust(header, b"\0")
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + palette + data


def _pieces(part: NDArray[Any], tile: int | None, rows: int) -> list[NDArray[Any]]:
    height, width, _ = part.shape
    if tile is None:
        return [part[start : start + rows] for start in range(0, height, rows)]
    padded = np.pad(part, ((0, -height % tile), (0, -width % tile), (0, 0)))
    return [
        padded[y : y + tile, x : x + tile]
        for y in range(0, padded.shape[0], tile)
        for x in range(0, padded.shape[1], tile)
    ]


def _bytes(piece: NDArray[Any], bits: int, order: str) -> bytes:
    if bits in (8, 16, 32, 64):
        return piece.astype(piece.dtype.newbyteorder("<" if order == "<" else ">")).tobytes()
    return packed(piece.reshape(len(piece), -1), bits).tobytes()


def _directory(values: Mapping[int, tuple[str, Sequence[int]]], order: str, start: int) -> bytes:
    entries, beyond = b"", b""
    after = start + 2 + 12 * len(values) + 4
    for tag in sorted(values):
        kind, numbers = values[tag]
        content = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        entries += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(numbers))
        if len(content) <= 4:
            entries += content.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", after + len(beyond))
            beyond += content
    return struct.pack(f"{order}H", len(values)) + entries + bytes(4) + beyond


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
