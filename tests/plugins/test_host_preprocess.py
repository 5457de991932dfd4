"""The pre-processing kernel, executed on the CPU, against OpenCV and the runtime's own pre-processing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import kernels
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.kernels import KernelLibrary
from asag_deploy.processing.preprocess import make_batch, resized_shape

# Height and width of an image, and the sides that its shorter and longer are resized to.
GROW = [
    ((100, 150), 160, 300),
    ((3, 7), 50, 90),
    ((5, 5), 320, 400),
    ((1, 50), 30, 100),
    ((97, 131), 98, 200),
]
SHRINK = [
    *(((97, 131), 64, 200), ((333, 211), 100, 120), ((200, 200), 199, 300), ((2, 301), 40, 100)),
    *(((300, 200), 100, 200), ((120, 180), 40, 200), ((490, 98), 2, 20), ((255, 510), 51, 102)),
]
STAY = [((50, 60), 50, 100)]


def picture(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Noise, for it shows every rounding, with a white and a black corner."""
    image = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image[: shape[0] // 3, : shape[1] // 3] = 255
    image[-(shape[0] // 3) :, -(shape[1] // 3) :] = 0
    return image


@pytest.mark.parametrize(("shape", "shorter", "longer"), [*GROW, *SHRINK, *STAY])
def test_pixels_are_those_of_opencv(
    host: KernelLibrary, shape: tuple[int, int], shorter: int, longer: int
) -> None:
    image, spec = picture(shape), Preprocessing(shorter_side=shorter, longer_side=longer)
    expected, sizes = make_batch([image], spec)
    new_shape = resized_shape(*shape, spec)
    assert tuple(sizes[0]) == new_shape
    out: NDArray[np.uint8] = np.full(expected.shape[1:], 77, dtype=np.uint8)
    kernels.preprocess(host, image, out, new_shape=new_shape)
    np.testing.assert_array_equal(out, expected[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "shorter", "longer"), [GROW[0], SHRINK[0], STAY[0]])
def test_normalised_values(
    host: KernelLibrary,
    shape: tuple[int, int],
    shorter: int,
    longer: int,
    dtype: type[np.floating[Any]],
) -> None:
    image, spec = picture(shape), Preprocessing(shorter_side=shorter, longer_side=longer)
    batch, sizes = make_batch([image], spec)
    mean, deviation = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    expected = (batch[0].astype(np.float32) - mean) / deviation
    height, width = sizes[0]
    expected[height:], expected[:, width:] = 0, 0
    out = np.full((3, *batch.shape[1:3]), np.nan, dtype=dtype)
    new_shape = resized_shape(*shape, spec)
    kernels.preprocess(host, image, out, new_shape=new_shape, mean=spec.mean, deviation=spec.std)
    np.testing.assert_array_equal(out, expected.transpose(2, 0, 1).astype(dtype))


# Sides of a resized image that end before, with and after a tile of the kernel (8 x 32 pixels), or are odd.
EDGES = [(1, 1), (7, 31), (8, 32), (9, 33), (15, 65), (16, 64), (17, 95), (41, 29)]
# What they come from: both sides or one may grow or shrink, by whole numbers too, or stay.
KINDS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "grow": lambda height, width: (-(-height * 3 // 7), -(-width * 3 // 7)),
    "grow in width": lambda height, width: (height, -(-width * 5 // 9)),
    "grow in height": lambda height, width: (-(-height // 4), width),
    "shrink": lambda height, width: (height * 7 // 3 + 1, width * 7 // 3 + 1),
    "shrink in width": lambda height, width: (height, width * 3 // 2 + 1),
    "shrink in height": lambda height, width: (5 * height + 2, width),
    "shrink little": lambda height, width: (height + 1, width + 1),
    "halve": lambda height, width: (2 * height, 2 * width),
    "shrink by 3 and 5": lambda height, width: (3 * height, 5 * width),
    "stay": lambda height, width: (height, width),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new_shape", EDGES)
def test_every_tile_of_a_slot(host: KernelLibrary, kind: str, new_shape: tuple[int, int]) -> None:
    """Images that fill their slot, and slots with whole and broken tiles beyond the image."""
    height, width = new_shape
    image = picture(KINDS[kind](height, width))
    method = cv2.INTER_AREA if image.shape[0] * image.shape[1] > height * width else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=method)
    for right, below in [(0, 0), (1, 0), (0, 1), (32, 8), (70, 27)]:
        expected = np.pad(resized, ((0, below), (0, right), (0, 0)))
        out: NDArray[np.uint8] = np.full(expected.shape, 77, dtype=np.uint8)
        kernels.preprocess(host, image, out, new_shape=new_shape)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_blue_first_and_normalised(host: KernelLibrary, kind: str) -> None:
    image = picture(KINDS[kind](17, 41))
    pixels: NDArray[np.uint8] = np.empty((17, 41, 3), dtype=np.uint8)
    kernels.preprocess(host, image, pixels, new_shape=(17, 41))
    mean, deviation = np.array([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], np.float32)
    values = (pixels[..., ::-1].astype(np.float32) - mean) / deviation
    out = np.full((3, 30, 75), np.nan, dtype=np.float32)
    options: dict[str, Any] = {"new_shape": (17, 41), "mean": mean, "deviation": deviation}
    kernels.preprocess(host, image, out, channel_order="bgr", **options)
    expected = np.pad(values.transpose(2, 0, 1), ((0, 0), (0, 13), (0, 34)))
    np.testing.assert_array_equal(out, expected)
