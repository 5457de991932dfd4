"""How probing decided, as pictures: one of each level, and one of the anchors that reached the decoder.

All of them need a trace that keeps the anchors of every level (`explain=True`).  Each is a new uint8
(H, W, 3) RGB picture, darkened so that the lines are seen, with a legend below.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import FIRST_LEVEL, Level
from asag_deploy.images.drawing import (
    ANCHOR_COLOUR,
    PATCH_COLOUR,
    Colour,
    LegendEntry,
    Picture,
    draw_boxes,
    draw_labels,
    muted,
    with_legend,
)
from asag_deploy.loop.trace import LevelCandidates, ProbingTrace

ASKED_COLOUR: Colour = (255, 190, 0)
DROPPED_COLOUR: Colour = (130, 170, 240)
LEVEL_COLOURS: dict[Level, Colour] = {"P5": ANCHOR_COLOUR, "P4": (70, 215, 255), "P3": (160, 255, 90)}
_FAINTEST = 0.75
"""Of its colour, what a dropped anchor of score 0 has."""

Scale = tuple[float, float]
"""x, y: from pixels of the original image to those of the picture."""


def level_picture(picture: Picture, scale: Scale, trace: ProbingTrace, number: int) -> Picture:
    """Draw what level `number` of the trace predicted, and what became of it (paper, section 4.2).

    Its patches are red; those it asked for on the next level are dashed.  Anchors that went on are white,
    those that asked for a closer look amber with their scores, those that did neither blue, fainter with a
    lower score.  Dashed amber are anchors of the level above that this level's replaced.
    """
    level = trace.levels[number]
    found = candidates_of(trace, number)
    drawn = muted(picture)
    dropped = ~(found.passed | found.asked)
    asked = _best_first(found, found.asked)
    legend = []

    def draw(boxes: NDArray[np.float32], entry: LegendEntry) -> None:
        if len(boxes):
            draw_boxes(drawn, scaled(boxes, scale), entry.colour, thin=entry.thin, dashed=entry.dashed)
            legend.append(entry)

    for one in _best_first(found, dropped)[::-1]:
        colour = _faint(DROPPED_COLOUR, float(found.scores[one]))
        draw_boxes(drawn, scaled(found.boxes[one : one + 1], scale), colour, thin=True)
    if dropped.any():
        legend.append(LegendEntry(f"dropped ({dropped.sum()})", DROPPED_COLOUR, thin=True))
    went_on = found.boxes[_best_first(found, found.passed & ~found.asked)]
    draw(went_on, LegendEntry(f"went on ({len(went_on)})", ANCHOR_COLOUR, thin=True))
    if number:
        above = candidates_of(trace, number - 1)
        replaced = above.boxes[above.asked]
        text = f"replaced, of {trace.levels[number - 1].level} ({len(replaced)})"
        draw(replaced, LegendEntry(text, ASKED_COLOUR, thin=True, dashed=True))
    if level.level != FIRST_LEVEL:
        draw(level.patch_boxes, LegendEntry(f"patches ({level.patches})", PATCH_COLOUR))
    if number + 1 < len(trace.levels):
        below = trace.levels[number + 1]
        text = f"patches asked for on {below.level} ({below.patches})"
        draw(below.patch_boxes, LegendEntry(text, PATCH_COLOUR, dashed=True))
    draw(found.boxes[asked], LegendEntry(f"asked for a closer look ({len(asked)})", ASKED_COLOUR))
    wordings = [(f"{score:.2f}",) for score in found.scores[asked]]
    draw_labels(drawn, scaled(found.boxes[asked], scale), wordings, [ASKED_COLOUR] * len(asked))
    return with_legend(drawn, legend)


def decoder_picture(picture: Picture, scale: Scale, trace: ProbingTrace) -> Picture:
    """Draw the anchors that reached the decoder, in the colour of the level that predicted them."""
    drawn = muted(picture)
    legend = []
    for number, level in enumerate(trace.levels):
        found = candidates_of(trace, number)
        boxes = found.boxes[_best_first(found, found.passed)]
        colour = LEVEL_COLOURS[level.level]
        draw_boxes(drawn, scaled(boxes, scale), colour, thin=True)
        legend.append(LegendEntry(f"of {level.level} ({len(boxes)})", colour))
    return with_legend(drawn, legend)


def candidates_of(trace: ProbingTrace, number: int) -> LevelCandidates:
    """Return every anchor that a level predicted; the call must have asked to explain."""
    found = trace.levels[number].candidates
    assert found is not None, "the detector was called with explain=True"
    return found


def scaled(boxes: NDArray[np.float32], scale: Scale) -> NDArray[np.float32]:
    """Return boxes (n, 4) xyxy in pixels of a picture that is `scale` (x, y) times as large."""
    return boxes * np.array([*scale, *scale], dtype=np.float32)


def _faint(colour: Colour, score: float) -> Colour:
    """Return a colour that is the darker the lower the score (0 to 1) is."""
    red, green, blue = (round((_FAINTEST + (1 - _FAINTEST) * score) * value) for value in colour)
    return red, green, blue


def _best_first(found: LevelCandidates, which: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the indices of those anchors, the best-scored first."""
    chosen = np.flatnonzero(which)
    order = np.argsort(-found.scores[chosen], kind="stable")
    return chosen[order].astype(np.int64, copy=False)
