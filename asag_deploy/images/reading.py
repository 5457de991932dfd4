"""Images in: files and arrays become uint8 (H, W, 3) RGB; what is no image is refused in a sentence."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import ConfigError, ImageError

ChannelOrder = Literal["bgr", "rgb"]
RgbImage = NDArray[np.uint8]
"""(H, W, 3) RGB, C-contiguous."""
ImageLike = str | os.PathLike[str] | NDArray[Any]
"""A path, or an array as `as_rgb` takes it."""

# OpenCV 5 has moved getLogLevel and setLogLevel there; their numbers are the same.
_opencv_log: Any = getattr(cv2.utils, "logging", cv2)
_SILENT = 0

_ORIENTATION_TAG = 0x0112
_CHANNELS = (1, 3, 4)


def read_image(path: str | os.PathLike[str]) -> RgbImage:
    """Read an image file as uint8 (H, W, 3) RGB, upright.

    Grey images get three equal channels, 16-bit ones are scaled to 8 bits, transparent ones are blended onto
    white, CMYK is converted, and the EXIF orientation is applied.  Raises ImageError for a file that is
    missing, empty, truncated, or no image.
    """
    file = Path(path)
    return decode_image(_read_bytes(file), file)


def decode_image(data: bytes, name: str | os.PathLike[str]) -> RgbImage:
    """Decode the bytes of an image file as uint8 (H, W, 3) RGB, upright, as `read_image` does.

    `name` is what messages call the image.  Raises ImageError for bytes that are empty, truncated, or no
    image.
    """
    if not data:
        raise ImageError(f"image '{name}' is empty: the file has 0 bytes")
    if not _is_complete(data):
        raise ImageError(f"image '{name}' is truncated: its end is missing, so copy or download it again")
    image = _decode(data)
    if image is None or image.size == 0:
        raise ImageError(
            f"'{name}' is damaged or is not an image in a format OpenCV reads "
            "(JPEG, PNG, WebP, BMP, TIFF and others)"
        )
    if image.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"image '{name}' holds {image.dtype} values; convert it to 8 or 16 bits a channel")
    return as_rgb(image, "bgr")


def as_rgb(image: NDArray[Any], channel_order: ChannelOrder) -> RgbImage:
    """Convert an array to uint8 (H, W, 3) RGB; a contiguous RGB one is returned as it is, without a copy.

    Takes uint8 or uint16 (scaled to 8 bits), as (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), whose fourth
    channel is opacity and is blended onto white; `channel_order` says which way round the first three are.
    Raises ImageError for anything else: other types, channels first, a batch, an image without pixels.
    """
    check_channel_order(channel_order)
    _check_array(image)
    pixels = _to_8_bits(image)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return cast(RgbImage, cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    if pixels.shape[2] == 4:
        pixels = _blend_onto_white(pixels)
    if channel_order == "bgr":
        return cast(RgbImage, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return np.ascontiguousarray(pixels)


def check_channel_order(channel_order: str) -> None:
    """Raise ConfigError for anything but `bgr` and `rgb`."""
    if channel_order not in ("bgr", "rgb"):
        raise ConfigError(f"unknown channel_order '{channel_order}'; expected 'bgr' or 'rgb'")


def load(image: ImageLike, channel_order: ChannelOrder) -> RgbImage:
    """Read a path with `read_image`, or convert an array with `as_rgb`."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    return as_rgb(image, channel_order)


