"""Detections made by hand, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asag_deploy.bundle.manifest import Category
from asag_deploy.detections import Detections
from asag_deploy.loop.trace import LevelCandidates, LevelTrace, ProbingTrace, StopReason

CATEGORIES = (Category(id=3, name="car"), Category(id=8, name="traffic light"), Category(id=21, name="cow"))


def boxes(*rows: tuple[float, float, float, float]) -> NDArray[np.float32]:
    """Rows x1, y1, x2, y2 as an array (n, 4), also when there are none."""
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def make_trace(
    *, p4: ArrayLike | None = ((10, 10, 30, 30),), p3: ArrayLike | None = None, dropped: int = 0
) -> ProbingTrace:
    """A trace that went to P4 with these patches, and to P3 if there are patches for it."""
    first = boxes((0, 0, 50, 40), (50, 0, 100, 40), (0, 40, 50, 80), (50, 40, 100, 80), (0, 0, 100, 80))
    levels = [LevelTrace(level="P5", patches=5, patches_dropped=0, anchors=7, selected=2, patch_boxes=first)]
    for level, patches in (("P4", p4), ("P3", p3)):
        if patches is not None:
            array = np.array(patches, dtype=np.float32).reshape(-1, 4)
            levels.append(
                LevelTrace(
                    level="P4" if level == "P4" else "P3",
                    patches=len(array),
                    patches_dropped=dropped,
                    anchors=5,
                    selected=1,
                    patch_boxes=array,
                )
            )
    stop = StopReason.NOTHING_SELECTED if p3 is None else StopReason.LAST_LEVEL
    return ProbingTrace(levels=tuple(levels), stop=stop, anchor_count=12)


def explained_trace() -> ProbingTrace:
    """A trace of an image of 640 x 640 with every anchor: P5 has one that went on, one that asked, and one
    that was dropped; its only patch on P4 has one that went on and one that was dropped."""
    first = LevelCandidates(
        boxes=boxes((50, 20, 100, 60), (300, 300, 340, 340), (440, 500, 490, 560)),
        scores=np.array([0.9, 0.4, 0.05], dtype=np.float32),
        asked=np.array([False, True, False]),
        passed=np.array([True, False, False]),
        patch=np.array([0, 4, 3]),
    )
    second = LevelCandidates(
        boxes=boxes((310, 310, 330, 330), (220, 220, 230, 230)),
        scores=np.array([0.8, 0.01], dtype=np.float32),
        asked=np.array([False, False]),
        passed=np.array([True, False]),
        patch=np.array([0, 0]),
    )
    quarters = boxes(
        (0, 0, 320, 320), (320, 0, 640, 320), (0, 320, 320, 640), (320, 320, 640, 640), (0, 0, 640, 640)
    )
    p5 = LevelTrace(
        level="P5",
        patches=5,
        patches_dropped=0,
        anchors=1,
        selected=1,
        patch_boxes=quarters,
        candidates=first,
    )
    p4 = LevelTrace(
        level="P4",
        patches=1,
        patches_dropped=0,
        anchors=1,
        selected=0,
        patch_boxes=boxes((200, 200, 400, 400)),
        candidates=second,
    )
    return ProbingTrace(levels=(p5, p4), stop=StopReason.NOTHING_SELECTED, anchor_count=2)


def make_detections(
    shape: tuple[int, int] = (80, 100),
    *,
    xyxy: ArrayLike = ((10, 20, 40, 60), (50, 5, 99, 30), (0, 0, 12, 9)),
    confidence: ArrayLike = (0.9, 0.5, 0.2),
    class_id: ArrayLike = (2, 0, 1),
    anchors: ArrayLike = ((8, 18, 42, 62), (48, 0, 100, 33)),
    trace: ProbingTrace | None = None,
) -> Detections:
    """Three detections in an image of `shape` (height, width), unless others are given."""
    return Detections(
        xyxy=np.array(xyxy, dtype=np.float32).reshape(-1, 4),
        confidence=np.array(confidence, dtype=np.float32),
        class_id=np.array(class_id, dtype=np.int64),
        categories=CATEGORIES,
        original_shape=shape,
        anchors=np.array(anchors, dtype=np.float32).reshape(-1, 4),
        trace=make_trace() if trace is None else trace,
        times_ms={"preprocess": 1.25, "backbone": 20.5, "decoder": 3.0},
    )


def assert_same(
    found: Detections | Sequence[Detections], expected: Detections | Sequence[Detections]
) -> None:
    """Compare detections and traces, of one image or of several, to the bit."""
    if isinstance(found, Detections) or isinstance(expected, Detections):
        found, expected = [cast(Detections, found)], [cast(Detections, expected)]
    for one, other in zip(found, expected, strict=True):
        assert one.trace.to_dict() == other.trace.to_dict()
        assert one.original_shape == other.original_shape
        for name in ("xyxy", "confidence", "class_id", "anchors"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
            assert getattr(one, name).dtype == getattr(other, name).dtype
