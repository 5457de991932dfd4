"""Formats of plain pixels, BMP and Netpbm's, as far as OpenCV reads them otherwise than they are meant.

OpenCV takes the fourth byte of a BMP for opacity where no mask says so, misreads the headers of OS/2, loses
its place in run lengths, and reads Netpbm's values as if the largest were always 255 or 65535.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import ImageError
from asag_deploy.images.depth import to_8_bits
from asag_deploy.images.header import Header, truncated
from asag_deploy.images.opacity import blend_onto_white

_CORE_HEADER = 12
"""The length of OS/2's header."""
_PLAIN, _RLE8, _RLE4, _MASKS, _MASKS_WITH_OPACITY = 0, 1, 2, 3, 6
_END_OF_ROW, _END, _STEP = 0, 1, 2
"""What a pair of bytes in run lengths means that begins with 0; more is the length of a row of pixels."""
_MASKS_OF_16_BITS = (0x7C00, 0x03E0, 0x001F, 0)
_MASKS_OF_32_BITS = (0xFF0000, 0xFF00, 0xFF, 0)


@dataclass(frozen=True, kw_only=True)
class _Bmp:
    """What a BMP's headers say."""

    width: int
    height: int
    top_down: bool
    bits: int
    compression: int
    masks: tuple[int, ...]
    """Of red, green, blue and opacity, 0 for none; empty for other depths than 16 and 32 bits."""
    palette: tuple[int, int, int]
    """Where it begins, how many colours it has, bytes of each."""
    pixels: int
    """Where they begin."""

    @property
    def row_bytes(self) -> int:
        return (self.width * self.bits + 31) // 32 * 4

    @property
    def is_packed(self) -> bool:
        """Whether its rows are run lengths."""
        return (self.compression, self.bits) in ((_RLE8, 8), (_RLE4, 4))


def bmp_header(data: bytes) -> Header:
    """Read the headers, and whether all rows are there; run lengths tell that when they are decoded."""
    bmp = _bmp(data)
    if bmp is None:
        return Header(format="bmp", height=0, width=0, complete=False)
    needed = 0 if bmp.is_packed else bmp.row_bytes * bmp.height
    complete = len(data) >= bmp.pixels + needed
    return Header(format="bmp", height=bmp.height, width=bmp.width, complete=complete)


def decode_bmp(data: bytes, name: str) -> NDArray[np.uint8] | None:
    """Decode as uint8 (H, W, 3) RGB on white; None for headers that make no sense.

    Raises ImageError for what is no picture.
    """
    bmp = _bmp(data)
    if bmp is None:
        return None
    if bmp.is_packed:
        return _from_runs(data, bmp, name)
    if bmp.compression not in (_PLAIN, _MASKS, _MASKS_WITH_OPACITY) or bmp.bits not in (
        1,
        2,
        4,
        8,
        16,
        24,
        32,
    ):
        raise ImageError(
            f"image '{name}' is a BMP of an unusual kind ({bmp.bits} bits, method {bmp.compression}): "
            "save it as PNG"
        )
    rows = np.frombuffer(data, np.uint8, bmp.row_bytes * bmp.height, bmp.pixels)
    rows = rows.reshape(bmp.height, bmp.row_bytes)[:: 1 if bmp.top_down else -1]
    if bmp.masks:
        return _masked(rows, bmp)
    if bmp.bits == 24:
        blue_first = np.ascontiguousarray(rows[:, : 3 * bmp.width]).reshape(bmp.height, bmp.width, 3)
        return cast("NDArray[np.uint8]", cv2.cvtColor(blue_first, cv2.COLOR_BGR2RGB))
    return _through_palette(data, rows, bmp, name)


def _bmp(data: bytes) -> _Bmp | None:
    """Read the headers; None if they are not all there or make no sense."""
    if len(data) < 26:
        return None
    pixels, size = struct.unpack_from("<II", data, 10)
    if size == _CORE_HEADER:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression, colours, each = _PLAIN, 0, 3
    elif size >= 40 and len(data) >= 54:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        colours, each = struct.unpack_from("<I", data, 46)[0], 4
    else:
        return None
    if width < 1 or height == 0 or bits == 0:
        return None
    masks: tuple[int, ...] = ()
    start = 14 + size
    if bits in (16, 32):
        masks = _MASKS_OF_16_BITS if bits == 16 else _MASKS_OF_32_BITS
        if compression in (_MASKS, _MASKS_WITH_OPACITY):
            count = 4 if size >= 56 or compression == _MASKS_WITH_OPACITY else 3
            if len(data) < 54 + 4 * count:
                return None
            masks = (*struct.unpack_from(f"<{count}I", data, 54), 0)[:4]
    in_palette = colours if 0 < colours <= 1 << min(bits, 8) else 1 << min(bits, 8)
    return _Bmp(
        width=width,
        height=abs(height),
        top_down=height < 0,
        bits=bits,
        compression=compression,
        masks=masks,
        palette=(start, in_palette, each),
        pixels=pixels,
    )


