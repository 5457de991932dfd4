"""Metrics of the anchor generator: recall, and how it adapts (paper, table 5 and figure 6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Level
from asag_deploy.loop.trace import ProbingTrace
from asag_evaluation.metrics.overlaps import Boxes, iou

RECALL_LIMITS = (100, 300, 1000)
LEVELS: tuple[Level, ...] = ("P5", "P4", "P3")

_THRESHOLDS = np.linspace(0.5, 0.95, 10)


class ProbedImage(NamedTuple):
    """One image's way through the anchor generator."""

    objects: int
    """Objects that are annotated in it."""
    kind: str | None
    """What sort of generated scene it is, or None."""
    trace: ProbingTrace


@dataclass(frozen=True, kw_only=True)
class AnchorMetrics:
    """Averages over images."""

    anchors: float
    """Anchors that reached the decoder [#An]."""
    patches_p4: float
    """Patches probed on P4 [N_P4]; images that were not probed count as 0."""
    patches_p3: float
    exit_levels: dict[str, int]
    """Images by the deepest level they were probed on."""
    exit_levels_of_kind: dict[str, dict[str, int]]
    """The same for each kind of generated scene; empty for other images."""
    correlation: float | None
    """Pearson's, between the objects and the anchors of an image; None where one of them never varies."""
    points: tuple[tuple[int, int], ...]
    """Objects and anchors of each image."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain JSON."""
        return {**vars(self), "points": [list(point) for point in self.points]}


def anchor_metrics(probed: Sequence[ProbedImage]) -> AnchorMetrics:
    """Measure how the images of a data set went through the anchor generator."""
    points = tuple((entry.objects, entry.trace.anchor_count) for entry in probed)
    kinds = sorted({entry.kind for entry in probed if entry.kind is not None})
    return AnchorMetrics(
        anchors=float(np.mean([anchors for _, anchors in points])) if points else 0.0,
        patches_p4=_mean_patches(probed, "P4"),
        patches_p3=_mean_patches(probed, "P3"),
        exit_levels=_exits(probed),
        exit_levels_of_kind={kind: _exits([e for e in probed if e.kind == kind]) for kind in kinds},
        correlation=_correlation(points),
        points=points,
    )


def best_anchors(trace: ProbingTrace) -> Boxes:
    """Return the anchors (q, 4) that reached the decoder, x1, y1, x2, y2, best scored first.

    trace: of a call that asked to explain.  The decoder has them in that order only if they were more than
    the cap.
    """
    levels = [level.candidates for level in trace.levels if level.candidates is not None]
    boxes = np.concatenate([level.boxes[level.passed] for level in levels])
    scores = np.concatenate([level.scores[level.passed] for level in levels])
    best: Boxes = boxes[(-scores).argsort(kind="stable")]
    return best


def average_recall(
    objects: Sequence[Boxes], boxes: Sequence[Boxes], limits: Sequence[int] = RECALL_LIMITS
) -> dict[int, float | None]:
    """Measure the average recall of class-agnostic boxes over IoU 0.50 to 0.95, for the best so many of each
    image.

    `objects` (T, 4) and `boxes` (n, 4), best first, x1, y1, x2, y2, one array of each per image.  Pairs are
    made from the largest overlap down, each object and each box once.  None where there are no objects.
    """
    total = sum(len(of_image) for of_image in objects)
    if not total:
        return dict.fromkeys(limits)
    overlaps = [iou(truth, found[: max(limits)]) for truth, found in zip(objects, boxes, strict=True)]
    result: dict[int, float | None] = {}
    for limit in limits:
        matched = np.concatenate([_matched(overlap[:, :limit]) for overlap in overlaps])
        result[limit] = float((matched[:, None] >= _THRESHOLDS).sum() / (total * len(_THRESHOLDS)))
    return result


def _matched(overlap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pair rows with columns, the largest overlap first: (T, n) -> the overlaps of the pairs, (min(T,
    n),)."""
    overlap = overlap.copy()
    pairs = np.zeros(min(overlap.shape))
    for i in range(len(pairs)):
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        pairs[i] = overlap[row, column]
        overlap[row] = overlap[:, column] = -1
    return pairs


def _mean_patches(probed: Sequence[ProbedImage], level: Level) -> float:
    counts = [sum(run.patches for run in entry.trace.levels if run.level == level) for entry in probed]
    return float(np.mean(counts)) if counts else 0.0


def _exits(probed: Sequence[ProbedImage]) -> dict[str, int]:
    counts = Counter(entry.trace.exit_level for entry in probed)
    return {level: counts[level] for level in LEVELS}


def _correlation(points: Sequence[tuple[int, int]]) -> float | None:
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    if len(values) < 2 or (np.ptp(values, axis=0) == 0).any():
        return None
    matrix = np.asarray(np.corrcoef(values.T))
    return float(matrix[0, 1])
