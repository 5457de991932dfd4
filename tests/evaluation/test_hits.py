"""Recall and precision at one threshold, against counts worked out by hand."""

from __future__ import annotations

import numpy as np

from asag_evaluation.metrics.hits import Compared, Hits, count_hits
from support.detection_samples import boxes

OBJECTS = boxes((0, 0, 10, 10), (20, 0, 30, 10))


def compared(found: list[tuple[float, float, float, float]], classes: list[int]) -> Compared:
    return Compared(boxes(*found), np.array(classes, dtype=np.int64), OBJECTS, np.array([0, 0]))


def test_each_object_is_found_once() -> None:
    hits = count_hits([compared([(0, 0, 10, 9), (0, 0, 10, 10), (20, 0, 30, 10)], [0, 0, 0])])
    assert hits == Hits(detections=3, objects=2, hits=2)
    assert (hits.recall, hits.precision) == (1.0, 2 / 3)


def test_a_detection_takes_the_object_it_overlaps_most_of_those_left() -> None:
    between = Compared(
        boxes((0, 0, 10, 10), (1, 0, 11, 10)),
        np.array([0, 0]),
        boxes((0, 0, 10, 10), (3, 0, 13, 10)),
        np.array([0, 0]),
    )
    assert count_hits([between]).hits == 2  # the second, whose best is taken, has the other


def test_class_and_overlap_must_fit() -> None:
    assert count_hits([compared([(0, 0, 10, 10)], [1])]).hits == 0
    assert count_hits([compared([(0, 0, 10, 5)], [0])]).hits == 1  # an IoU of exactly a half
    assert count_hits([compared([(0, 0, 10, 4.9)], [0])]).hits == 0
    assert count_hits([compared([(0, 0, 10, 4.9)], [0])], least_iou=0.3).hits == 1


def test_nothing_found_and_nothing_there() -> None:
    nothing = count_hits([compared([], [])])
    assert (nothing.recall, nothing.precision) == (0.0, None)
    empty = Compared(boxes((0, 0, 1, 1)), np.array([0]), boxes(), np.array([], dtype=np.int64))
    assert count_hits([empty]) == Hits(detections=1, objects=0, hits=0)
    assert count_hits([empty]).recall is None
    assert count_hits([]) == Hits(detections=0, objects=0, hits=0)
