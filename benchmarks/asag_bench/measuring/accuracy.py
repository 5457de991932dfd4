"""The accuracy of what is timed: the same detector, on annotated pictures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asag_bench.measuring.samples import evenly
from asag_bench.runners.subjects import DetectorSubject
from asag_deploy.images.reading import RgbImage

NEEDS = "accuracy was not measured: it needs {name}, which `pip install 'asag-deploy[bench]'` installs"


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Average precision of one subject, each from 0 to 1, or None where there is nothing to measure."""

    images: int
    ap: float | None
    ap50: float | None
    ap75: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dict(vars(self))


def open_data(folder: Path, detector: DetectorSubject, limit: int | None) -> tuple[Any | None, str | None]:
    """The validation images of a folder in COCO layout, or None and why accuracy cannot be measured.

    Raises DataError if the folder is no data set, or one of other classes.
    """
    try:
        import pycocotools  # noqa: F401

        from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
    except ImportError as error:
        return None, NEEDS.format(name=error.name)
    categories = detector.detector().manifest.categories
    data = CocoDataset.open(folder, VAL_SPLIT, categories=categories)
    return (data if limit is None else data.subset(range(min(limit, len(data))))), None


def pictures_of(data: Any, most: int) -> list[tuple[str, RgbImage]]:
    """At most so many pictures of a data set, evenly from first to last, with their names."""
    return [(str(data.records[i].image_id), data[i].image) for i in evenly(len(data), most)]


def measure_accuracy(subject: DetectorSubject, data: Any, *, quiet: bool) -> Accuracy:
    """Evaluate a subject on a data set opened by `open_data`, one image at a time."""
    from asag_evaluation.evaluate import evaluate

    off = True if quiet else None
    label = f"accuracy of {subject.name}"
    with tqdm(total=len(data), desc=label, unit="image", file=sys.stderr, disable=off, leave=False) as bar:
        found = evaluate(subject.detector(), data, on_image=lambda sample, detections: bar.update())
    return Accuracy(images=found.images, ap=found.coco.ap, ap50=found.coco.ap50, ap75=found.coco.ap75)
