"""A COCO annotation file, read and checked: what is odd is counted, what is wrong is refused.

Boxes in the file are x, y, w, h in pixels, from the top left corner.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import DataError


class Annotation(NamedTuple):
    """One object as it was annotated."""

    xywh: tuple[float, float, float, float]
    """x, y, w, h in pixels; it may reach beyond the image."""
    area: float
    """Of the object's outline where the file says, else of its box, in square pixels."""
    label: int
    """Index of its class."""
    crowd: bool
    """A group that was not told apart: not learnt from, and not held against a detector that finds it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRecord:
    """One image and its T objects, as the annotation file lists them."""

    image_id: int
    file_name: str
    height: int
    width: int
    kind: str | None
    """What sort of generated scene it is (`large`, `mixed` or `tiny`); None for other images."""
    boxes: NDArray[np.float32]
    """(T, 4) x1, y1, x2, y2 in pixels, clipped to the image; without crowds."""
    labels: NDArray[np.int64]
    """(T,) indices into the categories."""
    annotations: tuple[Annotation, ...]
    """Those objects and the crowds, unclipped: what detections are measured against."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of an annotation file."""

    images: int = 0
    objects: int = 0
    """Objects to learn from."""
    empty_images: int = 0
    """Images without any."""
    crowd: int = 0
    """Crowd annotations: only measured against."""
    clipped: int = 0
    """Objects that reached beyond their image and were clipped to it."""
    outside: int = 0
    """Annotations wholly outside their image: dropped."""
    zero_sized: int = 0
    """Annotations without width or height: dropped."""
    unknown_class: int = 0
    """Annotations of a class the file does not list: dropped."""
    unknown_image: int = 0
    """Annotations of an image the file does not list: dropped."""

    def describe(self) -> str:
        """Return the counts in a line; what did not occur is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        always = ("images", "objects")
        return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in values.items() if n or name in always)


class AnnotationFile(NamedTuple):
    """A whole annotation file."""

    categories: tuple[Category, ...]
    """In label order."""
    records: tuple[ImageRecord, ...]
    counts: Counts


def read_annotations(path: Path, categories: Sequence[Category] | None = None) -> AnnotationFile:
    """Read a COCO annotation file.

    Classes are labelled in the order of their ids; with `categories`, those of a checkpoint, in theirs.
    Raises DataError for a file that is missing or malformed, and for classes that the checkpoint lacks.
    """
    reader = _Reader(path, _read_json(path))
    own = reader.categories()
    if categories is None:
        chosen = tuple(sorted(own, key=lambda category: category.id))
    else:
        chosen = tuple(categories)
        check_categories(own, chosen, str(path))
    labels = {category.id: i for i, category in enumerate(chosen)}
    records = reader.records(labels)
    counted = Counts(
        images=len(records),
        objects=sum(len(record.boxes) for record in records),
        empty_images=sum(not len(record.boxes) for record in records),
        **reader.counts,
    )
    return AnnotationFile(chosen, records, counted)


def check_categories(found: Sequence[Category], known: Sequence[Category], where: str) -> None:
    """Check that every class of a data set is one a network knows, under the same id.

    Raises DataError, naming the first one that is not.
    """
    names = {category.id: category.name for category in known}
    for category in found:
        if category.id not in names:
            raise DataError(
                f"'{where}' has the class '{category.name}' (id {category.id}), which is not among the "
                f"{len(known)} classes of the network: use a data set of the same classes"
            )
        if names[category.id] != category.name:
            raise DataError(
                f"in '{where}' class id {category.id} is '{category.name}', but in the network it is "
                f"'{names[category.id]}': use a data set of the same classes"
            )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"there is no annotation file '{path}': check the data folder and the name of the split"
        ) from None
    except OSError as error:
        raise DataError(f"annotation file '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise DataError(f"annotation file '{path}' is not valid JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is not a COCO annotation file: it holds a {type(content).__name__}")
    return content


class _Reader:
    """Goes through the content of one file."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content
        self.counts: Counter[str] = Counter()

    def categories(self) -> list[Category]:
        found = []
        for position, entry in self._entries("categories"):
            number, name = entry.get("id"), entry.get("name")
            if not _is_int(number) or not isinstance(name, str) or not name:
                raise self._error(f"category {position} has no number as id or no name")
            found.append(Category(id=number, name=name))
        if not found:
            raise self._error("there are no categories")
        self._refuse_duplicates("categories", [category.id for category in found])
        return found

    def records(self, labels: Mapping[int, int]) -> tuple[ImageRecord, ...]:
        images = [self._image(position, entry) for position, entry in self._entries("images")]
        if not images:
            raise self._error("there are no images")
        self._refuse_duplicates("images", [image["image_id"] for image in images])
        sizes = {image["image_id"]: (image["width"], image["height"]) for image in images}
        objects: dict[int, list[Annotation]] = {image_id: [] for image_id in sizes}
        for position, entry in self._entries("annotations"):
            image_id = entry.get("image_id")
            annotation = self._annotation(position, entry, labels)
            if not isinstance(image_id, int) or image_id not in sizes:
                self.counts["unknown_image"] += 1
            elif annotation is not None and self._is_usable(annotation, *sizes[image_id]):
                objects[image_id].append(annotation)
        return tuple(_record(image, objects[image["image_id"]]) for image in images)

    def _image(self, position: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        image_id, name = entry.get("id"), entry.get("file_name")
        if not _is_int(image_id) or not isinstance(name, str) or not name:
            raise self._error(f"image {position} has no number as id or no file_name")
        height, width = entry.get("height"), entry.get("width")
        if not _is_int(height) or not _is_int(width) or min(height, width) < 1:
            raise self._error(f"image '{name}' has no height and width in pixels")
        kind = entry.get("kind")
        return {
            "image_id": image_id,
            "file_name": name,
            "height": height,
            "width": width,
            "kind": kind if isinstance(kind, str) else None,
        }

    def _annotation(
        self, position: int, entry: Mapping[str, Any], labels: Mapping[int, int]
    ) -> Annotation | None:
        """Read an annotation; None if its class is unknown."""
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            raise self._error(
                f"annotation {entry.get('id', position)} has the box {box!r:.60}, "
                "which is not four numbers x, y, width, height"
            )
        category = entry.get("category_id")
        if not isinstance(category, int) or category not in labels:
            self.counts["unknown_class"] += 1
            return None
        x, y, w, h = (float(value) for value in box)
        area = entry.get("area")
        outlined = float(area) if _is_number(area) and area > 0 else w * h
        return Annotation((x, y, w, h), outlined, labels[category], bool(entry.get("iscrowd", 0)))

    def _is_usable(self, annotation: Annotation, width: int, height: int) -> bool:
        """Return whether any of it lies in the image; count what is odd."""
        x, y, w, h = annotation.xywh
        if w <= 0 or h <= 0:
            self.counts["zero_sized"] += 1
            return False
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            self.counts["outside"] += 1
            return False
        beyond = x < 0 or y < 0 or x + w > width + _ROUNDING or y + h > height + _ROUNDING
        self.counts["crowd"] += annotation.crowd
        self.counts["clipped"] += beyond and not annotation.crowd
        return True

    def _entries(self, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        entries = self.content.get(name)
        if not isinstance(entries, list):
            raise self._error(f"it has no list of {name}")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise self._error(f"number {position} of its {name} is no object, but {entry!r:.40}")
            yield position, entry

    def _refuse_duplicates(self, name: str, ids: Sequence[int]) -> None:
        number, count = Counter(ids).most_common(1)[0]
        if count > 1:
            raise self._error(f"{count} of its {name} have the id {number}")

    def _error(self, problem: str) -> DataError:
        return DataError(f"'{self.path}' is not a usable COCO annotation file: {problem}; mend the file")


_ROUNDING = 0.01
"""Pixels a box may lie beyond its image before it counts as clipped."""


def _record(image: Mapping[str, Any], annotations: Sequence[Annotation]) -> ImageRecord:
    objects = [annotation for annotation in annotations if not annotation.crowd]
    xywh = np.array([annotation.xywh for annotation in objects], dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    corners = corners.clip(0, [image["width"], image["height"]] * 2)
    return ImageRecord(
        **image,
        boxes=corners.astype(np.float32),
        labels=np.array([annotation.label for annotation in objects], dtype=np.int64),
        annotations=tuple(annotations),
    )


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
