"""The annotations of a file put in order.

What is odd is counted, what cannot be used is dropped, what looks as if it were something else is doubted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import plural
from asag_evaluation.data.columns import NO_ID
from asag_evaluation.data.records import ImageEntry, Objects, packed

_ROUNDING = 0.01
"""Pixels a box may lie beyond its image before it counts as clipped."""


@dataclass(kw_only=True)
class Found:
    """What a reader found in a file; `objects` have a box, and an image and a class that are listed."""

    where: str
    """The file, as messages call it."""
    categories: Sequence[Category]
    """Sorted by id; labels are indices into them."""
    images: Sequence[ImageEntry]
    objects: Objects
    image: NDArray[np.int64]
    """(A,) indices into `images`."""
    annotations: int
    """How many the file has, whether they can be used or not."""
    turned: int = 0
    """Boxes that are said to be turned."""
    used_images: set[int] = field(default_factory=set)
    used_classes: set[int] = field(default_factory=set)
    """The ids that annotations name, listed or not."""
    counts: Counter[str] = field(default_factory=Counter)
    """What has been counted so far."""

    def packed(self) -> bytes:
        """Return all of it as the content of `FlatAnnotations`."""
        sides = np.array([(image.height, image.width) for image in self.images], dtype=np.int64)
        height, width = sides[self.image].T
        doubts = self._doubts(height, width)
        usable = self._usable(height, width)
        usable_image = self.image[usable]
        in_order = np.argsort(usable_image, kind="stable")
        objects, image = self.objects.chosen(np.flatnonzero(usable)[in_order]), usable_image[in_order]
        self.counts["objects_of_one_box"] += _alike(objects, image)
        shifted = (
            _if_shifted("classes", self.used_classes, {each.id for each in self.categories}, self.where),
            _if_shifted("images", self.used_images, {each.image_id for each in self.images}, self.where),
        )
        return packed(
            self.categories,
            self.images,
            objects,
            np.bincount(image, minlength=len(self.images)).astype(np.int64),
            self.counts,
            (
                *([] if len(image) or not self.annotations else [self._nothing_left()]),
                *doubts,
                *filter(None, shifted),
            ),
        )

    def _usable(self, height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return of which annotations any lies in the image; count what is odd."""
        x, y, w, h = self.objects.xywh.T
        is_empty = (w <= 0) | (h <= 0)
        is_outside = ~is_empty & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
        is_usable: NDArray[np.bool_] = ~is_empty & ~is_outside
        is_beyond = (x < 0) | (y < 0) | (x + w > width + _ROUNDING) | (y + h > height + _ROUNDING)
        is_crowd = self.objects.crowd
        for name, which in (
            ("zero_sized", is_empty),
            ("outside", is_outside),
            ("crowd", is_usable & is_crowd),
            ("clipped", is_usable & is_beyond & ~is_crowd),
        ):
            self.counts[name] += int(which.sum())
        return is_usable

    def _nothing_left(self) -> str:
        return (
            f"none of the {plural(self.annotations, 'annotation')} in '{self.where}' is an object with a "
            "box, of an image and a class that the file lists: look at how ids and boxes are written"
        )

    def _doubts(self, height: NDArray[np.int64], width: NDArray[np.int64]) -> list[str]:
        """Return what looks as if it were something else than it should be, in sentences."""
        w, h = self.objects.xywh[:, 2:].T
        area, count = self.objects.area, len(self.image)
        areas = int(((area > 1.5 * w * h + 10) | ((area <= 1) & (w * h / 16 > 1))).sum())
        found = []
        if self.turned:
            found.append(
                f"{self.turned} of {count} boxes in '{self.where}' are said to be turned, and are read as "
                "if they were not: replace them by upright boxes around their objects"
            )
        if areas > 0.1 * count:
            found.append(
                f"{areas} of {count} objects in '{self.where}' have an area that does not fit their "
                "box, and AP by size goes by it: leave areas out, and those of the boxes are taken"
            )
        of_boxes = self._doubt_of_boxes(height, width)
        return found if of_boxes is None else [*found, of_boxes]

    def _doubt_of_boxes(self, height: NDArray[np.int64], width: NDArray[np.int64]) -> str | None:
        x, y, w, h = self.objects.xywh.T
        count = len(self.image)
        largest = self.objects.xywh.max(axis=1, initial=-np.inf)
        least = self.objects.xywh.min(axis=1, initial=np.inf)
        is_relative = (largest > 0) & (largest <= 1) & (least >= 0) & (np.minimum(height, width) > 1)
        if count and is_relative.all():
            return (
                f"all {count} boxes in '{self.where}' lie between 0 and 1: if they are relative to the "
                "image, multiply them by its width and height"
            )
        beyond = int(((x + w > width + 1) | (y + h > height + 1)).sum())
        as_corners = (x >= 0) & (x < w) & (w <= width + 1) & (y >= 0) & (y < h) & (h <= height + 1)
        if beyond and as_corners.all():
            return (
                f"{beyond} of {count} boxes in '{self.where}' reach beyond their image, and none "
                "would as x1, y1, x2, y2: if they are that, write x, y, width, height"
            )
        return None


def _alike(objects: Objects, image: NDArray[np.int64]) -> int:
    """Return how many objects have class and box of one before them in their image."""
    columns = [image, objects.label, *objects.xywh.T]
    # Few are: only those of one sum are compared.
    sums = np.zeros(len(image), dtype=np.uint64)
    for column in columns:
        sums = sums * _FACTOR + (column + 0.0).view(np.uint64)  # 0.0: as -0.0 is the same number as 0.0
        sums ^= sums >> np.uint64(29)
    order = np.argsort(sums)
    is_next = sums[order[1:]] == sums[order[:-1]]
    places = np.unique(np.concatenate([order[1:][is_next], order[:-1][is_next]]))
    rows = {tuple(column[place].item() for column in columns) for place in places}
    return len(places) - len(rows)


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _if_shifted(what: str, used: set[int], listed: Collection[int], where: str) -> str | None:
    """Say that annotations seem to count from 0 what is listed from 1, or the reverse; else None."""
    used = used - {NO_ID}
    known = set(listed)
    if used <= known or not any({each + step for each in used} <= known for step in (1, -1)):
        return None
    return (
        f"the annotations in '{where}' name {what} {min(used)} to {max(used)}, but {min(known)} to "
        f"{max(known)} are listed: if the two count differently, every object is of another one; number "
        "them alike"
    )
