"""Figures of boxes: where a network looked, and what it found (paper, figures 5, 8 and C-2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_bench.paper.figures.canvas import Picture, enlarged, write_grid
from asag_deploy.bundle.manifest import FIRST_LEVEL
from asag_deploy.detections import Detections
from asag_deploy.errors import plural
from asag_deploy.images.drawing import class_colour, draw_trace
from asag_deploy.loop.trace import ProbingTrace
from asag_evaluation.data.coco import Sample
from asag_evaluation.predictor import Predictor

_PROPOSAL = (255, 196, 0)
_SURE = 0.3
"""Of the detections that are drawn: what is below shows in no picture of a person's."""


def write_probing(path: Path, predictor: Predictor, samples: Sequence[Sample], columns: int = 4) -> Path:
    """Draw figure 8: on each picture the anchors in white and the patches in red."""
    drawn = []
    for sample in samples:
        found = predictor.detector(sample.image, channel_order="rgb")
        drawn.append((_probed(sample.image, found), _short(found.trace)))
    columns = min(columns, len(drawn))
    rows = [
        [_captioned(picture, text) for picture, text in drawn[start : start + columns]]
        for start in range(0, len(drawn), columns)
    ]
    return write_grid(path, rows, [""] * columns, heading="anchors white, probed patches red")


def write_pipeline(path: Path, predictor: Predictor, samples: Sequence[Sample]) -> Path:
    """Draw figure C-2: of each picture the objects, patches and anchors, proposals, and detections."""
    rows: list[Sequence[Picture | None]] = []
    for sample in samples:
        (found,) = predictor.detector([sample.image], channel_order="rgb")
        proposals: Picture | None = None
        if predictor.proposals is not None:
            (relative,) = predictor.proposals([found.trace.anchor_count])
            proposals = _boxes(sample.image, relative * np.tile(_sides(sample.image), 2), None)
        truth = _boxes(sample.image, sample.boxes, sample.labels)
        sure = found.filter(_SURE)
        detected = _boxes(sample.image, sure.xyxy, sure.class_id)
        rows.append([truth, _probed(sample.image, found), proposals, detected])
    titles = ["objects", "patches (red), anchors (white)", "proposals", f"detections of {_SURE} and more"]
    return write_grid(path, rows, titles)


def write_training(
    path: Path, predictors: Sequence[Predictor], titles: Sequence[str], samples: Sequence[Sample]
) -> Path:
    """Draw figure 5: the anchors that each of several checkpoints of one run predicts."""
    rows = [
        [_probed(sample.image, each.detector(sample.image, channel_order="rgb")) for each in predictors]
        for sample in samples
    ]
    return write_grid(path, rows, titles)


def _probed(picture: Picture, found: Detections) -> Picture:
    """Return a picture with anchors and patches drawn on it."""
    drawn, times = enlarged(picture)
    levels = tuple(
        dataclasses.replace(level, patch_boxes=level.patch_boxes * np.float32(times))
        for level in found.trace.levels
    )
    trace = dataclasses.replace(found.trace, levels=levels)
    draw_trace(drawn, found.anchors * np.float32(times), trace)
    return drawn


def _boxes(picture: Picture, boxes: NDArray[np.floating], labels: NDArray[np.int64] | None) -> Picture:
    """Draw boxes (n, 4) x1, y1, x2, y2 in pixels, in the colours of their classes, or all in one."""
    drawn, times = enlarged(picture)
    line = max(2, round(min(drawn.shape[:2]) / 240))
    for i, box in enumerate(boxes):
        colour = _PROPOSAL if labels is None else class_colour(int(labels[i]))
        x1, y1, x2, y2 = (round(float(value) * times) for value in box)
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, 1 if labels is None else line)
    return drawn


def _captioned(picture: Picture, text: str) -> Picture:
    """Write a line over the picture's lower edge."""
    height = picture.shape[0]
    strip = max(26, height // 20)
    picture[height - strip :] //= 4
    scale = strip / 40
    cv2.putText(
        picture,
        text,
        (8, height - strip // 4),
        cv2.FONT_HERSHEY_SIMPLEX,
        scale,
        (255, 255, 255),
        max(1, round(2 * scale)),
        cv2.LINE_AA,
    )
    return picture


def _short(trace: ProbingTrace) -> str:
    probed = [level for level in trace.levels if level.level != FIRST_LEVEL]
    patches = ", ".join(f"{level.level} {level.patches}" for level in probed) or "none"
    return f"{plural(trace.anchor_count, 'anchor')}, patches: {patches}"


def _sides(picture: Picture) -> NDArray[np.float64]:
    return np.array([picture.shape[1], picture.shape[0]], dtype=np.float64)
