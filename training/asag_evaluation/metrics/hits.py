"""How many objects are found at one threshold: recall and precision, which COCO's averages do not show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_evaluation.metrics.overlaps import Boxes, iou


class Compared(NamedTuple):
    """An image's n detections, best first, and its m objects."""

    found: Boxes
    """(n, 4) x1, y1, x2, y2 in pixels."""
    found_class: NDArray[np.integer]
    """(n,)"""
    objects: Boxes
    """(m, 4) x1, y1, x2, y2 in pixels."""
    object_class: NDArray[np.integer]
    """(m,)"""


@dataclass(frozen=True, kw_only=True)
class Hits:
    """Counts over a set of images."""

    detections: int
    objects: int
    hits: int
    """Detections that are an object's; each object has one at most."""

    @property
    def recall(self) -> float | None:
        """The part of the objects that was found; None if there are none."""
        return self.hits / self.objects if self.objects else None

    @property
    def precision(self) -> float | None:
        """The part of the detections that is an object's; None if there are none."""
        return self.hits / self.detections if self.detections else None


def count_hits(images: Iterable[Compared], *, least_iou: float = 0.5) -> Hits:
    """Give every detection, best first, the free object of its class that it overlaps most, by `least_iou`.

    So do COCO's evaluation and others, at one threshold of confidence and of overlap.
    """
    detections = objects = hits = 0
    for image in images:
        detections += len(image.found)
        objects += len(image.objects)
        overlap = iou(image.found, image.objects)
        overlap[image.found_class[:, None] != image.object_class[None]] = 0
        for row in overlap:
            best = int(row.argmax()) if len(row) else 0
            if len(row) and row[best] >= least_iou:
                hits += 1
                overlap[:, best] = 0
    return Hits(detections=detections, objects=objects, hits=hits)
