"""What an annotation file says of its images, as flat arrays in one piece of memory that processes share."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Category
from asag_evaluation.data.shared_bytes import SharedBytes

_LENGTH = 8
"""Bytes that say how long the header is."""
_ALIGNED = 64
"""Bytes at whose multiples each array begins."""


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
    """One image with its A annotations, of which T are objects and the others crowds.

    Its arrays are shared and not to be written to.
    """

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
    annotated: Objects
    """All A of them, unclipped."""

    @functools.cached_property
    def annotations(self) -> tuple[Annotation, ...]:
        """The objects and the crowds, unclipped: what detections are measured against."""
        xywh, areas, labels, crowds = (column.tolist() for column in self.annotated)
        return tuple(map(Annotation, map(tuple, xywh), areas, labels, crowds))


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
        said = [
            f"{n} {(_OF_ONE.get(name, name) if n == 1 else name).replace('_', ' ')}"
            for name, n in values.items()
            if n or name in always
        ]
        return ", ".join(said)


_OF_ONE = {
    "images": "image",
    "objects": "object",
    "empty_images": "empty_image",
    "objects_of_one_box": "object_of_one_box",
    "numbers_as_text": "number_as_text",
    "boxes_from_outlines": "box_from_an_outline",
    "sizes_from_files": "size_from_a_file",
    "names_found_otherwise": "name_found_otherwise",
    "supercategories": "supercategory",
}
"""What counts are called that are of several things, when there is one."""


class ImageEntry(NamedTuple):
    """An image as the annotation file lists it."""

    image_id: int
    file_name: str
    height: int
    width: int
    kind: str | None


class Objects(NamedTuple):
    """The columns of A annotations."""

    xywh: NDArray[np.float64]
    """(A, 4) x, y, w, h in pixels, as annotated."""
    area: NDArray[np.float64]
    """(A,) square pixels."""
    label: NDArray[np.int64]
    """(A,) indices into the categories."""
    crowd: NDArray[np.bool_]
    """(A,) whether it is a crowd."""

    def chosen(self, which: NDArray[Any] | slice) -> Objects:
        """Return some of them."""
        return Objects(self.xywh[which], self.area[which], self.label[which], self.crowd[which])


def packed(
    categories: Sequence[Category],
    images: Sequence[ImageEntry],
    objects: Objects,
    per_image: NDArray[np.int64],
    counts: Mapping[str, int],
    doubts: Sequence[str],
) -> bytes:
    """Return the content of `FlatAnnotations`: `objects` of the first image, then of the second, and so on.

    `per_image`: (N,) how many of them each image has; `counts` are those that are not seen here.
    """
    kinds = sorted({image.kind for image in images if image.kind is not None})
    number_of = {None: -1} | {kind: number for number, kind in enumerate(kinds)}
    names = [image.file_name.encode("utf-8", "surrogatepass") for image in images]
    sides = np.array([(image.height, image.width) for image in images], dtype=np.int64).reshape(-1, 2)
    per_object = _total(~objects.crowd, per_image)
    arrays = {
        "image_ids": np.array([image.image_id for image in images], dtype=np.int64),
        "sides": sides,
        "kinds": np.array([number_of[image.kind] for image in images], dtype=np.int32),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "ends": np.cumsum(per_image, dtype=np.int64),
        "objects_per_image": per_object,
        "boxes": _clipped(objects.xywh, np.repeat(sides, per_image, axis=0)),
        **objects._asdict(),
    }
    counted = {
        "images": len(images),
        "objects": int(per_object.sum()),
        "empty_images": int((per_object == 0).sum()),
        **counts,
    }
    header = {
        "categories": [(category.id, category.name) for category in categories],
        "counts": counted,
        "doubts": list(doubts),
        "kinds": kinds,
        "arrays": [(name, array.dtype.str, array.shape) for name, array in arrays.items()],
    }
    text = json.dumps(header).encode("ascii")
    first = np.frombuffer(len(text).to_bytes(_LENGTH, "little") + text, dtype=np.uint8)
    parts = [first, *(np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays.values())]
    gaps = [np.zeros(-part.size % _ALIGNED, dtype=np.uint8) for part in parts]
    return b"".join(piece.data for pair in zip(parts, gaps, strict=True) for piece in pair)


def _clipped(xywh: NDArray[np.float64], sides: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (A, 4) x1, y1, x2, y2 inside images of these (A, 2) heights and widths."""
    boxes = np.empty(xywh.shape, dtype=np.float32)
    for column in range(4):
        low = column % 2
        corner = xywh[:, low] + xywh[:, low + 2] if column > 1 else xywh[:, low]
        boxes[:, column] = corner.clip(0, sides[:, 1 - low])
    return boxes


