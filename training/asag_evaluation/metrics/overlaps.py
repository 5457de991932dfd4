"""Overlaps of boxes x1, y1, x2, y2, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.floating[Any]]


def areas(boxes: Boxes) -> NDArray[np.float64]:
    """Return the areas (n,) of boxes (n, 4)."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).astype(np.float64)
    return np.asarray(sides[:, 0] * sides[:, 1])


def intersections(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Return the areas (n, m) that boxes (n, 4) and (m, 4) share."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(high - low, 0).astype(np.float64)
    return np.asarray(sides[..., 0] * sides[..., 1])


def iou(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Return intersection over union (n, m); 0 for boxes without area."""
    shared = intersections(a, b)
    union = areas(a)[:, None] + areas(b)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def covered(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Return (n, m) the part of each box of `a` that each of `b` covers."""
    shared = intersections(a, b)
    own = np.broadcast_to(areas(a)[:, None], shared.shape)
    return np.divide(shared, own, out=np.zeros_like(shared), where=own > 0)


def clip_boxes(boxes: Boxes, height: int, width: int) -> NDArray[np.float64]:
    """Clip boxes (n, 4) to the image."""
    return np.clip(boxes.astype(np.float64), 0, np.array([width, height, width, height]))
