"""Augmentation: random changes of an image and its boxes together.

Every function takes a `Sample` and gives a new one; the arrays of the old stay as they are.  All chance comes
from the generator that is passed, one per image and epoch (`sample_rng`), so that a run can be repeated, and
taken up in the middle, whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.preprocess import resize, resized_shape
from asag_evaluation.data.coco import Sample
from asag_training.settings import Settings

Rng = np.random.Generator

_SMALLEST_PART = 1.0
"""Pixels a box must keep in a crop, in width and in height, to stay."""


@dataclass(frozen=True, kw_only=True)
class CropRecipe(Settings):
    """Resize, cut out a part, and resize again as the whole image would have been."""

    of = "crop"
    shorter_sides: tuple[int, ...] = (400, 500, 600)
    """One of these becomes the shorter side before the cut."""
    smallest: int = 384
    largest: int = 600
    """The part's sides are drawn from `smallest` to `largest` pixels, each for itself."""
    probability: float = 0.5

    def __post_init__(self) -> None:
        self._require(min(self.shorter_sides, default=0) >= 1, "sides in pixels", "shorter_sides")
        self._require(0 <= self.probability <= 1, "between 0 and 1", "probability")
        possible = 1 <= self.smallest <= self.largest
        self._require(
            possible, "1 pixel or more, the largest no less than the smallest", "smallest", "largest"
        )


@dataclass(frozen=True, kw_only=True)
class Augmentation(Settings):
    """The changes to a training image, in this order: colour, flips and turns, crop, resize.

    Raises ConfigError for values that make no sense.
    """

    of = "augmentation"
    shorter_sides: tuple[int, ...] = (800,)
    """One of these becomes the shorter side, unless the longer would exceed `longer_side`."""
    longer_side: int = 1333
    crop: CropRecipe | None = None
    horizontal_flip: float = 0.5
    """Probability."""
    vertical_flip: float = 0.0
    """Probability; for images without an up and a down, as seen through a microscope."""
    quarter_turns: bool = False
    """Turn by 0, 90, 180 or 270 degrees; for the same images."""
    colour: float = 0.0
    """Strength of random changes of brightness, contrast, saturation and hue, from 0 (none) to 1."""

    def __post_init__(self) -> None:
        self._require(min(self.shorter_sides, default=0) >= 1, "sides in pixels", "shorter_sides")
        longest = max(self.shorter_sides)
        self._require(self.longer_side >= longest, f"at least the shorter side, {longest}", "longer_side")
        for name in ("horizontal_flip", "vertical_flip", "colour"):
            self._require(0 <= getattr(self, name) <= 1, "between 0 and 1", name)


def standard() -> Augmentation:
    """Return the 1x recipe (paper, section 5.1): a flip, and the shorter side at 800."""
    return Augmentation()


def multi_scale() -> Augmentation:
    """Return the 3x recipe: the shorter side at 640 to 800, in half of the images after a crop."""
    return Augmentation(shorter_sides=(640, 672, 704, 736, 768, 800), crop=CropRecipe())


def sample_rng(seed: int, epoch: int, index: int) -> Rng:
    """Seed the generator of one image in one epoch."""
    return np.random.default_rng([seed, epoch, index])


def augment(sample: Sample, augmentation: Augmentation, rng: Rng) -> Sample:
    """Apply an augmentation.  Boxes of which a crop leaves less than a pixel are dropped."""
    a = augmentation
    if a.colour:
        sample = dataclasses.replace(sample, image=jitter_colour(sample.image, a.colour, rng))
    if rng.random() < a.horizontal_flip:
        sample = flip_horizontally(sample)
    if rng.random() < a.vertical_flip:
        sample = flip_vertically(sample)
    if a.quarter_turns:
        sample = turn(sample, int(rng.integers(4)))
    if a.crop is not None and rng.random() < a.crop.probability:
        sample = resize_sample(sample, int(rng.choice(a.crop.shorter_sides)), _NO_LIMIT)
        sample = random_crop(sample, a.crop.smallest, a.crop.largest, rng)
    return resize_sample(sample, int(rng.choice(a.shorter_sides)), a.longer_side)


