"""Photographs whose boxes fit them only as they are stored, though they are read upright.

Their annotation file says no sizes, or those of the upright image beside boxes that were drawn on the stored
pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.image_files import stored_size
from asag_evaluation.data.orientation import OPTION

_ROUNDING = 1.0
"""Pixels a box may lie beyond its image."""


def about_boxes_as_stored(dataset: CocoDataset) -> str | None:
    """Say which images are to be turned and have boxes that fit their stored size only, in a sentence.

    Reads the headers of all images; None if there is no such image.
    """
    content = dataset.ground_truth()
    reach: dict[int, tuple[float, float]] = {}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        right, low = reach.get(annotation["image_id"], (0.0, 0.0))
        reach[annotation["image_id"]] = (max(right, x + w), max(low, y + h))
    found = [
        dataset.path(index)
        for index, image in enumerate(content["images"])
        if _only_as_stored(dataset.path(index), (image["width"], image["height"]), reach.get(image["id"]))
    ]
    return _sentence(found, len(dataset)) if found else None


def _only_as_stored(path: Path, read: tuple[int, int], reach: tuple[float, float] | None) -> bool:
    """Return whether boxes reach (right, low) beyond the image as it is read (width, height), and not beyond
    it as it is stored."""
    if reach is None or _within(reach, read):
        return False
    size = stored_size(path)
    if size is None or size.orientation == 1:
        return False
    stored = (size.width, size.height)
    return stored != read and _within(reach, stored)


def _within(reach: tuple[float, float], sides: Iterable[int]) -> bool:
    return all(most <= side + _ROUNDING for most, side in zip(reach, sides, strict=True))


def _sentence(found: list[Path], total: int) -> str:
    return (
        f"{len(found)} of {total} images are to be turned, and have boxes that fit them only as they are "
        f"stored (the first is '{found[0].name}'): give {OPTION} stored, and where the annotation file says "
        "the width and height of the upright image, exchange these two there"
    )
