"""A COCO annotation file of the usual kind, read in little time and little memory.

Annotations are taken as columns, piece by piece, without their outlines.  Whatever is written in another way
than COCO's own files, if only in one record, is left to `annotations`, which reads what it may mean, or says
what is wrong with it.
"""

from __future__ import annotations

import codecs
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import DataError
from asag_evaluation.data.annotations import MOST_PIXELS, AnnotationReader, turn_of
from asag_evaluation.data.assembly import Found
from asag_evaluation.data.columns import NO_ID, Columns, of_type
from asag_evaluation.data.image_files import ImageFiles
from asag_evaluation.data.json_stream import JsonMembers
from asag_evaluation.data.records import ImageEntry, Objects

_BLOCK = 2**20
_OTHERWISE = {"isCrowd", "is_crowd", "IsCrowd", "bbox_mode"}
"""Names of what changes the meaning of a record."""
_TURNS = {"attributes", "rotation"}
"""Names of what may say that a box is turned."""


class Digest(Protocol):
    """What sums up bytes as they come."""

    def update(self, data: bytes, /) -> None:
        """Take in the next bytes."""


def read_quickly(
    file: IO[bytes], path: Path, images: ImageFiles, digest: Digest, *, as_stored: bool
) -> Found | None:
    """Read a file of the usual kind; None for any other, and for one that is damaged.

    `digest` takes in the bytes that were read: all of them, unless None is returned.  `path` is what messages
    call the file, `images` and `as_stored` are those of `AnnotationReader`.
    """
    reader = _QuickReader(path, images, as_stored)
    try:
        with _no_collection():
            for name, value in JsonMembers(_blocks(file, digest), _typed()):
                reader.take(name, value)
        return reader.found()
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError, DataError, MemoryError):
        return None  # a record is not what it usually is


class _QuickReader:
    """Takes the members of a file in any order, and puts them together in the end."""

    def __init__(self, path: Path, images: ImageFiles, as_stored: bool) -> None:
        self.files = images
        self.content: dict[str, list[Any]] = {}
        self.careful = AnnotationReader(path, self.content, images, as_stored)
        """Reads images and classes, of which there are few."""
        self.images: dict[int, ImageEntry] = {}
        self.pieces: list[Columns] = []
        self.has_annotations = False

    def take(self, name: str, value: Any) -> None:
        """Take a member, or a piece of a list."""
        if name == "images":
            for entry in value:
                image = _usual_image(entry, self.files) or self.careful.image(len(self.images), entry)
                if image.image_id in self.images:
                    raise ValueError("an image is there twice")
                self.images[image.image_id] = image
        elif name == "categories":
            self.content.setdefault(name, []).extend(value)
        elif name == "annotations":
            self.has_annotations = True
            if not isinstance(value, list | Columns):
                raise ValueError("annotations are no list")
            if value:
                self.pieces.append(value if isinstance(value, Columns) else _columns(value))

    def found(self) -> Found:
        """Return all that was taken."""
        names = {image.file_name for image in self.images.values()}
        if not self.images or len(names) < len(self.images) or not self.has_annotations:
            raise ValueError("there are no images, or two of one name, or there is no list of annotations")
        ids, image_id, class_id, xywh, area, crowd = Columns.joined(self.pieces)
        self.pieces = []
        if len(_distinct(ids)) < len(ids):
            raise ValueError("an annotation may be there twice")
        categories = self.careful.categories(lambda number: bool((class_id == number).any()))
        label = _places(class_id, np.array([category.id for category in categories], dtype=np.int64))
        image = _places(image_id, np.array(list(self.images), dtype=np.int64))
        counts = self.careful.counts
        counts["unknown_class"] += int((label < 0).sum())
        counts["unknown_image"] += int((image < 0).sum())
        known = (label >= 0) & (image >= 0)
        objects = Objects(xywh, area, label, crowd)
        is_whole = bool(known.all())  # else this would be one copy more
        return Found(
            where=str(self.careful.path),
            categories=categories,
            images=list(self.images.values()),
            objects=objects if is_whole else objects.chosen(known),
            image=image if is_whole else image[known],
            annotations=len(known),
            used_images=set(_distinct(image_id).tolist()),
            used_classes=set(_distinct(class_id).tolist()),
            counts=counts,
        )


def _usual_image(entry: Mapping[str, Any], files: ImageFiles) -> ImageEntry | None:
    """Read an image of the usual kind whose file is there; None for any other."""
    number, name, kind = entry.get("id"), entry.get("file_name"), entry.get("kind")
    height, width = entry.get("height"), entry.get("width")
    if not (type(number) is int and type(name) is str and type(height) is int and type(width) is int):
        return None
    if not (NO_ID < number < -NO_ID and name.strip() and files.has(name)):
        return None
    if not (1 <= height < MOST_PIXELS and 1 <= width < MOST_PIXELS):
        return None
    return ImageEntry(number, name, height, width, kind if isinstance(kind, str) else None)


def _typed() -> Mapping[str, Callable[[str], Columns]]:
    """Return what reads annotations in the least time, where msgspec is installed."""
    try:
        from asag_evaluation.data.typed_annotations import typed_columns
    except ImportError:
        return {}
    return {"annotations": typed_columns}


def _columns(entries: Sequence[dict[str, Any]]) -> Columns:
    """Return the columns of annotations.

    Raises ValueError, TypeError, OverflowError or AttributeError for one that may mean anything else.
    """
    names = {name for entry in entries for name in entry}
    if names & _OTHERWISE or (names & _TURNS and any(map(turn_of, entries))):
        raise ValueError("a record says more than is read here")
    boxes = of_type([entry.get("bbox") for entry in entries], list)
    if {*map(len, boxes)} != {4}:
        raise ValueError("a box has not four numbers")
    values = of_type(list(itertools.chain.from_iterable(boxes)), int, float)
    xywh = np.array(values, dtype=np.float64).reshape(-1, 4)
    for position in np.flatnonzero(~xywh.any(axis=1)).tolist():
        if entries[position].get("segmentation") not in (None, []):
            raise ValueError("a box is missing, and there is an outline")
    return Columns.checked(
        ids=[entry["id"] for entry in entries if entry.get("id") is not None],
        image_ids=[entry.get("image_id") for entry in entries],
        class_ids=[entry.get("category_id") for entry in entries],
        xywh=xywh,
        areas=[entry.get("area") for entry in entries],
        flags=[[entry.get(name) for entry in entries] for name in ("iscrowd", "ignore")],
    )


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each value once; NumPy's own function takes ten times as long."""
    in_order = np.sort(values)
    is_new = np.ones(len(in_order), dtype=np.bool_)
    is_new[1:] = in_order[1:] != in_order[:-1]
    return in_order[is_new]


def _places(ids: NDArray[np.int64], listed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each id its index among those listed, at least one, or -1."""
    order = np.argsort(listed)
    place = np.searchsorted(listed, ids, sorter=order).clip(max=len(listed) - 1)
    place = order[place]
    return np.where(listed[place] == ids, place, -1)


def _blocks(file: IO[bytes], digest: Digest) -> Iterator[str]:
    """Yield the text of a file in UTF-8, as `json.loads` decodes it."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    while data := file.read(_BLOCK):
        digest.update(data)
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking through what is being read again and again, for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