def flip_horizontally(sample: Sample) -> Sample:
    """Mirror left and right."""
    width = sample.image.shape[1]
    x1, y1, x2, y2 = sample.boxes.T
    return _with(sample, sample.image[:, ::-1], np.stack([width - x2, y1, width - x1, y2], axis=1))


def flip_vertically(sample: Sample) -> Sample:
    """Mirror top and bottom."""
    height = sample.image.shape[0]
    x1, y1, x2, y2 = sample.boxes.T
    return _with(sample, sample.image[::-1], np.stack([x1, height - y2, x2, height - y1], axis=1))


def turn(sample: Sample, quarters: int) -> Sample:
    """Turn anticlockwise by this many times 90 degrees."""
    for _ in range(quarters % 4):
        width = sample.image.shape[1]
        x1, y1, x2, y2 = sample.boxes.T
        sample = _with(sample, np.rot90(sample.image), np.stack([y1, width - x2, y2, width - x1], axis=1))
    return sample


def resize_sample(sample: Sample, shorter_side: int, longer_side: int) -> Sample:
    """Resize by the rule of inference (`asag_deploy.processing.preprocess.resized_shape`)."""
    spec = Preprocessing(shorter_side=shorter_side, longer_side=longer_side)
    height, width = sample.image.shape[:2]
    new_height, new_width = resized_shape(height, width, spec)
    scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    return _with(sample, resize(sample.image, spec), sample.boxes * scale)


def random_crop(sample: Sample, smallest: int, largest: int, rng: Rng) -> Sample:
    """Cut out a part with sides of `smallest` to `largest` pixels, or of the image's where it has fewer."""
    height, width = (
        int(rng.integers(min(smallest, side), min(largest, side) + 1)) for side in sample.image.shape[:2]
    )
    top, left = (
        int(rng.integers(whole - part + 1))
        for whole, part in zip(sample.image.shape[:2], (height, width), strict=True)
    )
    return crop(sample, top, left, height, width)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cut out a part; boxes are clipped to it, and dropped if less than a pixel of them is left."""
    corner = np.array([left, top] * 2, dtype=np.float32)
    boxes = (sample.boxes - corner).clip(0, np.array([width, height] * 2, dtype=np.float32))
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST_PART).all(axis=1)
    image = sample.image[top : top + height, left : left + width]
    return dataclasses.replace(_with(sample, image, boxes[keep]), labels=sample.labels[keep])


def jitter_colour(image: RgbImage, strength: float, rng: Rng) -> RgbImage:
    """Change brightness, contrast and saturation by up to 40% and hue by up to 18 degrees at strength 1."""
    brightness, contrast, saturation = 1 + 0.4 * strength * rng.uniform(-1, 1, 3)
    hue = 18 * strength * rng.uniform(-1, 1)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hues = (np.arange(256) + hue / 2) % 180  # OpenCV counts hue in steps of 2 degrees
    shades = np.arange(256) * saturation
    hsv[..., 0] = cv2.LUT(hsv[..., 0], hues.astype(np.uint8))
    hsv[..., 1] = cv2.LUT(hsv[..., 1], shades.clip(0, 255).astype(np.uint8))
    levels = (np.arange(256) * brightness - 128) * contrast + 128
    table = levels.clip(0, 255).round().astype(np.uint8)
    return cast(RgbImage, cv2.LUT(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), table))


_NO_LIMIT = 1 << 30


def _with(sample: Sample, image: NDArray[np.uint8], boxes: NDArray[np.float32]) -> Sample:
    return dataclasses.replace(
        sample, image=np.ascontiguousarray(image), boxes=np.ascontiguousarray(boxes, dtype=np.float32)
    )
