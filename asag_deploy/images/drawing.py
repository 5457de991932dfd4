"""Detections and probing traces drawn on pictures, at a size that suits the picture.

Every function draws in place on a writable, contiguous uint8 (H, W, 3) RGB picture.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import FIRST_LEVEL
from asag_deploy.loop.trace import ProbingTrace

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels; x2 and y2 lie outside."""

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
PATCH_COLOUR: Colour = (255, 32, 32)
ANCHOR_COLOUR: Colour = WHITE

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_HEIGHT = 22
"""Height in pixels of a capital letter at scale 1."""
_SMALLEST_TEXT = 7
_LABELLED_PART = 0.25
"""The part of a picture that labels may cover."""


def class_colour(class_id: int) -> Colour:
    """Return the RGB colour of a class: always the same, and none is near the trace's red or white."""
    golden = (0.5 + class_id * 0.618034) % 1
    saturation, value = ((0.85, 0.95), (0.55, 1.0), (0.9, 0.72))[class_id // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(0.07 + 0.84 * golden, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    picture: Picture,
    *,
    xyxy: NDArray[np.float32],
    class_id: NDArray[np.int64],
    names: Sequence[str],
    confidence: NDArray[np.float32],
) -> None:
    """Draw boxes in the colours of their classes, each with its name and confidence.

    xyxy: (n, 4) x1, y1, x2, y2 in pixels, best first; class_id, names, confidence (0 to 1): (n,).
    Labels stay inside the picture and off each other.  Those that find no place, or would leave too little of
    the picture to see, are left out, the least confident first; the colour still tells the class.
    """
    style = _Style.of(picture)
    colours = [class_colour(int(i)) for i in class_id]
    for box, colour in reversed(list(zip(xyxy, colours, strict=True))):
        _rectangle(picture, box, colour, style.line)
    taken: list[Rectangle] = []
    room = _LABELLED_PART * picture.shape[0] * picture.shape[1]
    for box, name, sure, colour in zip(xyxy, names, confidence, colours, strict=True):
        text = _fitting(picture, style, (f"{name} {sure:.2f}", name, f"{sure:.2f}"))
        place = _label_place(picture, text, box, taken) if text is not None else None
        if text is None or place is None or text.width * text.height > room:
            continue
        room -= text.width * text.height
        taken.append(place)
        cv2.rectangle(picture, place[:2], (place[2] - 1, place[3] - 1), colour, cv2.FILLED)
        text.draw(picture, place[0], place[1], _readable_on(colour))


def draw_trace(picture: Picture, anchors: NDArray[np.float32], trace: ProbingTrace) -> None:
    """Draw the decoder's anchors in white and the probed patches in red (paper, figure 8).

    anchors: (q, 4) x1, y1, x2, y2 in pixels of the picture, as are the trace's patches.
    The first level's patches, which are the quarters of every image and the whole of it, are left out.
    """
    style = _Style.of(picture)
    for box in reversed(anchors):
        _rectangle(picture, box, ANCHOR_COLOUR, style.thin)
    for level in trace.levels:
        if level.level != FIRST_LEVEL:
            for box in level.patch_boxes:
                _rectangle(picture, box, PATCH_COLOUR, style.line)


def draw_caption(picture: Picture, phrases: Sequence[str]) -> None:
    """Write phrases on a darkened strip at the bottom, as many as fit the width and a third of the height."""
    style = _Style.of(picture)
    height, width = picture.shape[:2]
    lines: list[_Text] = []
    for phrase in phrases:
        joined = _Text(f"{lines[-1].text}  |  {phrase}", style.text) if lines else None
        if joined is not None and joined.width <= width:
            lines[-1] = joined
        else:
            lines.append(_Text(phrase, style.text))
    lines = [line for line in lines if line.width <= width]
    while 3 * sum(line.height for line in lines) > height:
        lines.pop()
    top = height - sum(line.height for line in lines)
    picture[top:] //= 4
    for line in lines:
        line.draw(picture, 0, top, WHITE)
        top += line.height


def trace_caption(trace: ProbingTrace) -> list[str]:
    """Tell the trace in a few short phrases: where and why probing ended, patches by level, and anchors."""
    probed = [level for level in trace.levels if level.level != FIRST_LEVEL]
    patches = ", ".join(f"{level.level} {level.patches}" for level in probed)
    dropped = sum(level.patches_dropped for level in trace.levels)
    phrases = [
        f"exit {trace.exit_level}: {trace.stop.value}",
        f"patches {patches}" if patches else "no patches",
        f"{trace.anchor_count} anchors",
    ]
    return [*phrases, f"{dropped} patches dropped"] if dropped else phrases


@dataclass(frozen=True, kw_only=True)
class _Style:
    """Line widths and text size for a picture, in pixels."""

    line: int
    thin: int
    text: float

    @classmethod
    def of(cls, picture: Picture) -> _Style:
        unit = min(picture.shape[:2]) / 480
        return cls(
            line=max(1, round(2 * unit)), thin=max(1, round(unit)), text=max(_SMALLEST_TEXT, 10 * unit)
        )


class _Text:
    """One line of text, measured with the margin around it."""

    def __init__(self, text: str, height: float) -> None:
        self.text = text
        self.scale = height / _FONT_HEIGHT
        self.stroke = max(1, round(height / 11))
        (width, rise), fall = cv2.getTextSize(text, _FONT, self.scale, self.stroke)
        self.margin = max(1, round(height / 5))
        self.rise = rise
        self.width = width + 2 * self.margin
        self.height = rise + fall + 2 * self.margin

    def draw(self, picture: Picture, x: int, y: int, colour: Colour) -> None:
        """Draw with the margin's upper left corner at (x, y)."""
        origin = (x + self.margin, y + self.margin + self.rise)
        cv2.putText(picture, self.text, origin, _FONT, self.scale, colour, self.stroke, cv2.LINE_AA)


def _fitting(picture: Picture, style: _Style, wordings: tuple[str, ...]) -> _Text | None:
    """Return the first wording that fits the picture's width and at most a third of its height."""
    for wording in wordings:
        text = _Text(wording, style.text)
        if text.width <= picture.shape[1] and 3 * text.height <= picture.shape[0]:
            return text
    return None


def _label_place(
    picture: Picture, text: _Text, box: NDArray[np.float32], taken: list[Rectangle]
) -> Rectangle | None:
    """Find the first free place at its box: above it, inside at the top, below or inside at the bottom.

    Inside only where that leaves half of the box to see.
    """
    height, width = picture.shape[:2]
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    roomy = y2 - y1 >= 2 * text.height
    tops = {
        y1 - text.height: y1 >= text.height,
        y1: roomy,
        y2: y2 + text.height <= height,
        y2 - text.height: roomy,
    }
    possible = [top for top, fits in tops.items() if fits] or [y1 - text.height]
    for x, y in product((x1, x2 - text.width), possible):
        left = min(max(x, 0), width - text.width)
        top = min(max(y, 0), height - text.height)
        place = (left, top, left + text.width, top + text.height)
        if not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _rectangle(picture: Picture, box: NDArray[np.float32], colour: Colour, line: int) -> None:
    """Draw a box's outline, kept wholly inside the picture so that its border lines show."""
    height, width = picture.shape[:2]
    inset = line // 2
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    start = (min(max(x1, inset), width - 1 - inset), min(max(y1, inset), height - 1 - inset))
    end = (min(max(x2, inset), width - 1 - inset), min(max(y2, inset), height - 1 - inset))
    cv2.rectangle(picture, start, end, colour, line)


def _readable_on(colour: Colour) -> Colour:
    red, green, blue = colour
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else WHITE
