"""Where the server keeps what it shows, until nobody looks at it any more."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from pathlib import Path

import cv2

from asag_deploy.images.drawing import Picture

KEPT_SECONDS = 3600
"""How long what was shown can be had; a page that is left open longer shows it again after any change."""
_SWEPT_SECONDS = 300.0
_QUALITY = [
    cv2.IMWRITE_JPEG_QUALITY,
    90,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]
"""Thin coloured lines keep their colour only where no colour is left out."""


class Shelf:
    """Files under names that nobody can guess, each for an hour."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._swept = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, name: str) -> str:
        """Keep data as a file of that name; return its path."""
        place = self._folder / secrets.token_urlsafe(18)
        with self._lock:
            self._sweep()
            place.mkdir()
            file = place / name
            file.write_bytes(data)
        return str(file)

    def picture(self, picture: Picture, name: str) -> str:
        """Keep an RGB picture as a JPEG file of that name, without suffix; return its path."""
        fine, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), _QUALITY)
        assert fine, "it is of a size that is shown on a page"
        return self.put(data.tobytes(), f"{name}.jpg")

    def _sweep(self) -> None:
        """Remove what is too old."""
        if time.monotonic() - self._swept < _SWEPT_SECONDS:
            return
        self._swept = time.monotonic()
        oldest = time.time() - KEPT_SECONDS
        for place in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if place.stat().st_mtime < oldest:
                    for file in place.iterdir():
                        file.unlink()
                    place.rmdir()
