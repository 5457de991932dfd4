"""Augmentation: boxes go where their pixels go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import Sample
from asag_training.data import transforms
from asag_training.data.transforms import Augmentation, CropRecipe, augment, sample_rng

INSIDE = (255, 200, 10)


def marked(height: int = 48, width: int = 64) -> Sample:
    """A dark picture with two bright rectangles, which are its objects."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    boxes = np.array([[4, 8, 20, 14], [30, 20, 50, 40]], dtype=np.float32)
    for x1, y1, x2, y2 in boxes.astype(int):
        image[y1:y2, x1:x2] = INSIDE
    return Sample(
        image=image, boxes=boxes, labels=np.array([1, 0]), image_id=5, original_shape=(height, width)
    )


def assert_boxes_are_on_their_pixels(sample: Sample, tolerance: float = 0.0) -> None:
    """Every box holds bright pixels only, and all bright pixels are in boxes."""
    bright = (sample.image[..., 0] > 127).astype(float)
    assert bright.any()
    for x1, y1, x2, y2 in sample.boxes.round().astype(int):
        assert bright[y1:y2, x1:x2].mean() >= 1 - tolerance
        bright[y1:y2, x1:x2] = 0
    assert bright.mean() <= tolerance


@pytest.mark.parametrize(
    "change",
    [
        transforms.flip_horizontally,
        transforms.flip_vertically,
        *(lambda sample, n=n: transforms.turn(sample, n) for n in range(4)),
    ],
)
def test_flips_and_turns(change: Callable[[Sample], Sample]) -> None:
    changed = change(marked())
    assert_boxes_are_on_their_pixels(changed)
    assert changed.labels.tolist() == [1, 0]
    assert (changed.image_id, changed.original_shape) == (5, (48, 64))


def test_flipping_twice_changes_nothing() -> None:
    sample = marked()
    for flip in (transforms.flip_horizontally, transforms.flip_vertically):
        assert not np.array_equal(flip(sample).image, sample.image)
        assert np.array_equal(flip(flip(sample)).image, sample.image)
        assert np.array_equal(flip(flip(sample)).boxes, sample.boxes)


@pytest.mark.parametrize(
    ("shorter", "longer", "shape"), [(96, 200, (96, 128)), (96, 64, (48, 64)), (24, 99, (24, 32))]
)
def test_resize_follows_the_rule_of_inference(shorter: int, longer: int, shape: tuple[int, int]) -> None:
    resized = transforms.resize_sample(marked(), shorter, longer)
    assert resized.image.shape[:2] == shape
    assert np.allclose(resized.boxes, marked().boxes * (shape[0] / 48))
    assert_boxes_are_on_their_pixels(resized, tolerance=0.01)


def test_crop_clips_and_drops() -> None:
    cut = transforms.crop(marked(), top=10, left=0, height=30, width=40)
    assert cut.image.shape == (30, 40, 3)
    assert cut.boxes.tolist() == [[4, 0, 20, 4], [30, 10, 40, 30]]
    assert_boxes_are_on_their_pixels(cut)
    away = transforms.crop(marked(), top=0, left=30, height=30, width=20)
    assert away.boxes.tolist() == [[0, 20, 20, 30]]
    assert away.labels.tolist() == [0]
    assert len(transforms.crop(marked(), top=0, left=50, height=10, width=10).boxes) == 0


def test_random_crop_has_the_sides_that_were_asked_for() -> None:
    rng = sample_rng(0, 0, 0)
    shapes = {transforms.random_crop(marked(), 20, 50, rng).image.shape[:2] for _ in range(300)}
    heights, widths = ({shape[axis] for shape in shapes} for axis in (0, 1))
    assert (min(heights), max(heights)) == (20, 48)  # the image ends there
    assert (min(widths), max(widths)) == (20, 50)


def test_augmentation_keeps_boxes_on_their_pixels() -> None:
    everything = Augmentation(
        shorter_sides=(90, 96),
        longer_side=200,
        crop=CropRecipe(shorter_sides=(48, 64), smallest=30, largest=60, probability=1.0),
        vertical_flip=0.5,
        quarter_turns=True,
    )
    shapes = set()
    for index in range(20):
        changed = augment(marked(), everything, sample_rng(0, 0, index))
        shapes.add(changed.image.shape)
        if len(changed.boxes):
            assert_boxes_are_on_their_pixels(changed, tolerance=0.08)
    assert len(shapes) > 5


def test_same_seed_epoch_and_index_give_the_same() -> None:
    recipe = dataclasses.replace(transforms.multi_scale(), colour=0.5)
    first, again = (augment(marked(480, 640), recipe, sample_rng(3, 1, 7)) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.boxes, again.boxes)
    others = [
        augment(marked(480, 640), recipe, sample_rng(*key)) for key in ((4, 1, 7), (3, 2, 7), (3, 1, 8))
    ]
    assert all(o.image.shape != first.image.shape or (o.image != first.image).any() for o in others)


def test_recipes_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    sample = marked(480, 640)
    assert {augment(sample, transforms.standard(), rng).image.shape for _ in range(4)} == {(800, 1066, 3)}
    sides = {min(augment(sample, transforms.multi_scale(), rng).image.shape[:2]) for _ in range(30)}
    assert sides == {640, 672, 704, 736, 768, 800}


def test_colour_changes_colours_only() -> None:
    image = marked().image
    changed = transforms.jitter_colour(image, 1.0, sample_rng(0, 0, 0))
    assert changed.shape == image.shape
    assert changed.dtype == np.uint8
    assert (changed != image).any()
    grey = np.full((4, 4, 3), 100, dtype=np.uint8)
    assert np.ptp(transforms.jitter_colour(grey, 1.0, sample_rng(0, 0, 1))) <= 1
    assert np.array_equal(transforms.jitter_colour(grey, 0.0, sample_rng(0, 0, 1)), grey)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Augmentation(shorter_sides=()), "shorter_sides"),
        (
            lambda: Augmentation(longer_side=700),
            "longer_side 700 is not possible: expected at least the shorter side, 800",
        ),
        (lambda: Augmentation(horizontal_flip=1.5), "augmentation setting horizontal_flip 1.5 is not"),
        (lambda: Augmentation(colour=-1), "colour -1 is not possible: expected between"),
        (lambda: CropRecipe(smallest=700), "crop setting smallest 700 and largest 600 is not"),
        (lambda: CropRecipe(probability=2), "crop setting probability 2 is not"),
    ],
)
def test_values_that_make_no_sense(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make()
