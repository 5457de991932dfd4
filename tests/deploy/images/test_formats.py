"""Every way that formats have to say opacity, palette and depth gives what a viewer shows, on white."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from asag_deploy.errors import ImageError
from asag_deploy.images.reading import decode_image
from support.image_writers import bmp, packed, png, tiff

Pixels = NDArray[np.uint8]

_Y, _X = np.mgrid[0:40, 0:60]
RGB = np.stack([_X * 4, _Y * 6, 255 - _X * 2 - _Y], axis=-1).astype(np.uint8)
GREY = RGB[..., :1]
OPACITY = (np.abs(_X - 30) * 8).clip(0, 255).astype(np.uint8)[..., None]
RGBA = np.concatenate([RGB, OPACITY], axis=2)
GREY_OPACITY = np.concatenate([GREY, OPACITY], axis=2)
TIMES_OPACITY = np.concatenate([(RGB * (OPACITY / 255)).round().astype(np.uint8), OPACITY], axis=2)
CMYK = np.concatenate([255 - RGB, np.full_like(GREY, 40)], axis=2)
PALETTE = np.stack([np.arange(256) * 257, 65535 - np.arange(256) * 200, np.full(256, 30000)]).astype(
    np.uint16
)


def _deep(samples: Pixels) -> NDArray[np.uint16]:
    return samples.astype(np.uint16) * 257


def _on_white(colours: NDArray[Any], opacity: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(colours * (opacity / 255) + 255 * (1 - opacity / 255))


def _grey(samples: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(samples, 3, axis=2)


def _shown(data: bytes) -> NDArray[np.float64]:
    """What Pillow shows, on white."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGBA")).astype(float)
    return _on_white(pixels[..., :3], pixels[..., 3:])


def _difference(found: Pixels, expected: NDArray[Any]) -> float:
    """The largest of any pixel; what is decoded may be written into."""
    assert found.flags.writeable
    assert found.flags.c_contiguous
    return float(np.abs(found.astype(float) - expected).max())


