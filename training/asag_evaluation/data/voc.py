"""A data set in Pascal VOC's layout: an XML file an image, and lists of images; as COCO.

DIR/Annotations/NAME.xml
DIR/JPEGImages/NAME.jpg
DIR/ImageSets/Main/train.txt      a NAME a line

Tools also write the XML files beside the images, and no lists.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from asag_deploy.atomic import atomic_write_text, real_path
from asag_deploy.errors import DataError, ImageError, plural
from asag_deploy.images.reading import read_image
from asag_evaluation.data.image_files import stored_size
from asag_evaluation.data.values import flag, number, whole_number
from asag_evaluation.data.voc_layout import VocLayout
from asag_evaluation.data.written import Converted, Remarks, check_ours, link_images

DESCRIPTION = "converted from Pascal VOC's layout"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MOST_BYTES = 2**24
"""Of an XML file; those of an image have some kilobytes."""

_ODDITIES = {
    "unlabelled": ("image", "{n} without an XML file, taken as background (the first is {first})"),
    "orphan": ("XML file", "{n} without an image, passed over (the first is {first})"),
    "size": (
        "image",
        "{n} of another size than the XML says, which is taken: try `asag-data check` (the first is {first})",
    ),
    "flat": ("object", "{n} with a box without width or height, left out (the first is in {first})"),
    "exchanged": (
        "object",
        "{n} with a box that ends before it begins, whose corners were exchanged (the first is in {first})",
    ),
    "repeated": ("object", "{n} standing in a file twice, taken once (the first is in {first})"),
    "difficult": (
        "object",
        "{n} marked as difficult, taken as crowds, which are not learned from (the first is in {first})",
    ),
    "unclear": (
        "object",
        "{n} with something else than 0 or 1 for difficult, taken as not difficult (the first is in {first})",
    ),
    "broken": ("XML file", "{n} of other images not to be read, passed over (the first: {first})"),
    "capitals": (
        "class name",
        "{n} differing from another in capitals alone, taken as another class: {first}",
    ),
    "inner": ("folder", "{n} beside the images, passed over with what is in it (the first is {first})"),
    "listed twice": ("line", "{n} naming an image again, passed over (the first is {first})"),
}


@dataclass(frozen=True)
class _Object:
    """An object of an XML file."""

    name: str
    """Of its class."""
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels, counted from 0."""
    difficult: bool
    unclear: bool
    """Whether the file says neither that it is difficult nor that it is not."""
    exchanged: bool
    """Whether its box ended before it began, and was put right."""


@dataclass(frozen=True)
class _Annotated:
    """What an XML file says."""

    size: tuple[int, int] | None
    """Height and width, if it says them."""
    objects: tuple[_Object, ...]


