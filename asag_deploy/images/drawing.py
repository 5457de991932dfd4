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
from asag_deploy.errors import plural
from asag_deploy.loop.trace import ProbingTrace

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels; x2 and y2 lie outside."""

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
PATCH_COLOUR: Colour = (255, 32, 32)
ANCHOR_COLOUR: Colour = WHITE

SHOWN_AT = (640, 1280)
"""Pixels of the longer side, at least and at most, at which lines and letters are seen on a screen."""

_LEGEND_GROUND: Colour = (24, 24, 27)
_DASH = 4
"""Times the width of a line."""
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
    confidence: NDArray[np.float32] | None,
) -> None:
    """Draw boxes in the colours of their classes, each with its name and confidence.

    xyxy: (n, 4) x1, y1, x2, y2 in pixels, best first; class_id, names, confidence (0 to 1): (n,).  Without
    confidence, as of what was annotated, the names stand alone.
    Labels stay inside the picture and off each other.  Those that find no place, or would leave too little of
    the picture to see, are left out, the least confident first; the colour still tells the class.
    """
    style = _Style.of(picture)
    colours = [class_colour(int(i)) for i in class_id]
    for box, colour in reversed(list(zip(xyxy, colours, strict=True))):
        _rectangle(picture, box, colour, style.line)
    wordings: list[tuple[str, ...]] = [(name,) for name in names]
    if confidence is not None:
        wordings = [
            (f"{name} {sure:.2f}", name, f"{sure:.2f}") for name, sure in zip(names, confidence, strict=True)
        ]
    draw_labels(picture, xyxy, wordings, colours)


def draw_labels(
    picture: Picture,
    xyxy: NDArray[np.float32],
    wordings: Sequence[tuple[str, ...]],
    colours: Sequence[Colour],
) -> None:
    """Write a label at each box (n, 4) in pixels, in the first of its wordings that fits.

    Those that find no place, or would leave too little of the picture to see, are left out, the last first.
    """
    style = _Style.of(picture)
    taken: list[Rectangle] = []
    room = _LABELLED_PART * picture.shape[0] * picture.shape[1]
    for box, wording, colour in zip(xyxy, wordings, colours, strict=True):
        text = _fitting(picture, style, wording)
        place = _label_place(picture, text, box, taken) if text is not None else None
        if text is None or place is None or text.width * text.height > room:
            continue
        room -= text.width * text.height
        taken.append(place)
        cv2.rectangle(picture, place[:2], (place[2] - 1, place[3] - 1), colour, cv2.FILLED)
        text.draw(picture, place[0], place[1], _readable_on(colour))


def draw_boxes(
    picture: Picture, xyxy: NDArray[np.float32], colour: Colour, *, thin: bool = False, dashed: bool = False
) -> None:
    """Draw the outlines of boxes (n, 4) in pixels, the first on top."""
    style = _Style.of(picture)
    line = style.thin if thin else style.line
    for box in reversed(xyxy):
        _rectangle(picture, box, colour, line, dash=_DASH * style.line if dashed else None)


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
        plural(trace.anchor_count, "anchor"),
    ]
    return [*phrases, f"{plural(dropped, 'patch')} dropped"] if dropped else phrases


def shown_at(picture: Picture) -> tuple[Picture, tuple[float, float]]:
    """Return a picture at a size at which what is drawn on it can be seen, as a copy, and its scale.

    One whose longer side is outside `SHOWN_AT` is enlarged or reduced to it.  The scale (x, y) leads from
    pixels of the picture given to pixels of the one returned.
    """
    height, width = picture.shape[:2]
    least, most = SHOWN_AT
    factor = min(max(least / max(height, width), 1), most / max(height, width))
    if factor == 1:
        return picture.copy(), (1.0, 1.0)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    shown = cv2.resize(picture, size, interpolation=method).astype(np.uint8, copy=False)
    return shown, (size[0] / width, size[1] / height)


def muted(picture: Picture) -> Picture:
    """Return a darker copy with little colour, on which thin coloured lines are seen."""
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(picture, 0.2, grey, 0.3, 0).astype(np.uint8, copy=False)


@dataclass(frozen=True)
class LegendEntry:
    """What a kind of line on a picture means."""

    text: str
    colour: Colour
    thin: bool = False
    dashed: bool = False


def with_legend(picture: Picture, entries: Sequence[LegendEntry]) -> Picture:
    """Return the picture with a strip below it that says what its lines mean, as many as fit its width."""
    style = _Style.of(picture)
    width = picture.shape[1]
    rows: list[list[tuple[LegendEntry, _Text, int]]] = []
    left = width
    for entry in entries:
        text = _Text(entry.text, style.text)
        takes = text.width + 3 * text.height // 2
        if takes > width:
            continue
        if left + takes > width:
            rows.append([])
            left = 0
        rows[-1].append((entry, text, left))
        left += takes
    if not rows:
        return picture.copy()
    high = rows[0][0][1].height + max(2, style.line)
    strip = np.full((high * len(rows), width, 3), _LEGEND_GROUND, dtype=np.uint8)
    for number, row in enumerate(rows):
        for entry, text, x in row:
            _sample(strip, entry, (x, number * high), text, style)
    return np.concatenate([picture, strip])


def _sample(strip: Picture, entry: LegendEntry, at: tuple[int, int], text: _Text, style: _Style) -> None:
    """Draw one entry of a legend with its upper left corner at (x, y): a small box, then what it means."""
    x, y = at
    inset, side = text.margin + style.line, text.height
    box = np.array([x + inset, y + inset, x + side + inset, y + side - inset], dtype=np.float32)
    dash = _DASH * style.line if entry.dashed else None
    _rectangle(strip, box, entry.colour, style.thin if entry.thin else style.line, dash=dash)
    text.draw(strip, x + side + 2 * inset - text.margin, y, WHITE)


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


def _rectangle(
    picture: Picture, box: NDArray[np.float32], colour: Colour, line: int, *, dash: int | None = None
) -> None:
    """Draw a box's outline, kept wholly inside the picture so that its border lines show.

    dash: pixels of a dash and of the gap behind it; None draws lines without gaps.
    """
    height, width = picture.shape[:2]
    inset = line // 2
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    start = (min(max(x1, inset), width - 1 - inset), min(max(y1, inset), height - 1 - inset))
    end = (min(max(x2, inset), width - 1 - inset), min(max(y2, inset), height - 1 - inset))
    if dash is None:
        cv2.rectangle(picture, start, end, colour, line)
        return
    for x in range(start[0], end[0] + 1, 2 * dash):
        for y in (start[1], end[1]):
            cv2.line(picture, (x, y), (min(x + dash, end[0]), y), colour, line)
    for y in range(start[1], end[1] + 1, 2 * dash):
        for x in (start[0], end[0]):
            cv2.line(picture, (x, y), (x, min(y + dash, end[1])), colour, line)


def _readable_on(colour: Colour) -> Colour:
    red, green, blue = colour
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else WHITE
