"""CrowdHuman's measures: AP, log-average miss rate (mMR) and recall, at an IoU of 0.5.

Objects are clipped to the image.  A detection is paired with the free object it overlaps most, best scored
detections first; one that lies on a region to be ignored counts neither way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_evaluation.metrics.overlaps import Boxes, covered, iou

_IOU = 0.5
_FALSE_PER_IMAGE = np.array([0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000])
"""False positives per image, where the miss rate is read off: evenly spread logarithms."""
_LEAST_MISS_RATE = 1e-10


class PersonImage(NamedTuple):
    """One image: boxes x1, y1, x2, y2 in pixels, clipped to it."""

    persons: Boxes
    """(T, 4)."""
    ignored: Boxes
    """(k, 4) regions in which detections do not count."""
    found: Boxes
    """(n, 4) detections."""
    scores: NDArray[np.floating[Any]]
    """(n,)."""


@dataclass(frozen=True, kw_only=True)
class CrowdHumanMetrics:
    """Values from 0 to 1."""

    ap: float
    """Area under precision over recall: higher is better."""
    mmr: float
    """Miss rate, its logarithm averaged over 0.01 to 1 false positives per image: lower is better."""
    recall: float
    """Of all detections together."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain JSON."""
        return dict(vars(self))


def crowdhuman_metrics(images: Sequence[PersonImage]) -> CrowdHumanMetrics | None:
    """Measure the detections of one class; None if there is nobody to find."""
    total = sum(len(image.persons) for image in images)
    if not total:
        return None
    scores, right = (np.concatenate(parts) for parts in zip(*(_judge(i) for i in images), strict=True))
    if not len(scores):
        return CrowdHumanMetrics(ap=0.0, mmr=1.0, recall=0.0)
    right = right[np.argsort(-scores, kind="stable")]
    true, false = np.cumsum(right), np.cumsum(~right)
    recall, precision = true / total, true / (true + false)
    ap = float((np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum())
    return CrowdHumanMetrics(ap=ap, mmr=_mmr(1 - recall, false / len(images)), recall=float(recall[-1]))


def _judge(image: PersonImage) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the scores of the detections that count, and which of them are right."""
    order = np.argsort(-image.scores, kind="stable")
    overlap = iou(image.found[order], image.persons)
    on_ignored = (covered(image.found[order], image.ignored) > _IOU).any(axis=1)
    right = np.zeros(len(order), dtype=np.bool_)
    for i, row in enumerate(overlap):
        if row.size and row.max() > _IOU:
            right[i] = True
            overlap[:, row.argmax()] = 0
    counts = right | ~on_ignored
    return image.scores[order][counts].astype(np.float64), right[counts]


def _mmr(miss_rate: NDArray[np.float64], false_per_image: NDArray[np.float64]) -> float:
    """Average the miss rate's logarithm; both (n,) over the detections, the best scored first."""
    positions = np.searchsorted(false_per_image, _FALSE_PER_IMAGE).clip(max=len(miss_rate) - 1)
    return float(np.exp(np.log(np.maximum(miss_rate[positions], _LEAST_MISS_RATE)).mean()))
