"""Pictures of a run: what is there, and what the network makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asag_deploy.bundle.manifest import distinct_names
from asag_deploy.detector import Detector
from asag_deploy.images.drawing import draw_detections
from asag_deploy.images.writing import write_picture
from asag_evaluation.data.coco import CocoDataset


def write_progress_pictures(
    detector: Detector,
    dataset: CocoDataset,
    indices: Sequence[int],
    folder: Path,
    epoch: int,
    threshold: float = 0.3,
) -> None:
    """Write a picture for each image: ground truth; patches (red) and anchors (white); detections.

    indices: of images in `dataset`, which must have the classes of the detector; detections below `threshold`
    are not drawn.  Files are called `epochEEE-imageID.jpg`.  Raises DataError if an image cannot be read,
    OutputError if a picture cannot be written.
    """
    names = distinct_names(dataset.categories)
    for index in indices:
        sample = dataset[index]
        found = detector(sample.image, channel_order="rgb")
        truth = sample.image.copy()
        draw_detections(
            truth,
            xyxy=sample.boxes,
            class_id=sample.labels,
            names=[names[label] for label in sample.labels],
            confidence=None,
        )
        traced = found.filter(1.0).plot(sample.image, trace=True, channel_order="rgb")
        detected = found.filter(threshold).plot(sample.image, channel_order="rgb")
        write_picture(
            folder / f"epoch{epoch:03d}-image{sample.image_id}.jpg", np.hstack([truth, traced, detected])
        )
