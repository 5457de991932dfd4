"""What the loop leaves behind, as a user wants it: detections and traces in pixels of the original image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Probing
from asag_deploy.loop.probing import LevelRun, Probed, passed_on
from asag_deploy.loop.stages import Stages
from asag_deploy.loop.trace import LevelTrace, ProbingTrace
from asag_deploy.processing.boxes import Boxes, clip, twice


class Found(NamedTuple):
    """The n detections of one image, best first."""

    xyxy: Boxes
    """(n, 4) pixels of the original image, clipped to it."""
    confidence: NDArray[np.float32]
    """(n,)"""
    class_id: NDArray[np.int64]
    """(n,)"""


def detections_of(
    scores: NDArray[np.floating],
    labels: NDArray[np.int64],
    boxes: NDArray[np.floating],
    *,
    original_shape: tuple[int, int],
    nms_iou: float | None,
) -> Found:
    """Turn one image's rows of the decoder's `det_*` outputs into detections.

    scores (D,), labels (D,), boxes (D, 4) x1, y1, x2, y2 relative to the valid image; `original_shape` is
    (height, width).  Rows of score 0 are padding and dropped; with `nms_iou`, so are boxes that overlap a
    better one of their class by more.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > 0]
    height, width = original_shape
    xyxy = boxes[order].astype(np.float32) * np.array([width, height, width, height], dtype=np.float32)
    confidence = scores[order].astype(np.float32)
    class_id = labels[order].astype(np.int64)
    if nms_iou is not None:
        kept = keep_best(xyxy, class_id, nms_iou)
        xyxy, confidence, class_id = xyxy[kept], confidence[kept], class_id[kept]
    return Found(clip(xyxy, height, width), confidence, class_id)


def best_of(found: Found, threshold: float, most: int | None) -> Found:
    """Return the best `most` (None: all) of those detections whose confidence is at least `threshold`."""
    count = int(np.count_nonzero(found.confidence >= threshold))  # they are sorted, the best first
    count = count if most is None else min(count, most)
    return Found(found.xyxy[:count], found.confidence[:count], found.class_id[:count])


def keep_best(xyxy: Boxes, class_id: NDArray[np.int64], iou: float) -> NDArray[np.bool_]:
    """Return (n,) what class-wise greedy NMS keeps of boxes (n, 4) that are sorted, the best first.

    A box goes if its IoU with a kept one of its class that stands before it is over `iou`.
    """
    suppresses = np.triu((_iou(xyxy) > iou) & (class_id[:, None] == class_id), 1)  # (n, n), those after it
    keep = np.ones(len(xyxy), dtype=np.bool_)
    for i in np.flatnonzero(suppresses.any(axis=1)):
        if keep[i]:
            keep &= ~suppresses[i]
    return keep


def traces_of(
    network: Stages,
    probing: Probing,
    probed: Probed,
    sizes: NDArray[np.int64],
    anchor_count: NDArray[np.int64],
    scales: list[tuple[float, float]],
) -> tuple[ProbingTrace, ...]:
    """Return the probing trace of each image of a batch.

    sizes (B, 2) are the valid heights and widths, anchor_count (B,) what reached the decoder; patch boxes are
    in pixels `scales[i]` (x, y) times larger than the network's.
    """
    origins = [None if run.origins is None else network.download(run.origins) for run in probed.levels]
    strides = {level.level: level.stride for level in probing.levels}
    anchors = passed_on(probed.levels, probed.probed)

    def level_trace(image: int, number: int) -> LevelTrace:
        run = probed.levels[number]
        height, width = (int(side) for side in sizes[image])
        of_level = origins[number]
        if of_level is None:
            boxes = _first_level_boxes(height, width)
        else:
            corner = of_level[image, : run.patches[image]]
            boxes = _patch_boxes(corner, strides[run.level], probing.patch_size, height, width)
        return _level_trace(run, image, int(anchors[number][image]), boxes * twice(scales[image]))

    return tuple(
        ProbingTrace(
            levels=tuple(
                level_trace(image, number)
                for number in range(len(probed.levels))
                if number == 0 or probed.probed[image, number - 1]
            ),
            stop=probed.stop[image],
            anchor_count=int(anchor_count[image]),
        )
        for image in range(len(sizes))
    )


def _iou(xyxy: Boxes) -> NDArray[np.float32]:
    """Return (n, n) the intersection over union of each pair of boxes (n, 4)."""
    x1, y1, x2, y2 = np.ascontiguousarray(xyxy.T)  # axis by axis, which is much faster than both
    area = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
    overlap: NDArray[np.float32] = _shared(x1, x2) * _shared(y1, y2)
    union = area[:, None] + area - overlap
    ratio = np.zeros_like(overlap)
    np.divide(overlap, union, out=ratio, where=union > 0)
    return ratio


def _shared(low: NDArray[np.float32], high: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (n, n) how much each pair of intervals (n,) has in common."""
    common: NDArray[np.float32] = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    return np.maximum(common, 0, out=common)


def _first_level_boxes(height: int, width: int) -> Boxes:
    """Return (5, 4): the four quarters of the image, which P5 is split into, and the whole, which P6 sees."""
    x, y = width / 2, height / 2
    return np.array(
        [[0, 0, x, y], [x, 0, width, y], [0, y, x, height], [x, y, width, height], [0, 0, width, height]],
        dtype=np.float32,
    )


def _patch_boxes(origins: NDArray[np.int64], stride: int, side: int, height: int, width: int) -> Boxes:
    """Return (k, 4) of patches `side` cells wide and high, from their origins (k, 2) x, y in cells."""
    corners = np.concatenate([origins, origins + side], axis=1) * stride
    return clip(corners.astype(np.float32), height, width)


def _level_trace(run: LevelRun, image: int, anchors: int, boxes: Boxes) -> LevelTrace:
    return LevelTrace(
        level=run.level,
        patches=int(run.patches[image]),
        patches_dropped=int(run.patches_dropped[image]),
        anchors=anchors,
        selected=int(run.counts.selected[image]),
        patch_boxes=boxes,
    )
