"""A data set in COCO layout: an annotation file, and a folder of images.

DIR/annotations/instances_train2017.json
DIR/train2017/*.jpg
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import DataError, ImageError
from asag_deploy.images.reading import RgbImage, read_image
from asag_evaluation.data.annotations import labels_of
from asag_evaluation.data.compiled_annotations import missing_images, open_annotations
from asag_evaluation.data.image_files import ImageFiles, stored_size
from asag_evaluation.data.orientation import OrientationChoice, OrientationRule, SizedImage, Survey
from asag_evaluation.data.records import Counts, FlatAnnotations, ImageRecord, Records

TRAIN_SPLIT, VAL_SPLIT = "train2017", "val2017"

_PREFIX = "instances_"

_COCO_NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck",
    9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench",
    16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear",
    24: "zebra", 25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase",
    34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat",
    40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle",
    46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple",
    54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza", 60: "donut",
    61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet",
    72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone", 78: "microwave",
    79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book", 85: "clock", 86: "vase",
    87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip

COCO_CATEGORIES: tuple[Category, ...] = tuple(Category(id=i, name=name) for i, name in _COCO_NAMES.items())
"""The 80 classes of COCO; their ids in the data set run from 1 to 90 with gaps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """An image and its T objects, at any step of their way into the network."""

    image: RgbImage
    """uint8 (H, W, 3) RGB."""
    boxes: NDArray[np.float32]
    """(T, 4) x1, y1, x2, y2 in pixels of `image`, inside it."""
    labels: NDArray[np.int64]
    """(T,) indices into the data set's categories."""
    image_id: int
    original_shape: tuple[int, int]
    """Height and width of the image in its file."""


class CocoDataset:
    """Images with their objects; `dataset[i]` reads a `Sample`.

    Everything but the pixels is read and checked when it is made, so that a run fails in its first second or
    not at all; a damaged image is found when it is read.  Images come as they were annotated: upright, or as
    they are stored.  Processes that are handed a data set share its memory.
    """

    def __init__(
        self,
        annotations: FlatAnnotations,
        image_dir: Path,
        *,
        categories: Sequence[Category],
        labels: Sequence[int],
        orientation: OrientationRule = "auto",
    ) -> None:
        """Take annotations that were read; `labels`: those of their classes among `categories`."""
        self.categories: tuple[Category, ...] = tuple(categories)
        """The classes in label order: sorted by id, unless others were given."""
        self.records = Records(annotations, np.array(labels, dtype=np.int64))
        self.counts: Counts = annotations.counts
        """What was found in the annotation file, oddities included."""
        self.doubts: tuple[str, ...] = annotations.doubts
        """Sentences on what may be meant otherwise than it was read."""
        self.image_dir = image_dir
        self._orientation = OrientationChoice(
            orientation, _SizedImages(self.records, image_dir), str(image_dir)
        )

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        split: str = TRAIN_SPLIT,
        *,
        categories: Sequence[Category] | None = None,
        orientation: OrientationRule = "auto",
    ) -> Self:
        """Open `root/annotations/instances_{split}.json` with the images in `root/{split}`.

        `categories` are the classes of a checkpoint, whose labels are then used; `orientation` as for
        `from_files`.  Raises DataError as that does, and if there is no such split.
        """
        folder = Path(root)
        if not folder.is_dir():
            raise DataError(f"there is no data folder '{folder}': check the path")
        file = folder / "annotations" / f"{_PREFIX}{split}.json"
        if not file.is_file():
            raise DataError(_no_such_split(folder, split, file))
        return cls.from_files(file, folder / split, categories=categories, orientation=orientation)

    @classmethod
    def from_files(
        cls,
        annotation_file: str | os.PathLike[str],
        image_dir: str | os.PathLike[str],
        *,
        categories: Sequence[Category] | None = None,
        orientation: OrientationRule = "auto",
    ) -> Self:
        """Open an annotation file with the images in `image_dir`.

        `orientation` says on which pixels images were annotated that state how they are to be turned, where
        their size does not tell; `auto`: as those whose size does, upright if there are none.  Raises
        DataError if the file is missing or malformed, if images are missing, or if there are classes that
        `categories` lacks.
        """
        path = Path(annotation_file)
        images = ImageFiles(Path(image_dir))
        annotations = open_annotations(path, images, as_stored=orientation == "stored")
        known = annotations.categories if categories is None else tuple(categories)
        labels = labels_of(annotations.categories, known, str(path))
        _check_images(annotations, images, path)
        return cls(annotations, images.folder, categories=known, labels=labels, orientation=orientation)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Read an image (DataError if it is missing, damaged, or not of the size its annotations say)."""
        record = self.records[index]
        return Sample(
            image=self._read(record),
            boxes=record.boxes.copy(),
            labels=record.labels.copy(),
            image_id=record.image_id,
            original_shape=(record.height, record.width),
        )

    def path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.image_dir / self.records.file_name(index)

    def orientations(self, most: int | None = None) -> Survey:
        """Say which images state an orientation, and how they are read; of the first `most` (None: of all).

        Of a subset it is what the whole file says.
        """
        return self._orientation.survey(most)

    def remarks(self, most: int | None = 2000) -> list[str]:
        """Return what there is to know about the file beside its counts, in sentences.

        How images are read that state an orientation, of the first `most` (None: of all), and what may be
        meant otherwise than it was read.
        """
        orientations = self.orientations(most).describe()
        return [*([] if orientations is None else [orientations]), *self.doubts]

    def first(self, limit: int | None) -> Self:
        """Return a data set of the first `limit` images, or of fewer if there are fewer; None for all."""
        return self if limit is None else self.subset(range(min(limit, len(self))))

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a data set of some of the images, in this order, with the same classes.

        Its counts are those of what it holds; what was dropped from the file is not counted again.
        """
        chosen = copy.copy(self)
        chosen.records = self.records.subset(indices)
        objects = chosen.records.objects_per_image()
        chosen.counts = Counts(
            images=len(objects),
            objects=int(objects.sum()),
            empty_images=int((objects == 0).sum()),
            crowd=int(chosen.records.crowds_per_image().sum()),
        )
        return chosen

    def for_training(self, *, min_side: int = 32) -> Self:
        """Return the images worth training on: with objects, and `min_side` pixels wide and high at least.

        Raises DataError if there are none.
        """
        good = np.flatnonzero(self._is_worth_training_on(min_side)).tolist()
        if not good:
            raise DataError(
                f"there is nothing to train on in '{self.image_dir}': {self.counts.describe()}, "
                f"and no image with objects is at least {min_side} pixels wide and high"
            )
        return self.subset(good)

    def left_out_of_training(self, *, min_side: int = 32) -> str:
        """Say how many images `for_training` leaves out, and why; empty if none."""
        empty = int((self.records.objects_per_image() == 0).sum())
        used = int(self._is_worth_training_on(min_side).sum())
        small = len(self) - empty - used
        why = [f"{empty} without objects"] * bool(empty) + [f"{small} under {min_side} pixels"] * bool(small)
        return f"left out: {', '.join(why)}" if why else ""

    def ground_truth(self) -> dict[str, Any]:
        """Return everything but the images as the content of a COCO file, for evaluation.

        Annotations are unclipped, crowds among them; ids of classes are those of the data set.
        """
        annotations = [
            {
                "image_id": record.image_id,
                "category_id": self.categories[annotation.label].id,
                "bbox": list(annotation.xywh),
                "area": annotation.area,
                "iscrowd": int(annotation.crowd),
            }
            for record in self.records
            for annotation in record.annotations
        ]
        return {
            "info": {},
            "images": [{"id": r.image_id, "height": r.height, "width": r.width} for r in self.records],
            "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
            "categories": [dataclasses.asdict(category) for category in self.categories],
        }

    def _is_worth_training_on(self, min_side: int) -> NDArray[np.bool_]:
        sides = self.records.sides().min(axis=1)
        return np.asarray((self.records.objects_per_image() > 0) & (sides >= min_side))

    def _sized(self, record: ImageRecord) -> SizedImage:
        return SizedImage(path=self.image_dir / record.file_name, height=record.height, width=record.width)

    def _read(self, record: ImageRecord) -> RgbImage:
        asked = self._sized(record)
        size = stored_size(asked.path)
        try:
            upright = size is None or self._orientation.reading(size, asked) == "upright"
            image = read_image(asked.path, upright=upright)
        except ImageError as error:
            raise DataError(f"{error} (image {record.image_id} of the data set)") from error
        if image.shape[:2] != (record.height, record.width):
            height, width = image.shape[:2]
            is_exchanged = (height, width) == (record.width, record.height)
            remedy = "exchange these two there" if is_exchanged else "use the image that was annotated"
            raise DataError(
                f"image '{asked.path}' is {width} x {height} pixels, but its annotations are for "
                f"{record.width} x {record.height}: {remedy}"
            )
        return image


