"""Pictures and videos."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from asag_deploy.errors import ImageError
from asag_deploy.images.formats import image_header
from asag_deploy.images.frames import decode_frames
from asag_deploy.images.reading import MAX_PIXELS, decode_image
from asag_deploy.images.sources import Failure, iter_frames, list_sources
from endurance.damage import damaged_bytes, damaged_jpeg, damaged_png
from endurance.judging import Target, WrongError
from endurance.targets import Part, one_of_parts
from support import image_writers
from support.coco_files import gradient

NAME = "the picture's name"
_FORMATS = (
    *(("PNG", mode) for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")),
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("TIFF", mode) for mode in ("RGB", "RGBA", "L", "P", "I;16", "1", "F", "CMYK")),
    *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    *(("GIF", mode) for mode in ("P", "RGB")),
    *(("BMP", mode) for mode in ("RGB", "P", "L", "1")),
    ("PPM", "RGB"),
    ("JPEG2000", "RGB"),
    ("AVIF", "RGB"),
    ("TGA", "RGB"),
)
_TOKENS = (
    b"Exif\0\0",
    b"II*\0",
    b"MM\0*",
    b"IEND",
    b"\xff\xd9",
    b"\xff\xd8\xff",
    b"RIFF",
    b"WEBP",
    b"acTL",
    b"GIF89a",
)


@contextmanager
def open_images(folder: Path) -> Iterator[Target]:
    """The bytes of a picture."""
    made = [(kind, data) for kind, mode in _FORMATS if (data := _encoded(kind, mode)) is not None]
    made += [
        ("TIFF", _encoded("TIFF", "RGB", compression=how) or b"") for how in ("tiff_lzw", "jpeg", "packbits")
    ]
    made += [("TIFF", _written_tiff(**options)) for options in _TIFFS]
    made += [("BMP", _written_bmp(bits, header)) for bits in (16, 32) for header in (40, 124)]
    made += [(kind, _animated(kind)) for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF")]
    every = [data for _, data in made]
    blocks = [exif(order, kind, value) for order in "<>" for kind in (3, 4, 1) for value in (1, 3, 6, 8, 9)]
    damaged_exif = damaged_bytes(blocks)
    jpegs = [data for kind, data in made if kind == "JPEG"]
    pngs = [data for kind, data in made if kind == "PNG"]
    inputs = st.one_of(
        damaged_bytes(every, _TOKENS),
        damaged_jpeg(jpegs, [(b"\xff\xe1", b"Exif\0\0" + block) for block in blocks]),
        damaged_png(pngs, [(b"eXIf", block) for block in blocks]),
        damaged_exif.map(lambda block: _with_exif(jpegs[0], block)),
    )
    yield Target(inputs=inputs, run=run_image, names=(NAME,))


def run_image(data: bytes) -> None:
    """Decode one, and then all its frames, which refuse what the first refuses."""
    found = image_header(data)
    image = decode_image(data, NAME)
    check_pixels(image)
    if found is None or image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise WrongError(f"{image.shape[:2]} pixels of what has the header {found}")
    for frame in itertools.islice(decode_frames(data, NAME), _MOST_FRAMES):
        check_pixels(frame.image)


def check_pixels(image: NDArray[np.uint8]) -> None:
    """An image is uint8 (H, W, 3), with pixels, in memory of its own."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise WrongError(f"decoded to {image.dtype} {image.shape}")
    if not image.flags.c_contiguous:
        raise WrongError("not contiguous")


def exif(order: str, kind: int, orientation: int) -> bytes:
    """An EXIF block with an orientation of a TIFF type, a software's name, and no further directory."""
    value = struct.pack(
        f"{order}H2x" if kind == 3 else f"{order}I" if kind == 4 else f"{order}B3x", orientation
    )
    entries = (
        struct.pack(f"{order}HHI", 0x0131, 2, 4)
        + b"abc\0"
        + struct.pack(f"{order}HHI", 0x0112, kind, 1)
        + value
    )
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return header + struct.pack(f"{order}H", 2) + entries + bytes(4)


_TIFFS: tuple[dict[str, Any], ...] = (
    {"photometric": 2, "planes": True},
    {"photometric": 2, "tile": 16},
    {"photometric": 2, "rows": 2, "kind": np.uint16},
    {"photometric": 1, "bits": 4, "count": 1},
    {"photometric": 0, "bits": 1, "count": 1},
    {"photometric": 2, "count": 4, "tags": {338: [2]}},
    {"photometric": 2, "count": 4, "tags": {338: [1], 274: [6]}, "order": ">"},
    {"photometric": 5, "count": 4, "compressed": True},
    {"photometric": 6, "tags": {530: [1, 1]}},
)