def _through_palette(indices: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(PALETTE.T[indices[..., 0]] / 257)


ON_WHITE = _on_white(RGB, OPACITY)
GREY_ON_WHITE = _on_white(_grey(GREY), OPACITY)
_UNASSOCIATED, _ASSOCIATED, _UNSPECIFIED = {338: [2]}, {338: [1]}, {338: [0]}
_FEW = GREY >> 4
_LIGHT = (GREY > 99).astype(np.uint8)

TIFFS: dict[str, tuple[Callable[[], bytes], NDArray[Any]]] = {
    "unassociated opacity": (lambda: tiff(RGBA, 2, tags=_UNASSOCIATED), ON_WHITE),
    "unassociated opacity, big-endian": (lambda: tiff(RGBA, 2, order=">", tags=_UNASSOCIATED), ON_WHITE),
    "associated opacity": (lambda: tiff(TIMES_OPACITY, 2, tags=_ASSOCIATED), ON_WHITE),
    "a fourth sample that says nothing": (lambda: tiff(RGBA, 2, tags=_UNSPECIFIED), RGB),
    "a fourth sample that nothing is said of": (lambda: tiff(RGBA, 2), ON_WHITE),
    "16 bits, unassociated": (lambda: tiff(_deep(RGBA), 2, tags=_UNASSOCIATED), ON_WHITE),
    "16 bits, associated": (lambda: tiff(_deep(TIMES_OPACITY), 2, tags=_ASSOCIATED), ON_WHITE),
    "16 bits in planes, big-endian": (lambda: tiff(_deep(RGB), 2, order=">", planes=True), RGB),
    "opacity in planes": (lambda: tiff(RGBA, 2, planes=True, rows=7, tags=_UNASSOCIATED), ON_WHITE),
    "opacity in compressed tiles": (
        lambda: tiff(RGBA, 2, tile=16, compressed=True, tags=_UNASSOCIATED),
        ON_WHITE,
    ),
    "opacity before another sample": (
        lambda: tiff(np.concatenate([RGBA, GREY], axis=2), 2, tags={338: [2, 0]}),
        ON_WHITE,
    ),
    "grey with opacity": (lambda: tiff(GREY_OPACITY, 1, tags=_UNASSOCIATED), GREY_ON_WHITE),
    "grey of 16 bits with opacity": (
        lambda: tiff(_deep(GREY_OPACITY), 1, tags=_UNASSOCIATED),
        GREY_ON_WHITE,
    ),
    "grey with a sample that says nothing": (lambda: tiff(GREY_OPACITY, 1, tags=_UNSPECIFIED), _grey(GREY)),
    "white is zero": (lambda: tiff(255 - GREY, 0), _grey(GREY)),
    "16 bits, white is zero": (lambda: tiff(65535 - _deep(GREY), 0), _grey(GREY)),
    "12 bits": (lambda: tiff(GREY.astype(np.uint16) * 16, 1, bits=12), _grey(GREY * (16 * 255 / 4095))),
    "12 bits, white is zero": (
        lambda: tiff(4095 - GREY.astype(np.uint16) * 16, 0, bits=12),
        _grey(GREY * (16 * 255 / 4095)),
    ),
    "4 bits": (lambda: tiff(_FEW, 1, bits=4), _grey(_FEW * 17)),
    "2 bits, white is zero": (lambda: tiff(3 - (GREY >> 6), 0, bits=2), _grey((GREY >> 6) * 85)),
    "1 bit, white is zero": (
        lambda: tiff((GREY < 99).astype(np.uint8), 0, bits=1),
        _grey((GREY >= 99) * 255),
    ),
    "a palette": (lambda: tiff(GREY, 3, tags={320: PALETTE.reshape(-1).tolist()}), _through_palette(GREY)),
    "a palette of 8 bits": (
        lambda: tiff(GREY, 3, tags={320: (PALETTE // 257).reshape(-1).tolist()}),
        _through_palette(GREY),
    ),
    "a palette of two colours": (
        lambda: tiff(
            (GREY > 99).astype(np.uint8), 3, bits=1, tags={320: PALETTE[:, [0, 200]].reshape(-1).tolist()}
        ),
        _through_palette((GREY > 99) * 200),
    ),
    "a palette with opacity": (
        lambda: tiff(GREY_OPACITY, 3, tags={320: PALETTE.reshape(-1).tolist(), **_UNASSOCIATED}),
        _on_white(_through_palette(GREY), OPACITY),
    ),
    "CMYK": (lambda: tiff(CMYK, 5), RGB * (215 / 255)),
    "CMYK of 16 bits": (lambda: tiff(_deep(CMYK), 5), RGB * (215 / 255)),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiff(kind: str) -> None:
    write, expected = TIFFS[kind]
    assert _difference(decode_image(write(), kind), expected) <= 1


@pytest.mark.parametrize(
    ("compression", "mode"),
    [
        (compression, mode)
        for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", None)
        for mode in ("RGB", "RGBA", "LA", "L", "CMYK")
        if (compression, mode) != ("jpeg", "LA")  # libtiff writes no such file
    ],
)
def test_compressed_tiff(compression: str | None, mode: str) -> None:
    stream = io.BytesIO()
    picture = Image.fromarray(RGBA, "RGBA").convert(mode)
    differences = {317: 2} if compression in ("tiff_lzw", "tiff_adobe_deflate") else {}
    picture.save(stream, format="TIFF", compression=compression, tiffinfo=differences)
    assert _difference(decode_image(stream.getvalue(), mode), _shown(stream.getvalue())) <= 1


def test_lab_is_converted_with_the_white_of_paper() -> None:
    """Within what Little CMS gives for colours that sRGB has."""
    soft = (RGB // 4 + 96).astype(np.uint8)
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    stream = io.BytesIO()
    changed = ImageCms.applyTransform(Image.fromarray(soft), lab)
    assert changed is not None
    changed.save(stream, format="TIFF")
    assert _difference(decode_image(stream.getvalue(), "lab").astype(int), soft) <= 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: tiff(RGB.astype(np.float32), 2, tags={339: [3] * 3}), "holds float32 values"),
        (lambda: tiff(RGB.astype(np.float16), 2, tags={339: [3] * 3}), "holds float16 values"),
        (lambda: tiff(RGB.astype(np.int16), 2, tags={339: [2] * 3}), "holds int16 values"),
        (lambda: tiff(RGB.astype(np.uint32), 2), "holds uint32 values"),
        (lambda: tiff(RGB, 2, tags={259: [50000]}), "compressed with Zstandard"),
        (lambda: tiff(GREY_OPACITY, 1, tags={259: [7], **_UNASSOCIATED}), "grey with opacity .* JPEG"),
        (lambda: tiff(RGB, 8, tags={259: [7]}), "Lab colours compressed with JPEG"),
        (lambda: tiff(GREY, 32803), "is a camera's raw file"),
        (lambda: tiff(GREY, 1, tags={254: [1], 330: [8]}), "is a camera's raw file"),
        (lambda: tiff(RGB, 10), "colours of an unusual kind"),
        (lambda: tiff(GREY, 3), "its palette is missing"),
        (lambda: tiff(GREY, 2), "its pixels have 1 of 3 samples"),
        (lambda: b"\0\0\0\x20ftypheic" + bytes(20), "is a HEIC file"),
        (lambda: b"#?RADIANCE\n", "is a Radiance HDR file"),
        (lambda: b"8BPS\0\1", "is a Photoshop file"),
        (lambda: b"\x1a\x45\xdf\xa3" + bytes(50), "is a video and no image"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (lambda: b"\n<!DOCTYPE html><html>404", "is a web page"),
    ],
)
def test_what_is_no_picture_for_the_network_is_refused_in_a_sentence(
    data: Callable[[], bytes], said: str
) -> None:
    with pytest.raises(ImageError, match=said) as raised:
        decode_image(data(), "x.tif")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png_with_a_transparent_value(bits: int) -> None:
    samples = (GREY.astype(np.uint16) * 257 >> (16 - bits)).astype(np.uint16)
    key = int(samples[2, 2, 0])
    data = png(samples, bits, 0, {b"tRNS": struct.pack(">H", key)})
    expected = np.where(samples == key, 255, np.round(samples * (255 / (2**bits - 1))))
    assert _difference(decode_image(data, "key"), _grey(expected)) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png_with_opacity(bits: int) -> None:
    colours = bytes(i * 37 % 256 for i in range(3 * 2**bits))
    data = png(GREY >> (8 - bits), bits, 3, {b"PLTE": colours, b"tRNS": bytes([0, 128, 255][: 2**bits])})
    assert _difference(decode_image(data, "palette"), _shown(data)) <= 1


@pytest.mark.parametrize("deep", [False, True])
def test_png_with_opacity_or_a_transparent_colour(deep: bool) -> None:
    bits, samples = (16, _deep(RGBA)) if deep else (8, RGBA)
    assert _difference(decode_image(png(samples, bits, 6), "opacity"), ON_WHITE) <= 1
    grey = _deep(GREY_OPACITY) if deep else GREY_OPACITY
    assert _difference(decode_image(png(grey, bits, 4), "grey"), GREY_ON_WHITE) <= 1
    key = samples[10, 10, :3]
    data = png(samples[..., :3], bits, 2, {b"tRNS": key.astype(">u2").tobytes()})
    expected = np.where((samples[..., :3] == key).all(axis=2, keepdims=True), 255, RGB)
    assert _difference(decode_image(data, "key"), expected) <= 1


_BGRA = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
_BLUE_FIRST = np.ascontiguousarray(RGBA[..., [2, 1, 0, 3]])
_WIDE = RGB.astype(np.uint16)
_565 = (_WIDE[..., 0] >> 3 << 11 | _WIDE[..., 1] >> 2 << 5 | _WIDE[..., 2] >> 3).astype("<u2")
_1555 = (_WIDE[..., 0] >> 3 << 10 | _WIDE[..., 1] >> 3 << 5 | _WIDE[..., 2] >> 3).astype("<u2")
_HALF = np.where(OPACITY > 128, 255, 0)
_CLEAR = np.concatenate([_BLUE_FIRST[..., :3], np.zeros_like(OPACITY)], axis=2)

BMPS: dict[str, tuple[Callable[[], bytes], NDArray[Any], int]] = {
    "a fourth byte that says nothing": (lambda: bmp(_BLUE_FIRST, 32, width=60), RGB, 0),
    "masks without opacity": (lambda: bmp(_BLUE_FIRST, 32, width=60, masks=_BGRA[:3]), RGB, 0),
    "opacity": (lambda: bmp(_BLUE_FIRST, 32, width=60, masks=_BGRA, header=124), ON_WHITE, 1),
    "opacity that was never set": (lambda: bmp(_CLEAR, 32, width=60, masks=_BGRA, header=124), RGB, 0),
    "red first": (lambda: bmp(RGBA, 32, width=60, masks=(0xFF, 0xFF00, 0xFF0000), header=40), RGB, 0),
    "5, 6 and 5 bits": (lambda: bmp(_565, 16, width=60, masks=(0xF800, 0x7E0, 0x1F)), RGB, 8),
    "15 bits": (lambda: bmp(_1555, 16, width=60), RGB, 8),
    "15 bits and opacity": (
        lambda: bmp(
            _1555 | (_HALF[..., 0] // 255 << 15).astype("<u2"),
            16,
            width=60,
            masks=(0x7C00, 0x3E0, 0x1F, 0x8000),
            header=108,
        ),
        _on_white(RGB, _HALF),
        8,
    ),
    "OS/2's header": (lambda: bmp(np.ascontiguousarray(RGB[..., ::-1]), 24, width=60, header=12), RGB, 0),
    "4 bits": (
        lambda: bmp(
            np.pad(packed(_FEW[..., 0], 4), ((0, 0), (0, 2))),
            4,
            width=60,
            palette=bytes(np.repeat(np.arange(16) * 17, 4).astype(np.uint8)),
        ),
        _grey(_FEW * 17),
        0,
    ),
}


@pytest.mark.parametrize("kind", BMPS)
def test_bmp(kind: str) -> None:
    write, expected, tolerance = BMPS[kind]
    assert _difference(decode_image(write(), kind), expected) <= tolerance


def _run_lengths(runs: bytes, bits: int) -> bytes:
    """A BMP of 9 x 4 pixels, packed."""
    colours = bytes(i * 37 % 256 for i in range(4 << bits))
    data = bytearray(bmp(np.frombuffer(runs, np.uint8)[None], bits, width=9, palette=colours))
    struct.pack_into("<i", data, 22, 4)
    struct.pack_into("<I", data, 30, 1 if bits == 8 else 2)
    return bytes(data)


_RUNS = {
    8: "050c 0522 0000  0005 0102030405 00  0004 4e000000 0000  0307 0002 0201 0263 0000  0a01 0001",
    4: "0512 0534 0000  0005 123450 00  0004 7800 0000  0367 0002 0201 0299 0000  0a01 0001",
}


_RUNS_SHOWN = {
    8: [
        [0, 0, 0, 0, 0, 0x63, 0x63, 0, 0],
        [7, 7, 7, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 0x4E, 0, 0, 0],
        [0x0C, 0x0C, 0x0C, 0x0C, 0x0C, 0x22, 0x22, 0x22, 0x22],
    ],
    4: [
        [0, 0, 0, 0, 0, 9, 9, 0, 0],
        [6, 7, 6, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 7, 8, 0, 0],
        [1, 2, 1, 2, 1, 3, 4, 3, 4],
    ],
}
"""Colours by their numbers, worked out by hand: releases of Pillow before 13 read some of these otherwise."""


@pytest.mark.parametrize("bits", _RUNS)
def test_run_lengths_of_a_bmp(bits: int) -> None:
    """Runs, pixels as they are, the end of a row, a step to the right and on; runs that are too long."""
    runs = bytes.fromhex(_RUNS[bits])
    data = _run_lengths(runs, bits)
    blue_green_red = 4 * np.array(_RUNS_SHOWN[bits])[..., None] + np.array([2, 1, 0])
    np.testing.assert_array_equal(decode_image(data, "runs.bmp"), blue_green_red * 37 % 256)
    with pytest.raises(ImageError, match="is truncated"):
        decode_image(_run_lengths(runs[:-6], bits), "cut.bmp")


_PAM = "P7\nWIDTH 60\nHEIGHT 40\nDEPTH {}\nMAXVAL {}\nTUPLTYPE {}\nENDHDR\n"
NETPBM: dict[str, tuple[bytes, NDArray[Any]]] = {
    "up to 100": (b"P6 60 40 100\n" + (RGB / 255 * 100).round().astype(np.uint8).tobytes(), RGB),
    "up to 1023": (b"P6 60 40\n#c\n1023\n" + (RGB / 255 * 1023).round().astype(">u2").tobytes(), RGB),
    "up to 15, grey": (b"P5 60 40 15\n" + _FEW.tobytes(), _grey(_FEW * 17)),
    "up to 100, text": (b"P2 60 40 15\n" + b" ".join(b"%d" % v for v in _FEW.ravel()), _grey(_FEW * 17)),
    "PAM": (_PAM.format(3, 255, "RGB").encode() + RGB.tobytes(), RGB),
    "PAM with opacity": (_PAM.format(4, 255, "RGB_ALPHA").encode() + RGBA.tobytes(), ON_WHITE),
    "PAM, grey with opacity": (
        _PAM.format(2, 255, "GRAYSCALE_ALPHA").encode() + GREY_OPACITY.tobytes(),
        GREY_ON_WHITE,
    ),
    "PAM of bits": (
        _PAM.format(1, 1, "BLACKANDWHITE").encode() + (GREY > 99).astype(np.uint8).tobytes(),
        _grey((GREY > 99) * 255),
    ),
}


@pytest.mark.parametrize("kind", NETPBM)
def test_netpbm(kind: str) -> None:
    data, expected = NETPBM[kind]
    assert _difference(decode_image(data, kind), expected) <= 1.3


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize(("samples", "expected"), [(RGB, RGB), (RGBA, ON_WHITE)])
def test_avif_of_every_depth(bits: int, samples: Pixels, expected: NDArray[Any]) -> None:
    blue_first = samples[..., [2, 1, 0, 3][: samples.shape[2]]].astype(np.uint16)
    deep = blue_first * 257 >> (16 - bits)
    found, data = cv2.imencode(
        ".avif",
        deep.astype(np.uint8 if bits == 8 else np.uint16),
        [cv2.IMWRITE_AVIF_QUALITY, 100, cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_SPEED, 9],
    )
    assert found
    assert _difference(decode_image(data.tobytes(), "a.avif"), expected) <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "YCbCr", "L"])
def test_jpeg_2000(mode: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(RGBA, "RGBA").convert(mode).save(stream, format="JPEG2000")
    assert _difference(decode_image(stream.getvalue(), mode), _shown(stream.getvalue())) <= 1


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_jpeg_2000_of_more_than_8_bits(bits: int) -> None:
    encoder = av.CodecContext.create("jpeg2000", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = 60, 40, f"gray{bits}le"
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(GREY[..., 0]), format="gray")
    packets = [*encoder.encode(frame.reformat(format=f"gray{bits}le")), *encoder.encode(None)]
    data = b"".join(bytes(packet) for packet in packets)
    assert _difference(decode_image(data, "deep.jp2"), _grey(GREY)) <= 2
