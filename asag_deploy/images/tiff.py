"""TIFF: pages and their tags, and the samples that are stored turned into colours.

OpenCV hands TIFF on to libtiff, whose own conversion to colours loses opacity, inverts or shifts some
depths, and multiplies opacity in twice.  Here libtiff only decompresses: the rows of a page are presented to
it as the bytes of a grey image, and what they mean is read from the tags.  JPEG and fax compression, and
YCbCr, are colours only when libtiff is done with them, and it is right about those.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import ImageError
from asag_deploy.images.depth import to_8_bits
from asag_deploy.images.header import ORIENTATION_TAG, Header, xmp_orientation
from asag_deploy.images.opacity import blend_onto_white
from asag_deploy.images.tiff_pieces import (
    DEFLATE,
    JPEG,
    LZW,
    OLD_DEFLATE,
    PACKBITS,
    Grid,
    decoded,
    decompressed,
    refuse_broken_jpeg,
)

_MOST_PAGES = 65536
_WHOLE_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}

(_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER) = (
    254,
    256,
    257,
    258,
    259,
    262,
    266,
)
(_OFFSETS, _SAMPLES, _ROWS, _SIZES, _PLANES, _PREDICTOR) = (273, 277, 278, 279, 284, 317)
(_COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES) = (320, 322, 323, 324, 325)
(_SUBDIRECTORIES, _INKS, _EXTRA, _KIND, _JPEG_TABLES, _XMP, _DNG) = (330, 332, 338, 339, 347, 700, 50706)

_NONE = 1
_BYTEWISE = (_NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS)
_WITH_PREDICTOR = (LZW, DEFLATE, OLD_DEFLATE)
_OF_LIBTIFF = {2: "CCITT", 3: "CCITT", 4: "CCITT", 6: "JPEG", 7: "JPEG"}
_OTHER_COMPRESSIONS = {34925: "LZMA", 50000: "Zstandard", 50001: "WebP", 34887: "LERC", 34712: "JPEG 2000"}

_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _MASK, _CMYK, _YCBCR, _CIELAB, _ICCLAB = 0, 1, 2, 3, 4, 5, 6, 8, 9
_COLOUR_SAMPLES = {_WHITE_IS_ZERO: 1, _GREY: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _CIELAB: 3, _ICCLAB: 3}
_RAW = (32803, 34892)
_ASSOCIATED, _UNASSOCIATED = 1, 2
_KNOWN = frozenset(
    (_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _OFFSETS, _SAMPLES, _ROWS,
     _SIZES, _PLANES, _PREDICTOR, _COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES,
     _SUBDIRECTORIES, _INKS, _EXTRA, _KIND, _JPEG_TABLES, _XMP, _DNG, ORIENTATION_TAG)
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Page:
    """One image of a TIFF file."""

    offset: int
    """Where its directory begins."""
    order: str
    """`<` for little endian, `>` for big endian."""
    tags: Mapping[int, NDArray[Any]]
    """Those of the known tags that hold whole numbers."""
    places: Mapping[int, int]
    """Where in the file the values of a tag begin."""

    def tag(self, number: int, default: int) -> int:
        """Return the first value of a tag."""
        values = self.tags.get(number)
        return int(values[0]) if values is not None and len(values) else default

    @property
    def is_extra(self) -> bool:
        """Whether it is a thumbnail or a mask of another page."""
        return bool(self.tag(_SUBFILE, 0) & 0b101) or self.tag(_PHOTOMETRIC, -1) == _MASK

    @property
    def is_tiled(self) -> bool:
        """Whether its pixels lie in tiles and not in strips."""
        return _TILE_OFFSETS in self.tags

    @property
    def orientation(self) -> int:
        """As in EXIF, 1 to 8; that of XMP where the directory states none."""
        if ORIENTATION_TAG not in self.tags and _XMP in self.tags:
            return xmp_orientation(self.tags[_XMP].tobytes()) or 1
        value = self.tag(ORIENTATION_TAG, 1)
        return value if 1 <= value <= 8 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels, as stored."""
        return self.tag(_HEIGHT, 0), self.tag(_WIDTH, 0)

    def pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return offsets and sizes of its strips or tiles in the file; empty if they do not say both."""
        numbers = (_TILE_OFFSETS, _TILE_SIZES) if self.is_tiled else (_OFFSETS, _SIZES)
        nothing = np.zeros(0, dtype=np.int64)
        offsets, sizes = (self.tags.get(n, nothing).astype(np.int64) for n in numbers)
        return (offsets, sizes) if len(offsets) == len(sizes) else (nothing, nothing)

    def is_whole(self, length: int) -> bool:
        """Tell whether a file of `length` bytes has all of its strips or tiles."""
        offsets, sizes = self.pieces()
        return bool((offsets + sizes <= length).all())


def tiff_pages(data: Any) -> list[Page]:
    """Return the pages of a file that begins as TIFF does, without thumbnails and masks of others."""
    return _pages(_directories(data)[0])


def tiff_header(data: Any) -> Header:
    """Read what the directories say."""
    found, is_broken = _directories(data)
    pages = _pages(found)
    whole = [page.is_whole(len(data)) for page in pages]
    height, width = pages[0].shape if pages else (0, 0)
    return Header(
        format="tiff",
        height=height,
        width=width,
        orientation=pages[0].orientation if pages else 1,
        frames=len(pages),
        whole_frames=[*whole, False].index(False),
        complete=bool(pages) and all(whole) and not is_broken,
    )


def decode_page(data: bytes, page: Page, name: str) -> NDArray[np.uint8]:
    """Decode a page as uint8 (H, W, 3) RGB on white, as it is stored.

    Raises ImageError for what cannot be decoded, or whose samples are no colours.
    """
    _refuse_strange(page, name)
    if page.tag(_COMPRESSION, _NONE) in _OF_LIBTIFF or page.tag(_PHOTOMETRIC, 0) == _YCBCR:
        return _by_libtiff(data, page, name)
    return np.require(_colours(page, _samples(data, page, name), name), requirements=["C", "W"])


def _pages(found: list[Page]) -> list[Page]:
    return [page for page in found if not page.is_extra] or found[:1]


def _directories(data: Any) -> tuple[list[Page], bool]:
    """Follow the chain of directories; also return whether it breaks off."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    pages: list[Page] = []
    seen = set()
    try:
        (offset,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
        while offset and offset not in seen and len(pages) < _MOST_PAGES:
            seen.add(offset)
            page, offset = _directory(data, offset, order, is_big)
            pages.append(page)
    except (struct.error, OverflowError):  # OverflowError: a place that no file reaches
        return pages, True
    return pages, False


def _directory(data: Any, offset: int, order: str, is_big: bool) -> tuple[Page, int]:
    """Read one directory, and where the next one is; struct.error if it is not all there."""
    length, pointer, room = ("Q", "Q", 8) if is_big else ("H", "I", 4)
    (count,) = struct.unpack_from(order + length, data, offset)
    entry = offset + struct.calcsize(order + length)
    tags: dict[int, NDArray[Any]] = {}
    places: dict[int, int] = {}
    for _ in range(count):
        tag, kind, number = struct.unpack_from(f"{order}HH{pointer}", data, entry)
        entry += 4 + room
        kept = _WHOLE_NUMBERS.get(kind)
        if kept is not None and tag in _KNOWN and tag not in tags:
            size = int(kept[1]) * number
            (place,) = (entry,) if size <= room else struct.unpack_from(order + pointer, data, entry)
            if place + size > len(data):
                raise struct.error
            tags[tag] = np.frombuffer(data, order + kept, number, place) if number else np.zeros(0, "u1")
            places[tag] = place
        entry += room
    (following,) = struct.unpack_from(order + pointer, data, entry)
    return Page(offset=offset, order=order, tags=tags, places=places), following


def _refuse_strange(page: Page, name: str) -> None:
    compression, photometric = page.tag(_COMPRESSION, _NONE), page.tag(_PHOTOMETRIC, _WHITE_IS_ZERO)
    if _DNG in page.tags or photometric in _RAW or (page.is_extra and _SUBDIRECTORIES in page.tags):
        raise ImageError(
            f"image '{name}' is a camera's raw file, of which only a thumbnail could be read: develop it to "
            "JPEG, PNG or TIFF"
        )
    if compression not in _BYTEWISE and compression not in _OF_LIBTIFF:
        said = _OTHER_COMPRESSIONS.get(compression, f"method {compression}")
        raise ImageError(
            f"image '{name}' is a TIFF compressed with {said}, which OpenCV does not read: save it with LZW "
            "or Deflate"
        )
    kind, bits = page.tag(_KIND, 1), page.tag(_BITS, 1)
    if compression in _WITH_PREDICTOR and page.tag(_PREDICTOR, 1) == 2 and bits not in (8, 16, 32, 64):
        raise ImageError(
            f"image '{name}' is a TIFF of {bits} bits with differences of neighbours: save it without them"
        )
    if kind != 1 or bits > 16:
        said = {2: "int", 3: "float", 5: "complex int", 6: "complex float"}.get(kind, "uint")
        raise ImageError(f"image '{name}' holds {said}{bits} values; convert it to 8 or 16 bits a channel")
    has_opacity = photometric in (_WHITE_IS_ZERO, _GREY) and page.tag(_SAMPLES, 1) > 1
    if compression in _OF_LIBTIFF and (has_opacity or photometric in (_CIELAB, _ICCLAB)):
        said = "grey with opacity" if has_opacity else "Lab colours"
        raise ImageError(
            f"image '{name}' is a TIFF of {said} compressed with {_OF_LIBTIFF[compression]}, which OpenCV "
            "reads as something else: save it with LZW or Deflate"
        )
    if photometric not in _COLOUR_SAMPLES and photometric != _YCBCR:
        raise ImageError(
            f"image '{name}' is a TIFF in colours of an unusual kind (photometric interpretation "
            f"{photometric}): convert it to RGB"
        )
    if len(set(page.tags.get(_BITS, np.ones(1)).tolist())) != 1 or (
        photometric == _CMYK and page.tag(_INKS, 1) != 1
    ):
        raise ImageError(
            f"image '{name}' is a TIFF of uneven depths or of inks other than CMYK: convert it to RGB"
        )


def _by_libtiff(data: bytes, page: Page, name: str) -> NDArray[np.uint8]:
    """Let libtiff make colours of a page, but neither turn it nor multiply its opacity in."""
    if page.tag(_COMPRESSION, _NONE) == JPEG:
        tables = page.tags.get(_JPEG_TABLES, np.zeros(0, dtype=np.uint8)).tobytes()
        for offset, size in zip(*page.pieces(), strict=True):
            refuse_broken_jpeg(data[offset : offset + size], tables, name)
    patched = bytearray(data)
    where = 8 if data[2:4] in (b"+\0", b"\0+") else 4
    struct.pack_into(page.order + ("Q" if where == 8 else "I"), patched, where, page.offset)
    for tag, value in ((ORIENTATION_TAG, 1), (_EXTRA, _ASSOCIATED)):
        if tag in page.places and len(page.tags[tag]) == 1:
            size = page.tags[tag].itemsize
            order: Literal["little", "big"] = "little" if page.order == "<" else "big"
            patched[page.places[tag] : page.places[tag] + size] = value.to_bytes(size, order)
    image = decoded(patched, name)
    if image.ndim == 2:
        return cast("NDArray[np.uint8]", cv2.cvtColor(image, cv2.COLOR_GRAY2RGB))
    rgb = np.ascontiguousarray(image[..., 2::-1])
    if image.shape[2] == 3:
        return rgb
    return _on_white(rgb, image[..., 3], page.tag(_EXTRA, _UNASSOCIATED))


def _samples(data: bytes, page: Page, name: str) -> NDArray[Any]:
    """Return the stored samples (H, W, samples of a pixel), uint8 or uint16, from 0 to 2 ** bits - 1."""
    height, width = page.shape
    count, bits = page.tag(_SAMPLES, 1), page.tag(_BITS, 1)
    offsets, sizes = page.pieces()
    if min(height, width, count) < 1 or not len(offsets):
        raise ImageError(f"image '{name}' is damaged: it does not say where its pixels are")
    if page.tag(_PLANES, 1) != 2 or count == 1:
        return _plane(data, page, (offsets, sizes), count, bits, name)
    each = len(offsets) // count
    parts = [slice(i * each, (i + 1) * each) for i in range(count)]
    planes = [_plane(data, page, (offsets[part], sizes[part]), 1, bits, name) for part in parts]
    return np.concatenate(planes, axis=2)


def _plane(
    data: bytes,
    page: Page,
    pieces: tuple[NDArray[np.int64], NDArray[np.int64]],
    count: int,
    bits: int,
    name: str,
) -> NDArray[Any]:
    """Decompress strips or tiles of `count` samples a pixel -> (H, W, count)."""
    height, width = page.shape
    step = page.tag(_TILE_WIDTH, width) if page.is_tiled else width
    if step < 1:
        raise ImageError(f"image '{name}' is damaged: its tiles have no width")
    columns = -(-width // step)
    grid = Grid(
        height=height,
        rows=page.tag(_TILE_HEIGHT, height) if page.is_tiled else min(page.tag(_ROWS, height), height),
        columns=columns,
        row_bytes=-(-step * count * bits // 8),
        is_tiled=page.is_tiled,
    )
    parts = [data[offset : offset + size] for offset, size in zip(*pieces, strict=True)]
    rows = decompressed(parts, page.tag(_COMPRESSION, _NONE), grid, page.tag(_FILL_ORDER, 1), name)
    samples = _unpacked(rows, bits, page.order)
    samples = samples[:, :, : step * count].reshape(height, columns, step, count)
    if page.tag(_PREDICTOR, 1) == 2 and page.tag(_COMPRESSION, _NONE) in _WITH_PREDICTOR:
        samples = np.add.accumulate(samples, axis=2, dtype=samples.dtype)
    return samples.reshape(height, columns * step, count)[:, :width]


def _unpacked(rows: NDArray[np.uint8], bits: int, order: str) -> NDArray[Any]:
    """Turn rows of bytes (..., bytes) into samples of so many bits each (..., samples)."""
    if bits == 8:
        return rows
    if bits == 16:
        return rows.view(f"{order}u2").astype(np.uint16)
    single = np.unpackbits(rows, axis=-1)
    single = single[..., : single.shape[-1] // bits * bits].reshape(*single.shape[:-1], -1, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint16)
    return (single @ weights).astype(np.uint8 if bits < 8 else np.uint16)


def _colours(page: Page, samples: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Turn samples into RGB on white."""
    photometric, bits = page.tag(_PHOTOMETRIC, _WHITE_IS_ZERO), page.tag(_BITS, 1)
    needed = _COLOUR_SAMPLES[photometric]
    if samples.shape[2] < needed:
        raise ImageError(f"image '{name}' is damaged: its pixels have {samples.shape[2]} of {needed} samples")
    colours = samples[..., :needed]
    if photometric == _PALETTE:
        rgb = _through_palette(colours[..., 0], page, bits, name)
    else:
        rgb = _as_rgb(to_8_bits(colours, (1 << bits) - 1), photometric)
    for i, kind in enumerate(_extra_samples(page, samples.shape[2] - needed)):
        if kind in (_ASSOCIATED, _UNASSOCIATED):
            return _on_white(rgb, to_8_bits(samples[..., needed + i], (1 << bits) - 1), kind)
    return rgb


def _extra_samples(page: Page, count: int) -> list[int]:
    """Return what the samples after the colours are; a fourth of RGB that nothing is said of is opacity."""
    if _EXTRA in page.tags:
        return [int(kind) for kind in page.tags[_EXTRA][:count]]
    return [_UNASSOCIATED] if count == 1 and page.tag(_PHOTOMETRIC, 0) == _RGB else []


def _as_rgb(colours: NDArray[np.uint8], photometric: int) -> NDArray[np.uint8]:
    if photometric in (_WHITE_IS_ZERO, _GREY):
        grey = 255 - colours if photometric == _WHITE_IS_ZERO else colours
        return np.repeat(grey, 3, axis=2)
    if photometric == _CMYK:
        light = 255 - colours.astype(np.uint16)
        return ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)
    if photometric in (_CIELAB, _ICCLAB):
        lightness = colours[..., 0] * np.float32(100 / 255)
        hues = (
            colours[..., 1:].view(np.int8) if photometric == _CIELAB else colours[..., 1:] - np.float32(128)
        )
        return _lab_as_rgb(lightness, hues.astype(np.float32))
    return np.ascontiguousarray(colours)


def _lab_as_rgb(lightness: NDArray[np.float32], hues: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert L*a*b* under D50, as TIFF has it: lightness (H, W) from 0 to 100, hues (H, W, 2)."""
    middle = (lightness + 16) / 116
    root = np.stack([middle + hues[..., 0] / 500, middle, middle - hues[..., 1] / 200], axis=2)
    linear = np.where(root > 6 / 29, root**3, (root - 4 / 29) * 3 * (6 / 29) ** 2)
    light = (linear * _D50 @ _D50_TO_SRGB.T).clip(0, 1)
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (curved * 255 + 0.5).astype(np.uint8)


_D50 = np.array([0.96422, 1, 0.82521], dtype=np.float32)
_D50_TO_SRGB = np.array(
    [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ],
    dtype=np.float32,
)
"""From XYZ to linear sRGB, with the white point adapted (Bradford)."""


def _through_palette(indices: NDArray[Any], page: Page, bits: int, name: str) -> NDArray[np.uint8]:
    palette = page.tags.get(_COLOURS)
    if palette is None or len(palette) != 3 << bits:
        raise ImageError(f"image '{name}' is damaged: its palette is missing, or is of another length")
    # Old programs wrote 8 bits where the standard asks for 16.
    colours = palette if palette.max() < 256 else (palette.astype(np.uint32) * 255 + 32767) // 65535
    return cast("NDArray[np.uint8]", colours.astype(np.uint8).reshape(3, -1).T[indices])


def _on_white(rgb: NDArray[np.uint8], opacity: NDArray[np.uint8], kind: int) -> NDArray[np.uint8]:
    """Blend onto white; colours whose opacity is associated are multiplied by it already."""
    if kind not in (_ASSOCIATED, _UNASSOCIATED):
        return rgb
    if kind == _UNASSOCIATED:
        return blend_onto_white(rgb, opacity)
    return cast("NDArray[np.uint8]", cv2.add(rgb, cv2.merge([255 - opacity] * 3)))