def _masked(rows: NDArray[np.uint8], bmp: _Bmp) -> NDArray[np.uint8]:
    values = np.ascontiguousarray(rows).view(f"<u{bmp.bits // 8}")[:, : bmp.width]
    red, green, blue, opacity = (_channel(values, mask) for mask in bmp.masks)
    rgb = np.stack([red, green, blue], axis=2)
    # All of it transparent is what programs write that know nothing of opacity.
    return blend_onto_white(rgb, opacity) if bmp.masks[3] and opacity.any() else rgb


def _channel(values: NDArray[Any], mask: int) -> NDArray[np.uint8]:
    """Take the bits of a mask and spread them over 0 to 255."""
    mask &= (1 << 8 * values.itemsize) - 1
    if mask == 0:
        return np.zeros(values.shape, dtype=np.uint8)
    shift = (mask & -mask).bit_length() - 1
    extra = max((mask >> shift).bit_length() - 8, 0)  # more than 8 bits are cut to them
    top = mask >> shift + extra
    return to_8_bits((values >> shift + extra & top).astype(np.uint8), top)


def _through_palette(data: bytes, rows: NDArray[np.uint8], bmp: _Bmp, name: str) -> NDArray[np.uint8]:
    palette = _palette(data, bmp, name)
    single = np.unpackbits(rows, axis=1)[:, : bmp.width * bmp.bits].reshape(bmp.height, bmp.width, bmp.bits)
    indices = np.packbits(single, axis=2)[..., 0] >> (8 - bmp.bits)
    return cast("NDArray[np.uint8]", palette[indices])


def _palette(data: bytes, bmp: _Bmp, name: str) -> NDArray[np.uint8]:
    """Return (256, 3) RGB; colours that there are none of are black."""
    start, count, each = bmp.palette
    if start + count * each > len(data):
        raise ImageError(f"image '{name}' is damaged: its palette is not all there")
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[:count] = np.frombuffer(data, np.uint8, count * each, start).reshape(count, each)[:, 2::-1]
    return palette


def _from_runs(data: bytes, bmp: _Bmp, name: str) -> NDArray[np.uint8]:
    palette = _palette(data, bmp, name)
    indices = _unpacked(data, bmp)
    if indices is None:
        raise ImageError(truncated(name))
    image = np.empty((bmp.height, bmp.width, 3), dtype=np.uint8)
    for y, row in enumerate(indices if bmp.top_down else indices[::-1]):
        image[y] = palette[row]
    return image


def _unpacked(data: bytes, bmp: _Bmp) -> NDArray[np.uint8] | None:
    """Unpack run lengths to indices (H, W), in the order of the file; None if they end early.

    Pixels that they step over are 0.  Each pair of bytes is a run, or after a 0 what else there is to do.
    """
    indices = np.zeros((bmp.height, bmp.width), dtype=np.uint8)
    x, y, position = 0, 0, bmp.pixels
    while y < bmp.height:
        if position + 2 > len(data):
            return indices if (x, y) == (bmp.width, bmp.height - 1) else None
        count, what = data[position], data[position + 1]
        position += 2
        if count:
            run = bytes([what]) if bmp.bits == 8 else bytes([what >> 4, what & 15])
            x = _put(indices[y], x, (run * count)[:count])
        elif what == _END_OF_ROW:
            x, y = 0, y + 1
        elif what == _END:
            break
        elif what == _STEP:
            right, down = (*data[position : position + 2], 0, 0)[:2]
            x, y, position = min(x + right, bmp.width), y + down, position + 2
        else:
            size = (what * bmp.bits + 7) // 8
            literal = data[position : position + size]
            if bmp.bits == 4:
                literal = bytes(half for byte in literal for half in (byte >> 4, byte & 15))
            x = _put(indices[y], x, literal[:what])
            position += size + size % 2
    return indices


def _put(row: NDArray[np.uint8], x: int, values: bytes) -> int:
    """Put values into a row from `x` on, as far as it goes, and return where they end."""
    end = min(x + len(values), len(row))
    row[x:end] = np.frombuffer(values, dtype=np.uint8, count=end - x)
    return end