class _Quiet:
    """How many callers want OpenCV silent, and the log level that the last of them restores."""

    lock = threading.Lock()
    depth = 0
    level = 0


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keep OpenCV's own log off the terminal; errors come as exceptions instead.  Safe across threads."""
    with _Quiet.lock:
        _Quiet.depth += 1
        if _Quiet.depth == 1:
            _Quiet.level = _opencv_log.getLogLevel()
            _opencv_log.setLogLevel(_SILENT)
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.depth -= 1
            if _Quiet.depth == 0:
                _opencv_log.setLogLevel(_Quiet.level)


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"image '{file}' does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"'{file}' is a folder, not an image; pass the images in it") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ImageError(f"image '{file}' cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _is_complete(data: bytes) -> bool:
    """Tell whether a JPEG or PNG has its end, which OpenCV would fill with grey or complain about."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg_is_complete(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data.rfind(b"IEND") >= 0
    return True


def _jpeg_is_complete(data: bytes) -> bool:
    """Tell whether an end-of-image marker follows the first scan.

    The segments before the scan are stepped over, because an embedded thumbnail is a whole JPEG with an end
    marker of its own; in the scan itself the two bytes can mean nothing else.
    """
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return True  # damaged rather than truncated: the decoder's to judge
        marker = data[position + 1]
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        if marker == 0xFF:
            position += 1  # a fill byte
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2  # a marker without a segment
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _decode(data: bytes) -> NDArray[Any] | None:
    """Decode to (H, W), (H, W, 3) BGR or (H, W, 4) BGRA in its own depth, upright; None if OpenCV cannot."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    with quiet_opencv():
        try:
            # Only IMREAD_UNCHANGED keeps opacity, and it leaves the orientation to us.
            decoded = cast("tuple[Any, ...]", cv2.imdecodeWithMetadata(buffer, flags=cv2.IMREAD_UNCHANGED))
        except cv2.error:
            return None
    image, kinds, metadata = decoded
    if image is None:
        return None
    for kind, content in zip(kinds, metadata, strict=True):
        if kind == cv2.IMAGE_METADATA_EXIF:
            image = _upright(image, _orientation(np.asarray(content, dtype=np.uint8).tobytes()))
    return cast("NDArray[Any]", image)


def _orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) that EXIF data states in its first directory; 1 if it states none."""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(offset: int, size: int) -> int:
        return int.from_bytes(exif[offset : offset + size], order)

    start = number(4, 4)
    for entry in range(start + 2, start + 2 + 12 * number(start, 2), 12):
        if number(entry, 2) == _ORIENTATION_TAG:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation: 5 to 8 are transposed, then rows or columns are reversed."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _check_array(image: NDArray[Any]) -> None:
    if not isinstance(image, np.ndarray):
        raise ImageError(f"expected an image as a path or a numpy array, got {type(image).__name__}")
    shape, dtype = image.shape, image.dtype
    if image.ndim == 4:
        raise ImageError(f"expected one image (H, W, 3), got a batch {shape}; pass a list of images instead")
    if image.ndim not in (2, 3):
        raise ImageError(f"expected an image (H, W, 3), got an array of shape {shape}")
    if image.size == 0:
        raise ImageError(f"expected an image with pixels, got an empty array of shape {shape}")
    if image.ndim == 3 and shape[2] not in _CHANNELS:
        if shape[0] in _CHANNELS:
            raise ImageError(
                f"expected an image (H, W, 3), got {shape}, which has its channels first; "
                "pass image.transpose(1, 2, 0)"
            )
        raise ImageError(f"expected an image with 1, 3 or 4 channels (H, W, 3), got {shape}")
    if np.issubdtype(dtype, np.floating):
        raise ImageError(
            f"expected a uint8 image with values 0 to 255, got {dtype}; scale it to uint8, "
            "or pass a normalised float32 batch to Detector.forward"
        )
    if dtype not in (np.uint8, np.uint16):
        raise ImageError(f"expected a uint8 image with values 0 to 255, got {dtype}; convert it to uint8")


def _to_8_bits(image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.dtype == np.uint16:
        scaled = cv2.convertScaleAbs(image, alpha=255 / 65535)
        return cast("NDArray[np.uint8]", scaled.reshape(image.shape))
    return image


def _blend_onto_white(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn (H, W, 4) into (H, W, 3): what a viewer shows, not the colours that transparency hides."""
    colour, opacity = image[..., :3], image[..., 3:]
    if opacity.min() == 255:
        return np.ascontiguousarray(colour)
    weight = opacity.astype(np.uint16)
    blended = (colour * weight + 255 * (255 - weight) + 127) // 255
    return blended.astype(np.uint8)
