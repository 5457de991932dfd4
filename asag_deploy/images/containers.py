"""How image files are laid out: size, orientation, frames, and whether all of it is there.

A decoder that is given half a file may fill the rest with grey and say nothing, so that is found out before.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from asag_deploy.images.header import Header, exif_orientation, stated, xmp_orientation

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HARMLESS = frozenset(b"tEXt zTXt iTXt tIME iCCP pHYs gAMA cHRM sRGB sBIT bKGD hIST sPLT cICP".split())
"""Parts of a PNG that the pixels do not depend on."""
_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""Markers that begin a frame and say its size; those between define tables."""
_XMP_HEADING = b"http://ns.adobe.com/xap/1.0/\0"
_LONGEST_TEXT = 1 << 20
"""Bytes that are unpacked of a text in a PNG at most."""
_BOXES_OF_BOXES = frozenset({b"meta", b"iprp", b"ipco", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"jp2h"})


def jpeg_header(data: Any) -> Header:
    """Read the segments before the first scan, and look for the end of the image behind it.

    They are stepped over, because an embedded thumbnail is a whole JPEG with an end marker of its own; in the
    scan itself the two bytes can mean nothing else.
    """
    height = width = 0
    exif: int | None = None
    xmp: int | None = None
    complete, damage = False, None
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:  # bytes that belong to no segment, which decoders step over
            position = data.find(b"\xff", position)
            if position < 0:
                complete, damage = True, "none of its segments is a picture"
                break
            continue
        if marker == 0xDA:
            complete = data.rfind(b"\xff\xd9") > position
            break
        if marker == 0xFF:
            position += 1  # a fill byte
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2  # a marker without a segment
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        if marker in _JPEG_FRAMES and len(segment) >= 5:
            height, width = struct.unpack_from(">HH", segment, 1)
        elif marker == 0xE1 and segment.startswith(b"Exif\0\0") and exif is None:
            exif = exif_orientation(segment)
        elif marker == 0xE1 and segment.startswith(_XMP_HEADING) and xmp is None:
            xmp = xmp_orientation(segment)
        position += 2 + length
    return Header(
        format="jpeg",
        height=height,
        width=width,
        orientation=stated(exif, xmp),
        complete=complete,
        damage=damage,
    )


def png_header(data: Any) -> Header:
    """Walk through the chunks."""
    height = width = drawn = 0
    declared, complete = 1, False
    exif: int | None = None
    in_text: int | None = None
    frame_open = False
    for kind, start, size, whole in png_chunks(data):
        if not whole:
            break
        if kind == b"IHDR" and size >= 8:
            width, height = struct.unpack_from(">II", data, start)
        elif kind == b"eXIf":
            exif = exif_orientation(data[start : start + size])
        elif kind in _TEXTS and in_text is None:
            in_text = _orientation_in_text(kind, data[start : start + size])
        elif kind == b"acTL" and size >= 4:
            declared = max(1, struct.unpack_from(">I", data, start)[0])
        elif kind == b"fcTL":
            drawn, frame_open = drawn + frame_open, True
        elif kind == b"IEND":
            drawn, complete = drawn + frame_open, True
            break
    whole_frames = min(drawn, declared) if declared > 1 else int(complete)
    return Header(
        format="png",
        height=height,
        width=width,
        orientation=stated(exif, in_text),
        frames=declared,
        whole_frames=whole_frames,
        complete=complete,
    )


_TEXTS = (b"iTXt", b"tEXt", b"zTXt")


def _orientation_in_text(kind: bytes, content: bytes) -> int | None:
    """Return the orientation in XMP, or in EXIF that older programs write as hexadecimal text; else None."""
    keyword, _, rest = content.partition(b"\0")
    if keyword not in (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1"):
        return None
    is_packed = kind == b"zTXt"
    if kind == b"iTXt":  # flag and method of compression, language, translated keyword
        is_packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    elif is_packed:
        rest = rest[1:]
    if is_packed:
        try:
            rest = zlib.decompressobj().decompress(rest, _LONGEST_TEXT)
        except zlib.error:
            return None
    if keyword.startswith(b"XML"):
        return xmp_orientation(rest)
    digits = b"".join(rest.split()[2:])  # after its name and length
    try:
        profile = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return None
    return xmp_orientation(profile) if profile.startswith(_XMP_HEADING) else exif_orientation(profile)


def png_damage(data: bytes) -> str | None:
    """Return which part of a PNG has changed since its check sum was made; None if none has."""
    for kind, start, size, whole in png_chunks(data):
        if whole and kind not in _HARMLESS:
            (stated,) = struct.unpack_from(">I", data, start + size)
            if zlib.crc32(data[start - 4 : start + size]) != stated:
                return f"the check sum of its part {kind.decode('latin-1')} is wrong"
    return None


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk with its length and check sum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_chunks(data: Any) -> Iterator[tuple[bytes, int, int, bool]]:
    """Yield the kind of each chunk, where its content begins, its size, and whether all of it is there.

    What programs put behind the last one is none.
    """
    position = len(PNG_SIGNATURE)
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        yield kind, position + 8, size, position + 12 + size <= len(data)
        if kind == b"IEND":
            return
        position += 12 + size


def webp_header(data: Any) -> Header:
    """Walk through the chunks of the RIFF container."""
    height = width = frames = whole_frames = 0
    exif: int | None = None
    xmp: int | None = None
    complete = len(data) >= 12 and struct.unpack_from("<I", data, 4)[0] + 8 <= len(data)
    for kind, start, size, whole in _riff_chunks(data):
        content = data[start : start + min(size, size if kind in (b"EXIF", b"XMP ") else 4096)]
        if kind == b"VP8X" and len(content) >= 10:
            width, height = (1 + int.from_bytes(content[i : i + 3], "little") for i in (4, 7))
        elif kind == b"VP8 " and not width and len(content) >= 10:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 6))
        elif kind == b"VP8L" and not width and len(content) >= 5:
            bits = int.from_bytes(content[1:5], "little")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif kind == b"ANMF":
            frames, whole_frames = frames + 1, whole_frames + whole
        elif kind == b"EXIF":
            exif = exif_orientation(content)
        elif kind == b"XMP ":
            xmp = xmp_orientation(content)
    return Header(
        format="webp",
        height=height,
        width=width,
        orientation=stated(exif, xmp),
        frames=max(frames if complete else whole_frames, 1),
        whole_frames=whole_frames if frames else int(complete),
        complete=complete,
    )


