"""The resizing rule, batches with padding, and what `Detector.forward` refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ImageError
from asag_deploy.processing.preprocess import (
    check_batch,
    make_batch,
    normalize,
    resize,
    resize_all,
    resized_shape,
)

SPEC = Preprocessing()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((480, 640), (800, 1066)),  # 1066.67 rounds down
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((800, 1000), (800, 1000)),  # already there
        ((800, 1333), (800, 1333)),
        ((800, 1334), (799, 1332)),  # the longer side decides
        ((1080, 1920), (750, 1333)),
        ((3000, 4000), (800, 1066)),
        ((500, 500), (800, 800)),
        ((1, 1), (800, 800)),
        ((2, 1), (1332, 666)),  # 1600 would be too long
        ((40, 20_000), (3, 1500)),  # the shorter side's rounding may exceed the longer one
        ((1, 20_000), (1, 1333)),
        ((20_000, 1), (1333, 1)),
    ],
)
def test_resized_shape(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_shape(*shape, SPEC) == expected


def test_resized_shape_is_symmetric_and_bounded() -> None:
    rng = np.random.default_rng(1)
    for height, width in rng.integers(1, 5000, (300, 2)).tolist():
        new_height, new_width = resized_shape(height, width, SPEC)
        assert resized_shape(width, height, SPEC) == (new_width, new_height)
        assert 1 <= min(new_height, new_width) <= 800
        assert max(new_height, new_width) <= 2 * 1333


def test_shrinking_averages() -> None:
    """Black and white columns finer than the new grid become grey, not stripes."""
    image = np.zeros((1600, 1600, 3), dtype=np.uint8)
    image[:, ::2] = 255
    small = resize(image, SPEC)
    assert small.shape == (800, 800, 3)
    assert small.min() >= 127
    assert small.max() <= 128


def test_enlarging_interpolates() -> None:
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[:, 1] = 200
    large = resize(image, Preprocessing(shorter_side=8, longer_side=8))
    assert large.shape == (8, 8, 3)
    row = large[0, :, 0].astype(int)
    assert row[0] == 0
    assert row[-1] == 200
    assert (np.diff(row) >= 0).all()
    assert len(np.unique(row)) > 2


def test_right_size_is_not_copied() -> None:
    image = np.zeros((800, 900, 3), dtype=np.uint8)
    assert resize(image, SPEC) is image


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (7, 20_000), (2, 40_000)])
def test_extreme_images_go_through(shape: tuple[int, int]) -> None:
    batch, sizes = make_batch([np.full((*shape, 3), 77, dtype=np.uint8)], SPEC)
    height, width = sizes[0]
    assert batch.shape[1] % 32 == 0
    assert batch.shape[2] % 32 == 0
    assert (batch[0, :height, :width] == 77).all()


def test_batch_is_padded_right_and_bottom() -> None:
    spec = Preprocessing(shorter_side=40, longer_side=100, size_divisor=32)
    tall = np.full((80, 40, 3), 200, dtype=np.uint8)
    wide = np.full((40, 60, 3), 100, dtype=np.uint8)
    batch, sizes = make_batch([tall, wide], spec)
    assert batch.dtype == np.uint8
    assert batch.shape == (2, 96, 64, 3)
    assert sizes.dtype == np.int64
    np.testing.assert_array_equal(sizes, [[80, 40], [40, 60]])
    for image, (height, width), value in zip(batch, sizes, (200, 100), strict=True):
        assert (image[:height, :width] == value).all()
        assert image.sum() == value * height * width * 3


def test_an_image_in_a_batch_is_what_it_is_alone() -> None:
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((50, 70), (90, 30))]
    batch, sizes = make_batch(images, SPEC)
    for i, image in enumerate(images):
        alone, size = make_batch([image], SPEC)
        height, width = sizes[i]
        np.testing.assert_array_equal(size[0], sizes[i])
        np.testing.assert_array_equal(batch[i, :height, :width], alone[0, :height, :width])


def test_no_images() -> None:
    with pytest.raises(ImageError, match="at least one image"):
        make_batch([], SPEC)
    with pytest.raises(ImageError, match="at least one image"):
        resize_all([], SPEC)


@pytest.mark.parametrize("sizes", [[(64, 90)], [(64, 64), (64, 100)], [(64, 1)], [(1, 64)], [(1, 1)]])
def test_normalized_on_the_host_to_the_bit(sizes: list[tuple[int, int]]) -> None:
    """Whatever the images' memory looks like, and what was in that of the batch before."""
    spec = Preprocessing(shorter_side=64, longer_side=100)
    rng = np.random.default_rng(3)
    given = [rng.integers(0, 256, (2 * h, w, 3), dtype=np.uint8)[::2, :, ::-1] for h, w in sizes]
    padded = (96, 128)
    expected = np.zeros((len(given), 3, *padded), dtype=np.float32)
    for slot, image in zip(expected, given, strict=True):
        mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
        values = (image.astype(np.float32) - mean) / std
        slot[:, : image.shape[0], : image.shape[1]] = values.transpose(2, 0, 1)
    np.full_like(expected, np.nan)  # freed at once, and likely where the batch will be
    found = normalize(given, padded, spec)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def good_batch() -> NDArray[np.float32]:
    return np.zeros((2, 3, 64, 96), dtype=np.float32)


def good_sizes() -> NDArray[np.int64]:
    return np.array([[64, 96], [1, 1]], dtype=np.int64)


def with_nan() -> NDArray[np.float32]:
    batch = good_batch()
    batch[1, 2, 3, 4] = np.nan
    return batch


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_good_batch(dtype: Any) -> None:
    images = good_batch()
    check_batch(images, good_sizes().astype(dtype))
    assert not images.any()


@pytest.mark.parametrize(
    ("images", "sizes", "sentence"),
    [
        (good_batch().astype(np.float64), good_sizes(), "float32 images, got float64"),
        (good_batch().astype(np.uint8), good_sizes(), "call the detector itself"),
        (np.zeros((2, 64, 96, 3), np.float32), good_sizes(), "the channels come first"),
        (np.zeros((3, 64, 96), np.float32), good_sizes(), r"\(B, 3, H, W\)"),
        (np.zeros((0, 3, 64, 96), np.float32), good_sizes()[:0], r"got \(0, 3"),
        (good_batch(), good_sizes()[:1], r"shape \(2, 2\)"),
        (good_batch(), good_sizes().ravel(), r"shape \(2, 2\)"),
        (good_batch(), good_sizes().astype(np.float32), "integer sizes"),
        (good_batch(), np.array([[64, 96], [65, 96]]), "65 x 96 for image 1"),
        (good_batch(), np.array([[64, 97], [64, 96]]), "64 x 97 for image 0"),
        (good_batch(), np.array([[64, 96], [0, 96]]), "0 x 96 for image 1"),
        (good_batch(), np.array([[64, 96], [-1, 96]]), "-1 x 96"),
        (with_nan(), good_sizes(), "NaN or infinity"),
        ([1, 2], good_sizes(), "numpy array, got list"),
        (good_batch(), [(64, 96), (1, 1)], "sizes as a numpy array"),
    ],
)
def test_bad_batches(images: Any, sizes: Any, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        check_batch(images, sizes)
