"""Pictures on disk, each written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import cv2

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import OutputError
from asag_deploy.images.reading import RgbImage, quiet_opencv

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Formats that pictures are written in."""


def write_picture(path: str | os.PathLike[str], picture: RgbImage) -> None:
    """Write an RGB picture in the format of the path's suffix, whole or not at all.

    Raises OutputError for an unknown suffix, a picture too large for the format, or a path that cannot be
    written.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        raise OutputError(
            f"could not write '{target}': its name must end in one of {', '.join(PICTURE_SUFFIXES)}"
        )
    with quiet_opencv():
        try:
            fine, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        except cv2.error:
            fine = False
    if not fine:
        height, width = picture.shape[:2]
        raise OutputError(
            f"could not write '{target}': {width} x {height} pixels are too many for {suffix}, use .png"
        )
    with atomic_write(target) as temporary:
        temporary.write_bytes(data.tobytes())
