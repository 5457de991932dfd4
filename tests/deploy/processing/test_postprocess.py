"""Decoder outputs as detections, the loop's record as traces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import ProbeLevel, Probing
from asag_deploy.loop.probing import LevelRun, Probed
from asag_deploy.loop.stages import Counts
from asag_deploy.loop.trace import StopReason
from asag_deploy.processing.boxes import anchors_of, clip
from asag_deploy.processing.postprocess import Found, detections_of, keep_best, traces_of

Rows = list[list[float]]


def found(scores: list[float], labels: list[int], boxes: Rows, nms_iou: float | None = None) -> Found:
    return detections_of(
        np.array(scores, dtype=np.float32),
        np.array(labels, dtype=np.int64),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        original_shape=(100, 200),
        nms_iou=nms_iou,
    )


def test_boxes_in_pixels_of_the_original_image() -> None:
    result = found([0.5], [1], [[0.1, 0.2, 0.5, 0.75]])
    np.testing.assert_allclose(result.xyxy, [[20, 20, 100, 75]], rtol=1e-6)
    assert [field.dtype.name for field in result] == ["float32", "float32", "int64"]


def test_boxes_are_clipped() -> None:
    result = found([0.5], [0], [[-0.1, -3, 1.2, 1.01]])
    assert result.xyxy.tolist() == [[0, 0, 200, 100]]


def test_padding_is_dropped() -> None:
    result = found([0.5, 0, 0.3, 0], [0, 1, 2, 0], [[0, 0, 1, 1]] * 4)
    assert result.class_id.tolist() == [0, 2]


def test_nothing_found() -> None:
    for result in (found([0, 0], [0, 0], [[0, 0, 1, 1]] * 2, 0.5), found([], [], [], 0.5)):
        assert [len(field) for field in result] == [0, 0, 0]
        assert result.xyxy.shape == (0, 4)


def test_best_first_and_ties_by_index() -> None:
    result = found([0.2, 0.9, 0.2, 0.9], [0, 1, 2, 3], [[0, 0, 1, 1]] * 4)
    assert result.class_id.tolist() == [1, 3, 0, 2]


def test_half_precision_scores() -> None:
    result = detections_of(
        np.array([0.5, 0.75], dtype=np.float16),
        np.array([0, 1]),
        np.array([[0, 0, 1, 1]] * 2, dtype=np.float16),
        original_shape=(10, 10),
        nms_iou=0.5,
    )
    assert result.confidence.tolist() == [0.75, 0.5]
    assert result.confidence.dtype == np.float32


def test_nms_drops_overlaps_of_the_same_class_only() -> None:
    boxes = [[0, 0, 0.5, 1], [0.01, 0, 0.5, 1], [0.02, 0, 0.5, 1], [0.5, 0, 1, 1]]
    result = found([0.6, 0.9, 0.8, 0.7], [4, 4, 2, 4], boxes, nms_iou=0.7)
    assert result.class_id.tolist() == [4, 2, 4]
    np.testing.assert_allclose(result.confidence, [0.9, 0.8, 0.7])


def test_nms_is_over_boxes_as_they_were_before_clipping() -> None:
    boxes = [[-1, 0, 0.1, 1], [-0.1, 0, 0.1, 1]]
    assert len(found([0.9, 0.8], [0, 0], boxes, nms_iou=0.5).xyxy) == 2


def test_a_suppressed_box_suppresses_nothing() -> None:
    xyxy = np.array([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], dtype=np.float32)
    assert keep_best(xyxy, np.zeros(3, dtype=np.int64), 0.4).tolist() == [True, False, True]


def test_iou_equal_to_the_threshold_is_kept() -> None:
    xyxy = np.array([[0, 0, 2, 1], [1, 0, 3, 1]], dtype=np.float32)  # IoU 1/3
    third = float(np.float32(1) / np.float32(3))
    assert keep_best(xyxy, np.zeros(2, dtype=np.int64), third).tolist() == [True, True]
    assert keep_best(xyxy, np.zeros(2, dtype=np.int64), 0.33).tolist() == [True, False]


def test_boxes_without_area_are_kept() -> None:
    xyxy = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [5, 5, 2, 2]], dtype=np.float32)
    assert keep_best(xyxy, np.zeros(3, dtype=np.int64), 0.5).all()


@pytest.mark.parametrize("iou", [0.3, 0.7])
@pytest.mark.parametrize("classes", [1, 4])
def test_nms_is_exact(iou: float, classes: int) -> None:
    rng = np.random.default_rng(classes)
    corner, side = rng.uniform(0, 30, (300, 2)), rng.uniform(2, 20, (300, 2))
    xyxy = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    class_id = rng.integers(0, classes, 300)
    kept = keep_best(xyxy, class_id, iou)
    assert kept.tolist() == _plain_nms(xyxy, class_id, iou)
    assert 10 < kept.sum() < 290


def _plain_nms(xyxy: NDArray[np.float32], class_id: NDArray[np.int64], iou: float) -> list[bool]:
    kept: list[int] = []
    for i, box in enumerate(xyxy):
        rivals = [xyxy[k] for k in kept if class_id[k] == class_id[i]]
        if all(_plain_iou(box, rival) <= iou for rival in rivals):
            kept.append(i)
    return [i in kept for i in range(len(xyxy))]


def _plain_iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return float(width * height / (total - width * height))


def test_clip() -> None:
    boxes = np.array([[-1, -2, 3, 4], [5, 6, 7, 8]], dtype=np.float32)
    assert clip(boxes, height=7, width=6).tolist() == [[0, 0, 3, 4], [5, 6, 6, 7]]


def test_anchors() -> None:
    anchors = np.array([[10, 20, 4, 8]], dtype=np.float32)
    assert anchors_of(anchors, (2.0, 0.5)).tolist() == [[16, 8, 24, 12]]
    assert anchors_of(np.zeros((0, 4), np.float32), (1.0, 1.0)).shape == (0, 4)


class HostNetwork(Network):
    """Arrays that are on the host already."""

    def stage(self, name: str) -> Any:
        raise NotImplementedError

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        return array


PROBING = Probing(
    mode="exact",
    patch_size=15,
    levels=(
        ProbeLevel(level="P4", stride=16, capacity=128, anchors_per_patch=20),
        ProbeLevel(level="P3", stride=8, capacity=256, anchors_per_patch=20),
    ),
    max_candidates=64,
    patch_nms_iou=0.25,
    anchor_floor=5,
    anchor_cap=200,
)


def _probed() -> Probed:
    """Two images, of which the second stopped on the first level."""
    origins = np.array([[[0, 0], [10, 5], [99, 99]], [[7, 7], [7, 7], [7, 7]]])

    def counts(*columns: list[int]) -> Counts:
        return Counts(*(np.array(column) for column in columns))

    zero = np.zeros(2, dtype=np.int64)
    first = counts([9, 0], [4, 0], [50, 30], [41, 30])
    second = counts([3, 0], [1, 0], [40, 0], [37, 0])
    return Probed(
        outputs={},
        levels=[
            LevelRun(
                level="P5",
                patches=zero + 5,
                patches_dropped=zero,
                next_origins=None,
                origins=None,
                anchors=None,
                selected=None,
                counts=first,
            ),
            LevelRun(
                level="P4",
                patches=np.array([2, 0]),
                patches_dropped=np.array([2, 0]),
                next_origins=None,
                origins=origins,
                anchors=None,
                selected=None,
                counts=second,
            ),
        ],
        probed=np.array([[True, False], [False, False]]),
        stop=[StopReason.DEADLINE, StopReason.NOTHING_SELECTED],
    )


def test_traces() -> None:
    sizes = np.array([[300, 400], [100, 60]])
    scales = [(2.0, 0.5), (1.0, 1.0)]
    probed_image, stopped = traces_of(HostNetwork(), PROBING, _probed(), sizes, np.array([78, 30]), scales)
    assert (probed_image.stop, probed_image.exit_level, probed_image.anchor_count) == (
        StopReason.DEADLINE,
        "P4",
        78,
    )
    p5, p4 = probed_image.levels
    assert (p5.patches, p5.patches_dropped, p5.anchors, p5.selected) == (5, 0, 41, 9)
    # The next level was not probed, so P4 passes on what it selected too.
    assert (p4.patches, p4.patches_dropped, p4.anchors, p4.selected) == (2, 2, 40, 3)
    # 240 pixels a side; the second starts at (160, 80) and ends at the image's 400 x 300; then scaled.
    assert p4.patch_boxes.tolist() == [[0, 0, 480, 120], [320, 40, 800, 150]]
    assert p4.patch_boxes.dtype == np.float32

    assert (stopped.stop, stopped.exit_level, stopped.anchor_count) == (
        StopReason.NOTHING_SELECTED,
        "P5",
        30,
    )
    assert len(stopped.levels) == 1
    assert stopped.levels[0].patch_boxes.tolist() == [
        [0, 0, 30, 50],
        [30, 0, 60, 50],
        [0, 50, 30, 100],
        [30, 50, 60, 100],
        [0, 0, 60, 100],
    ]