class _SizedImages(Sequence[SizedImage]):
    """The images of a file, as their annotations see them."""

    def __init__(self, records: Records, folder: Path) -> None:
        self._records, self._folder = records, folder

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _SizedImages(self._records[index], self._folder)
        height, width = self._records.size(index)
        return SizedImage(path=self._folder / self._records.file_name(index), height=height, width=width)


def _check_images(annotations: FlatAnnotations, images: ImageFiles, annotation_file: Path) -> None:
    if not images.folder.is_dir():
        raise DataError(f"there is no image folder '{images.folder}', for '{annotation_file}'")
    missing = list(missing_images(annotations, images))
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(annotations)} images in '{annotation_file}' are missing from "
            f"'{images.folder}', the first is '{missing[0]}': copy them there"
        )


def _no_such_split(folder: Path, split: str, file: Path) -> str:
    annotations = folder / "annotations"
    if not annotations.is_dir() and (folder / "data.yaml").is_file():
        return f"'{folder}' is a data set in YOLO layout: convert it with `asag-data yolo '{folder}'`"
    if not annotations.is_dir() and (folder / "Annotations").is_dir():
        return f"'{folder}' is a data set in Pascal VOC's layout: convert it with `asag-data voc '{folder}'`"
    if not annotations.is_dir():
        return (
            f"'{folder}' is not a data set in COCO layout: it has no folder 'annotations' "
            f"(expected '{file}' and the images in '{folder / split}')"
        )
    found = sorted(path.stem.removeprefix(_PREFIX) for path in annotations.glob(f"{_PREFIX}*.json"))
    has = f"its splits are {', '.join(found)}" if found else f"it has no files {_PREFIX}*.json"
    return f"there is no split '{split}' in '{folder}' (expected '{file}'); {has}"