def _written_tiff(*, photometric: int, count: int = 3, kind: type = np.uint8, **options: Any) -> bytes:
    """A TIFF that Pillow does not write."""
    samples: NDArray[Any] = np.resize(gradient(9, 13), (9, 13, count)).astype(kind)
    bits = options.get("bits")
    return image_writers.tiff(samples if bits is None else samples >> (8 - bits), photometric, **options)


def _written_bmp(bits: int, header: int) -> bytes:
    """A BMP that says by masks where its colours are."""
    kind = np.uint16 if bits == 16 else np.uint32
    masks = (0xF800, 0x7E0, 0x1F, 0) if bits == 16 else (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    rows = np.arange(9 * 12, dtype=kind).reshape(9, 12)
    return image_writers.bmp(rows, bits, width=12, masks=masks, header=header)


def _with_exif(jpeg: bytes, block: bytes) -> bytes:
    body = b"Exif\0\0" + block[:60000]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def _encoded(kind: str, mode: str, **options: object) -> bytes | None:
    """A small picture as Pillow writes it; None where it cannot."""
    image = Image.fromarray(gradient(9, 13)).convert("L" if mode in ("I;16", "F") else mode)
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    return _saved([image], kind, **options)


def _animated(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(gradient(9, 13), shift, axis=1)) for shift in range(3)]
    return _saved(frames, kind) or b""


def _saved(frames: Sequence[Image.Image], kind: str, **options: object) -> bytes | None:
    stream = BytesIO()
    if len(frames) > 1:
        options |= {"save_all": True, "append_images": frames[1:]}
    try:
        frames[0].save(stream, kind, **options)
    except (OSError, KeyError, ValueError):  # this Pillow, or this format, does not
        return None
    return stream.getvalue()


_VIDEOS = {
    "mp4": ("mpeg4", "libx264"),
    "mkv": ("mpeg4", "ffv1", "rawvideo"),
    "avi": ("mjpeg", "huffyuv"),
    "ts": ("mpeg2video",),
    "flv": ("flv",),
    "webm": ("libvpx", "libvpx-vp9"),
    "mpg": ("mpeg1video",),
    "mov": ("prores",),
    "wmv": ("wmv2",),
}
"""Codecs by suffix."""
_PIXELS = {"mjpeg": "yuvj420p", "huffyuv": "rgb24", "prores": "yuv422p10le"}
"""Those of codecs that take no yuv420p."""
_MOST_FRAMES = 60


@contextmanager
def open_videos(folder: Path) -> Iterator[Target]:
    """A suffix, and on the next line the bytes of a video of that name."""
    import av

    def part(suffix: str, codecs: Sequence[str]) -> Part:
        def run(data: bytes) -> None:
            path = folder / f"clip.{suffix}"
            path.write_bytes(data)
            try:
                _read_video(path)
            finally:
                path.unlink()

        # Not every PyAV can write every codec.
        seeds = [_video(suffix, codec) for codec in codecs if codec in av.codecs_available]
        return damaged_bytes(seeds), run

    inputs, run = one_of_parts({suffix: part(suffix, codecs) for suffix, codecs in _VIDEOS.items()})
    yield Target(inputs=inputs, run=run, names=(str(folder / "clip"),))


def _read_video(path: Path) -> None:
    """Read it frame by frame; refuse in the words of the first failure."""
    for item in itertools.islice(iter_frames(list_sources([str(path)]).sources), _MOST_FRAMES):
        if isinstance(item, Failure):
            raise ImageError(item.message)
        check_pixels(item.image)


def _video(suffix: str, codec: str) -> bytes:
    import av
    from av.video.stream import VideoStream

    stream = BytesIO()
    kind = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "wmv": "asf"}.get(suffix, suffix)
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream(codec, rate=25)
        assert isinstance(track, VideoStream)
        track.width, track.height = 64, 48
        track.pix_fmt = _PIXELS.get(codec, "yuv420p")
        for index in range(6):
            frame = av.VideoFrame.from_ndarray(np.roll(gradient(48, 64), index, axis=1), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()