def webp_whole_part(data: bytes) -> bytes:
    """Return the file with its whole chunks only, and the length that they have."""
    ends = [start + size + size % 2 for _, start, size, whole in _riff_chunks(data) if whole]
    end = min(ends[-1], len(data)) if ends else len(data)
    return data[:4] + struct.pack("<I", end - 8) + data[8:end]


def _riff_chunks(data: Any) -> Iterator[tuple[bytes, int, int, bool]]:
    position = 12
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        yield kind, position + 8, size, position + 8 + size <= len(data)
        position += 8 + size + size % 2


def avif_header(data: Any) -> Header:
    """Walk through the boxes: the picture's properties, or the samples of its track."""
    all_boxes, complete = boxes(data)
    found = {kind: (start, size) for kind, start, size in reversed(all_boxes)}
    height = width = 0
    frames = 1
    if b"ispe" in found:
        width, height = _largest_extent(data, all_boxes)
    if data[8:12] == b"avis" and b"stsz" in found and found[b"stsz"][1] >= 12:
        frames = max(1, struct.unpack_from(">I", data, found[b"stsz"][0] + 8)[0])
    return Header(
        format="avif",
        height=height,
        width=width,
        orientation=_turned_and_mirrored(data, found),
        bits=_av1_bits(data, found),
        frames=frames,
        whole_frames=frames if complete else 0,
        complete=complete,
    )


def _largest_extent(data: Any, all_boxes: list[tuple[bytes, int, int]]) -> tuple[int, int]:
    """Return width and height of the largest picture in the file: opacity and thumbnails are pictures too."""
    sizes = [
        struct.unpack_from(">II", data, start + 4)
        for kind, start, size in all_boxes
        if kind == b"ispe" and size >= 12
    ]
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def _av1_bits(data: Any, found: dict[bytes, tuple[int, int]]) -> int | None:
    """Return the depth that the decoder's configuration states, if it is more than 8 bits."""
    start, size = found.get(b"av1C", (0, 0))
    is_high = size >= 3 and data[start + 2] & 0x40
    return (12 if data[start + 2] & 0x20 else 10) if is_high else None


def _turned_and_mirrored(data: Any, found: dict[bytes, tuple[int, int]]) -> int:
    """Return what rotation and mirroring of a HEIF picture are as an EXIF orientation.

    It is turned anticlockwise first, then mirrored: top to bottom (axis 0) or left to right (axis 1).
    """
    turns = data[found[b"irot"][0]] & 3 if b"irot" in found and found[b"irot"][1] else 0
    mirrored = data[found[b"imir"][0]] & 1 if b"imir" in found and found[b"imir"][1] else None
    return _HEIF_ORIENTATIONS[mirrored][turns]


_HEIF_ORIENTATIONS = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}


def boxes(data: Any) -> tuple[list[tuple[bytes, int, int]], bool]:
    """Return kind, start and size of the content of all boxes, nested ones too, and whether all are there."""
    found: list[tuple[bytes, int, int]] = []
    pending = [(0, len(data), True)]
    complete = True
    while pending:
        position, end, is_top = pending.pop()
        while position + 8 <= end:
            size, kind = struct.unpack_from(">I4s", data, position)
            head = 8
            if size == 1 and position + 16 <= end:
                size, head = struct.unpack_from(">Q", data, position + 8)[0], 16
            elif size == 0:
                size = end - position
            if size < head or position + size > end:
                complete = complete and (not is_top or _has_picture(found))
                break
            found.append((kind, position + head, size - head))
            if kind in _BOXES_OF_BOXES and len(found) < 10_000:
                skipped = 4 if kind == b"meta" else 0
                pending.append((position + head + skipped, position + size, False))
            position += size
        else:
            complete = complete and (not is_top or position == end or _has_picture(found))
    return found, complete


def _has_picture(found: list[tuple[bytes, int, int]]) -> bool:
    """Tell whether a whole picture is among whole boxes, so that what follows is another program's."""
    kinds = {kind for kind, _, _ in found}
    return b"jp2c" in kinds or (b"mdat" in kinds and bool(kinds & {b"meta", b"moov"}))
