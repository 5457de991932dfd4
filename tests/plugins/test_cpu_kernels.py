"""The operators made for speed on a CPU, against the PyTorch references."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.kernels import cpu, structures
from asag_deploy.kernels.buffers import BFLOAT16, ScaledIntegers
from asag_deploy.kernels.cpu import (
    CPU_LIBRARY_VARIABLE,
    CpuKernels,
    cpu_kernels,
    why_no_cpu_kernels,
)
from asag_deploy.loop.patch_nms import patch_nms
from asag_training.network import operators
from asag_training.network.config import Activation
from support import naive_operators as naive
from support.naive_operators import STRIDES

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
TYPES = [
    (FLOAT32, FLOAT32, 2e-6),
    (FLOAT16, FLOAT32, 2e-6),
    (BFLOAT16, FLOAT32, 2e-6),
    (FLOAT16, FLOAT16, 2**-10),
    (FLOAT32, BFLOAT16, 2**-7),
    (BFLOAT16, BFLOAT16, 2**-7),
]
"""Of the features, of the result, and what rounding the result may change (values are about 1)."""
SIZES = [(203, 317), (7, 5)]


@pytest.fixture(scope="module")
def kernels(host_library_path: Path) -> CpuKernels:
    return CpuKernels(host_library_path)


def narrowed(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype != BFLOAT16:
        return values.astype(dtype)
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16).view(BFLOAT16)


def widened(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype != BFLOAT16:
        return values.astype(np.float32)
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(("of_features", "of_result", "tolerance"), TYPES)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("channels", "threads"), [(5, 1), (64, 3)])
def test_sampling_is_that_of_the_references(
    kernels: CpuKernels,
    of_features: np.dtype[Any],
    of_result: np.dtype[Any],
    tolerance: float,
    height: int,
    width: int,
    channels: int,
    threads: int,
) -> None:
    features = [narrowed(f, of_features) for f in naive.pyramid(0, height, width, channels=channels)]
    maps = [torch.from_numpy(widened(feature)) for feature in features]
    how: dict[str, Any] = {"strides": STRIDES, "out": of_result, "threads": threads}
    boxes = naive.roi_boxes(1, height, width)
    found = kernels.multiscale_roi_align(features, boxes, **how)
    expected = operators.multiscale_roi_align(maps, torch.from_numpy(boxes), STRIDES).numpy()
    assert found.dtype == of_result
    np.testing.assert_allclose(widened(found), expected, rtol=tolerance, atol=2e-6)
    xy, weight = naive.sample_points(2, height, width, groups=1)
    found = kernels.pyramid_sample(features, xy, weight, **how)
    expected = operators.pyramid_sample(maps, torch.from_numpy(xy), torch.from_numpy(weight), STRIDES).numpy()
    # PyTorch's grid_sample computes where to look less exactly.
    np.testing.assert_allclose(widened(found), expected, rtol=tolerance, atol=2e-4)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize(("of_features", "of_result", "tolerance"), TYPES)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1)])
@pytest.mark.parametrize(
    ("channels", "groups", "points", "threads"), [(5, 1, 4, 1), (96, 2, 3, 3), (256, 8, 4, 2), (42, 2, 17, 1)]
)
def test_deformable_sampling_is_that_of_the_reference(
    kernels: CpuKernels,
    of_features: np.dtype[Any],
    of_result: np.dtype[Any],
    tolerance: float,
    height: int,
    width: int,
    channels: int,
    groups: int,
    points: int,
    threads: int,
) -> None:
    floats = naive.pyramid(0, height, width, channels=channels)
    given = naive.deformable_points(1, floats, groups=groups, points=points)
    features = [narrowed(each, of_features) for each in floats]
    maps = [torch.from_numpy(widened(feature)) for feature in features]
    found = kernels.deformable_sample(features, *given, out=of_result, threads=threads)
    expected = operators.deformable_sample(maps, *map(torch.from_numpy, given)).numpy()
    assert found.dtype == of_result
    np.testing.assert_allclose(widened(found), expected, rtol=tolerance, atol=1e-4)
    assert np.abs(expected).max() > 0.2


def test_deformable_points_that_are_nowhere_sample_zeros(kernels: CpuKernels) -> None:
    features = naive.pyramid(0, 64, 64, batch=1, channels=20)
    xy = np.full((1, 3, 1, 4, 6, 2), 0.4, dtype=np.float32)
    xy[:, 0, ..., 0] = xy[:, 1, ..., 1] = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e9]
    weight = np.ones(xy.shape[:-1], dtype=np.float32)
    found = kernels.deformable_sample(features, xy, weight, out=FLOAT32, threads=1)
    np.testing.assert_array_equal(found[:, :2], 0)
    assert found[:, 2].all()


MIXED_TYPES = [
    (FLOAT32, FLOAT32, FLOAT32),
    (BFLOAT16, FLOAT32, FLOAT32),
    (BFLOAT16, BFLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16, BFLOAT16),
    (FLOAT32, BFLOAT16, BFLOAT16),
]
"""Of the samples, of the parameters and of the result."""
MIXED_SIZES = [
    (2, 3, 2, 5, 6, 7),
    (1, 5, 4, 32, 64, 128),
    (1, 2, 4, 16, 48, 32),
    (1, 1, 3, 1, 5, 1),
    (2, 2, 1, 7, 83, 9),
]
"""Batch, queries, groups, points, channels and points that come out."""


def mixed_by_the_reference(inputs: naive.MixingInputs, activation: Activation) -> NDArray[np.float32]:
    tensors = (torch.from_numpy(inputs.sampled), torch.from_numpy(inputs.parameters))
    return operators.adaptive_mixing(*tensors, inputs.out_points, activation).numpy()


@pytest.mark.parametrize("types", MIXED_TYPES)
@pytest.mark.parametrize("sizes", MIXED_SIZES)
@pytest.mark.parametrize("activation", operators.MIXING_ACTIVATIONS)
def test_mixing_is_that_of_the_reference(
    kernels: CpuKernels,
    types: tuple[np.dtype[Any], ...],
    sizes: tuple[int, ...],
    activation: Activation,
) -> None:
    inputs = naive.mixing_inputs(0, *sizes)
    of_samples, of_parameters, of_result = types
    given = (narrowed(inputs.sampled, of_samples), narrowed(inputs.parameters, of_parameters))
    number = operators.MIXING_ACTIVATIONS.index(activation)
    how: dict[str, Any] = {"out_points": inputs.out_points, "activation": number, "out": of_result}
    found = kernels.adaptive_mixing(*given, threads=3, **how)
    assert found.dtype == of_result
    exact = naive.MixingInputs(widened(given[0]), widened(given[1]), inputs.out_points)
    expected = mixed_by_the_reference(exact, activation)
    rounding = 2**-8 if of_result == BFLOAT16 else 0
    # Where a processor multiplies bfloat16, what is between the two products is rounded to it.
    between = 2e-2 if of_samples == of_parameters == BFLOAT16 else 5e-5
    np.testing.assert_allclose(widened(found), expected, rtol=rounding, atol=between)
    assert np.abs(expected).max() > 0.5
    alone = kernels.adaptive_mixing(*given, threads=1, **how)
    assert np.array_equal(found, alone)


def test_mixing_of_numbers_that_are_none_stays_where_it_is(kernels: CpuKernels) -> None:
    inputs = naive.mixing_inputs(0, 1, 3, 2, 5, 20, 7)
    inputs.sampled[0, 1, 0, 2, 3] = np.nan
    inputs.parameters[0, 2, -1] = np.inf
    for number, activation in enumerate(operators.MIXING_ACTIVATIONS):
        how: dict[str, Any] = {"out_points": inputs.out_points, "activation": number, "threads": 2}
        for out in (FLOAT32, BFLOAT16):
            found = kernels.adaptive_mixing(inputs.sampled, inputs.parameters, out=out, **how)
            expected = mixed_by_the_reference(inputs, activation)
            assert np.array_equal(np.isnan(widened(found)), np.isnan(expected))
            assert np.isnan(expected).sum() == 2 * 20 * 7


def test_mixing_of_no_queries(kernels: CpuKernels) -> None:
    inputs = naive.mixing_inputs(0, 2, 0, 2, 5, 6, 7)
    how: dict[str, Any] = {"out_points": 7, "activation": structures.GELU, "out": FLOAT32, "threads": 2}
    assert kernels.adaptive_mixing(inputs.sampled, inputs.parameters, **how).shape == (2, 0, 84)


def test_mixing_that_makes_no_sense_is_said(kernels: CpuKernels) -> None:
    inputs = naive.mixing_inputs(0, 1, 2, 2, 5, 6, 7)
    how: dict[str, Any] = {"out_points": 7, "activation": structures.GELU, "out": FLOAT32, "threads": 1}
    arrays = (inputs.sampled, inputs.parameters)
    with pytest.raises(ConfigError, match=r"expected parameters of shape \(1, 2, 132\), got \(1, 2, 142\)"):
        kernels.adaptive_mixing(*arrays, **how | {"out_points": 6})
    with pytest.raises(ConfigError, match="expected sampled of type float32 or bfloat16, got float16"):
        kernels.adaptive_mixing(inputs.sampled.astype(np.float16), inputs.parameters, **how)
    with pytest.raises(BackendError, match="activation is 2, expected 0 to 1"):
        kernels.adaptive_mixing(*arrays, **how | {"activation": 2})
    with pytest.raises(BackendError, match=r"out_type is 1, expected 0 \(float32\) or 3 \(bfloat16\)"):
        kernels.adaptive_mixing(*arrays, **how | {"out": FLOAT16})


@pytest.mark.parametrize("of_floats", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("integers", [(0,), (1, 3), (0, 1, 2, 3)])
def test_maps_of_integers_stand_for_their_values_times_a_scale(
    kernels: CpuKernels, of_floats: np.dtype[Any], integers: tuple[int, ...]
) -> None:
    """Beside maps of floats, each with a scale of its own."""
    floats = naive.pyramid(0, 203, 317, channels=64)
    given: list[Any] = [narrowed(each, of_floats) for each in floats]
    for level in integers:
        scale = 0.01 * (level + 1)
        values = np.clip(np.rint(floats[level] / scale), -128, 127).astype(np.int8)
        given[level] = ScaledIntegers(values=values, scale=scale)
    meant = [each.to_float32() if isinstance(each, ScaledIntegers) else widened(each) for each in given]
    how: dict[str, Any] = {"strides": STRIDES, "out": of_floats, "threads": 2}
    exact = how | {"out": FLOAT32}
    tolerance: dict[str, Any] = {"rtol": 2e-6 if of_floats == FLOAT32 else 2**-7, "atol": 2e-6}
    boxes = naive.roi_boxes(1, 203, 317)
    found = widened(kernels.multiscale_roi_align(given, boxes, **how))
    np.testing.assert_allclose(found, kernels.multiscale_roi_align(meant, boxes, **exact), **tolerance)
    points = naive.sample_points(2, 203, 317, groups=1)
    found = widened(kernels.pyramid_sample(given, *points, **how))
    np.testing.assert_allclose(found, kernels.pyramid_sample(meant, *points, **exact), **tolerance)
    places = naive.deformable_points(3, floats, groups=2)
    found = widened(kernels.deformable_sample(given, *places, out=of_floats, threads=2))
    whole = kernels.deformable_sample(meant, *places, out=FLOAT32, threads=1)
    np.testing.assert_allclose(found, whole, **tolerance)


def test_more_threads_than_queries_and_none_at_all(kernels: CpuKernels) -> None:
    features, boxes = naive.pyramid(3, 64, 96), naive.roi_boxes(4, 64, 96)
    how: dict[str, Any] = {"strides": STRIDES, "out": FLOAT32}
    one = kernels.multiscale_roi_align(features, boxes[:, :2].copy(), threads=1, **how)
    many = kernels.multiscale_roi_align(features, boxes[:, :2].copy(), threads=512, **how)
    assert np.array_equal(one, many)
    assert kernels.multiscale_roi_align(features, boxes[:, :0].copy(), threads=2, **how).shape[1] == 0
    given = naive.deformable_points(5, features, groups=5)
    one, many = (kernels.deformable_sample(features, *given, out=FLOAT32, threads=n) for n in (1, 512))
    assert np.array_equal(one, many)
    none = naive.deformable_points(5, features, queries=0, groups=5)
    assert kernels.deformable_sample(features, *none, out=FLOAT32, threads=2).shape == (2, 0, 5)


def test_calls_at_once_and_after_a_fork_are_those_of_one_thread(kernels: CpuKernels) -> None:
    """The threads that calls share stay; the child of a fork starts its own."""
    features, boxes = naive.pyramid(3, 64, 96), naive.roi_boxes(4, 64, 96)
    inputs = naive.mixing_inputs(0, 2, 30, 2, 5, 6, 7)

    def results(threads: int) -> list[NDArray[Any]]:
        how: dict[str, Any] = {"out": FLOAT32, "threads": threads}
        given = (inputs.sampled, inputs.parameters)
        mixed = kernels.adaptive_mixing(*given, out_points=7, activation=structures.GELU, **how)
        return [kernels.multiscale_roi_align(features, boxes, strides=STRIDES, **how), mixed]

    def as_alone(threads: int) -> bool:
        return all(map(np.array_equal, results(threads), alone))

    alone = results(1)
    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(as_alone, [2, 3, 5, 8] * 40))
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # which ends it
        os._exit(0 if all(as_alone(threads) for threads in (2, 3) * 10) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert as_alone(3)


def test_every_half_is_read_as_what_it_is(kernels: CpuKernels) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    maps = [halves.reshape(1, 1, 1, -1), np.zeros((1, 1, 1, 2**16), dtype=np.float16)]
    xy, weight = np.full((1, 1, 1, 1, 2), 2, dtype=np.float32), np.zeros((1, 1, 1, 1, 2), dtype=np.float32)
    weight[..., 0] = 1
    found = kernels.pyramid_sample(maps, xy, weight, strides=(4, 8), out=FLOAT32, threads=1)
    np.testing.assert_array_equal(found.ravel(), halves.astype(np.float32))


@pytest.mark.parametrize("settings", naive.NMS_SETTINGS)
def test_patches_are_those_of_the_host(kernels: CpuKernels, settings: naive.NmsSettings) -> None:
    for inputs in naive.nms_inputs(settings):
        expected = patch_nms(*inputs[1:], **settings._asdict())
        found = kernels.patch_nms(*inputs[1:], **settings._asdict())
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(other, one, err_msg=inputs.name)
            assert other.dtype == np.int64


def test_patches_of_many_tied_and_odd_candidates(kernels: CpuKernels) -> None:
    """More than fit into a block of a GPU, most of the same place or score, some of no score."""
    rng = np.random.default_rng(0)
    for case in range(40):
        count, dtype = (5000 if case < 2 else 300), (np.float16 if case % 3 == 2 else np.float32)
        anchors = np.rint(rng.uniform(-100, 900, (2, count, 5)) / 8) * 8
        anchors[..., 4] = rng.integers(-1, 12, (2, count)) / 10
        anchors[rng.random((2, count)) < 0.05, 4] = np.nan
        selected = rng.random((2, count)) < 0.8
        given: Any = (anchors.astype(dtype), selected, rng.integers(1, 1000, (2, 2)))
        for most in (0, 7, 2048, 2**31 - 1):
            how: dict[str, Any] = {"stride": 8, "iou_threshold": 0.25, "max_candidates": most}
            how |= {"patch_size": int(rng.integers(1, 16)), "capacity": int(rng.integers(0, 60))}
            for one, other in zip(patch_nms(*given, **how), kernels.patch_nms(*given, **how), strict=True):
                np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("settings", [naive.PadSettings(), naive.PadSettings(10, 9, 4)])
def test_anchors_are_padded_as_by_the_reference(kernels: CpuKernels, settings: naive.PadSettings) -> None:
    for inputs in naive.pad_inputs(settings):
        anchors, keep = torch.from_numpy(inputs.anchors), torch.from_numpy(inputs.keep)
        size, slots = torch.from_numpy(inputs.image_size), torch.arange(inputs.slots)
        expected, count = operators.pad_anchors(anchors, keep, size, slots, *settings)
        arrays = (inputs.anchors, inputs.keep, inputs.image_size)
        queries, real = kernels.pad_anchors(*arrays, inputs.slots, **settings._asdict())
        assert np.array_equal(real, count.numpy()), inputs.name
        assert np.array_equal(queries, expected.numpy()), inputs.name


@pytest.mark.parametrize(("count", "k"), [(1, 1), (7, 7), (1000, 100), (1000, 1), (1000, 999), (5, 0)])
def test_the_largest_of_rows(kernels: CpuKernels, count: int, k: int) -> None:
    values = np.random.default_rng(0).integers(0, 40, (3, count)).astype(np.float32)  # with many ties
    largest, indices = kernels.top_k(values, k)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :k]
    assert np.array_equal(indices, expected)
    assert np.array_equal(largest, np.take_along_axis(values, expected, axis=1))


def test_nan_is_the_smallest(kernels: CpuKernels) -> None:
    values = np.array([[np.nan, -np.inf, 1.0, np.nan, 2.0]], dtype=np.float32)
    assert kernels.top_k(values, 5)[1].tolist() == [[4, 2, 0, 1, 3]]


def test_what_makes_no_sense_is_said(kernels: CpuKernels) -> None:
    features, boxes = naive.pyramid(0, 64, 96), naive.roi_boxes(0, 64, 96)
    how: dict[str, Any] = {"strides": STRIDES, "out": FLOAT32, "threads": 1}
    with pytest.raises(BackendError, match="features of type 0 and a result of type 1 do not go together"):
        kernels.multiscale_roi_align(features, boxes, **how | {"out": FLOAT16})
    with pytest.raises(BackendError, match="threads is 0, expected 1 to 512"):
        kernels.multiscale_roi_align(features, boxes, **how | {"threads": 0})
    with pytest.raises(BackendError, match="the kernels were given threads 1099511627776; expected"):
        kernels.multiscale_roi_align(features, boxes, **how | {"threads": 2**40})
    with pytest.raises(BackendError, match=r"strides\[3\] is 31, expected 32"):
        kernels.multiscale_roi_align(features, boxes, **how | {"strides": (4, 8, 16, 31)})
    floats: Any = features[0]
    with pytest.raises(ConfigError, match="features with a scale to be int8, got float32"):
        kernels.multiscale_roi_align([ScaledIntegers(values=floats, scale=1), *features[1:]], boxes, **how)
    endless = ScaledIntegers(values=features[1].astype(np.int8), scale=np.nan)
    with pytest.raises(BackendError, match=r"scales\[1\] is nan, expected a positive number or 0"):
        kernels.multiscale_roi_align([features[0], endless, *features[2:]], boxes, **how)
    with pytest.raises(ConfigError, match="features of one type of float, got float64"):
        kernels.multiscale_roi_align([f.astype(np.float64) for f in features], boxes, **how)
    with pytest.raises(ConfigError, match="expected float32, float16 or bfloat16, got int64"):
        kernels.multiscale_roi_align(features, boxes, **how | {"out": np.dtype(np.int64)})
    with pytest.raises(ConfigError, match="4 feature maps and as many strides, got 3, 4"):
        kernels.multiscale_roi_align(features[1:], boxes, **how)
    with pytest.raises(ConfigError, match=r"features\[1\] of shape"):
        kernels.multiscale_roi_align([features[0], features[1][:1].copy(), *features[2:]], boxes, **how)
    xy, weight = naive.sample_points(2, 64, 96, groups=2)
    with pytest.raises(ConfigError, match="divides 5 channels, got 2"):
        kernels.pyramid_sample(features, xy, weight, **how)
    places, shares = naive.deformable_points(2, features, groups=2)
    with pytest.raises(ConfigError, match="divides 5 channels, got 2"):
        kernels.deformable_sample(features, places, shares, out=FLOAT32, threads=1)
    with pytest.raises(
        ConfigError, match=r"xy of shape \(2, any, any, 3, any, 2\), got \(2, 9, 2, 4, 4, 2\)"
    ):
        kernels.deformable_sample(features[1:], places, shares, out=FLOAT32, threads=1)
    with pytest.raises(ConfigError, match="expected 1 to 4 feature maps, got 5"):
        kernels.deformable_sample([*features, features[0]], places, shares, out=FLOAT32, threads=1)
    many = naive.deformable_points(2, features, groups=1, points=65)
    with pytest.raises(BackendError, match="points is 65, expected 0 to 64"):
        kernels.deformable_sample(features, *many, out=FLOAT32, threads=1)
    settings = naive.NMS_SETTINGS[0]._replace(patch_size=1025)
    arrays = next(iter(naive.nms_inputs(settings)))[1:]
    with pytest.raises(BackendError, match="patch_size is 1025, expected 1 to 1024"):
        kernels.patch_nms(*arrays, **settings._asdict())
    with pytest.raises(ConfigError, match="expected selected of type bool, got uint8"):
        kernels.patch_nms(arrays[0], arrays[1].view(np.uint8), arrays[2], **settings._asdict())
    with pytest.raises(BackendError, match="k is 3 of 2 values in 1 rows"):
        kernels.top_k(np.zeros((1, 2), dtype=np.float32), 3)


def test_where_the_library_is_found(
    host_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, "")
    assert cpu_kernels() is None
    assert "is empty" in str(why_no_cpu_kernels())
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(host_library_path))
    assert cpu_kernels() is cpu_kernels()
    assert why_no_cpu_kernels() is None
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"none.so, which is no file; set it to libasag_kernels_host.so"):
        cpu_kernels()
    assert "which is no file" in str(why_no_cpu_kernels())
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(tmp_path / "text.so"))
    with pytest.raises(BackendError, match="cannot be loaded") as refused:
        cpu_kernels()
    for remedy in ("`pip install ./plugins` from the sources of this", "or set it to nothing to run without"):
        assert remedy in str(refused.value)


def test_an_installed_package_brings_it(host_library_path: Path, package_of_operators: Path) -> None:
    assert cpu_kernels() is None
    assert "install its wheel" in str(why_no_cpu_kernels())
    (package_of_operators / cpu.LIBRARY_NAME).symlink_to(host_library_path)
    found = cpu_kernels()
    assert found is not None
    assert found.path.parent.name == cpu.PACKAGE


def test_a_library_without_one_of_the_operators(
    host_library_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a release between two interfaces."""
    monkeypatch.setitem(cpu._ARGUMENTS, "other", structures.TopK)
    with pytest.raises(BackendError, match="have no asag_cpu_other; build them again"):
        CpuKernels(host_library_path)
