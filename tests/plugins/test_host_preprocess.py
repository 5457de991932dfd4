"""The pre-processing kernel, executed on the CPU, against OpenCV and the runtime's own pre-processing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import kernels
from asag_deploy.kernels import KernelLibrary
from asag_deploy.manifest import Preprocessing
from asag_deploy.preprocess import make_batch, resized_shape

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


@pytest.fixture
def library(host_library_path: Path) -> KernelLibrary:
    return KernelLibrary(host_library_path, "host")


def picture(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Noise, for it shows every rounding, with a white and a black corner."""
    image = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image[: shape[0] // 3, : shape[1] // 3] = 255
    image[-(shape[0] // 3) :, -(shape[1] // 3) :] = 0
    return image


@pytest.mark.parametrize(("shape", "shorter", "longer"), [*GROW, *SHRINK, *STAY])
def test_pixels_are_those_of_opencv(
    library: KernelLibrary, shape: tuple[int, int], shorter: int, longer: int
) -> None:
    image, spec = picture(shape), Preprocessing(shorter_side=shorter, longer_side=longer)
    expected, sizes = make_batch([image], spec)
    new_shape = resized_shape(*shape, spec)
    assert tuple(sizes[0]) == new_shape
    out: NDArray[np.uint8] = np.full(expected.shape[1:], 77, dtype=np.uint8)
    kernels.preprocess(library, image, out, new_shape=new_shape)
    np.testing.assert_array_equal(out, expected[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "shorter", "longer"), [GROW[0], SHRINK[0], STAY[0]])
def test_normalised_values(
    library: KernelLibrary,
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
    kernels.preprocess(library, image, out, new_shape=new_shape, mean=spec.mean, deviation=spec.std)
    np.testing.assert_array_equal(out, expected.transpose(2, 0, 1).astype(dtype))
