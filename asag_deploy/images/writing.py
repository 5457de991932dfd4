"""Pictures on disk, each written whole or not at all."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import cv2
import numpy as np
from cv2.typing import MatLike

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import OutputError
from asag_deploy.images.decoder_log import quiet_opencv
from asag_deploy.images.reading import RgbImage

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Formats that pictures are written in."""
_SOFTWARE = b"asag-deploy\0"
_MARK = struct.pack("<2sHLHHHLLL", b"II", 42, 8, 1, 305, 2, len(_SOFTWARE), 26, 0) + _SOFTWARE
"""EXIF that names what made the picture, by which it is known again."""
_WITH_EXIF = (".jpg", ".jpeg", ".png")
"""What every OpenCV that is taken writes EXIF into; behind the others' end the mark bothers no reader."""
_NEAR = 4096
"""Bytes from the start of a file that EXIF lies within."""


def write_picture(path: str | os.PathLike[str], picture: RgbImage) -> None:
    """Write an RGB picture in the format of the path's suffix, whole or not at all, and marked as ours.

    Raises OutputError for an unknown suffix, a picture too large for the format, or a path that cannot be
    written.
    """
    if not os.fspath(path):  # which would be the working directory
        raise OutputError("the path to write a picture to is empty; name a file")
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        raise OutputError(
            f"could not write '{target}': its name must end in one of {', '.join(PICTURE_SUFFIXES)}"
        )
    with quiet_opencv():
        try:
            fine, data = _encode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        except cv2.error:
            fine, data = False, b""
    if not fine:
        height, width = picture.shape[:2]
        raise OutputError(
            f"could not write '{target}': {width} x {height} pixels are too many for {suffix}, use .png"
        )
    with atomic_write(target) as temporary:
        temporary.write_bytes(data)


def is_own_picture(path: Path) -> bool:
    """Tell whether a file was written by `write_picture`; raises OSError where it cannot be read."""
    with path.open("rb") as file:
        start = file.read(_NEAR)
        file.seek(max(file.seek(0, os.SEEK_END) - len(_MARK), 0))
        return _MARK in start or file.read() == _MARK


def _encode(suffix: str, bgr: MatLike) -> tuple[bool, bytes]:
    if suffix in _WITH_EXIF:
        exif = np.frombuffer(_MARK, np.uint8)
        fine, data = cv2.imencodeWithMetadata(suffix, bgr, [cv2.IMAGE_METADATA_EXIF], [exif])
        return fine, bytes(data)
    fine, data = cv2.imencode(suffix, bgr)
    return fine, bytes(data) + _MARK
