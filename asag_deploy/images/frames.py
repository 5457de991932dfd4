"""All frames of an animation, and all pages of a TIFF; `reading` gives the first of them."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import ImageError, plural
from asag_deploy.images.apng import apng_frames
from asag_deploy.images.containers import webp_whole_part
from asag_deploy.images.decoder_log import decoder_log, quiet_opencv
from asag_deploy.images.formats import image_header
from asag_deploy.images.gif import gif_frames
from asag_deploy.images.header import Header, truncated
from asag_deploy.images.reading import (
    MAX_PIXELS,
    RgbImage,
    as_rgb,
    checked_header,
    decode_image,
    read_bytes,
    scaled,
    turned,
)
from asag_deploy.images.tiff import decode_page, tiff_pages

_MOST_AT_ONCE = 2**27
"""Bytes of decoded frames that are held at a time."""
_SHORTEST_S, _INSTEAD_S = 0.01, 0.1
"""Frames that are to be shown for less than browsers can are shown for a tenth of a second by them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFrame:
    """One frame of an animation, or one page."""

    index: int
    """From 0."""
    image: RgbImage
    """uint8 (H, W, 3) RGB, upright, composed as it is shown; pages may differ in size."""
    seconds: float | None
    """How long it is shown; None for pages and single images."""


def count_image_frames(path: str | os.PathLike[str]) -> int:
    """Count the frames or pages of an image file, without decoding it; 1 for what is no image.

    It is what the file says of itself, or has if it says nothing; fewer may be there.
    """
    try:
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = image_header(data)
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return 1
    return 1 if header is None else max(header.frames, 1)


def read_frames(path: str | os.PathLike[str]) -> Iterator[ImageFrame]:
    """Yield every frame of an animated GIF, PNG, WebP or AVIF, and every page of a TIFF; of others the one.

    As `decode_frames` does.
    """
    file = Path(path)
    yield from decode_frames(read_bytes(file), file)


def decode_frames(
    data: bytes, name: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS
) -> Iterator[ImageFrame]:
    """Yield every frame or page in the bytes of an image file, decoded as `decode_image` does.

    A few are decoded at a time, so that memory does not grow with their number.  Raises ImageError as
    `decode_image` does; of a file that ends early, after the frames that are there.
    """
    text = os.fspath(name)
    header = checked_header(data, text, max_pixels)
    if header.format == "tiff":
        yield from _pages(data, header, text, max_pixels)
    elif header.frames == 1 and header.complete:
        image = decode_image(data, text, max_pixels=max_pixels)
        yield ImageFrame(index=0, image=image, seconds=None)
    elif header.format in ("gif", "png", "webp", "avif"):
        yield from _animation(data, header, text)
    else:
        decode_image(data, text, max_pixels=max_pixels)


def _pages(data: bytes, header: Header, name: str, max_pixels: int) -> Iterator[ImageFrame]:
    done = 0
    for page in tiff_pages(data)[: header.whole_frames]:
        height, width = page.shape
        if height * width > max_pixels:
            raise ImageError(
                f"page {done} of image '{name}' has {width} x {height} pixels, and at most {max_pixels} are "
                "taken: make it smaller"
            )
        with quiet_opencv():
            image = decode_page(data, page, name)
        yield ImageFrame(index=done, image=turned(image, page.orientation), seconds=None)
        done += 1
    if not header.complete:
        raise ImageError(_broke_off(name, done, None))


def _animation(data: bytes, header: Header, name: str) -> Iterator[ImageFrame]:
    own = _COMPOSED_HERE.get(header.format)
    frames = _frames_by_opencv(data, header) if own is None else own(data)
    done = 0
    for frame, seconds in itertools.islice(frames, header.whole_frames):
        shown = _INSTEAD_S if seconds <= _SHORTEST_S else seconds
        image = turned(as_rgb(scaled(frame, header.bits), "bgr"), header.orientation)
        yield ImageFrame(index=done, image=image, seconds=shown)
        done += 1
    if done < header.frames or not header.complete:
        raise ImageError(_broke_off(name, done, header.frames if done < header.frames else None))


def _frames_by_opencv(data: bytes, header: Header) -> Iterator[tuple[NDArray[Any], float]]:
    whole = data if header.complete else _WHOLE_PARTS[header.format](data)
    window = max(1, _MOST_AT_ONCE // (4 * max(header.height * header.width, 1)))
    done = 0
    while done < header.whole_frames:
        frames, durations = _some_frames(whole, done, min(window, header.whole_frames - done))
        if not frames:
            return
        for frame, milliseconds in zip(frames, durations, strict=True):
            yield frame, milliseconds / 1000
        done += len(frames)


def _some_frames(data: bytes, start: int, count: int) -> tuple[list[NDArray[Any]], list[int]]:
    """Decode frames from `start` on, composed onto those before; none if OpenCV cannot."""
    with quiet_opencv():
        try:
            buffer = np.frombuffer(data, np.uint8)
            with decoder_log():
                found, animation = cv2.imdecodeanimation(buffer, start=start, count=count)
        except cv2.error:
            return [], []
    frames = list(animation.frames)[:count] if found else []
    return frames, [int(duration) for duration in animation.durations[: len(frames)]]


def _broke_off(name: str, done: int, declared: int | None) -> str:
    if done == 0:
        return truncated(name)
    frames = plural(done, "frame") if declared is None else f"{done} of {plural(declared, 'frame')}"
    return f"image '{name}' broke off after {frames}: copy or download it again"


_COMPOSED_HERE: dict[str, Callable[[bytes], Iterator[tuple[NDArray[Any], float]]]] = {
    "gif": gif_frames,
    "png": apng_frames,
}
_WHOLE_PARTS: dict[str, Callable[[bytes], bytes]] = {
    "webp": webp_whole_part,
    "avif": lambda data: data,
}
"""How what is left of a file that ends early becomes one that ends properly."""
