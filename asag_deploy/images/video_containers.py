"""Video files by their own structure: which container a file is, and whether it goes on to its end.

A container says how long its parts are.  A file that ends before a part does was cut: by a copy or download
that broke off, or a recorder that was stopped hard.  Where a container says nothing (raw streams, transport
streams between packets), nothing is claimed.
"""

from __future__ import annotations

import mmap
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from struct import unpack_from
from typing import Literal

Container = Literal[
    "mp4",
    "matroska",
    "avi",
    "flv",
    "mpegts",
    "mpegps",
    "mpeges",
    "asf",
    "ogg",
    "mxf",
    "y4m",
    "ivf",
    "dv",
    "other",
]
Condition = Literal["whole", "cut", "damaged"]
Bytes = bytes | mmap.mmap

_STILL_BRANDS = frozenset(b"avif avis heic heix heim heis hevc hevx mif1 msf1 crx".split())
"""Images that lie in the boxes of an MP4 file."""
_SOUND_BRANDS = frozenset((b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B "))
_PICTURES_IN_OGG = rb"\x80theora|BBCD\x00|OVP80|\x01video"
"""Theora, Dirac, VP8, OGM: how the first page of such a stream begins; these pages come before all others."""
_ASF_HEADER = bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C")
_ASF_FILE = bytes.fromhex("A1DCAB8C47A9CF118EE400C00C205365")
_MXF_KEY = bytes.fromhex("060E2B34")
_TS_SIZES = (188, 192, 204)
_HEAD = 4096
_PACK = b"\x00\x00\x01\xba"
_BEGIN_DV_BLOCKS = bytes(byte for byte in range(256) if byte & 0x10)
_JPEG = b"\xff\xd8\xff"
_PARTS_OF_JPEG = rb"(\r?\n)?--.{0,500}image/jpeg"
"""What a camera sends to browsers, kept as it came: images between lines of a form."""
MJPEG_SUFFIXES = (".mjpeg", ".mjpg")


def container_of(file: Path) -> Container | None:
    """Tell by its first bytes which container a file is; None if it is no video, or cannot be read."""
    try:
        with file.open("rb") as opened:
            return container_of_bytes(opened.read(_HEAD))
    except OSError:
        return None


def holds_pictures(file: Path) -> bool:
    """Tell by its first bytes whether a file is a video, and not only sound in a video's container."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
    except OSError:
        return False
    container = container_of_bytes(head)
    if container == "ogg":
        return re.search(_PICTURES_IN_OGG, head) is not None
    return container is not None and not (container == "mp4" and head[8:12] in _SOUND_BRANDS)


def container_of_bytes(head: bytes) -> Container | None:
    """Tell which container a file is that begins with these bytes (some hundreds at least)."""
    for container, signature in _SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            return container
    if head[4:8] == b"ftyp":
        return None if head[8:12].strip() in _STILL_BRANDS else "mp4"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"pnot"):
        return "mp4"
    if _ts_layout(head) is not None:
        return "mpegts"
    return None


def condition(file: Path) -> Condition:
    """Tell whether a video file ends before its own structure does, or has a hole in that.

    `whole` where the container does not say, and for a file that is no video.
    """
    with file.open("rb") as opened:
        if not (head := opened.read(_HEAD)):
            return "whole"
        is_mjpeg = head.startswith(_JPEG) or re.match(_PARTS_OF_JPEG, head, re.DOTALL) is not None
        check = _mjpeg_condition if is_mjpeg else _CHECKS.get(container_of_bytes(head) or "other")
        if check is None:
            return "whole"
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return check(data)
            except (struct.error, IndexError, OverflowError):  # a header that ends early, or makes no sense
                return "cut"


def list_condition(file: Path) -> Condition:
    """Tell whether the parts that a playlist names are there, as far as they are files here.

    A list of other lists, of which one is taken, names none.
    """
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    if not any(line.startswith("#EXTINF") for line in lines):
        return "whole"
    parts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    are_there = [":" in part or "?" in part or _holds_something(file.parent / part) for part in parts]
    if all(are_there):
        return "whole"
    return "damaged" if any(are_there[are_there.index(False) :]) else "cut"


def _holds_something(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def is_row_of_jpegs(file: Path) -> bool:
    """Tell by name and first bytes whether a file is a video of JPEG images one behind the other."""
    if file.suffix.lower() not in MJPEG_SUFFIXES:
        return False
    with file.open("rb") as opened:
        return opened.read(len(_JPEG)) == _JPEG


def whole_mp4(file: Path) -> int:
    """Return how many bytes of an MP4 file its whole boxes have, without a `moof` that misses its `mdat`."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        whole = 0
        for kind, end in _boxes(data):
            if end > len(data):
                break
            if kind != b"moof":
                whole = end
        return whole


_SIGNATURES: dict[Container, bytes] = {
    "matroska": rb"\x1a\x45\xdf\xa3",
    "avi": rb"(RIFF....AVI |ON2 ....ON2f)",
    "flv": rb"FLV[\x01-\x05]",
    "mpegps": rb"\x00\x00\x01\xba",
    "mpeges": rb"\x00\x00\x01[\xb3\xb0\xb5]",
    "asf": re.escape(_ASF_HEADER),
    "ogg": rb"OggS\x00",
    "mxf": re.escape(_MXF_KEY),
    "y4m": rb"YUV4MPEG2 ",
    "ivf": rb"DKIF",
    "dv": rb"\x1f\x07\x00[\x3f\xbf]",
    # RealMedia, NUT, raw H.264 and HEVC, WTV, GXF, Bink and Smacker
    "other": rb"(\.RMF|nut/multimedia|\x00\x00(\x00\x01|\x01)([\x09\x27\x67]|[\x40\x46]\x01)"
    rb"|\xb7\xd8\x00\x20\x37\x49\xda\x11|\x00\x00\x00\x00\x01\xbc|BIK[a-i]|SMK[24])",
}


def _cut_if(is_cut: bool) -> Condition:
    return "cut" if is_cut else "whole"


def _boxes(data: Bytes) -> list[tuple[bytes, int]]:
    """Return the kind of each box of an MP4 file, and where it says that it ends."""
    found, position = [], 0
    while position + 8 <= len(data):
        size, kind = unpack_from(">I4s", data, position)
        if size == 1 and position + 16 <= len(data):
            (size,) = unpack_from(">Q", data, position + 8)
        elif size == 0:
            size = len(data) - position
        if size < 8 or not _is_name(kind.replace(b"\xa9", b"c")):
            break  # padding, or what some other program has put behind
        position += size
        found.append((kind, position))
    return found


_PARTS_OF_MP4 = frozenset(
    b"ftyp styp moov moof mdat free skip wide pnot udta uuid meta mfra sidx ssix prft emsg".split()
)


def _mp4_condition(data: Bytes) -> Condition:
    boxes = _boxes(data)
    if not boxes:
        return "whole"
    kinds = {kind for kind, end in boxes if end <= len(data)}
    last, end = boxes[-1]
    if {b"moov", b"mdat"} <= kinds and last not in _PARTS_OF_MP4:
        return "whole"  # what comes behind is another program's
    fragment = last == b"moof"  # its pictures come next
    # A box begins with its length, of which the first byte is 0.
    begins_another = 0 < len(data) - end < 8 and data[end] == 0 and any(data[end : len(data)])
    return _cut_if(end > len(data) or fragment or begins_another)


def _ebml_number(data: Bytes, position: int, keep_marker: bool) -> tuple[int | None, int]:
    """Read an EBML number and return it (None: unknown, or beyond the end) with the place behind it."""
    if position >= len(data) or data[position] == 0:
        return None, len(data) + 1
    length = 9 - data[position].bit_length()
    raw = data[position : position + length]
    if len(raw) < length:
        return None, len(data) + 1
    number = int.from_bytes(raw, "big")
    marker = 1 << (7 * length)
    if keep_marker:
        return number, position + length
    return (None if number == 2 * marker - 1 else number - marker), position + length


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675


def _matroska_condition(data: Bytes) -> Condition:
    """Go from element to element, into segments and clusters, whose sizes a live recorder leaves open."""
    position, ends, is_closed = 0, [len(data)], False
    while position < len(data):
        while position >= ends[-1] and len(ends) > 1:
            ends.pop()
        if is_closed and len(ends) == 1:
            return "whole"  # what comes behind is another program's
        kind, after = _ebml_number(data, position, keep_marker=True)
        size, after = _ebml_number(data, after, keep_marker=False)
        if after > len(data):
            if data[position]:
                return "cut"
            # No element begins with a zero: something was lost there, or all that follows is padding, which
            # no segment has that says how long it is.
            if any(data[position : position + _HEAD]):
                return "damaged"
            return "cut" if is_closed else "whole"
        if kind in (_SEGMENT, _CLUSTER):
            if size is not None and after + size > len(data):
                return "cut"
            ends.append(ends[-1] if size is None else min(after + size, ends[-1]))
            is_closed |= kind == _SEGMENT and size is not None
            position = after
        elif size is None:
            return "damaged"
        else:
            position = after + size
            if position > ends[-1]:
                return "cut" if ends[-1] == len(data) else "damaged"
    return "whole"


def _avi_condition(data: Bytes) -> Condition:
    """Compare the sizes of RIFF parts with the file, and go through the pictures in them.

    A recorder that was stopped leaves zeros for sizes.
    """
    position, is_damaged = 0, False
    while position + 12 <= len(data) and data[position : position + 4] == b"RIFF":
        (size,) = unpack_from("<I", data, position + 4)
        movie = data.find(b"movi", position)
        inner = unpack_from("<I", data, movie - 4)[0] if movie > 0 else None
        is_damaged = is_damaged or (inner is None and position == 0)
        if size == 0 or inner in (0, 4):
            return "cut"
        if inner is not None and inner < 0x7FFFFFFF:
            if movie + inner > len(data) + 1:
                return "cut"
            end = movie + inner
            last = _after_chunks(data, movie + 4, end)
            if end - last >= 8:
                behind = data[max(last, end - _HEAD) : end + 8]  # the index, if the part goes on there
                if any(data[last : min(end, last + _HEAD)]):
                    is_damaged = True
                elif end <= position + size and not any(behind):
                    return "cut"  # room that was made for what never came
        position += 8 + size + size % 2
    if position > len(data) + 16 and position < 0x7FFFFFFF:
        return "cut"
    return "damaged" if is_damaged else "whole"


def _after_chunks(data: Bytes, position: int, end: int) -> int:
    """Go through chunks, each with a name and a length; return the place behind the last, `end` at most."""
    while position + 8 <= end:
        if not _is_name(data[position : position + 4]):
            if not _is_name(data[position - 1 : position + 3]):
                return position
            position -= 1  # some programs leave out the byte that makes a length even
        (size,) = unpack_from("<I", data, position + 4)
        if data[position : position + 4] != b"LIST" and position + size > end + 8:
            return position
        position += 12 if data[position : position + 4] == b"LIST" else 8 + size + size % 2
    return position


def _is_name(letters: bytes) -> bool:
    return all(0x20 <= letter < 0x7F for letter in letters)


_FLV_TAGS = (8, 9, 15, 18)


def _flv_condition(data: Bytes) -> Condition:
    """Go from tag to tag; behind each stands how long it was."""
    position = int.from_bytes(data[5:9], "big") + 4
    while position + 11 <= len(data):
        if data[position] & 0x1F not in _FLV_TAGS:
            if position >= _flv_length(data):
                return "damaged" if _has_flv_tag(data, position) else "whole"
            return "damaged" if any(data[position : position + _HEAD]) else "cut"
        position += 11 + int.from_bytes(data[position + 1 : position + 4], "big") + 4
    begins_another = position < len(data) and data[position] & 0x1F in _FLV_TAGS
    return _cut_if(len(data) < position - 4 or begins_another)


def _flv_length(data: Bytes) -> int:
    """Return how many bytes a file says it has; 0 if it says nothing."""
    said = re.search(rb"\x00\x08filesize\x00(.{8})", data[: 1 << 16], re.DOTALL)
    length: float = unpack_from(">d", said[1])[0] if said else 0.0
    return int(length) if 0 < length < 2**63 else 0


def _has_flv_tag(data: Bytes, position: int) -> bool:
    """Tell whether another whole tag comes behind this place."""
    for match in re.finditer(rb"[\x08\x09\x0f\x12].{7}\x00\x00\x00", data[position:], re.DOTALL):
        start = position + match.start()
        length = 11 + int.from_bytes(data[start + 1 : start + 4], "big")
        if data[start + length : start + length + 4] == length.to_bytes(4, "big"):
            return True
    return False


def _ts_layout(head: Bytes) -> tuple[int, int] | None:
    """Return where transport packets begin and how long they are, if these are such."""
    for size in _TS_SIZES:
        for start in range(min(size, len(head))):
            places = range(start, min(len(head), start + 5 * size), size)
            if len(places) >= 2 and all(_begins_packet(head, place) for place in places):
                return start, size
            if start == 4 and size == 192:
                break
    return None


def _begins_packet(head: Bytes, place: int) -> bool:
    """Tell whether a transport packet begins here, whose fourth byte says what follows: never nothing."""
    return head[place] == 0x47 and (place + 3 >= len(head) or head[place + 3] & 0x30 != 0)


def _mpegts_condition(data: Bytes) -> Condition:
    """Tell whether the last packet is there in part only, or packets between are none."""
    layout = _ts_layout(data[:_HEAD])
    if layout is None:
        return "whole"
    start, size = layout
    starts = data[start::size]
    count, rest = divmod(len(data) - (start - 4 if size == 192 and start >= 4 else start), size)
    if starts[:count].rstrip(b"\x00").strip(b"\x47"):
        return "damaged"
    return _cut_if(rest > 0 and (len(starts) == count or starts[count] == 0x47))


def _after_zeros(data: Bytes, position: int) -> int:
    """Step over padding."""
    found = re.compile(rb"[^\x00]").search(data, position)
    return len(data) if found is None else found.start()


def _mpegps_condition(data: Bytes) -> Condition:
    position = 0
    while position + 6 <= len(data):
        if data[position : position + 3] != b"\x00\x00\x01":
            end = _after_zeros(data, position)
            if data[end - 2 : end + 1] == b"\x00\x00\x01" and end - 2 > position:
                position = end - 2
                continue
            return "damaged" if data.find(_PACK, position) >= 0 else "whole"
        kind = data[position + 3]
        if kind == 0xB9:
            return "whole"
        if kind == 0xBA:
            if position + 14 > len(data):
                return "cut"
            is_mpeg2 = data[position + 4] >> 6 == 1
            position += 14 + (data[position + 13] & 7) if is_mpeg2 else 12
        elif kind >= 0xBB:
            length = int.from_bytes(data[position + 4 : position + 6], "big")
            if length == 0:
                return "whole"  # where it ends is not said
            position += 6 + length
        else:
            return "whole"
    rest = data[position:]
    begins_another = len(rest) in (1, 2, 3, 5) or rest != b"\x00\x00\x01\xb9"
    return _cut_if(position > len(data) or (begins_another and any(rest) and not any(rest[:2])))


def _asf_condition(data: Bytes) -> Condition:
    header_size: int = unpack_from("<Q", data, 16)[0]
    place = data.find(_ASF_FILE, 0, header_size)
    if place < 0 or place + 104 > len(data):
        return _cut_if(len(data) < header_size)
    is_broadcast = unpack_from("<I", data, place + 88)[0] & 1
    if is_broadcast:
        return "whole"
    if header_size + 50 > len(data):
        return "cut"
    (data_size,) = unpack_from("<Q", data, header_size + 16)
    if header_size + data_size > len(data):
        return "cut"
    (packets,) = unpack_from("<Q", data, header_size + 40)
    (packet_size,) = unpack_from("<I", data, place + 92)
    if packets > 0 and packet_size > 0 and data[header_size + 50] & 0x80:
        starts = data[header_size + 50 :: packet_size][:packets]
        if min(starts.rstrip(b"\x00"), default=0x80) < 0x80:
            return "damaged"
    last = header_size + 50 + max(packets - 1, 0) * packet_size
    return _cut_if(packets > 0 and not any(data[last : last + packet_size]))


def _ogg_condition(data: Bytes) -> Condition:
    """Go from page to page, which are numbered; the last one of each stream says so."""
    position, next_page = 0, dict[bytes, int]()
    while position < len(data):
        if data[position : position + 4] != b"OggS"[: len(data) - position]:
            # Where every stream has ended, it is another program's.
            return "damaged" if next_page and any(data[position : position + _HEAD]) else "whole"
        if position + 27 > len(data):
            return "cut"
        flags, serial = data[position + 5], data[position + 14 : position + 18]
        (number,) = unpack_from("<I", data, position + 18)
        if next_page.get(serial, number) != number and not flags & 2:
            return "damaged"
        next_page[serial] = number + 1
        if flags & 4:
            del next_page[serial]
        lengths = data[position + 27 : position + 27 + data[position + 26]]
        start, position = position, position + 27 + data[position + 26] + sum(lengths)
        if position <= len(data) and _ogg_sum(data[start:position]) != data[start + 22 : start + 26]:
            return "damaged"
    return _cut_if(position > len(data) or bool(next_page))


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_sum(page: bytes) -> bytes:
    """Return the check sum of a page, which is zlib's of mirrored bits, from 0 on."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
    value = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return value.to_bytes(4, "big").translate(_MIRRORED)


def _mxf_condition(data: Bytes) -> Condition:
    position = 0
    while position + 17 <= len(data):
        if data[position : position + 4] != _MXF_KEY:
            return "damaged" if data.find(_MXF_KEY, position) >= 0 else "whole"
        length = data[position + 16]
        position += 17
        if length & 0x80:
            digits = length & 0x7F
            length = int.from_bytes(data[position : position + digits], "big")
            position += digits
        position += length
    return _cut_if(position > len(data) or data[position : position + 2] == _MXF_KEY[:2])


def _y4m_condition(data: Bytes) -> Condition:
    """Tell whether frames, all of the length of the first, fill the file."""
    first = data.find(b"FRAME", 0, _HEAD)
    header = re.match(rb"YUV4MPEG2 [^\n]*?W(\d+) H(\d+)[^\n]*", data[:_HEAD])
    if first < 0 or header is None:
        return "cut"
    colours = re.search(rb" C(\w+)", header.group())
    size = _y4m_frame(int(header[1]), int(header[2]), colours[1].decode() if colours else "420")
    if size is None:
        return "whole"
    position = first
    while position < len(data):
        if data[position : position + 5] != b"FRAME"[: len(data) - position]:
            return "whole"
        line = data.find(b"\n", position, position + _HEAD)
        if line < 0:
            return "cut"
        position = line + 1 + size
    return _cut_if(position > len(data))


def _y4m_frame(width: int, height: int, colours: str) -> int | None:
    """Return the bytes of a picture, or None for a way to store colours that is not known here."""
    half_width, half_height = (width + 1) // 2, (height + 1) // 2
    parts = {
        "420": 2 * half_width * half_height,
        "411": 2 * ((width + 3) // 4) * height,
        "422": 2 * half_width * height,
        "444": 2 * width * height,
        "mono": 0,
    }
    family = next((name for name in parts if colours.startswith(name)), None)
    if family is None or colours == "444alpha":
        return None
    samples = width * height + parts[family]
    deep = re.fullmatch(r"(?:\d{3}p|mono)(9|10|12|14|16)", colours)
    return samples * (2 if deep else 1)


def _ivf_condition(data: Bytes) -> Condition:
    position = unpack_from("<H", data, 6)[0] if len(data) >= 32 else 32
    left = unpack_from("<I", data, 24)[0] or -1  # some programs leave the number of frames open
    while position + 12 <= len(data) and left:
        position += 12 + unpack_from("<I", data, position)[0]
        left -= 1
    return _cut_if(position > len(data) or (position != len(data) and left != 0))


def _dv_condition(data: Bytes) -> Condition:
    """Tell whether whole frames fill the file; those of 50 megabits are twice as long.

    They consist of blocks of 80 bytes, the first of which never lacks one bit.
    """
    if data[::80].translate(None, _BEGIN_DV_BLOCKS):
        return "damaged"
    return _cut_if(len(data) % (144_000 if data[3] & 0x80 else 120_000) != 0)


def _mjpeg_condition(data: Bytes) -> Condition:
    """Tell whether the last of a row of JPEG images lacks its end marker."""
    return _cut_if(data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xd8\xff"))


_CHECKS: dict[Container, Callable[[Bytes], Condition]] = {
    "mp4": _mp4_condition,
    "matroska": _matroska_condition,
    "avi": _avi_condition,
    "flv": _flv_condition,
    "mpegts": _mpegts_condition,
    "mpegps": _mpegps_condition,
    "asf": _asf_condition,
    "ogg": _ogg_condition,
    "mxf": _mxf_condition,
    "y4m": _y4m_condition,
    "ivf": _ivf_condition,
    "dv": _dv_condition,
}
