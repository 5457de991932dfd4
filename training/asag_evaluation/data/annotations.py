"""A COCO annotation file, read and checked: what is odd is counted, what is wrong is refused.

Boxes in the file are x, y, w, h in pixels, from the top left corner.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import DataError
from asag_deploy.images.file_names import said_name
from asag_evaluation.data.annotation_file import read_content
from asag_evaluation.data.image_files import ImageFiles, is_file, stored_size
from asag_evaluation.data.values import box_around, box_of, flag, number, whole_number


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

    without_box: int = 0
    """Annotations with neither a box nor an outline, as captions and keypoints are: dropped."""
    repeated: int = 0
    """Entries that stand in the file twice, alike to the letter: taken once."""
    objects_of_one_box: int = 0
    """Objects that have class and box of another one in their image: taken all the same."""
    numbers_as_text: int = 0
    """Numbers that were written as text: read as numbers."""
    boxes_from_outlines: int = 0
    """Boxes that were missing and were drawn around the outlines."""
    sizes_from_files: int = 0
    """Images whose height and width were missing and were read from their files."""
    names_found_otherwise: int = 0
    """Images whose file has not quite the name that the annotations give: other folders, letters or signs."""
    supercategories: int = 0
    """Classes that are but the heading of others and have no objects: left out."""

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
    doubts: tuple[str, ...]
    """Sentences on what may be meant otherwise than it was read."""


def read_annotations(
    path: Path,
    categories: Sequence[Category] | None = None,
    *,
    images: ImageFiles | None = None,
    as_stored: bool = False,
) -> AnnotationFile:
    """Read a COCO annotation file.

    Classes are labelled in the order of their ids; with `categories`, those of a checkpoint, in theirs, whose
    names tell which is which, and whose ids take the place of the file's.
    `images` finds files whose names are written in another way, and gives sizes that are missing: those of
    the upright image, or `as_stored`.  Raises DataError for a file that is missing, malformed or of another
    kind, for records that cannot be read, and for classes that the checkpoint lacks.
    """
    return _Reader(path, read_content(path), images, as_stored).file(categories)


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


def _labels(own: Sequence[Category], known: Sequence[Category], where: str) -> dict[int, int]:
    """Return by its id in the file the label that a class has in a network.

    It is known by its name, whatever its number, unless another has the same; DataError for one that is not.
    """
    by_name = {category.name: label for label, category in enumerate(known)}
    counts = [Counter(category.name for category in categories) for categories in (own, known)]
    if any(count[category.name] != 1 for category in own for count in counts):
        check_categories(own, known, where)
        by_id = {category.id: label for label, category in enumerate(known)}
        return {category.id: by_id[category.id] for category in own}
    return {category.id: by_name[category.name] for category in own}


class _Image(NamedTuple):
    """An entry of `images`."""

    image_id: int
    file_name: str
    height: int
    width: int
    kind: str | None


class _Reader:
    """Goes through the content of one file."""

    def __init__(
        self, path: Path, content: Mapping[str, Any], files: ImageFiles | None, as_stored: bool
    ) -> None:
        self.path, self.content, self.files, self.as_stored = path, content, files, as_stored
        self.counts: Counter[str] = Counter()
        self.ids_of_names: dict[str, int] = {}
        """The ids of classes whose names are their own."""

    def file(self, categories: Sequence[Category] | None) -> AnnotationFile:
        """Read everything."""
        own = self._categories()
        if categories is None:
            chosen = tuple(sorted(own, key=lambda category: category.id))
            labels = {category.id: label for label, category in enumerate(chosen)}
        else:
            chosen = tuple(categories)
            labels = _labels(own, chosen, str(self.path))
        records, doubts = self._records(labels)
        counted = Counts(
            images=len(records),
            objects=sum(len(record.boxes) for record in records),
            empty_images=sum(not len(record.boxes) for record in records),
            **self.counts,
        )
        return AnnotationFile(chosen, records, counted, doubts)

    def _categories(self) -> list[Category]:
        found: dict[int, Category] = {}
        headings = {}
        for position, entry in self._entries("categories"):
            name = _class_name(entry.get("name"))
            number = self._whole(entry.get("id"))
            if number is None:
                said = _shown(entry.get("id"))
                raise self._error(f"category {position} has the id {said}, which is {_NO_WHOLE}")
            if not name:
                raise self._error(f"category {position} (id {number}) has no name")
            category = Category(id=number, name=name)
            if number in found and found[number] != category:
                raise self._error(
                    f"two of its categories have the id {number}: '{found[number].name}' and '{name}'"
                )
            self.counts["repeated"] += number in found
            found[number] = category
            headings[number] = _class_name(entry.get("supercategory"))
        if not found:
            raise self._error("there are no categories")
        names = Counter(category.name for category in found.values())
        self.ids_of_names = {c.name: c.id for c in found.values() if names[c.name] == 1}
        return self._without_headings(list(found.values()), headings)

    def _without_headings(self, found: list[Category], headings: Mapping[int, str]) -> list[Category]:
        """Leave out a class 0 that is the supercategory of all the others and has no objects (Roboflow's)."""
        heading = next((category for category in found if category.id == 0), None)
        others = [category for category in found if category.id != 0]
        if heading is None or not others or any(headings[c.id] != heading.name for c in others):
            return found
        if any(whole_number(entry.get("category_id")) == 0 for _, entry in self._entries("annotations")):
            return found
        self.counts["supercategories"] += 1
        return others

    def _records(self, labels: Mapping[int, int]) -> tuple[tuple[ImageRecord, ...], tuple[str, ...]]:
        images = self._images()
        objects: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
        doubts = _Doubts()
        used_images, used_classes = set[int](), set[int]()
        seen: dict[Any, Mapping[str, Any]] = {}
        for position, entry in self._entries("annotations"):
            if self._is_repeated(entry, seen):
                continue
            image_id, class_id = self._number_in(entry, "image_id"), self._class_of(entry)
            used_images.add(image_id)
            used_classes.add(class_id)
            image = images.get(image_id)
            annotation = self._annotation(position, entry, labels.get(class_id), image)
            if image is None:
                self.counts["unknown_image"] += 1
            elif annotation is not None:
                doubts.look_at(annotation, image.height, image.width, _turn(entry))
                if self._is_usable(annotation, image.width, image.height):
                    objects[image.image_id].append(annotation)
        for found in objects.values():
            self.counts["objects_of_one_box"] += len(found) - len({(each.xywh, each.label) for each in found})
        records = tuple(_record(image, objects[image.image_id]) for image in images.values())
        dropped = len(self.content["annotations"]) if not any(objects.values()) else 0
        shifted = (
            _if_shifted("classes", used_classes, labels, str(self.path)),
            _if_shifted("images", used_images, images, str(self.path)),
        )
        return records, (*doubts.sentences(str(self.path), dropped), *filter(None, shifted))

    def _is_repeated(self, entry: Mapping[str, Any], seen: dict[Any, Mapping[str, Any]]) -> bool:
        """Tell whether an annotation of this id and content was there before."""
        key = entry.get("id")
        if not isinstance(key, int | str):
            return False
        is_repeated = seen.setdefault(key, entry) is not entry and seen[key] == entry
        self.counts["repeated"] += is_repeated
        return is_repeated

    def _images(self) -> dict[int, _Image]:
        """Return the images by their id, in the order of the file."""
        found: dict[int, _Image] = {}
        entries: dict[int, Mapping[str, Any]] = {}
        names: dict[str, int] = {}
        for position, entry in self._entries("images"):
            image = self._image(position, entry)
            if image.image_id in found:
                if entries[image.image_id] != entry:
                    raise self._error(
                        f"two of its images have the id {image.image_id}: "
                        f"'{found[image.image_id].file_name}' and '{image.file_name}'"
                    )
                self.counts["repeated"] += 1
                continue
            first = names.setdefault(image.file_name, image.image_id)
            if first != image.image_id:
                raise self._error(
                    f"images {first} and {image.image_id} are the same file '{image.file_name}', so that "
                    "objects of the one are missing from the other: give it one entry"
                )
            found[image.image_id], entries[image.image_id] = image, entry
        if not found:
            raise self._error("there are no images")
        return found

    def _image(self, position: int, entry: Mapping[str, Any]) -> _Image:
        image_id, name = self._whole(entry.get("id")), self._file_name(entry)
        if image_id is None:
            said = _shown(entry.get("id"))
            raise self._error(f"image {position} has the id {said}, which is {_NO_WHOLE}")
        if not name:
            raise self._error(f"image {position} (id {image_id}) has no file_name")
        height, width = self._size(entry, name)
        kind = entry.get("kind")
        return _Image(image_id, name, height, width, kind if isinstance(kind, str) else None)

    def _file_name(self, entry: Mapping[str, Any]) -> str:
        """Return the name of a file that is there, else what the entry says; empty if it says none."""
        name = said_name(entry)
        if self.files is None or not name:
            return name
        if is_file(self.files.folder / name):
            plain = str(PurePath(name))
            self.counts["names_found_otherwise"] += plain != name
            return plain
        path = self.files.find(name)
        if path is None:
            return name
        found = path.relative_to(self.files.folder) if path.is_relative_to(self.files.folder) else path
        self.counts["names_found_otherwise"] += str(found) != name
        return str(found)

    def _size(self, entry: Mapping[str, Any], name: str) -> tuple[int, int]:
        """Return height and width, from the file if the entry has none."""
        height, width = (self._whole(entry.get(side)) for side in ("height", "width"))
        if height is not None and width is not None and min(height, width) >= 1 > max(height, width) // _MOST:
            return height, width
        size = stored_size(self.files.folder / name) if self.files is not None else None
        if size is None:
            raise self._error(f"image '{name}' has no height and width in pixels, and its file says none")
        self.counts["sizes_from_files"] += 1
        return (size.height, size.width) if self.as_stored else size.upright

    def _annotation(
        self, position: int, entry: Mapping[str, Any], label: int | None, image: _Image | None
    ) -> Annotation | None:
        """Read an annotation; None if it has no place or its class is unknown."""
        what = f"annotation {entry.get('id', position)}"
        box = self._box(entry, what, image)
        if box is not None and label is None:
            self.counts["unknown_class"] += 1
        if box is None or label is None:
            return None
        _, _, w, h = box
        area = number(entry.get("area"))
        said = entry["iscrowd"] if "iscrowd" in entry else _crowd_otherwise(entry)
        is_crowd, is_ignored = flag(said), flag(entry.get("ignore"))
        if is_crowd is None or is_ignored is None:
            raise self._error(
                f"{what} has iscrowd {_shown(said)} and ignore "
                f"{_shown(entry.get('ignore'))}, where 0 or 1 is expected"
            )
        return Annotation(box, area if area and area > 0 else w * h, label, is_crowd or is_ignored)

    def _box(
        self, entry: Mapping[str, Any], what: str, image: _Image | None
    ) -> tuple[float, float, float, float] | None:
        """Return x, y, width, height, around the outline if there is no box; None if there is neither."""
        said, outline = entry.get("bbox"), entry.get("segmentation")
        if said in (None, [], [0, 0, 0, 0]):
            height, width = (0, 0) if image is None else (image.height, image.width)
            around = box_around(outline, height, width)
            if around is None and said:
                return 0.0, 0.0, 0.0, 0.0
            if around is None and outline not in (None, []):
                raise self._error(f"{what} has no box, and a segmentation that cannot be read")
            self.counts["without_box" if around is None else "boxes_from_outlines"] += 1
            return around
        box = box_of(said)
        if box is None:
            raise self._error(
                f"{what} has the box {_shown(said)}, which is not four numbers x, y, width, height"
            )
        self.counts["numbers_as_text"] += isinstance(said, str) or str in map(type, said)
        return box if "bbox_mode" not in entry else self._from_mode(box, entry["bbox_mode"], what)

    def _from_mode(
        self, box: tuple[float, float, float, float], mode: Any, what: str
    ) -> tuple[float, float, float, float]:
        """Return x, y, width, height of a box that says what it is, as Detectron2 writes it."""
        name = str(mode).rpartition(".")[2].upper()
        if name in ("1", "XYWH_ABS"):
            return box
        if name not in ("0", "XYXY_ABS"):
            raise self._error(f"{what} has a box of mode {_shown(mode)}, where XYXY_ABS or XYWH_ABS is read")
        x1, y1, x2, y2 = box
        return x1, y1, x2 - x1, y2 - y1

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

    def _class_of(self, entry: Mapping[str, Any]) -> int:
        """Return the id of an annotation's class, which may be called by its name."""
        said = entry.get("category_id")
        if isinstance(said, str) and whole_number(said) is None:
            return self.ids_of_names.get(_class_name(said), _NO_ID)
        return self._number_in(entry, "category_id")

    def _number_in(self, entry: Mapping[str, Any], name: str) -> int:
        """Return the id that an entry refers to; -1 for none, which no list has."""
        found = self._whole(entry.get(name))
        return _NO_ID if found is None else found

    def _whole(self, value: Any) -> int | None:
        found = whole_number(value)
        self.counts["numbers_as_text"] += found is not None and isinstance(value, str)
        return found

    def _entries(self, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        entries = self.content.get(name)
        if not isinstance(entries, list):
            raise self._error(f"it has no list of {name}")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise self._error(f"number {position} of its {name} is no object, but {_shown(entry)}")
            yield position, entry

    def _error(self, problem: str) -> DataError:
        return DataError(f"'{self.path}' is not a usable COCO annotation file: {problem}; mend the file")


_ROUNDING = 0.01
"""Pixels a box may lie beyond its image before it counts as clipped."""
_NO_ID = -(2**63)
_NO_WHOLE = "no whole number that 64 bits hold"
_MOST = 2**31
"""Pixels of a side, which no image has."""


class _Doubts:
    """Boxes and areas that look as if they were something else than they should be."""

    def __init__(self) -> None:
        self._boxes = self._beyond = self._as_corners = self._relative = self._turned = self._areas = 0

    def look_at(self, annotation: Annotation, height: int, width: int, turn: float) -> None:
        """Take note of a box, its area, and the degrees by which it is said to be turned."""
        x, y, w, h = xywh = annotation.xywh
        self._areas += annotation.area > 1.5 * w * h + 10 or annotation.area <= 1 < w * h / 16
        self._boxes += 1
        self._beyond += x + w > width + 1 or y + h > height + 1
        self._as_corners += 0 <= x < w <= width + 1 and 0 <= y < h <= height + 1
        self._turned += turn != 0
        self._relative += 0 < max(xywh) <= 1 and min(xywh) >= 0 and min(height, width) > 1

    def sentences(self, where: str, dropped: int) -> tuple[str, ...]:
        """Return what there is to doubt; `dropped`: the number of annotations, if none of them is left."""
        found = []
        if dropped:
            found.append(
                f"none of the {dropped} annotations in '{where}' is an object with a box, of an image and a "
                "class that the file lists: look at how ids and boxes are written"
            )
        if self._turned:
            found.append(
                f"{self._turned} of {self._boxes} boxes in '{where}' are said to be turned, and are read as "
                "if they were not: replace them by upright boxes around their objects"
            )
        if self._areas > 0.1 * self._boxes:
            found.append(
                f"{self._areas} of {self._boxes} objects in '{where}' have an area that does not fit their "
                "box, and AP by size goes by it: leave areas out, and those of the boxes are taken"
            )
        if self._boxes and self._relative == self._boxes:
            found.append(
                f"all {self._boxes} boxes in '{where}' lie between 0 and 1: if they are relative to the "
                "image, multiply them by its width and height"
            )
        elif self._beyond and self._as_corners == self._boxes:
            found.append(
                f"{self._beyond} of {self._boxes} boxes in '{where}' reach beyond their image, and none "
                "would as x1, y1, x2, y2: if they are that, write x, y, width, height"
            )
        return tuple(found)


def _if_shifted(what: str, used: set[int], listed: Mapping[int, Any], where: str) -> str | None:
    """Say that annotations seem to count from 0 what is listed from 1, or the reverse; else None."""
    used = used - {_NO_ID}
    unlisted = used - listed.keys()
    if not unlisted or not any({each + step for each in used} <= listed.keys() for step in (1, -1)):
        return None
    return (
        f"the annotations in '{where}' name {what} {min(used)} to {max(used)}, but {min(listed)} to "
        f"{max(listed)} are listed: if the two count differently, every object is of another one; number "
        "them alike"
    )


def _record(image: _Image, annotations: Sequence[Annotation]) -> ImageRecord:
    objects = [annotation for annotation in annotations if not annotation.crowd]
    xywh = np.array([annotation.xywh for annotation in objects], dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    corners = corners.clip(0, [image.width, image.height] * 2)
    return ImageRecord(
        **image._asdict(),
        boxes=corners.astype(np.float32),
        labels=np.array([annotation.label for annotation in objects], dtype=np.int64),
        annotations=tuple(annotations),
    )


def _turn(entry: Mapping[str, Any]) -> float:
    """Return the degrees by which a box is turned, an attribute in CVAT's files; 0 for half turns."""
    attributes = entry.get("attributes")
    place = attributes if isinstance(attributes, dict) and "rotation" in attributes else entry
    if "rotation" not in place:
        return 0.0
    turn = number(place["rotation"])
    return 0.0 if turn is None or turn % 180 == 0 else turn


def _crowd_otherwise(entry: Mapping[str, Any]) -> Any:
    """Return what an annotation says of being a crowd in other spellings of `iscrowd`."""
    return next((entry[key] for key in ("isCrowd", "is_crowd", "IsCrowd") if key in entry), None)


def _class_name(value: Any) -> str:
    """Return a name on one line, without signs that steer a terminal; numbers are names too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return ""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", value).split())


def _shown(value: Any) -> str:
    """Return a value as a message may hold it."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


_LONGEST_SHOWN = 60
