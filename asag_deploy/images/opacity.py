"""Opacity: what is seen of transparent pixels, which is the white behind them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def blend_onto_white(colour: NDArray[np.uint8], opacity: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (H, W, 3): what a viewer shows, not the colours that transparency hides.

    colour: (H, W, 3); opacity: (H, W), of which the colours have not been multiplied by it.
    """
    if opacity.min() == 255:
        return np.ascontiguousarray(colour)
    weight = opacity.astype(np.uint16)[..., None]
    blended = (colour * weight + 255 * (255 - weight) + 127) // 255
    return blended.astype(np.uint8)