def convert_voc(
    data: Path,
    output_dir: Path,
    *,
    split: str,
    part: str | None = None,
    classes: Sequence[str] | None = None,
    count_from_one: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> Converted:
    """Write `output_dir/annotations/instances_{split}.json` of a data set in Pascal VOC's layout.

    part: which list of `ImageSets/Main`; None: `train`, or all images where there are no lists.  classes:
    their names, in the order of their ids, from 1 on; None: all that any XML file of the data set names, in
    the alphabet's order, so that all parts have the same.  count_from_one: xmin and ymin of the first pixel
    are 1, as PASCAL's own files have it, and not 0.  A box then begins one pixel before them; it ends at
    xmax and ymax in either case.

    `output_dir/split` leads to the images of the part.  Image ids are numbered from 1 in the list's
    order.  Raises DataError for what is missing or malformed, OutputError if nothing can be written.
    """
    file = output_dir / "annotations" / f"instances_{split}.json"
    check_ours(file, DESCRIPTION)
    layout, remarks = VocLayout(data), Remarks(_ODDITIES)
    taken = layout.part(part)
    pictures = layout.pictures(taken, remarks)
    if not any(layout.xml(image) for image in pictures):
        raise DataError(
            f"none of the {plural(len(pictures), 'image')} has an XML file (looked for "
            f"'{layout.annotations / pictures[0].stem}.xml')"
        )
    wanted = {layout.xml(image) for image in pictures}
    read: dict[Path, _Annotated] = {}
    names = _class_names(layout, wanted, read, remarks) if classes is None else _given_names(classes)
    ids = {name: i for i, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(pictures, start=1):
        xml = layout.xml(image)
        annotated = _Annotated(None, ())
        if xml is None:
            remarks.note("unlabelled", f"'{image}'")
        else:
            annotated = read.pop(xml) if xml in read else _read(xml)
            if count_from_one:
                annotated = _from_one(annotated, xml)
        height, width = _size(image, annotated.size, remarks)
        images.append({"id": image_id, "file_name": image.name, "height": height, "width": width})
        for found in _kept(annotated.objects, f"'{xml}'", remarks):
            if found.name not in ids:
                raise DataError(
                    f"'{xml}' has an object {found.name!r:.100}, which is none of --classes: add it"
                )
            annotations.append(_as_coco(found, len(annotations) + 1, image_id, ids[found.name]))
        progress(image_id)
    content = {
        "info": {"description": f"{taken or 'all'} of '{real_path(data).name}', {DESCRIPTION}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
    }
    link_images(output_dir / split, layout.images, (image["file_name"] for image in images))
    atomic_write_text(file, json.dumps(content))
    return Converted(file=file, remarks=tuple(remarks.sentences()))


def _as_coco(found: _Object, number: int, image_id: int, category_id: int) -> dict[str, Any]:
    """Return an object as COCO's files have it; number: its id."""
    x1, y1, x2, y2 = found.box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": int(found.difficult),
    }


def _class_names(
    layout: VocLayout, wanted: Set[Path | None], read: dict[Path, _Annotated], remarks: Remarks
) -> list[str]:
    """Return the classes that the XML files name, by id, and leave what the wanted ones say in `read`.

    wanted: the XML files that have to be right, whatever the others are.
    """
    found: set[str] = set()
    for xml in layout.xml_files:
        try:
            annotated = _read(xml)
        except DataError as error:
            if xml in wanted:
                raise
            remarks.note("broken", str(error))
            continue
        found.update(one.name for one in annotated.objects)
        if xml in wanted:
            read[xml] = annotated
    if not found:
        raise DataError(f"no XML file of '{layout.data}' has an object: name the classes with --classes")
    small = Counter(name.casefold() for name in found)
    for name in sorted(found):
        if small[name.casefold()] > 1:
            remarks.note("capitals", f"'{name}'")
    return sorted(found)


def _given_names(classes: Sequence[str]) -> list[str]:
    """Return the classes that were given, by id (DataError if one has no name of its own)."""
    names = [" ".join(name.split()) for name in classes]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None or not all(names):
        what = "has no letters" if twice is None else f"'{twice}' is named twice"
        raise DataError(f"a name of --classes {what}: give each class a name of its own")
    return names


def _kept(objects: Sequence[_Object], where: str, remarks: Remarks) -> Iterator[_Object]:
    """Yield the objects that have a box, each once."""
    seen: set[_Object] = set()
    for found in objects:
        x1, y1, x2, y2 = found.box
        if found in seen:
            remarks.note("repeated", where)
        elif not (x2 > x1 and y2 > y1):
            remarks.note("flat", where)
        else:
            for oddity in ("difficult", "exchanged", "unclear"):
                if getattr(found, oddity):
                    remarks.note(oddity, where)
            yield found
        seen.add(found)


def _size(image: Path, said: tuple[int, int] | None, remarks: Remarks) -> tuple[int, int]:
    """Return height and width of an image: what its XML file says, else those of the image, upright."""
    size = stored_size(image)
    if said is not None:
        # As it is stored is no mistake: whoever reads the boxes asks on which pixels they were drawn.
        if size is not None and said not in (size.upright, (size.height, size.width)):
            remarks.note("size", f"'{image}'")
        return said
    if size is not None:
        return size.upright
    try:
        height, width = read_image(image).shape[:2]
    except ImageError as error:
        raise DataError(str(error)) from error
    return height, width


def _read(xml: Path) -> _Annotated:
    """Read an XML file, as if it called the first pixel 0 (DataError, with the object, if malformed)."""
    root = _root(xml)
    if root.tag != "annotation":
        raise DataError(f"'{xml}' is no XML of Pascal VOC: it begins with {root.tag!r:.60}, not 'annotation'")
    height, width = (whole_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    size = (height, width) if height and width and min(height, width) > 0 else None
    found = (_object(element, _nth(i, xml)) for i, element in enumerate(root.findall("object"), 1))
    return _Annotated(size, tuple(found))


def _nth(number: int, xml: Path) -> str:
    return f"object {number} in '{xml}'"


def _from_one(annotated: _Annotated, xml: Path) -> _Annotated:
    """Return what a file says that calls the first pixel 1 (DataError if it does not)."""
    moved = []
    for nth, found in enumerate(annotated.objects, 1):
        x1, y1, x2, y2 = found.box
        if 0 <= min(x1, y1) < 1:
            raise DataError(
                f"{_nth(nth, xml)} begins at {min(x1, y1):g}, so pixels are counted from 0: leave "
                "--count-from-one out"
            )
        moved.append(replace(found, box=(x1 - 1, y1 - 1, x2, y2)))
    return _Annotated(annotated.size, tuple(moved))


class _DocumentTypeError(Exception):
    """A few bytes of a document type can stand for gigabytes."""


class _TreeBuilder(ElementTree.TreeBuilder):
    """Builds the tree of an XML file without a document type, whatever its encoding."""

    def doctype(self, name: str, pubid: str, system: str) -> None:
        """Refuse it."""
        raise _DocumentTypeError(name)


def _root(xml: Path) -> ElementTree.Element:
    try:
        if xml.stat().st_size > _MOST_BYTES:
            raise DataError(f"'{xml}' is larger than {_MOST_BYTES >> 20} MiB, which no XML of one image is")
        content = xml.read_bytes()
    except OSError as error:
        raise DataError(f"'{xml}' cannot be read: {error.strerror or error}") from None
    parser = ElementTree.XMLParser(target=_TreeBuilder())
    try:
        return ElementTree.fromstring(content, parser=parser)
    except _DocumentTypeError:
        raise DataError(
            f"'{xml}' declares a document type, which Pascal VOC's files do not: remove it"
        ) from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: its encoding
        raise DataError(f"'{xml}' is no XML ({error}): export it again, or remove it") from None


def _object(element: ElementTree.Element, where: str) -> _Object:
    name = " ".join((element.findtext("name") or "").split())
    if not name:
        raise DataError(f"{where} has no name: give it its class")
    corners = element.find("bndbox")
    if corners is None:
        has = ", ".join(sorted({str(part.tag) for part in element}))
        raise DataError(f"{where} has no bndbox, only {has!r:.100}: export boxes that are not rotated")
    found = []
    for corner in _CORNERS:
        value = number(corners.findtext(corner))
        if value is None:
            raise DataError(f"{where} has {corners.findtext(corner)!r:.60} for {corner}, expected pixels")
        found.append(value)
    (x1, x2), (y1, y2) = sorted(found[::2]), sorted(found[1::2])
    difficult = flag(element.findtext("difficult"))
    return _Object(
        name=name,
        box=(x1, y1, x2, y2),
        difficult=bool(difficult),
        unclear=difficult is None,
        exchanged=[x1, y1, x2, y2] != found,
    )
