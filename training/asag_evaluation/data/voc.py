"""A data set in Pascal VOC's layout: an XML file an image, and lists of images; as COCO.

DIR/Annotations/NAME.xml
DIR/JPEGImages/NAME.jpg
DIR/ImageSets/Main/train.txt      a NAME a line

Tools also write the XML files beside the images, and no lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from asag_deploy.atomic import atomic_write_text
from asag_deploy.errors import DataError, ImageError
from asag_deploy.images.reading import read_image
from asag_deploy.images.sources import IMAGE_SUFFIXES
from asag_evaluation.data.image_files import is_file, stored_size
from asag_evaluation.data.values import flag, number, whole_number
from asag_evaluation.data.written import Converted, Remarks, check_ours, link_images

DESCRIPTION = "converted from Pascal VOC's layout"
ANNOTATIONS = "Annotations"
TRAIN_PART = "train"
"""The list that is taken if none is named."""

_LISTS = Path("ImageSets", "Main")
_IMAGES = ("JPEGImages", "images", "Images")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MOST_BYTES = 2**24
"""Of an XML file; those of an image have some kilobytes."""

_ODDITIES = {
    "unlabelled": ("image", "{n} without an XML file, taken as background (the first is {first})"),
    "orphan": ("XML file", "{n} without an image, passed over (the first is {first})"),
    "flat": ("object", "{n} with a box without width or height, left out (the first is in {first})"),
    "repeated": ("object", "{n} standing in a file twice, taken once (the first is in {first})"),
    "difficult": (
        "object",
        "{n} marked as difficult, taken as crowds, which are not learned from (the first is in {first})",
    ),
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


@dataclass(frozen=True)
class _Annotated:
    """What an XML file says."""

    size: tuple[int, int] | None
    """Height and width, if it says them."""
    objects: tuple[_Object, ...]


class _Layout:
    """Where a data set has its files; raises DataError for a folder that is none."""

    def __init__(self, data: Path) -> None:
        self.data = data
        if not data.is_dir():
            raise DataError(f"there is no data set '{data}': check the path, and give its folder")
        with_xml = [folder for folder in (data / ANNOTATIONS, data) if any(folder.glob("*.xml"))]
        if not with_xml:
            raise DataError(f"'{data}' has no XML files, in '{ANNOTATIONS}' or by themselves{_below(data)}")
        self.annotations = with_xml[0]
        found = next((data / name for name in _IMAGES if (data / name).is_dir()), None)
        self.images = found or self.annotations
        self._files: dict[str, list[Path]] = {}
        for path in sorted(self.images.iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and is_file(path):
                self._files.setdefault(path.stem, []).append(path)
        if not self._files:
            raise DataError(f"there are no images in '{self.images}', for the XML files of '{data}'")

    def image(self, name: str) -> Path | None:
        """Return the image of a name (DataError if there is more than one)."""
        found = self._files.get(name, [])
        if len(found) > 1:
            raise DataError(
                f"'{found[0]}' and '{found[1].name}' would share the file '{name}.xml': remove one of them"
            )
        return found[0] if found else None

    def xml(self, name: str) -> Path:
        """Return where the XML file of a name is, if there is one."""
        return self.annotations / f"{name}.xml"

    def xml_files(self) -> list[Path]:
        """Return all XML files, sorted."""
        return sorted(path for path in self.annotations.glob("*.xml") if not path.name.startswith("."))

    def names(self, part: str | None, remarks: Remarks) -> list[str]:
        """Return the names of the images of a part: those of its list, or all if there are no lists."""
        lists = self.data / _LISTS
        if lists.is_dir():
            return list(self._listed(lists, part or TRAIN_PART, remarks))
        if part is not None:
            raise DataError(f"'{self.data}' has no lists in '{_LISTS}': leave --part {part} out to take all")
        for path in self.xml_files():
            if path.stem not in self._files:
                remarks.note("orphan", f"'{path}'")
        return sorted(self._files)

    def _listed(self, lists: Path, part: str, remarks: Remarks) -> Iterator[str]:
        file = lists / f"{part}.txt"
        if not is_file(file):
            found = sorted(path.stem for path in lists.glob("*.txt"))
            has = f"its lists are {', '.join(found[:10])}" if found else "there is none at all"
            raise DataError(f"there is no list '{file}'; {has}")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"'{file}' cannot be read as text: {error}") from None
        seen: set[str] = set()
        for count, line in enumerate(lines, start=1):
            name = line.strip()
            if not name:
                continue
            where = f"line {count} of '{file}'"
            name = self._meant(name, where)
            if name in seen:
                remarks.note("listed twice", where)
                continue
            seen.add(name)
            yield name
        if not seen:
            raise DataError(f"'{file}' lists no images")

    def _meant(self, name: str, where: str) -> str:
        """Return the name of an image that a list names, with or without how its file's name ends."""
        for candidate in (name, name.rpartition(".")[0]):
            if candidate in self._files:
                return candidate
        of_class = "; a list with -1, 0 or 1 behind the names is of one class: take the list of all"
        more = of_class if name.split()[-1] in ("-1", "0", "1") and len(name.split()) > 1 else ""
        raise DataError(f"{where} names the image {name!r:.100}, which is not in '{self.images}'{more}")


