"""Which format the bytes of an image file are in, and what its header says."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from asag_deploy.images.bitmaps import bmp_header, pnm_header
from asag_deploy.images.containers import (
    PNG_SIGNATURE,
    avif_header,
    jpeg_header,
    png_header,
    webp_header,
)
from asag_deploy.images.gif import gif_header
from asag_deploy.images.header import Header
from asag_deploy.images.jpeg2000 import CODESTREAM, jpeg2000_header
from asag_deploy.images.tiff import tiff_header

_LONGEST_MAGIC = 64
"""Bytes; AVIF lists what it is compatible with after 16 of them."""
_SUN = b"\x59\xa6\x6a\x95"
_UNREAD = (
    (b"#?R", "Radiance HDR"),
    (b"PF\n", "PFM"),
    (b"Pf\n", "PFM"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML, perhaps SVG,"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"\0\0\1\0", "icon (ICO)"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"\x0a\x05\x01\x08", "PCX"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def image_header(data: Any) -> Header | None:
    """Read the header of an image file, given as bytes or a memory map; None for another format."""
    read = _reader(bytes(data[:_LONGEST_MAGIC]))
    if read is None:
        return None
    try:
        return read(data)
    except (struct.error, IndexError):
        return Header(format="bmp", height=0, width=0, complete=False)


def unread_format(data: bytes) -> str | None:
    """Return what the format is called if it is one that is known but not read."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIC"
    return next((name for magic, name in _UNREAD if data.startswith(magic)), None)


def _reader(start: bytes) -> Callable[[Any], Header] | None:
    for magics, reader in _READERS:
        if start.startswith(magics):
            return reader
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return webp_header
    if start[4:8] == b"ftyp" and (start[8:12] in (b"avif", b"avis") or b"avif" in start):
        return avif_header
    return None


def _sun_header(data: Any) -> Header:
    width, height, _, size, _, _, colours = struct.unpack_from(">7I", data, 4)
    return Header(format="sun", height=height, width=width, complete=len(data) >= 32 + colours + size)


_READERS: tuple[tuple[bytes | tuple[bytes, ...], Callable[[Any], Header]], ...] = (
    (b"\xff\xd8", jpeg_header),
    (PNG_SIGNATURE, png_header),
    ((b"GIF87a", b"GIF89a"), gif_header),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), tiff_header),
    (b"BM", bmp_header),
    ((CODESTREAM, b"\0\0\0\x0cjP  \r\n\x87\n"), jpeg2000_header),
    (tuple(b"P%d" % digit for digit in range(1, 8)), pnm_header),
    (_SUN, _sun_header),
)
