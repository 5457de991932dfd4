"""Boxes as arrays, from the network's pixels to those of an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]


def anchors_of(cxcywh: NDArray[np.floating], scale: tuple[float, float]) -> Boxes:
    """Convert anchors (q, 4) cx, cy, w, h of the network to x1, y1, x2, y2, `scale` (x, y) times larger."""
    centre, half = cxcywh[:, :2], cxcywh[:, 2:] / 2
    corners: Boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    return corners * twice(scale)


def clip(xyxy: Boxes, height: int, width: int) -> Boxes:
    """Clip boxes (n, 4), so that none reaches beyond the image."""
    return np.clip(xyxy, np.float32(0), np.array([width, height, width, height], dtype=np.float32))


def twice(scale: tuple[float, float]) -> Boxes:
    """Return (4,) x, y, x, y."""
    return np.array([*scale, *scale], dtype=np.float32)