def _below(data: Path) -> str:
    """Return which folder below is meant, where that is plain."""
    found = sorted(path.parent for path in (*data.glob(f"*/{ANNOTATIONS}"), *data.glob(f"*/*/{ANNOTATIONS}")))
    if found:
        return f"; give '{found[0]}', which has them"
    with_xml = sorted({path.parent for path in data.glob("*/*.xml")})
    return f"; give '{with_xml[0]}', which has some" if with_xml else ": check the path"


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
    layout, remarks = _Layout(data), Remarks(_ODDITIES)
    names = layout.names(part, remarks)
    if not any(is_file(layout.xml(name)) for name in names):
        raise DataError(
            f"none of the {len(names)} images has an XML file (looked for '{layout.xml(names[0])}')"
        )
    ids = {name: i for i, name in enumerate(_class_names(layout, classes), start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, name in enumerate(names, start=1):
        image, xml = layout.image(name), layout.xml(name)
        if image is None:
            raise DataError(f"there is no image '{name}' in '{layout.images}'")
        annotated = _Annotated(None, ())
        if is_file(xml):
            annotated = _read(xml, 1 if count_from_one else 0)
        else:
            remarks.note("unlabelled", f"'{image}'")
        height, width = annotated.size or _size(image)
        images.append({"id": image_id, "file_name": image.name, "height": height, "width": width})
        for found in _kept(annotated.objects, xml, remarks):
            if found.name not in ids:
                raise DataError(
                    f"'{xml}' has an object {found.name!r:.100}, which is none of --classes: add it"
                )
            x1, y1, x2, y2 = found.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[found.name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(found.difficult),
                }
            )
        progress(image_id)
    content = {
        "info": {"description": f"{'all' if part is None else part} of '{data.name}', {DESCRIPTION}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
    }
    link_images(output_dir / split, layout.images, (image["file_name"] for image in images))
    atomic_write_text(file, json.dumps(content))
    return Converted(file=file, remarks=tuple(remarks.sentences()))


def _class_names(layout: _Layout, classes: Sequence[str] | None) -> list[str]:
    if classes is None:
        names = sorted({found.name for xml in layout.xml_files() for found in _read(xml, 0).objects})
        if not names:
            raise DataError(f"no XML file of '{layout.data}' has an object: name the classes with --classes")
        return names
    names = [" ".join(name.split()) for name in classes]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None or not all(names):
        what = "has no letters" if twice is None else f"'{twice}' is named twice"
        raise DataError(f"a name of --classes {what}: give each class a name of its own")
    return names


def _kept(objects: Sequence[_Object], xml: Path, remarks: Remarks) -> Iterator[_Object]:
    """Yield the objects that have a box, each once."""
    seen: set[_Object] = set()
    for found in objects:
        x1, y1, x2, y2 = found.box
        if found in seen:
            remarks.note("repeated", f"'{xml}'")
        elif not (x2 > x1 and y2 > y1):
            remarks.note("flat", f"'{xml}'")
        else:
            if found.difficult:
                remarks.note("difficult", f"'{xml}'")
            yield found
        seen.add(found)


def _size(image: Path) -> tuple[int, int]:
    """Return height and width of an image once it is upright."""
    size = stored_size(image)
    if size is not None:
        return size.upright
    try:
        height, width = read_image(image).shape[:2]
    except ImageError as error:
        raise DataError(str(error)) from error
    return height, width


def _read(xml: Path, first: int) -> _Annotated:
    """Read an XML file that calls the first pixel `first` (DataError, with the object, if malformed)."""
    root = _root(xml)
    if root.tag != "annotation":
        raise DataError(f"'{xml}' is no XML of Pascal VOC: it begins with {root.tag!r:.60}, not 'annotation'")
    height, width = (whole_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    size = (height, width) if height and width and min(height, width) > 0 else None
    found = (
        _object(element, first, f"object {i} in '{xml}'")
        for i, element in enumerate(root.findall("object"), 1)
    )
    return _Annotated(size, tuple(found))


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


def _object(element: ElementTree.Element, first: int, where: str) -> _Object:
    name = " ".join((element.findtext("name") or "").split())
    if not name:
        raise DataError(f"{where} has no name: give it its class")
    difficult = flag(element.findtext("difficult"))
    if difficult is None:
        raise DataError(f"{where} has {element.findtext('difficult')!r:.60} for difficult, expected 0 or 1")
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
    x1, y1, x2, y2 = found
    if 0 <= min(x1, y1) < first:
        raise DataError(
            f"{where} begins at {min(x1, y1):g}, so pixels are counted from 0: leave --count-from-one out"
        )
    return _Object(name, (x1 - first, y1 - first, x2, y2), difficult)
