"""The demo's pictures: detections above, where the network looked below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from asag_deploy import Detector
from asag_deploy.detections import Detections
from asag_deploy.images.reading import RgbImage
from asag_deploy.images.writing import write_picture

PHOTOGRAPHS_GALLERY = "photographs.jpg"
SCENES_GALLERY = "gallery.jpg"
SHOWN_AS = "the demo's pictures"
_THRESHOLD = 0.5
"""Of the detections that are drawn."""


def write_gallery(path: Path, detector: Detector, pictures: Sequence[RgbImage], *, enlarged: float) -> None:
    """Write one picture of several of one size, side by side.

    enlarged: how many times they are, for those that are small on a screen.
    """
    columns = [_column(detector, picture, enlarged) for picture in pictures]
    if columns:
        write_picture(path, np.hstack(columns))


def _column(detector: Detector, image: RgbImage, enlarged: float) -> RgbImage:
    picture = cv2.resize(image, None, fx=enlarged, fy=enlarged, interpolation=cv2.INTER_CUBIC).astype(
        np.uint8
    )
    found: Detections = detector(picture, channel_order="rgb", threshold=_THRESHOLD)
    probing = found.filter(1.0).plot(picture, trace=True, channel_order="rgb")
    return np.vstack([found.plot(picture, channel_order="rgb"), probing])