def _total(which: NDArray[np.bool_], per_image: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (N,) how many of each image's annotations are set in (A,)."""
    so_far = np.concatenate([[0], np.cumsum(which, dtype=np.int64)])
    ends = np.concatenate([[0], np.cumsum(per_image, dtype=np.int64)])
    return np.asarray(np.diff(so_far[ends]))


class FlatAnnotations:
    """A whole annotation file: arrays that lie in shared memory, where each process finds them.

    Handing it to a process that is started costs nothing but the descriptor of an open file.
    """

    def __init__(self, content: SharedBytes) -> None:
        self.content = content
        """What `packed` returned."""
        header, arrays = _unpacked(content.array)
        self.categories = tuple(Category(id=number, name=name) for number, name in header["categories"])
        """The classes, sorted by id, to which `objects.label` points."""
        self.counts = Counts(**header["counts"])
        self.doubts: tuple[str, ...] = tuple(header["doubts"])
        """Sentences on what may be meant otherwise than it was read."""
        self.kinds: tuple[str, ...] = tuple(header["kinds"])
        self.image_ids, self.sides = arrays["image_ids"], arrays["sides"]
        """(N,) ids and (N, 2) heights and widths of the images."""
        self.kind_of = arrays["kinds"]
        """(N,) indices into `kinds`, or -1."""
        self.objects_per_image = arrays["objects_per_image"]
        """(N,) without crowds."""
        self.ends = arrays["ends"]
        """(N,) where the annotations of each image end."""
        self.boxes = arrays["boxes"]
        """(A, 4) x1, y1, x2, y2 in pixels, clipped to the images, of objects and crowds."""
        self.objects = Objects(*(arrays[name] for name in Objects._fields))
        self._names, self._name_ends = arrays["names"], arrays["name_ends"]

    def __reduce__(self) -> tuple[Any, ...]:
        return FlatAnnotations, (self.content,)

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """Return the name of an image's file in the folder of the images."""
        begin = int(self._name_ends[index - 1]) if index else 0
        return self._names[begin : int(self._name_ends[index])].tobytes().decode("utf-8", "surrogatepass")

    def record(self, index: int, labels: NDArray[np.int64]) -> ImageRecord:
        """Return one image; `labels`: (C,) the labels that the C classes are to have."""
        of_image = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        annotated = self.objects.chosen(of_image)
        annotated = annotated._replace(label=labels[annotated.label])
        boxes, own = self.boxes[of_image], annotated.label
        if self.objects_per_image[index] != len(boxes):
            boxes, own = boxes[~annotated.crowd], own[~annotated.crowd]
        height, width = self.sides[index].tolist()
        kind = int(self.kind_of[index])
        return ImageRecord(
            image_id=int(self.image_ids[index]),
            file_name=self.file_name(index),
            height=height,
            width=width,
            kind=None if kind < 0 else self.kinds[kind],
            boxes=boxes,
            labels=own,
            annotated=annotated,
        )

    def crowds(self) -> NDArray[np.int64]:
        """Return (N,) how many crowds each image has."""
        return np.asarray(np.diff(self.ends, prepend=0) - self.objects_per_image)


def _unpacked(content: NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    position = _LENGTH + int.from_bytes(content[:_LENGTH].tobytes(), "little")
    header, arrays = json.loads(content[_LENGTH:position].tobytes()), {}
    for name, dtype, shape in header["arrays"]:
        position += -position % _ALIGNED
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays[name] = content[position : position + size].view(dtype).reshape(shape)
        position += size
    return header, arrays


class Records(Sequence[ImageRecord]):
    """Some of the images of an annotation file, in any order, made when they are asked for."""

    def __init__(
        self,
        flat: FlatAnnotations,
        labels: NDArray[np.int64],
        chosen: NDArray[np.int32] | None = None,
    ) -> None:
        self._flat, self._labels, self._chosen = flat, labels, chosen

    def __len__(self) -> int:
        return len(self._flat) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        return self._flat.record(self._place(index), self._labels)

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self[i] for i in range(len(self)))

    def _place(self, index: int) -> int:
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"there is no image {index} among {len(self)}")
        return number if self._chosen is None else int(self._chosen[number])

    def subset(self, indices: Sequence[int]) -> Self:
        """Return some of these, in this order."""
        chosen = np.array([self._place(index) for index in indices], dtype=np.int32)
        return type(self)(self._flat, self._labels, chosen)

    def file_name(self, index: int) -> str:
        """Return the name of an image's file."""
        return self._flat.file_name(self._place(index))

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of an image."""
        height, width = self._flat.sides[self._place(index)].tolist()
        return height, width

    def sides(self) -> NDArray[np.int64]:
        """Return (N, 2) heights and widths."""
        return self._of_all(self._flat.sides)

    def objects_per_image(self) -> NDArray[np.int64]:
        """Return (N,) numbers of objects, crowds left out."""
        return self._of_all(self._flat.objects_per_image)

    def crowds_per_image(self) -> NDArray[np.int64]:
        """Return (N,) numbers of crowds."""
        return self._of_all(self._flat.crowds())

    def _of_all(self, array: NDArray[np.int64]) -> NDArray[np.int64]:
        return array if self._chosen is None else array[self._chosen]
