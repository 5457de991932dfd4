"""Pictures and videos on disk, each written whole or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

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


class VideoFile:
    """An MP4 (MPEG-4 part 2) video in a file, written frame by frame.

    A context manager: the file appears when it ends well.  Raises OutputError when it cannot be written, and
    leaves nothing behind then.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float, height: int, width: int) -> None:
        self._frames = 0
        self._pad = (height % 2, width % 2)
        size = (width + self._pad[1], height + self._pad[0])
        with ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_write(path))
            with quiet_opencv():
                codec = cv2.VideoWriter.fourcc(*"mp4v")
                self._writer = cv2.VideoWriter(str(self._temporary), codec, fps, size)
            if not self._writer.isOpened():
                raise OutputError(
                    f"could not write video '{path}' of {width} x {height} pixels: the folder is not "
                    "writable, or the size is not possible (MPEG-4 ends at 8191 a side)"
                )
            stack.callback(self._writer.release)
            self._stack = stack.pop_all()

    def add(self, picture: RgbImage) -> None:
        """Add an RGB frame; an odd side gets its last row or column twice, as the codec wants it even."""
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        bottom, right = self._pad
        self._writer.write(cv2.copyMakeBorder(bgr, 0, bottom, 0, right, cv2.BORDER_REPLICATE))
        self._frames += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None:
                raise error
            self._writer.release()
            # OpenCV reports no failed write: a full disk shows only in what can be read back.
            if _frames_in(self._temporary) != self._frames:
                raise OSError(errno.EIO, "some frames could not be stored; is the disk full?")


def _frames_in(video: Path) -> int:
    with quiet_opencv():
        capture = cv2.VideoCapture(str(video))
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
    return count
