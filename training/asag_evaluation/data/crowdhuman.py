"""CrowdHuman's annotations, one JSON object a line (.odgt), converted to COCO layout.

Objects are whole bodies (`fbox`), which may reach beyond the image.  What CrowdHuman wants ignored, crowds,
reflections and statues among them, becomes a crowd annotation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asag_deploy.atomic import atomic_write_text
from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import DataError, ImageError
from asag_deploy.images.reading import read_image
from asag_evaluation.data.values import flag
from asag_evaluation.data.values import number as measure_of
from asag_evaluation.data.written import check_ours, link_images

CROWDHUMAN_CATEGORIES: tuple[Category, ...] = (Category(id=1, name="person"),)
"""The one class of CrowdHuman."""

_PERSON = CROWDHUMAN_CATEGORIES[0]


_DESCRIPTION = "CrowdHuman, whole bodies"


def convert_crowdhuman(
    odgt: Path,
    image_dir: Path,
    output_dir: Path,
    *,
    split: str,
    progress: Callable[[int], object] = lambda done: None,
) -> Path:
    """Write `output_dir/annotations/instances_{split}.json` and return it.

    `image_dir` holds an image `ID.jpg` for each line of `odgt`; `output_dir/split` leads to them,
    unless it is that folder.  Image ids are numbered from 1 in the order of the file.  Raises DataError for a
    file that is missing or malformed and for images that are, OutputError if nothing can be written.
    """
    file = output_dir / "annotations" / f"instances_{split}.json"
    check_ours(file, _DESCRIPTION)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate(_records(odgt), start=1):
        name = f"{record['ID']}.jpg"
        images.append({"id": number, "file_name": name, **_size(image_dir / name, odgt)})
        for box in record["gtboxes"]:
            annotations.append(_annotation(box, number, len(annotations) + 1, odgt))
        progress(number)
    if not images:
        raise DataError(f"'{odgt}' holds no images: download it again")
    content = {
        "info": {"description": _DESCRIPTION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": _PERSON.id, "name": _PERSON.name}],
    }
    link_images(output_dir / split, image_dir, (image["file_name"] for image in images))
    atomic_write_text(file, json.dumps(content))
    return file


def _records(odgt: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = odgt.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"there is no annotation file '{odgt}': check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"annotation file '{odgt}' cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or "ID" not in record or not isinstance(record.get("gtboxes"), list):
            raise DataError(
                f"line {number} of '{odgt}' is not a CrowdHuman record with ID and gtboxes: download it again"
            )
        yield record


def _size(image: Path, odgt: Path) -> dict[str, int]:
    try:
        height, width = read_image(image).shape[:2]
    except ImageError as error:
        raise DataError(f"{error} (listed in '{odgt}')") from error
    return {"height": height, "width": width}


def _annotation(box: Any, image_id: int, number: int, odgt: Path) -> dict[str, Any]:
    try:
        x, y, w, h = (_measure(value) for value in box["fbox"])
        ignored = flag(box.get("extra", {}).get("ignore"))
        visible = box.get("vbox")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"'{odgt}' has a box without four numbers in fbox, {box!r:.60}: download it again"
        ) from None
    if ignored is None:
        raise DataError(f"'{odgt}' has a box whose 'ignore' is neither 0 nor 1, {box!r:.60}: mend it")
    return {
        "id": number,
        "image_id": image_id,
        "category_id": _PERSON.id,
        "bbox": [x, y, w, h],
        "bbox_vis": visible,
        "area": w * h,
        "iscrowd": int(ignored or box.get("tag") != "person"),
    }


def _measure(value: Any) -> float:
    found = measure_of(value)
    if found is None:
        raise ValueError("it is no number")
    return found
