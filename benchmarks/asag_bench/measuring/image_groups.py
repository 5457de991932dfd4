"""Image groups: the pictures that are timed, sorted by the level at which the network stops on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from asag_deploy.bundle.manifest import Level, Preprocessing
from asag_deploy.detections import Detections
from asag_deploy.errors import SourceError
from asag_deploy.images.reading import RgbImage
from asag_deploy.images.sources import Frame, iter_frames, list_sources
from asag_deploy.processing.preprocess import resized_shape
from asag_evaluation.data.doodles import draw_doodles

WORST = "worst"
"""The group of the one picture with the most patches, the worst case."""
GENERATED = 12
MOST_PER_LEVEL = 16
_LEVELS: tuple[Level, ...] = ("P5", "P4", "P3")
_SHAPES = ((480, 640), (640, 480), (450, 600))


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture, and what the network did with it."""

    name: str
    image: RgbImage
    found: Detections

    @property
    def exit_level(self) -> Level:
        """The level at which probing stopped by itself."""
        return self.found.trace.exit_level

    @property
    def patches(self) -> int:
        """Number of patches probed, beyond the five of the first level."""
        return sum(level.patches for level in self.found.trace.levels[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageGroup:
    """Pictures that are timed together, because the network does the same work on them."""

    name: str
    """The exit level, or WORST."""
    max_level: Level | None
    """A manual stop, if no picture stops there by itself."""
    pictures: tuple[Picture, ...]

    @property
    def forced(self) -> bool:
        """Whether the pictures only stop there because they are made to."""
        return self.max_level is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """All pictures by exit level."""

    origin: str
    histogram: dict[str, int]
    groups: tuple[ImageGroup, ...]
    missing: tuple[Level, ...]
    """Levels that no picture reaches."""
    skipped: tuple[str, ...]
    """Files that could not be read, each with its reason."""


def read_pictures(folder: Path, limit: int | None) -> tuple[list[tuple[str, RgbImage]], list[str]]:
    """Read the pictures in a folder, at most `limit`; of those that cannot be read, return the reasons.

    Raises SourceError if there are none at all.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder '{folder}' with pictures; check the path")
    sources = [source for source in list_sources([str(folder)]).sources if source.kind == "image"]
    if not sources:
        raise SourceError(f"the folder '{folder}' holds videos but no pictures; name one with pictures")
    pictures, failed = [], []
    for item in iter_frames(sources[:limit]):
        if isinstance(item, Frame):
            pictures.append((Path(item.name).name, item.image))
        else:
            failed.append(item.message)
    if not pictures:
        raise SourceError(f"none of the pictures in '{folder}' can be read, beginning with: {failed[0]}")
    return pictures, failed


def generated_pictures(
    count: int = GENERATED, shape: tuple[int, int] | None = None
) -> list[tuple[str, RgbImage]]:
    """Draw scenes, the same everywhere; of several shapes, or all of one (height, width)."""
    given = _SHAPES if shape is None else (shape,)
    shapes = [given[i % len(given)] for i in range(count)]
    return [(f"scene-{i}", draw_doodles(*shape, seed=i)) for i, shape in enumerate(shapes)]


def resized_pictures(
    pictures: Sequence[tuple[str, RgbImage]], shape: tuple[int, int]
) -> list[tuple[str, RgbImage]]:
    """Resize pictures to one (height, width), whatever their own proportions are."""
    size = shape[1], shape[0]
    return [(name, cv2.resize(image, size).astype(np.uint8, copy=False)) for name, image in pictures]


def sort_pictures(
    pictures: Sequence[tuple[str, RgbImage]],
    detect: Callable[[RgbImage], Detections],
    levels: Sequence[Level],
    *,
    origin: str,
    skipped: Sequence[str] = (),
) -> Samples:
    """Run the network on each picture and sort them by exit level, the deepest of `levels` included.

    A level at which none stops by itself is timed with a manual stop, on pictures that would go deeper; one
    that none reaches is `missing`.
    """
    seen = [Picture(name=name, image=image, found=detect(image)) for name, image in pictures]
    histogram = Counter(picture.exit_level for picture in seen)
    groups, missing = [], []
    for level in levels:
        natural = [picture for picture in seen if picture.exit_level == level]
        deeper = [p for p in seen if _LEVELS.index(p.exit_level) > _LEVELS.index(level)]
        if natural:
            groups.append(ImageGroup(name=level, max_level=None, pictures=_spread(natural)))
        elif deeper:
            groups.append(ImageGroup(name=level, max_level=level, pictures=_spread(deeper)))
        else:
            missing.append(level)
    worst = max(seen, key=lambda picture: (picture.patches, picture.found.trace.anchor_count))
    groups.append(ImageGroup(name=WORST, max_level=None, pictures=(worst,)))
    return Samples(
        origin=origin,
        histogram={level: histogram[level] for level in levels},
        groups=tuple(groups),
        missing=tuple(missing),
        skipped=tuple(skipped),
    )


def batches(group: ImageGroup, size: int, spec: Preprocessing) -> list[list[RgbImage]]:
    """Return the group's pictures in full batches, of one shape each as far as they go.

    The last batch is filled up from the first pictures.
    """
    ordered = sorted(group.pictures, key=lambda picture: network_shape(picture.image, spec))
    images = [picture.image for picture in ordered]
    count = -(-len(images) // size)
    return [[images[(i * size + k) % len(images)] for k in range(size)] for i in range(count)]


def network_shape(image: RgbImage, spec: Preprocessing) -> tuple[int, int]:
    """Return the height and width at which a picture reaches the network, before padding."""
    return resized_shape(image.shape[0], image.shape[1], spec)


def network_shapes(images: Iterable[RgbImage], spec: Preprocessing) -> tuple[str, ...]:
    """Return the shapes at which pictures reach the network, each once, such as `800x1088`."""
    shapes = sorted({network_shape(image, spec) for image in images})
    return tuple(f"{height}x{width}" for height, width in shapes)


def evenly(total: int, most: int) -> list[int]:
    """Return at most so many of the numbers below `total`, evenly from first to last."""
    count = min(total, most)
    return [i * total // count for i in range(count)]


def _spread(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    return tuple(pictures[i] for i in evenly(len(pictures), MOST_PER_LEVEL))
