"""Canvases: the few shapes that pictures are padded to, so that engines of exactly these shapes serve them.

An engine of one shape is compiled for it, needs no sizes from the host, and its CUDA graph is captured once
for all pictures.  It takes one image; larger batches, and images that no canvas holds, go to the engines that
take every shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError

_ASPECTS = (1.0, 4 / 3, 3 / 2)
"""Those of most cameras, and a square.  Everything longer goes on the longest canvas that there is."""


@dataclass(frozen=True, order=True)
class Canvas:
    """Height and width in pixels that a picture is padded to, right and bottom."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def area(self) -> int:
        """In pixels."""
        return self.height * self.width

    def holds(self, height: int, width: int) -> bool:
        """Tell whether a picture of this size fits."""
        return height <= self.height and width <= self.width


def parse_canvas(text: str) -> Canvas:
    """Read `800x1088`, height first, as a canvas.  Raises ConfigError for anything else."""
    found = re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.strip().lower())
    if found is None:
        raise ConfigError(f"unknown canvas '{text}'; give height and width in pixels, such as 800x1088")
    return Canvas(int(found[1]), int(found[2]))


def default_canvases(preprocessing: Preprocessing) -> tuple[Canvas, ...]:
    """Return a square, 4:3, 3:2 and the longest that resized pictures can be, each lying and standing.

    Every picture whose longer side is resized to `longer_side` at most fits on one of them.  For 800 and 1333
    pixels they are 800 by 800, 1088, 1216 and 1344, and the last three turned.
    """
    shorter, longer, divisor = (
        preprocessing.shorter_side,
        preprocessing.longer_side,
        preprocessing.size_divisor,
    )
    sides = [min(int(shorter * aspect), longer) for aspect in _ASPECTS]
    short = round_up_to(min(shorter, longer), divisor)
    lying = {Canvas(short, round_up_to(side, divisor)) for side in (*sides, longer)}
    return in_order({*lying, *(Canvas(canvas.width, canvas.height) for canvas in lying)})


def in_order(canvases: Iterable[Canvas]) -> tuple[Canvas, ...]:
    """Return each canvas once, the smallest first; of two that are equally large, the one that lies."""
    return tuple(sorted(set(canvases), key=lambda canvas: (canvas.area, canvas.height)))


def smallest_holding(canvases: Sequence[Canvas], height: int, width: int) -> Canvas | None:
    """Return the canvas of the least area that holds a picture of this size; None if none does."""
    return next((canvas for canvas in in_order(canvases) if canvas.holds(height, width)), None)


def check_canvas(canvas: Canvas, preprocessing: Preprocessing) -> None:
    """Raise ConfigError for a canvas that is of no use to pictures that are resized by this rule."""
    shorter, longer, divisor = (
        preprocessing.shorter_side,
        preprocessing.longer_side,
        preprocessing.size_divisor,
    )
    if canvas.height % divisor or canvas.width % divisor:
        better = Canvas(round_up_to(canvas.height, divisor), round_up_to(canvas.width, divisor))
        raise ConfigError(f"the canvas {canvas} is no multiple of {divisor} pixels; use {better}")
    most = round_up_to(longer, divisor)
    if max(canvas.height, canvas.width) > most:
        raise ConfigError(
            f"the canvas {canvas} is larger than any picture, whose longer side becomes {longer} pixels at "
            f"most; use sides up to {most}"
        )
    # The narrowest picture is one pixel by the longest side; all others have the shorter side in full.
    if min(canvas.height, canvas.width) < shorter and max(canvas.height, canvas.width) < longer:
        usual = ", ".join(str(default) for default in default_canvases(preprocessing))
        raise ConfigError(
            f"no picture fits on the canvas {canvas}, since the shorter side is resized to {shorter} pixels "
            f"unless the longer one is {longer}; use one such as {usual}"
        )


def round_up_to(value: int, multiple: int) -> int:
    """Return the least multiple that holds `value`."""
    return -(-value // multiple) * multiple
