"""Files that end early or were changed on the way: refused in every format, never filled up in silence."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asag_deploy.errors import ImageError
from asag_deploy.images.reading import decode_image

_Y, _X = np.mgrid[0:120, 0:160]
_NOISE = np.random.default_rng(0).integers(0, 60, (120, 160, 3))
PICTURE = (np.stack([_X, _Y * 2, 255 - _X], axis=-1) * 0.7 + _NOISE).astype(np.uint8)


def _encode(kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, format=kind, **how)
    return stream.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: _encode("JPEG"),
    "JPEG, progressive": lambda: _encode("JPEG", progressive=True),
    "PNG": lambda: _encode("PNG"),
    "GIF": lambda: _encode("GIF"),
    "WebP": lambda: _encode("WEBP"),
    "WebP, lossless": lambda: _encode("WEBP", lossless=True),
    "AVIF": lambda: _encode("AVIF", speed=9),
    "BMP": lambda: _encode("BMP"),
    "JPEG 2000": lambda: _encode("JPEG2000"),
    "JPEG 2000 without boxes": lambda: _encode("JPEG2000", no_jp2=True),
    "PPM": lambda: _encode("PPM"),
    "TIFF": lambda: _encode("TIFF"),
    "TIFF, LZW": lambda: _encode("TIFF", compression="tiff_lzw"),
    "TIFF, JPEG": lambda: _encode("TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_half_a_file_is_refused(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = FORMATS[kind]()
    decode_image(data, "whole")
    cuts = [5, 9, 13, 20, 33, 60, 200, *range(300, len(data) - 12, len(data) // 25), len(data) - 12]
    for cut in cuts:
        with pytest.raises(ImageError, match=r"truncated|damaged") as raised:
            decode_image(data[:cut], "photo")
        assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", FORMATS)
def test_what_stands_behind_a_whole_image_does_no_harm(kind: str) -> None:
    """Padding of cards and servers, a line's end, the film of a phone's photograph."""
    data = FORMATS[kind]()
    whole = decode_image(data, "whole")
    for behind in (bytes(300), b"\r\n", FORMATS["JPEG"](), struct.pack(">I4s", 9999, b"free")):
        assert (decode_image(data + behind, "longer") == whole).all(), behind[:8]


def _changed(data: bytes, how: str, seed: int) -> bytes:
    """Change a tenth of a file somewhere behind its head."""
    rng = np.random.default_rng(seed)
    length = len(data) // 10
    start = int(rng.integers(len(data) // 4, len(data) * 3 // 4 - length))
    if how == "cut out":
        return data[:start] + data[start + length :]
    middle = bytes(length) if how == "zeroed" else rng.bytes(length).replace(b"\xff", b"\xfe")
    return data[:start] + middle + data[start + length :]


@pytest.mark.parametrize("how", ["zeroed", "scrambled", "cut out"])
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "TIFF, LZW", "TIFF, JPEG", "AVIF"]
)  # WebP and JPEG 2000 have nothing in them that would tell
def test_a_file_that_was_changed_in_the_middle_is_refused(
    kind: str, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = FORMATS[kind]()
    for seed in range(5):
        with pytest.raises(ImageError, match=r"truncated|damaged"):
            decode_image(_changed(data, how, seed), "photo")
    assert capfd.readouterr() == ("", "")


def test_some_bytes_too_many_do_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    """Cameras write them before the end marker, few or as padding."""
    data = _encode("JPEG")
    whole = decode_image(data, "whole")
    for extra in (b"\0", b"\1\2\3", bytes(3000)):
        assert np.array_equal(decode_image(data[:-2] + extra + data[-2:], "padded"), whole)
    assert capfd.readouterr() == ("", "")


def test_each_thread_hears_of_its_own_image(capfd: pytest.CaptureFixture[str]) -> None:
    data = _encode("JPEG")
    files = [data if i % 3 else _changed(data, "zeroed", i) for i in range(60)]

    def is_whole(file: bytes) -> bool:
        try:
            decode_image(file, "photo")
        except ImageError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(is_whole, files)) == [i % 3 != 0 for i in range(60)]
    assert capfd.readouterr() == ("", "")


def _tiff_header(*sizes: tuple[int, int]) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sizes)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(sizes)) + entries + bytes(4)


def _png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + checked


_SIDES = struct.pack(">8I", *[100_000, 100_000, 0, 0] * 2)
HUGE: dict[str, bytes] = {
    "PNG": _png_header(100_000, 100_000),
    "BMP": b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 100_000, 100_000, 1, 24, 0) + bytes(20),
    "PPM": b"P6 100000 100000 255\n",
    "GIF": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
    "JPEG": b"\xff\xd8\xff\xc0\0\x11\x08" + b"\xff\xdc" * 2 + bytes(10) + b"\xff\xda\0\2\xff\xd9",
    "TIFF": _tiff_header((256, 100_000), (257, 100_000), (258, 8), (273, 8), (279, 10)),
    "WebP": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xff" * 6,
    "JPEG 2000": b"\xff\x4f\xff\x51\0\x2f\0\0" + _SIDES + bytes(12),
}


@pytest.mark.parametrize("kind", HUGE)
def test_sizes_that_nobody_has_are_refused_before_memory_is_taken(kind: str) -> None:
    with pytest.raises(ImageError, match=r"has \d+ x \d+ pixels, and at most 536870912 are taken: make it"):
        decode_image(HUGE[kind], kind)


def test_who_decodes_says_how_many_pixels_there_may_be() -> None:
    data = _encode("PNG")
    assert decode_image(data, "a.png", max_pixels=120 * 160).shape == (120, 160, 3)
    with pytest.raises(ImageError, match=r"'a\.png' has 160 x 120 pixels, and at most 19199 are taken"):
        decode_image(data, "a.png", max_pixels=120 * 160 - 1)
