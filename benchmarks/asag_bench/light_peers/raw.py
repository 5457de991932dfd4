"""What a peer's graph gives for one picture, and how it becomes detections: NMS for the dense one."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_bench.light_peers.recipe import PeerName
from asag_bench.runners.peers import BEST
from asag_deploy.processing.postprocess import Found, detections_of

_LEAST_SCORE, _NMS_IOU = 0.01, 0.65
"""Of the dense peer, as YOLOX is evaluated (arXiv 2107.08430 and its authors' code)."""

Floats = NDArray[np.float32]


class Raw(NamedTuple):
    """What a graph gives for one picture."""

    scores: Floats
    """(D,)"""
    labels: NDArray[np.int64]
    """(D,)"""
    boxes: Floats
    """(D, 4) xyxy relative to the canvas."""


def deployed(
    raw: Raw, peer: PeerName, canvas: tuple[int, int], size: NDArray[np.int64], shape: tuple[int, int]
) -> Found:
    """Turn what a graph gives into detections in a picture.

    canvas: height and width that the picture was padded to; size: its own in it; shape: as it came.
    """
    if peer == "yolox-lite":
        raw = suppressed(raw)
    height, width = (int(side) for side in size)
    scale = np.array([canvas[1] / width, canvas[0] / height] * 2, dtype=np.float32)
    return detections_of(raw.scores, raw.labels, raw.boxes * scale, original_shape=shape, nms_iou=None)


def suppressed(raw: Raw) -> Raw:
    """Drop what scores next to nothing, and of each class what overlaps a better one; keep the 300 best.

    OpenCV's NMS is used, which is compiled.
    """
    likely = raw.scores > _LEAST_SCORE
    scores, labels, boxes = raw.scores[likely], raw.labels[likely], raw.boxes[likely]
    if not len(scores):
        return Raw(scores, labels, boxes)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    kept = cv2.dnn.NMSBoxesBatched(xywh.tolist(), scores.tolist(), labels.tolist(), 0.0, _NMS_IOU)
    best = np.asarray(kept, dtype=np.int64).reshape(-1)
    best = best[np.argsort(-scores[best], kind="stable")][:BEST]
    return Raw(scores[best], labels[best], boxes[best])
