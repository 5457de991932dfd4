"""Small data sets in COCO layout, written for a test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 3, "name": "ball"}]
"""Not in the order of their ids: labels are."""


def box(image_id: int, xywh: Any, category_id: int = 3, **more: Any) -> dict[str, Any]:
    """An annotation."""
    return {"image_id": image_id, "bbox": xywh, "category_id": category_id, **more}


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    """An RGB picture in which every pixel tells where it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, np.full_like(x, 90)], axis=2).astype(np.uint8)


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def write_coco(
    root: Path,
    annotations: Sequence[Mapping[str, Any]],
    *,
    split: str = "train2017",
    shapes: Sequence[tuple[int, int]] = ((40, 60), (50, 50)),
    pictures: Sequence[NDArray[np.uint8]] | None = None,
    categories: Sequence[Mapping[str, Any]] = CATEGORIES,
    kinds: Sequence[str] | None = None,
) -> Path:
    """Write a data set of images of these (height, width), with ids from 1; return its annotation file."""
    pictures = [gradient(*shape) for shape in shapes] if pictures is None else pictures
    images = []
    for number, picture in enumerate(pictures, start=1):
        name = f"{number}.png"
        write_image(root / split / name, picture)
        entry = {"id": number, "file_name": name, "height": picture.shape[0], "width": picture.shape[1]}
        images.append(entry if kinds is None else {**entry, "kind": kinds[number - 1]})
    numbered = [{"id": i, "iscrowd": 0, **annotation} for i, annotation in enumerate(annotations)]
    content = {"images": images, "annotations": numbered, "categories": list(categories)}
    return write_json(root / "annotations" / f"instances_{split}.json", content)


def write_json(path: Path, content: Any) -> Path:
    """Write any JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
