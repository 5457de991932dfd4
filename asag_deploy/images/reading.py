"""Images in: files and arrays become uint8 (H, W, 3) RGB; what is no image is refused in a sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.downloads import LFS_POINTER, is_web_page
from asag_deploy.errors import ConfigError, ImageError
from asag_deploy.images.apng import grey_key, without_animation
from asag_deploy.images.bitmaps import decode_bmp, decode_pnm
from asag_deploy.images.containers import png_damage
from asag_deploy.images.decoder_log import decoder_log, jpeg_damage, quiet_opencv
from asag_deploy.images.formats import image_header, unread_format
from asag_deploy.images.gif import gif_frames
from asag_deploy.images.header import Header, truncated
from asag_deploy.images.jpeg2000 import said_to_be_rgb
from asag_deploy.images.opacity import blend_onto_white
from asag_deploy.images.tiff import decode_page, tiff_pages
from asag_deploy.images.video_containers import container_of_bytes

ChannelOrder = Literal["bgr", "rgb"]
RgbImage = NDArray[np.uint8]
"""(H, W, 3) RGB, C-contiguous."""
ImageLike = str | os.PathLike[str] | NDArray[Any]
"""A path, or an array as `as_rgb` takes it."""
_ENCODED = (bytes, bytearray, memoryview)
"""What the contents of a file come as: sequences of numbers to Python, but no images."""

# OpenCV 5 has moved getLogLevel and setLogLevel there; their numbers are the same.

MAX_PIXELS = 2**29
"""What is decoded at most: 536 million pixels, which are 1.6 GB."""

_CHANNELS = (1, 3, 4)


def read_image(path: str | os.PathLike[str], *, upright: bool = True) -> RgbImage:
    """Read an image file as uint8 (H, W, 3) RGB, upright, as a viewer shows it.

    Grey images get three equal channels, those of other depths are scaled to 8 bits, transparent ones are
    blended onto white, and CMYK is converted.  The orientation that the file states is applied, unless
    `upright` is False: then the pixels are as they are stored.  Of an animation it is the first frame, of
    several pages the first; `asag_deploy.images.frames` reads them all.  Colour profiles are not applied:
    colours are taken for sRGB, as detectors are trained.  Raises ImageError for a file that is missing,
    empty, truncated, damaged, or no image.
    """
    if not os.fspath(path):  # which would be the working directory
        raise ImageError("the path of an image is empty; name an image file")
    file = Path(path)
    return decode_image(read_bytes(file), file, upright=upright)


def decode_image(
    data: bytes, name: str | os.PathLike[str], *, upright: bool = True, max_pixels: int = MAX_PIXELS
) -> RgbImage:
    """Decode the bytes of an image file as uint8 (H, W, 3) RGB, upright, as `read_image` does.

    `name` is what messages call the image.  Raises ImageError for bytes that are empty, truncated, damaged or
    no image, and before anything is decoded for an image of more than `max_pixels`.
    """
    text = os.fspath(name)
    header = checked_header(data, text, max_pixels)
    if not header.complete:
        raise ImageError(truncated(text))
    with quiet_opencv():
        image = _decode(data, header, text)
    return turned(image, header.orientation) if upright else image


def checked_header(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Header:
    """Return what an image file says of itself before it is decoded; it may still end early.

    Raises ImageError for bytes that are empty, damaged or no image, and for more than `max_pixels`.
    """
    if not data:
        raise ImageError(f"image '{name}' is empty: the file has 0 bytes")
    header = image_header(data)
    if header is None:
        raise ImageError(_no_image(data, name))
    if header.complete and min(header.height, header.width) < 1:
        raise ImageError(f"image '{name}' is damaged: it says nowhere how large it is")
    damage = png_damage(data) if header.format == "png" else header.damage
    if damage is not None:
        raise ImageError(f"image '{name}' is damaged: {damage}; copy or download it again")
    if header.height * header.width > max_pixels:
        raise ImageError(
            f"image '{name}' has {header.width} x {header.height} pixels, and at most {max_pixels} are "
            "taken: make it smaller"
        )
    return header


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
        pixels = blend_onto_white(pixels[..., :3], pixels[..., 3])
    if channel_order == "bgr":
        return cast(RgbImage, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return np.ascontiguousarray(pixels)


def check_channel_order(channel_order: str) -> None:
    """Raise ConfigError for anything but `bgr` and `rgb`."""
    if channel_order not in ("bgr", "rgb"):
        raise ConfigError(f"unknown channel_order '{channel_order}'; expected 'bgr' or 'rgb'")


def load(image: ImageLike, channel_order: ChannelOrder) -> RgbImage:
    """Read a path with `read_image`, or convert an array with `as_rgb`; raises what these raise.

    A `channel_order` that there is not is a ConfigError for both.
    """
    check_channel_order(channel_order)
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    return as_rgb(image, channel_order)


def refuse_encoded(image: object) -> None:
    """Raise ImageError for the bytes of a file, which are no image yet; say how they become one."""
    if isinstance(image, _ENCODED):
        raise ImageError(
            f"expected an image as a path or a numpy array, got {type(image).__name__}; give the path of the "
            "file, or decode its bytes with asag_deploy.images.reading.decode_image(data, name) and give "
            "what that returns with channel_order='rgb'"
        )


def read_bytes(file: Path) -> bytes:
    """Read a file (ImageError if that is not possible)."""
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


_ENOUGH = 4096
"""Bytes by which it is seen what a file is."""
_SIGNED = 12
"""Bytes that tell a video from an AVIF image."""


def _no_image(data: bytes, name: str) -> str:
    known = unread_format(data)
    if known is not None:
        return f"'{name}' is a {known} file, which OpenCV does not read: convert it to JPEG or PNG"
    if len(data) >= _SIGNED and container_of_bytes(data[:_ENOUGH]) is not None:
        return f"'{name}' is a video and no image: asag-detect takes files, and pipes named like one (a.mkv)"
    if data.startswith(LFS_POINTER):
        return f"'{name}' is a Git LFS pointer, not the image itself: get that with `git lfs pull`"
    if is_web_page(data[:_ENOUGH]):
        return f"'{name}' is a web page, as a download leaves that was refused: download it again"
    return f"'{name}' {_DAMAGED}"


_DAMAGED = (
    "is damaged or is not an image in a format that is read (JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, ...)"
)


def _decode(data: bytes, header: Header, name: str) -> RgbImage:
    """Decode to RGB on white, as stored."""
    if header.format == "tiff":
        return decode_page(data, tiff_pages(data)[0], name)
    if header.format == "pnm":
        return decode_pnm(data, name)
    if header.format == "gif":
        return _first_of_gif(data, name)
    plain = decode_bmp(data, name) if header.format == "bmp" else None
    return _decode_by_opencv(data, header, name) if plain is None else plain


def _first_of_gif(data: bytes, name: str) -> RgbImage:
    first = next(gif_frames(data), None)
    if first is None:
        raise ImageError(f"image '{name}' is damaged: copy or download it again")
    return as_rgb(first[0], "bgr")


def _decode_by_opencv(data: bytes, header: Header, name: str) -> RgbImage:
    as_stored = said_to_be_rgb(data) if header.format == "jpeg2000" else None
    image, damage = _imdecode(data if as_stored is None else as_stored, header)
    if image is None or image.size == 0:
        raise ImageError(
            f"image '{name}' is damaged, or {header.format.upper()} of a kind that OpenCV does not read: "
            "save it again as JPEG or PNG"
        )
    if damage is not None:
        raise ImageError(
            f"image '{name}' is damaged, and a part of it cannot be seen ({damage}): "
            "copy or download it again"
        )
    if image.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"image '{name}' holds {image.dtype} values; convert it to 8 or 16 bits a channel")
    if header.format == "png" and image.ndim == 2:
        key = grey_key(data)
        if key is not None:
            image[image == key] = np.iinfo(image.dtype).max  # transparent, which OpenCV overlooks
    image = scaled(image, header.bits)
    if as_stored is not None:
        return cast(RgbImage, cv2.cvtColor(image[..., ::-1][..., [0, 2, 1]], cv2.COLOR_YCrCb2RGB))
    return as_rgb(image, "bgr")


def _imdecode(data: bytes, header: Header) -> tuple[NDArray[Any] | None, str | None]:
    """Decode; also return what is wrong with a JPEG whose damage the decoder has mended."""
    buffer = np.frombuffer(without_animation(data) if header.format == "png" else data, dtype=np.uint8)
    try:
        with decoder_log() as complaints:
            # Only IMREAD_UNCHANGED keeps opacity, and it leaves the orientation to us.
            image = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None, None
    return image, jpeg_damage(complaints, data) if header.format == "jpeg" else None


def scaled(image: NDArray[Any], bits: int | None) -> NDArray[Any]:
    """Scale samples of so many bits to 8, where they do not fill their type; None for those that do."""
    if bits is None or bits in (8, 16) or bits > 16:
        return image
    eight = cv2.convertScaleAbs(image, alpha=255 / ((1 << bits) - 1))
    return eight.reshape(image.shape)


def turned(image: RgbImage, orientation: int) -> RgbImage:
    """Undo an EXIF orientation: 5 to 8 are transposed, then rows or columns are reversed."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _check_array(image: NDArray[Any]) -> None:
    refuse_encoded(image)
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
