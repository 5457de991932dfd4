"""Every kernel's steps, executed on the CPU, against the operators' PyTorch references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asag_deploy import kernels
from asag_deploy.kernels import KernelLibrary
from asag_training.network import operators
from support import naive_operators as naive
from support.naive_operators import (
    STRIDES,
    Bools,
    Floats,
    Ints,
    NmsInputs,
    NmsSettings,
    PadInputs,
    PadSettings,
)

SIZES = [(203, 317), (64, 96), (33, 500), (7, 5)]
HALF_STEP = 2**-11
"""Half a unit in the last place of float16, relative."""


def torch_roi(
    features: Sequence[NDArray[Any]], boxes: Floats, strides: Sequence[int] = STRIDES
) -> NDArray[Any]:
    maps = [torch.from_numpy(feature) for feature in features]
    return operators.multiscale_roi_align(maps, torch.from_numpy(boxes), strides).numpy()


def roi_align(
    library: KernelLibrary,
    features: Sequence[NDArray[Any]],
    boxes: Floats,
    strides: Sequence[int] = STRIDES,
) -> NDArray[Any]:
    channels, dtype = features[0].shape[3], features[0].dtype
    out = np.full((*boxes.shape[:2], 7, 7, channels), np.nan, dtype=dtype)
    kernels.multiscale_roi_align(library, features, boxes, out, strides=strides)
    return out


def sample(
    library: KernelLibrary, features: Sequence[NDArray[Any]], xy: Floats, weight: Floats
) -> NDArray[Any]:
    shape = (*xy.shape[:4], features[0].shape[3] // xy.shape[2])
    out = np.full(shape, np.nan, dtype=features[0].dtype)
    kernels.pyramid_sample(library, features, xy, weight, out, strides=STRIDES)
    return out


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("channels", [5, 8])
def test_roi_align(host: KernelLibrary, height: int, width: int, channels: int) -> None:
    features = naive.pyramid(0, height, width, channels=channels)
    boxes = naive.roi_boxes(1, height, width)
    expected = torch_roi(features, boxes)
    actual = roi_align(host, features, boxes)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("channels", [3, 16])
def test_roi_align_in_half_precision(host: KernelLibrary, channels: int) -> None:
    features = naive.pyramid(2, 203, 317, channels=channels)
    halves = [feature.astype(np.float16) for feature in features]
    boxes = naive.roi_boxes(3, 203, 317)
    actual = roi_align(host, halves, boxes)
    expected = torch_roi([half.astype(np.float32) for half in halves], boxes)
    assert actual.dtype == np.float16
    # Only the result is rounded: weights and sums are float32.
    np.testing.assert_allclose(actual, expected, rtol=1.01 * HALF_STEP, atol=1e-6)


def test_roi_align_of_fewer_levels(host: KernelLibrary) -> None:
    features, boxes = naive.pyramid(0, 300, 400)[1:], naive.roi_boxes(2, 300, 400)
    strides = (8, 16, 32)
    expected = torch_roi(features, boxes, strides)
    np.testing.assert_allclose(roi_align(host, features, boxes, strides), expected, rtol=0, atol=2e-6)


def test_each_box_samples_only_its_own_level(host: KernelLibrary) -> None:
    features = naive.pyramid(0, 256, 256, batch=1)
    boxes = np.array([[[10, 10, 40, 40], [5, 5, 120, 120], [0, 0, 230, 230], [0, 0, 460, 460]]], np.float32)
    expected = roi_align(host, features, boxes)
    for level in range(4):
        spoilt = [np.full_like(f, np.nan) if i != level else f for i, f in enumerate(features)]
        np.testing.assert_array_equal(roi_align(host, spoilt, boxes)[0, level], expected[0, level])


def test_boxes_that_are_no_boxes(host: KernelLibrary) -> None:
    features = naive.pyramid(0, 64, 96, batch=1)
    empty = np.array([[[30, 20, 30, 20], [50, 40, 30, 20], [30, 20, 30, 60]]], dtype=np.float32)
    expected = torch_roi(features, empty)
    np.testing.assert_allclose(roi_align(host, features, empty), expected, rtol=0, atol=2e-6)
    nan, inf = np.nan, np.inf
    wild = np.array([[[40, 10, 20, 30], [nan] * 4, [-inf, 0, inf, 9], [1e30, 1e30, 3e38, 3e38]]], np.float32)
    roi_align(
        host, features, wild
    )  # whatever comes out, nothing is read beyond the maps (see the sanitizers)
    assert roi_align(host, features, np.zeros((1, 0, 4), np.float32)).shape == (1, 0, 7, 7, 5)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (3, 6), (2, 8), (4, 32)])
def test_pyramid_sample(host: KernelLibrary, height: int, width: int, groups: int, channels: int) -> None:
    features = naive.pyramid(5, height, width, channels=channels)
    xy, weight = naive.sample_points(6, height, width, groups=groups)
    maps = [torch.from_numpy(feature) for feature in features]
    points = torch.from_numpy(xy), torch.from_numpy(weight)
    expected = operators.pyramid_sample(maps, *points, STRIDES).numpy()
    # The reference goes through coordinates of -1 to 1, which are off by 2^-24 of the map's side.
    np.testing.assert_allclose(sample(host, features, xy, weight), expected, rtol=0, atol=1e-4)
    exact = naive.pyramid_sample(features, xy, weight, STRIDES)
    np.testing.assert_allclose(sample(host, features, xy, weight), exact, rtol=0, atol=3e-5)


def test_pyramid_sample_in_half_precision_and_of_many_points(host: KernelLibrary) -> None:
    halves = [feature.astype(np.float16) for feature in naive.pyramid(7, 100, 80, channels=16)]
    xy, weight = (np.repeat(array, 12, axis=3) for array in naive.sample_points(8, 100, 80))
    assert xy.shape[3] > 2 * 32  # several tiles of points
    expected = naive.pyramid_sample([half.astype(np.float32) for half in halves], xy, weight, STRIDES)
    actual = sample(host, halves, xy, weight)
    assert actual.dtype == np.float16
    np.testing.assert_allclose(actual, expected, rtol=1.01 * HALF_STEP, atol=3e-5)


def deform(
    library: KernelLibrary, features: Sequence[NDArray[Any]], xy: Floats, weight: Floats
) -> NDArray[Any]:
    out = np.full((*xy.shape[:2], features[0].shape[3]), np.nan, dtype=features[0].dtype)
    kernels.deformable_sample(library, features, xy, weight, out)
    return out


@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1)])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (3, 6), (2, 8), (8, 256)])
def test_deformable_sample(host: KernelLibrary, height: int, width: int, groups: int, channels: int) -> None:
    features = naive.pyramid(5, height, width, channels=channels)
    xy, weight = naive.deformable_points(6, features, groups=groups)
    maps = [torch.from_numpy(feature) for feature in features]
    expected = operators.deformable_sample(maps, torch.from_numpy(xy), torch.from_numpy(weight)).numpy()
    actual = deform(host, features, xy, weight)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    if channels < 256:
        exact = naive.deformable_sample(features, xy, weight)
        np.testing.assert_allclose(actual, exact, rtol=0, atol=3e-5)


def test_deformable_sample_in_half_precision_and_of_fewer_levels(host: KernelLibrary) -> None:
    features = naive.pyramid(7, 100, 80, channels=16)[1:]
    halves = [feature.astype(np.float16) for feature in features]
    xy, weight = naive.deformable_points(8, features, groups=2, points=3)
    expected = naive.deformable_sample([half.astype(np.float32) for half in halves], xy, weight)
    actual = deform(host, halves, xy, weight)
    assert actual.dtype == np.float16
    np.testing.assert_allclose(actual, expected, rtol=1.01 * HALF_STEP, atol=3e-5)


def test_deformable_sample_of_no_points_and_of_points_that_are_nowhere(host: KernelLibrary) -> None:
    features = naive.pyramid(0, 64, 64, batch=1, channels=4)
    wild = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e9], dtype=np.float32)
    xy = np.full((1, 3, 1, 4, 6, 2), 0.4, dtype=np.float32)
    xy[:, 0, ..., 0], xy[:, 1, ..., 1] = wild, wild
    out = deform(host, features, xy, np.ones(xy.shape[:-1], dtype=np.float32))
    np.testing.assert_array_equal(out[:, :2], 0)
    assert out[:, 2].all()
    none = deform(host, features, xy[..., :0, :].copy(), np.ones((1, 3, 1, 4, 0), dtype=np.float32))
    np.testing.assert_array_equal(none, 0)


def test_points_that_are_nowhere_sample_zeros(host: KernelLibrary) -> None:
    features = naive.pyramid(0, 64, 64, batch=1, channels=4)
    xy = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e9], dtype=np.float32)
    points = np.stack([xy, np.full_like(xy, 20)], axis=-1).reshape(1, 1, 1, 6, 2)
    weight = np.full((1, 1, 1, 6, 4), 0.25, dtype=np.float32)
    assert not sample(host, features, points, weight).any()
    assert sample(host, features, points[:, :, :, :0], weight[:, :, :, :0]).size == 0


def run_nms(library: KernelLibrary, inputs: NmsInputs, settings: NmsSettings) -> tuple[Ints, Ints]:
    _, anchors, selected, image_size = inputs
    origins = np.full((len(anchors), settings.capacity, 2), -7, dtype=np.int64)
    counts = np.tile([-3, -7, -5, -9], (len(anchors), 1))
    options = settings._asdict()
    del options["capacity"]
    kernels.patch_nms(library, anchors, selected, image_size, origins, counts, **options)
    assert (counts[:, [0, 2, 3]] == [-3, -5, -9]).all(), "only the column of the patches is written"
    return origins, counts[:, 1]


def expected_nms(inputs: NmsInputs, settings: NmsSettings) -> tuple[Ints, Ints]:
    _, anchors, selected, image_size = inputs
    tensors = (torch.from_numpy(anchors), torch.from_numpy(selected), torch.from_numpy(image_size))
    origins, counts = operators.patch_nms(*tensors, **settings._asdict())
    return origins.numpy(), counts.numpy()


@pytest.mark.parametrize("settings", naive.NMS_SETTINGS)
def test_patch_nms(host: KernelLibrary, settings: NmsSettings) -> None:
    for inputs in naive.nms_inputs(settings):
        for actual, expected in zip(
            run_nms(host, inputs, settings), expected_nms(inputs, settings), strict=True
        ):
            np.testing.assert_array_equal(actual, expected, err_msg=inputs.name)


@pytest.mark.parametrize("max_candidates", [3, 40, 400, 3000])
def test_patch_nms_of_very_many_anchors(host: KernelLibrary, max_candidates: int) -> None:
    """More candidates than are considered, with ties across the cut, and many anchors to each thread."""
    settings = NmsSettings(stride=8, patch_size=3, capacity=900, max_candidates=max_candidates)
    rng = np.random.default_rng(0)
    anchors = (rng.uniform(0, 1, (2, 1100, 5)) * (1300, 800, 50, 50, 1)).astype(np.float32)
    anchors[0, :, 4] = np.round(anchors[0, :, 4] * 20) / 20
    selected = rng.uniform(0, 1, (2, 1100)) < 0.9
    inputs = NmsInputs("many", anchors, selected, np.array([[800, 1300], [640, 1111]]))
    origins, counts = run_nms(host, inputs, settings)
    expected_origins, expected_counts = expected_nms(inputs, settings)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(origins, expected_origins)


def test_patch_nms_without_anchors_or_capacity(host: KernelLibrary) -> None:
    inputs = next(naive.nms_inputs(NmsSettings()))
    nothing = NmsInputs(
        "none", inputs.anchors[:, :0].copy(), inputs.selected[:, :0].copy(), inputs.image_size
    )
    origins, counts = run_nms(host, nothing, NmsSettings())
    assert not origins.any()
    assert not counts.any()
    many = list(naive.nms_inputs(NmsSettings()))[4]
    _, counts = run_nms(host, many, NmsSettings(capacity=0))
    np.testing.assert_array_equal(counts, expected_nms(many, NmsSettings())[1])


def test_patch_nms_in_half_precision(host: KernelLibrary) -> None:
    settings = NmsSettings(capacity=40)
    for inputs in naive.nms_inputs(settings):
        half = inputs._replace(anchors=inputs.anchors.astype(np.float16))
        same = inputs._replace(anchors=half.anchors.astype(np.float32))
        for actual, expected in zip(run_nms(host, half, settings), expected_nms(same, settings), strict=True):
            np.testing.assert_array_equal(actual, expected, err_msg=inputs.name)


def test_scores_below_zero_and_both_zeros(host: KernelLibrary) -> None:
    anchors = np.zeros((1, 6, 5), dtype=np.float32)
    anchors[0, :, 0] = np.arange(6) * 1000
    anchors[0, :, 4] = [0.0, -0.0, -0.5, 0.0, -0.0, -1e-9]
    inputs = NmsInputs("zeros", anchors, np.ones((1, 6), np.bool_), np.array([[500, 9000]]))
    settings = NmsSettings()
    origins, counts = run_nms(host, inputs, settings)
    expected_origins, expected_counts = expected_nms(inputs, settings)
    assert counts.tolist() == expected_counts.tolist() == [4]
    np.testing.assert_array_equal(origins, expected_origins)


def run_pad(library: KernelLibrary, inputs: PadInputs, settings: PadSettings) -> tuple[NDArray[Any], Ints]:
    _, anchors, keep, image_size, slots = inputs
    queries = np.full((len(anchors), slots, 4), np.nan, dtype=anchors.dtype)
    counts = np.full(len(anchors), -7, dtype=np.int64)
    kernels.pad_anchors(library, anchors, keep, image_size, queries, counts, **settings._asdict())
    return queries, counts


def expected_pad(inputs: PadInputs, settings: PadSettings) -> tuple[Floats, Ints]:
    _, anchors, keep, image_size, slots = inputs
    tensors = (torch.from_numpy(anchors), torch.from_numpy(keep), torch.from_numpy(image_size))
    queries, counts = operators.pad_anchors(*tensors, torch.arange(slots), **settings._asdict())
    return queries.numpy(), counts.numpy()


PAD_SETTINGS = [
    *(PadSettings(), PadSettings(10, 10, 15), PadSettings(5, 1, 5), PadSettings(20, 7, 100)),
    *(PadSettings(10, 9, 4), PadSettings(10, 0, 12)),
]


@pytest.mark.parametrize("settings", PAD_SETTINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_pad_anchors(host: KernelLibrary, settings: PadSettings, dtype: type[np.floating[Any]]) -> None:
    for inputs in naive.pad_inputs(settings):
        given = inputs._replace(anchors=inputs.anchors.astype(dtype))
        same = inputs._replace(anchors=given.anchors.astype(np.float32))
        queries, counts = run_pad(host, given, settings)
        expected_queries, expected_counts = expected_pad(same, settings)
        np.testing.assert_array_equal(counts, expected_counts, err_msg=inputs.name)
        np.testing.assert_array_equal(queries, expected_queries.astype(dtype), err_msg=inputs.name)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_pad_anchors_of_very_many(host: KernelLibrary, share: float) -> None:
    settings = PadSettings(first_level=750, floor=50, cap=600)
    rng = np.random.default_rng(1)
    anchors = (rng.uniform(0, 1, (2, 3100, 5)) * (1300, 800, 300, 300, 1)).astype(np.float32)
    anchors[1, :, 4] = np.round(anchors[1, :, 4] * 9) / 9
    keep: Bools = rng.uniform(0, 1, (2, 3100)) < share
    keep[1, :750] = False
    inputs = PadInputs("many", anchors, keep, np.array([[800, 1300], [640, 1111]]), 640)
    queries, counts = run_pad(host, inputs, settings)
    expected_queries, expected_counts = expected_pad(inputs, settings)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(queries, expected_queries)


def test_pad_anchors_without_anchors(host: KernelLibrary) -> None:
    anchors, keep = np.zeros((2, 0, 5), dtype=np.float32), np.zeros((2, 0), dtype=np.bool_)
    inputs = PadInputs("none", anchors, keep, np.array([[80, 60], [40, 30]]), 3)
    queries, counts = run_pad(host, inputs, PadSettings(first_level=0, floor=3))
    assert counts.tolist() == [0, 0]
    assert queries.tolist() == [[[30, 40, 60, 80]] * 3, [[15, 20, 30, 40]] * 3]
