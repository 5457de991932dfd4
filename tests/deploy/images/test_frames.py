"""Animations and pages: every frame as it is shown, how long, and those that a cut file still has."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag_deploy.errors import ImageError
from asag_deploy.images import frames as frames_module
from asag_deploy.images.containers import PNG_SIGNATURE, png_chunk, png_chunks
from asag_deploy.images.frames import ImageFrame, count_image_frames, decode_frames, read_frames
from asag_deploy.images.reading import decode_image

_DURATIONS = [100, 200, 300, 400]


def _pictures() -> list[Image.Image]:
    """Four pictures of a square that moves over a transparent ground."""
    pictures = []
    for i in range(4):
        pixels = np.zeros((40, 60, 4), dtype=np.uint8)
        pixels[:30] = (30 * i, 50, 200, 255)
        pixels[5 + 5 * i : 15 + 5 * i, 5 + 5 * i : 20 + 5 * i] = (255, 60 * i, 0, 255)
        pictures.append(Image.fromarray(pixels, "RGBA"))
    return pictures


def _encode(kind: str, **how: Any) -> bytes:
    first, *others = _pictures()
    stream = io.BytesIO()
    first.save(stream, format=kind, save_all=True, append_images=others, **how)
    return stream.getvalue()


def _shown(data: bytes, skipped: int = 0) -> list[NDArray[np.float64]]:
    """Return the frames as Pillow composes them, on white."""
    shown = []
    with Image.open(io.BytesIO(data)) as image:
        for i in range(skipped, getattr(image, "n_frames", 1)):
            image.seek(i)
            pixels = np.asarray(image.convert("RGBA")).astype(float)
            opacity = pixels[..., 3:] / 255
            shown.append(pixels[..., :3] * opacity + 255 * (1 - opacity))
    return shown


_ANIMATIONS: list[tuple[str, dict[str, Any], int]] = [
    ("GIF", {"duration": _DURATIONS, "disposal": 2}, 0),
    ("PNG", {"duration": _DURATIONS}, 0),
    ("PNG", {"duration": _DURATIONS, "default_image": True}, 1),
    ("WEBP", {"duration": _DURATIONS, "lossless": True}, 0),
    ("AVIF", {"duration": _DURATIONS, "quality": 100, "subsampling": "4:4:4"}, 0),
    ("TIFF", {}, 0),
]


@pytest.mark.parametrize(("kind", "how", "skipped"), _ANIMATIONS)
@pytest.mark.parametrize("at_once", [2**27, 1])
def test_every_frame_is_given_as_it_is_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    how: dict[str, Any],
    skipped: int,
    at_once: int,
) -> None:
    monkeypatch.setattr(frames_module, "_MOST_AT_ONCE", at_once)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(_encode(kind, **how))
    expected = _shown(path.read_bytes(), skipped)
    frames = list(read_frames(path))
    assert count_image_frames(path) == len(frames) == len(expected)
    assert [frame.index for frame in frames] == list(range(len(expected)))
    for frame, picture in zip(frames, expected, strict=True):
        assert np.abs(frame.image - picture).max() <= 1
    lengths = [None] * 4 if kind == "TIFF" else [ms / 1000 for ms in _DURATIONS[: len(expected)]]
    assert [frame.seconds for frame in frames] == lengths


@pytest.mark.parametrize(
    ("mode", "disposal", "blending"),
    [
        *(("RGBA", disposal, blending) for disposal in (0, 1, 2) for blending in (0, 1)),
        *(
            (mode, 0, blending) for mode in ("RGB", "P") for blending in (0, 1)
        ),  # whose background FFmpeg fills
    ],
)
def test_animated_png_is_composed_as_it_says(tmp_path: Path, mode: str, disposal: int, blending: int) -> None:
    """FFmpeg says how."""
    rng = np.random.default_rng(3)
    places = [(0, 0, 32, 24), (3, 5, 20, 10), (8, 0, 24, 12), (0, 9, 10, 15)]
    pieces = [rng.integers(0, 256, (h, w, 4), dtype=np.uint8) for _, _, w, h in places]
    palette = Image.fromarray(pieces[0], "RGBA").convert("RGB").quantize(40)
    head, parts = b"", list[bytes]()
    for number, (piece, (left, top, width, height)) in enumerate(zip(pieces, places, strict=True)):
        picture = Image.fromarray(piece, "RGBA").convert("RGB" if mode == "P" else mode)
        stream = io.BytesIO()
        (picture.quantize(palette=palette) if mode == "P" else picture).save(stream, format="PNG")
        still = stream.getvalue()
        found = {kind: still[start : start + size] for kind, start, size, _ in png_chunks(still)}
        if not parts:
            head = png_chunk(b"IHDR", found[b"IHDR"]) + png_chunk(b"acTL", struct.pack(">II", 4, 0))
            head += png_chunk(b"PLTE", found[b"PLTE"]) if mode == "P" else b""
        order = max(2 * number - 1, 0)
        control = struct.pack(">IIIIIHHBB", order, width, height, left, top, 1, 10, disposal, blending)
        parts.append(png_chunk(b"fcTL", control))
        data = found[b"IDAT"]
        parts.append(
            png_chunk(b"fdAT", struct.pack(">I", order + 1) + data) if number else png_chunk(b"IDAT", data)
        )
    path = tmp_path / "a.png"
    path.write_bytes(PNG_SIGNATURE + head + b"".join(parts) + png_chunk(b"IEND", b""))
    with av.open(path, format="apng") as container:
        expected = [frame.to_ndarray(format="rgba").astype(float) for frame in container.decode(video=0)]
    frames = [frame.image for frame in read_frames(path)]
    assert len(frames) == len(expected) == 4
    for frame, pixels in zip(frames, expected, strict=True):
        opacity = pixels[..., 3:] / 255
        assert np.abs(frame - (pixels[..., :3] * opacity + 255 * (1 - opacity))).max() <= 3


_COLOURS = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
_Control = tuple[int, int | None, int] | None
"""Disposal, transparent colour and hundredths of a second; None where a picture is not preceded by any."""


def _gif(*pictures: tuple[_Control, list[int], tuple[int, int, int, int]]) -> bytes:
    """Write pictures, colours by number at left, top, width, height, into a GIF of 16 x 16 by hand."""
    data = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0xF1, 0, 0) + _COLOURS
    for control, pixels, place in pictures:
        if control is not None:
            disposal, transparent, delay = control
            flags = disposal << 2 | (transparent is not None)
            data += b"!\xf9\x04" + struct.pack("<BHBB", flags, delay, transparent or 0, 0)
        codes = [code for pixel in pixels for code in (4, pixel)] + [5]  # each begins a dictionary anew
        bits = sum(code << 3 * i for i, code in enumerate(codes))
        packed = bits.to_bytes((3 * len(codes) + 7) // 8, "little")
        parts = [packed[i : i + 255] for i in range(0, len(packed), 255)]
        data += b"," + struct.pack("<HHHHB", *place, 0) + b"\x02"
        data += b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    return data + b";"


_WHOLE, _MIDDLE, _CORNER = (0, 0, 16, 16), (4, 4, 8, 8), (0, 0, 2, 2)


@pytest.mark.parametrize(
    ("pictures", "seconds"),
    [
        # A picture that nothing is said of has no transparency, stays, and takes a tenth of a second.
        ([(None, [0] * 256, _WHOLE), ((1, 0, 50), [0, 1] * 128, _WHOLE)], [0.1, 0.5]),
        ([((1, 0, 70), [2, 0] * 128, _WHOLE), (None, [0, 3] * 128, _WHOLE)], [0.7, 0.1]),
        (
            [((2, None, 5), [1] * 256, _WHOLE), (None, [2] * 64, _MIDDLE), (None, [3] * 4, _CORNER)],
            [0.05, 0.1, 0.1],
        ),
        # Where transparent pictures leave nothing, or paint nothing, there is nothing.
        ([((1, 3, 50), [1] * 64, _MIDDLE), ((1, None, 50), [2] * 4, _CORNER)], [0.5, 0.5]),
        ([((2, 3, 50), [1] * 256, _WHOLE), ((1, 3, 50), [2] * 64, _MIDDLE)], [0.5, 0.5]),
        # Opaque ones leave the background's colour.
        ([((2, None, 50), [1] * 64, _MIDDLE), ((3, 3, 50), [2] * 64, _MIDDLE)], [0.5, 0.5]),
    ],
)
def test_animated_gif_is_composed_as_it_says(
    tmp_path: Path, pictures: list[Any], seconds: list[float]
) -> None:
    """FFmpeg says how."""
    path = tmp_path / "a.gif"
    path.write_bytes(_gif(*pictures))
    with av.open(path) as container:
        expected = [frame.to_ndarray(format="rgba").astype(float) for frame in container.decode(video=0)]
    frames = list(read_frames(path))
    assert [frame.seconds for frame in frames] == seconds
    for frame, pixels in zip(frames, expected, strict=True):
        opacity = pixels[..., 3:] / 255
        assert (frame.image == pixels[..., :3] * opacity + 255 * (1 - opacity)).all()
    assert (decode_image(path.read_bytes(), path) == frames[0].image).all()


def _apng(control: bytes, compressed: bytes, *, bits: int = 8, key: bytes = b"") -> bytes:
    """Two grey frames of 4 x 3 pixels: the first is whole, the second as given."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 3, bits, 0, 0, 0, 0)),
        (b"acTL", struct.pack(">II", 2, 0)),
        *([(b"tRNS", key)] if key else []),
        (b"fcTL", struct.pack(">IIIIIHHBB", 0, 4, 3, 0, 0, 1, 10, 0, 0)),
        (b"IDAT", zlib.compress(bytes(3 * (1 + 4 * bits // 8)))),
        (b"fcTL", control),
        (b"fdAT", struct.pack(">I", 2) + compressed),
        (b"IEND", b""),
    ]
    return PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)


def test_animated_png_of_16_bits_and_with_a_transparent_grey() -> None:
    control = struct.pack(">IIIIIHHBB", 1, 2, 1, 1, 2, 1, 0, 0, 1)
    row = zlib.compress(b"\0" + struct.pack(">HH", 0x8000, 0xFFFF))
    first, second = decode_frames(_apng(control, row, bits=16), "a.png")
    assert (first.seconds, second.seconds) == (0.1, 0.1)  # browsers show a hundredth as long as that
    assert not first.image.any()
    assert second.image[2, :, 0].tolist() == [0, 128, 255, 0]
    grey = zlib.compress(b"\0" + bytes([7, 9]))
    _, second = decode_frames(_apng(control, grey, key=struct.pack(">H", 7)), "a.png")
    assert second.image[2, :, 0].tolist() == [0, 0, 9, 0]  # 7 is transparent, and lies over black
    first, second = decode_frames(_apng(control, grey, key=struct.pack(">H", 0)), "a.png")
    assert first.image.min() == 255
    assert second.image[2, :, 0].tolist() == [255, 7, 9, 255]


@pytest.mark.parametrize(
    ("control", "compressed"),
    [
        (struct.pack(">IIIIIHHBB", 1, 2, 1, 3, 2, 1, 10, 0, 0), zlib.compress(bytes(3))),  # beyond the right
        (struct.pack(">IIIIIHHBB", 1, 2**31, 2**31, 0, 0, 1, 10, 0, 0), zlib.compress(bytes(3))),
        (struct.pack(">IIIIIHHBB", 1, 0, 1, 0, 0, 1, 10, 0, 0), zlib.compress(bytes(3))),
        (struct.pack(">IIIIIHHBB", 1, 2, 1, 1, 2, 1, 10, 0, 0), b"no zlib"),
        (b"too short", zlib.compress(bytes(3))),
    ],
)
def test_a_damaged_frame_of_an_animated_png_is_missed(control: bytes, compressed: bytes) -> None:
    data = _apng(control, compressed)
    assert decode_image(data, "a.png").shape == (3, 4, 3)
    frames = list[ImageFrame]()
    with pytest.raises(ImageError, match=r"'a\.png' broke off after 1 of 2 frames"):
        frames.extend(decode_frames(data, "a.png"))
    assert len(frames) == 1


@pytest.mark.parametrize(("kind", "how", "skipped"), _ANIMATIONS)
def test_what_a_cut_file_still_has_is_given_and_the_rest_is_missed(
    kind: str, how: dict[str, Any], skipped: int
) -> None:
    data = _encode(kind, **how)
    whole = [frame.image for frame in decode_frames(data, "whole")]
    most = 0
    for cut in range(20, len(data) - 8, len(data) // 40):
        frames: list[NDArray[np.uint8]] = []
        with pytest.raises(ImageError, match=r"truncated|broke off after \d( of [34])? frame|is damaged"):
            frames.extend(frame.image for frame in decode_frames(data[:cut], "cut"))
        assert all(np.array_equal(a, b) for a, b in zip(frames, whole, strict=False))
        most = max(most, len(frames))
    assert most == (0 if kind == "AVIF" else len(whole) - 1)


def test_frames_shown_too_briefly_to_see_last_as_long_as_in_browsers() -> None:
    data = _encode("GIF", duration=[0, 10, 20, 400])
    assert [frame.seconds for frame in decode_frames(data, "fast.gif")] == [0.1, 0.1, 0.02, 0.4]


def test_pages_have_their_own_sizes() -> None:
    stream = io.BytesIO()
    pages = [Image.new("RGB", size, (9, 8, 7)) for size in ((6, 4), (20, 30))]
    pages[0].save(stream, format="TIFF", save_all=True, append_images=pages[1:])
    assert [f.image.shape[:2] for f in decode_frames(stream.getvalue(), "pages")] == [(4, 6), (30, 20)]
    with pytest.raises(ImageError, match="page 1 of image 'pages' has 20 x 30 pixels, and at most 100"):
        list(decode_frames(stream.getvalue(), "pages", max_pixels=100))


def test_what_is_no_animation_has_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "still.jpg")
    (tmp_path / "text.gif").write_text("no image")
    (tmp_path / "empty.gif").write_bytes(b"")
    names = ("still.jpg", "text.gif", "empty.gif", "none")
    assert [count_image_frames(tmp_path / name) for name in names] == [1, 1, 1, 1]
    (frame,) = read_frames(tmp_path / "still.jpg")
    assert (frame.index, frame.seconds, frame.image.shape) == (0, None, (4, 6, 3))
    with pytest.raises(ImageError, match=r"text\.gif' is damaged or is not an image"):
        list(read_frames(tmp_path / "text.gif"))
