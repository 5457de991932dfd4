"""How the frames of an animation lie on each other: each changes a rectangle, and leaves something behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Left = Literal["stays", "cleared", "as before"]
"""What is left of a frame when the next one comes."""


class Piece(NamedTuple):
    """What one frame changes."""

    pixels: NDArray[Any]
    """uint8 or uint16 (H, W, 4) BGRA, not multiplied by their opacity; the same type in all frames."""
    left: int
    top: int
    seconds: float
    left_behind: Left
    is_over: bool
    """Whether it is put onto what lies there, instead of into its place."""
    blank: tuple[int, int, int, int] = (0, 0, 0, 0)
    """BGRA of what it leaves cleared, and of what nothing has painted where it is the first."""


def composed(pieces: Iterable[Piece], height: int, width: int) -> Iterator[tuple[NDArray[Any], float]]:
    """Yield each frame as it is shown, (H, W, 4) BGRA, and for how many seconds.

    Each array is the same, and holds a frame until the next one is asked for.  It ends at a frame that
    reaches beyond the picture.
    """
    canvas: NDArray[Any] | None = None
    for piece in pieces:
        bottom, right = piece.top + piece.pixels.shape[0], piece.left + piece.pixels.shape[1]
        if right > width or bottom > height:
            return
        if canvas is None:
            canvas = np.empty((height, width, 4), piece.pixels.dtype)
            canvas[:] = piece.blank
        region = canvas[piece.top : bottom, piece.left : right]
        before = region.copy() if piece.left_behind == "as before" else piece.blank
        if piece.is_over:
            _put_over(region, piece.pixels)
        else:
            region[:] = piece.pixels
        yield canvas, piece.seconds
        if piece.left_behind != "stays":
            region[:] = before


def as_bgra(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return (H, W), (H, W, 3) or (H, W, 4) pixels with all four channels, opaque where they did not say."""
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGRA)
    return pixels if pixels.shape[2] == 4 else cv2.cvtColor(pixels, cv2.COLOR_BGR2BGRA)


def _put_over(below: NDArray[Any], above: NDArray[Any]) -> None:
    """Put BGRA pixels onto others, which are changed."""
    most = 65_535 if above.dtype == np.uint16 else 255
    if above[..., 3].min() == most:
        below[:] = above
        return
    covers = above[..., 3:] == most
    if (covers | (above[..., 3:] == 0)).all():
        np.copyto(below, above, where=covers)
        return
    share = above[..., 3:].astype(np.float32) / most
    rest = below[..., 3:].astype(np.float32) / most * (1 - share)
    opacity = share + rest
    with np.errstate(invalid="ignore", divide="ignore"):
        colour = (above[..., :3] * share + below[..., :3] * rest) / opacity
    below[:] = np.rint(np.concatenate([np.where(opacity > 0, colour, 0), opacity * most], axis=2))
