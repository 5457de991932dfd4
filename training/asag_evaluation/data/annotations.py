"""A COCO annotation file, read and checked: what is odd is counted, what is wrong is refused.

Boxes in the file are x, y, w, h in pixels, from the top left corner.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import DataError
from asag_deploy.images.file_names import said_name
from asag_evaluation.data.assembly import Found
from asag_evaluation.data.columns import NO_ID
from asag_evaluation.data.image_files import ImageFiles, is_file, stored_size
from asag_evaluation.data.records import ImageEntry, Objects
from asag_evaluation.data.values import box_around, box_of, flag, number, whole_number

_NAMED = 6
"""As many classes a message names."""


def labels_of(own: Sequence[Category], known: Sequence[Category], where: str) -> list[int]:
    """Return the label that each class of a file has in a network.

    It is known by its name, whatever its number, unless another has the same: then by both.  Raises
    DataError, naming the first class that the network does not know.
    """
    names = {category.name for category in known}
    for category in own:
        if category.name not in names:
            raise DataError(_unknown_class(category.name, own, known, where))
    counts = [Counter(category.name for category in categories) for categories in (own, known)]
    if any(count[category.name] > 1 for category in own for count in counts):
        return _labels_by_id(own, known, where)
    by_name = {category.name: label for label, category in enumerate(known)}
    return [by_name[category.name] for category in own]


def _unknown_class(name: str, own: Sequence[Category], known: Sequence[Category], where: str) -> str:
    """Say that a network does not know a class, and what helps."""
    more = len(known) - _NAMED
    those = ", ".join(category.name for category in known[:_NAMED])
    if more > 0:
        those += f" and {more} more"
    advice = "use a data set of its classes"
    if {category.name for category in own} & {category.name for category in known}:  # parts of one, maybe
        advice += " (of Pascal VOC's layout, `asag-data voc --classes` gives all parts the same)"
    return f"'{where}' has the class '{name}', which the network does not know (it knows {those}): {advice}"


def _labels_by_id(own: Sequence[Category], known: Sequence[Category], where: str) -> list[int]:
    """Return the labels where several classes have one name, which only ids tell apart (else DataError)."""
    by_id = {category.id: label for label, category in enumerate(known)}
    for category in own:
        label = by_id.get(category.id)
        if label is None or known[label].name != category.name:
            theirs = "it has no such id" if label is None else f"it is '{known[label].name}'"
            raise DataError(
                f"in '{where}' class id {category.id} is '{category.name}', but in the network {theirs}, and "
                "as several classes have one name, ids have to be the same: use the ids that the network "
                "was trained with"
            )
    return [by_id[category.id] for category in own]


class Row(NamedTuple):
    """An annotation with a box and a class that the file lists."""

    xywh: tuple[float, float, float, float]
    area: float
    label: int
    crowd: bool


def columns(rows: Sequence[Row]) -> Objects:
    """Return the columns of a table."""
    return Objects(
        np.array([row.xywh for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row.area for row in rows], dtype=np.float64),
        np.array([row.label for row in rows], dtype=np.int64),
        np.array([row.crowd for row in rows], dtype=np.bool_),
    )


class AnnotationReader:
    """Goes through the content of one file, record by record, and reads what each may mean."""

    def __init__(
        self, path: Path, content: Mapping[str, Any], files: ImageFiles | None, as_stored: bool
    ) -> None:
        self.path, self.content, self.files, self.as_stored = path, content, files, as_stored
        self.counts: Counter[str] = Counter()
        self.ids_of_names: dict[str, int] = {}
        """The ids of classes whose names are their own."""

    def found(self) -> Found:
        """Read everything."""
        categories = self.categories(self._is_used)
        labels = {category.id: label for label, category in enumerate(categories)}
        images = self._images()
        place_of = {image_id: place for place, image_id in enumerate(images)}
        rows: list[Row] = []
        places: list[int] = []
        turned = 0
        used_images, used_classes = set[int](), set[int]()
        seen: dict[Any, Mapping[str, Any]] = {}
        for position, entry in self._entries("annotations"):
            if self._is_repeated(entry, seen):
                continue
            image_id, class_id = self._number_in(entry, "image_id"), self._class_of(entry)
            used_images.add(image_id)
            used_classes.add(class_id)
            image = images.get(image_id)
            row = self._annotation(position, entry, labels.get(class_id), image)
            if image is None:
                self.counts["unknown_image"] += 1
            elif row is not None:
                turned += turn_of(entry) != 0
                rows.append(row)
                places.append(place_of[image_id])
        return Found(
            where=str(self.path),
            categories=categories,
            images=list(images.values()),
            objects=columns(rows),
            image=np.array(places, dtype=np.int64),
            annotations=len(self.content["annotations"]),
            turned=turned,
            used_images=used_images,
            used_classes=used_classes,
            counts=self.counts,
        )

    def categories(self, is_used: Callable[[int], bool]) -> list[Category]:
        """Return the classes, sorted by id; `is_used` tells whether there are annotations of one."""
        found, headings = self._categories()
        chosen = self._without_headings(found, headings, is_used)
        return sorted(chosen, key=lambda category: category.id)

    def _categories(self) -> tuple[list[Category], Mapping[int, str]]:
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
        return list(found.values()), headings

    def _without_headings(
        self, found: list[Category], headings: Mapping[int, str], is_used: Callable[[int], bool]
    ) -> list[Category]:
        """Leave out a class 0 that is the supercategory of all the others and has no objects (Roboflow's)."""
        heading = next((category for category in found if category.id == 0), None)
        others = [category for category in found if category.id != 0]
        if heading is None or not others or any(headings[c.id] != heading.name for c in others):
            return found
        if is_used(heading.id):
            return found
        self.counts["supercategories"] += 1
        return others

    def _is_used(self, class_id: int) -> bool:
        entries = self._entries("annotations")
        return any(whole_number(entry.get("category_id")) == class_id for _, entry in entries)

    def _is_repeated(self, entry: Mapping[str, Any], seen: dict[Any, Mapping[str, Any]]) -> bool:
        """Tell whether an annotation of this id and content was there before."""
        key = entry.get("id")
        if not isinstance(key, int | str):
            return False
        is_repeated = seen.setdefault(key, entry) is not entry and seen[key] == entry
        self.counts["repeated"] += is_repeated
        return is_repeated

    def _images(self) -> dict[int, ImageEntry]:
        """Return the images by their id, in the order of the file."""
        found: dict[int, ImageEntry] = {}
        entries: dict[int, Mapping[str, Any]] = {}
        names: dict[str, int] = {}
        for position, entry in self._entries("images"):
            image = self.image(position, entry)
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

    def image(self, position: int, entry: Mapping[str, Any]) -> ImageEntry:
        """Read an entry of `images`.  Raises DataError where it cannot be read."""
        image_id, name = self._whole(entry.get("id")), self._file_name(entry)
        if image_id is None:
            said = _shown(entry.get("id"))
            raise self._error(f"image {position} has the id {said}, which is {_NO_WHOLE}")
        if not name:
            raise self._error(f"image {position} (id {image_id}) has no file_name")
        height, width = self._size(entry, name)
        kind = entry.get("kind")
        return ImageEntry(image_id, name, height, width, kind if isinstance(kind, str) else None)

    def _file_name(self, entry: Mapping[str, Any]) -> str:
        """Return the name of a file that is there, else what the entry says; empty if it says none."""
        name = said_name(entry)
        if self.files is None or not name or self.files.has(name):
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
        if (
            height is not None
            and width is not None
            and min(height, width) >= 1 > max(height, width) // MOST_PIXELS
        ):
            return height, width
        size = stored_size(self.files.folder / name) if self.files is not None else None
        if size is None:
            raise self._error(f"image '{name}' has no height and width in pixels, and its file says none")
        self.counts["sizes_from_files"] += 1
        return (size.height, size.width) if self.as_stored else size.upright

    def _annotation(
        self, position: int, entry: Mapping[str, Any], label: int | None, image: ImageEntry | None
    ) -> Row | None:
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
        return Row(box, area if area and area > 0 else w * h, label, is_crowd or is_ignored)

    def _box(
        self, entry: Mapping[str, Any], what: str, image: ImageEntry | None
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

    def _class_of(self, entry: Mapping[str, Any]) -> int:
        """Return the id of an annotation's class, which may be called by its name."""
        said = entry.get("category_id")
        if isinstance(said, str) and whole_number(said) is None:
            return self.ids_of_names.get(_class_name(said), NO_ID)
        return self._number_in(entry, "category_id")

    def _number_in(self, entry: Mapping[str, Any], name: str) -> int:
        """Return the id that an entry refers to; -1 for none, which no list has."""
        found = self._whole(entry.get(name))
        return NO_ID if found is None else found

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


_NO_WHOLE = "no whole number that 64 bits hold"
MOST_PIXELS = 2**31
"""Pixels of a side, which no image has."""


def turn_of(entry: Mapping[str, Any]) -> float:
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
