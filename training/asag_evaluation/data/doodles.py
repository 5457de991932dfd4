"""Doodles: pictures to run a detector on where no photographs are at hand, without annotations."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def draw_doodles(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Draw (height, width, 3) RGB: a few large and many small shapes, the same for the same seed."""
    rng = np.random.default_rng([seed, height, width])
    canvas = _background(rng, height, width)
    large, medium, small = rng.uniform(0.2, 0.5, 3), rng.uniform(0.04, 0.15, 10), rng.uniform(0.01, 0.04, 20)
    sides = np.concatenate([large, medium, small])
    for side in sides * min(height, width):
        _draw_shape(rng, canvas, float(side))
    noise = rng.normal(0, 6, canvas.shape)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Draw soft blotches of muted colour."""
    coarse = rng.uniform(60, 200, (6, 8, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth, 0, 255).astype(np.uint8)


def _draw_shape(rng: np.random.Generator, canvas: NDArray[np.uint8], side: float) -> None:
    """Draw one shape of about `side` pixels somewhere on the canvas, shaded by an outline."""
    height, width = canvas.shape[:2]
    centre = (rng.uniform(0, width), rng.uniform(0, height))
    colour = [int(c) for c in rng.integers(20, 236, 3)]
    size = (max(side, 2.0), max(side * rng.uniform(0.5, 1.0), 2.0))
    box = (centre, size, float(rng.uniform(0, 180)))
    outline = [c // 2 for c in colour]
    thickness = max(int(side / 20), 1)
    kind = rng.integers(3)
    if kind == 0:
        cv2.ellipse(canvas, box, colour, -1, cv2.LINE_AA)
        cv2.ellipse(canvas, box, outline, thickness, cv2.LINE_AA)
        return
    corners = cv2.boxPoints(box).astype(np.int32)
    if kind == 1:
        corners = corners[:3]
    cv2.fillPoly(canvas, [corners], colour, cv2.LINE_AA)
    cv2.polylines(canvas, [corners], True, outline, thickness, cv2.LINE_AA)
