"""The post-processing kernel, executed on the CPU, against the runtime's own post-processing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import kernels
from asag_deploy.kernels import KernelLibrary
from asag_deploy.processing.postprocess import detections_of

SHAPES = np.array([[480, 640], [1333, 17], [50, 900]])


def decoded(count: int, classes: int) -> tuple[NDArray[Any], ...]:
    """Scores with ties and padding, labels, and crowded boxes, some of them empty, some over the border."""
    rng = np.random.default_rng([count, classes])
    scores = np.round(rng.uniform(0, 1, (3, count)) * 40).astype(np.float32) / 40
    scores[1, count // 2 :] = 0
    scores[2] = 0
    labels = rng.integers(0, classes, (3, count))
    centre, side = rng.uniform(0, 1, (3, count, 2)), rng.uniform(-0.01, 0.5, (3, count, 2))
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=-1).astype(np.float32)
    boxes[:, ::4] = boxes[:, :1]
    return scores, labels, boxes


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("nms_iou", [None, 0.0, 0.3, 0.7])
@pytest.mark.parametrize(("count", "classes"), [(0, 1), (1, 1), (100, 80), (100, 2), (333, 1)])
def test_detections_are_those_of_the_runtime(
    host: KernelLibrary, count: int, classes: int, nms_iou: float | None, dtype: type[np.floating[Any]]
) -> None:
    scores, labels, boxes = decoded(count, classes)
    scores, boxes = scores.astype(dtype), boxes.astype(dtype)
    xyxy, confidence = np.full((3, count, 4), np.nan, np.float32), np.full((3, count), np.nan, np.float32)
    class_id, counts = np.full((3, count), -7, np.int64), np.full(3, -7, np.int64)
    outputs = (xyxy, confidence, class_id, counts)
    kernels.postprocess(host, scores, labels, boxes, SHAPES, *outputs, nms_iou=nms_iou)
    for image, (height, width) in enumerate(SHAPES.tolist()):
        expected = detections_of(
            scores[image], labels[image], boxes[image], original_shape=(height, width), nms_iou=nms_iou
        )
        kept = len(expected.confidence)
        assert counts[image] == kept
        np.testing.assert_array_equal(xyxy[image, :kept], expected.xyxy)
        np.testing.assert_array_equal(confidence[image, :kept], expected.confidence)
        np.testing.assert_array_equal(class_id[image, :kept], expected.class_id)
        assert not xyxy[image, kept:].any()
        assert not confidence[image, kept:].any()
        assert not class_id[image, kept:].any()
    if count > 100 and nms_iou is not None:
        assert 0 < counts[0] < count - 50  # there was something to suppress