@dataclass(frozen=True, kw_only=True)
class _Netpbm:
    """What the head of a Netpbm file says."""

    magic: bytes
    width: int
    height: int
    channels: int
    top: int
    """The largest value, which is white."""
    pixels: int
    """Where they begin."""

    @property
    def size(self) -> int:
        """Bytes of the pixels; at the least, where they are written as text."""
        if self.magic == b"P4":
            return (self.width + 7) // 8 * self.height
        values = self.width * self.height * self.channels
        return values * (1 if self.top < 256 else 2)


def pnm_header(data: bytes) -> Header:
    """Read the head, and whether all values are there."""
    head = _netpbm(data)
    if head is None:
        return Header(format="pnm", height=0, width=0, complete=False)
    if head.magic in (b"P1", b"P2", b"P3"):
        complete = len(_numbers(data, head)) >= head.width * head.height * head.channels
    else:
        complete = len(data) >= head.pixels + head.size
    return Header(format="pnm", height=head.height, width=head.width, complete=complete)


def decode_pnm(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode PBM, PGM, PPM or PAM as uint8 (H, W, 3) RGB on white.  Raises ImageError for no picture."""
    head = _netpbm(data)
    if head is None or not 1 <= head.channels <= 4 or not 1 <= head.top <= 65535:
        raise ImageError(f"image '{name}' is damaged: its head is none of PBM, PGM, PPM or PAM")
    values = _values(data, head)
    eight = to_8_bits(values.reshape(head.height, head.width, head.channels), head.top)
    rgb = np.repeat(eight[..., :1], 3, axis=2) if head.channels < 3 else eight[..., :3]
    if head.channels in (2, 4):
        return blend_onto_white(rgb, eight[..., -1])
    return np.require(rgb, requirements=["C", "W"])


def _values(data: bytes, head: _Netpbm) -> NDArray[Any]:
    count = head.width * head.height * head.channels
    if head.magic == b"P4":
        rows = np.frombuffer(data, np.uint8, head.size, head.pixels).reshape(head.height, -1)
        return 1 - np.unpackbits(rows, axis=1)[:, : head.width]
    if head.magic in (b"P1", b"P2", b"P3"):
        values = _numbers(data, head)[:count]
        return 1 - values.clip(0, 1) if head.magic == b"P1" else values
    return np.frombuffer(data, np.uint8 if head.top < 256 else ">u2", count, head.pixels)


def _numbers(data: bytes, head: _Netpbm) -> NDArray[np.int64]:
    """Return values that are written as text, up to what is no number; those of PBM need nothing between."""
    text = re.sub(rb"#[^\n\r]*", b"", data[head.pixels :])
    if head.magic == b"P1":
        signs = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - ord("0")
        return cast("NDArray[np.int64]", signs[(signs == 0) | (signs == 1)])
    numbers = re.match(rb"[\d\s]*", text)
    assert numbers is not None, "it matches nothing, too"
    return np.fromstring(numbers[0], dtype=np.int64, sep=" ") if numbers[0].strip() else np.zeros(0, np.int64)


def _netpbm(data: bytes) -> _Netpbm | None:
    """Read the head; None if it is not all there."""
    magic = data[:2]
    if magic == b"P7":
        return _pam(data)
    fields = 2 if magic in (b"P1", b"P4") else 3
    between = rb"(?:\s|#[^\n\r]*[\n\r])+"
    match = re.match(magic + (between + rb"(\d{1,9})") * fields + rb"(?:#[^\n\r]*[\n\r]|\s)", data[:65536])
    if match is None:
        return None
    numbers = [int(number) for number in match.groups()]
    return _Netpbm(
        magic=magic,
        width=numbers[0],
        height=numbers[1],
        channels=3 if magic in (b"P3", b"P6") else 1,
        top=numbers[2] if fields == 3 else 1,
        pixels=match.end(),
    )


def _pam(data: bytes) -> _Netpbm | None:
    end = data.find(b"ENDHDR\n", 0, 65536)
    said = dict(
        re.findall(rb"^(WIDTH|HEIGHT|DEPTH|MAXVAL)\s+(\d{1,9})\s*$", data[: max(end, 0)], re.MULTILINE)
    )
    if len(said) != 4:
        return None
    return _Netpbm(
        magic=b"P7",
        width=int(said[b"WIDTH"]),
        height=int(said[b"HEIGHT"]),
        channels=int(said[b"DEPTH"]),
        top=int(said[b"MAXVAL"]),
        pixels=end + len(b"ENDHDR\n"),
    )
