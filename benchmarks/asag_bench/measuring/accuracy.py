"""The accuracy of what is timed: the same detector, on annotated pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asag_bench.measuring.image_groups import evenly
from asag_bench.result import Accuracy
from asag_bench.runners.runner import DetectorRunner
from asag_deploy.command_line import progress
from asag_deploy.images.reading import RgbImage

NEEDS = "accuracy was not measured: it needs {name}, which `pip install 'asag-deploy[bench]'` installs"


def open_data(folder: Path, runner: DetectorRunner, limit: int | None) -> tuple[Any | None, str | None]:
    """Open the validation images of a folder in COCO layout; or None, and why accuracy cannot be measured.

    Raises DataError if the folder is no data set, or one of other classes.
    """
    try:
        import pycocotools  # noqa: F401

        from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
    except ImportError as error:
        return None, NEEDS.format(name=error.name)
    categories = runner.detector().manifest.categories
    data = CocoDataset.open(folder, VAL_SPLIT, categories=categories)
    return (data if limit is None else data.subset(range(min(limit, len(data))))), None


def pictures_of(data: Any, most: int) -> list[tuple[str, RgbImage]]:
    """Read at most so many pictures of a data set, evenly from first to last, with their names."""
    return [(str(data.records[i].image_id), data[i].image) for i in evenly(len(data), most)]


def measure_accuracy(runner: DetectorRunner, data: Any, *, quiet: bool) -> Accuracy:
    """Evaluate a runner on a data set opened by `open_data`, one image at a time."""
    from asag_evaluation.evaluate import evaluate

    label = f"accuracy of {runner.name}"
    with progress(total=len(data), unit="image", description=label, quiet=quiet) as bar:
        found = evaluate(runner.detector(), data, on_image=lambda sample, detections: bar.update())
    return Accuracy(images=found.images, ap=found.coco.ap, ap50=found.coco.ap50, ap75=found.coco.ap75)
