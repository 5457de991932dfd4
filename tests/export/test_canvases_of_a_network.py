"""A real network on a canvas, on an imaginary GPU: the loop on the device with engines of one shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from asag_deploy.backends.tensorrt.device_loop import DeviceLoop
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level
from asag_deploy.detector import Detector
from asag_deploy.processing.canvases import Canvas
from asag_evaluation.data.doodles import draw_doodles
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels

CANVASES = (Canvas(160, 224), Canvas(224, 160))
SIZES = [(160, 210), (210, 160), (100, 120), (160, 300)]
"""The last is too long for either."""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["P4", "P3"])
def test_both_loops_find_the_same(
    kernels: FakeKernels, small_bundle: Bundle, tmp_path: Path, level: Level
) -> None:
    """Decisions to the number; levels and decoder have room for more there, which only rounding shows."""
    bundle = Bundle.open(shutil.copytree(small_bundle.path, tmp_path / "bundle"))
    write_engines(bundle, canvases=CANVASES)
    with (
        Detector.load(bundle, backend="tensorrt-rtx", loop="host", max_level=level) as host,
        Detector.load(bundle, backend="tensorrt-rtx", loop="device", max_level=level) as device,
    ):
        deepest = set()
        for seed, (height, width) in enumerate(SIZES):
            image = draw_doodles(height, width, seed=seed)
            expected, found = host(image), device(image)
            deepest.add(found.trace.levels[-1].level)
            assert found.trace.to_dict() == expected.trace.to_dict()
            np.testing.assert_array_equal(found.class_id, expected.class_id)
            np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)
            np.testing.assert_allclose(found.xyxy, expected.xyxy, atol=1e-2)
        loop = device._loop
        assert isinstance(loop, DeviceLoop)
        assert {key[0][2:]: graph.fixed for key, graph in loop._graphs.items()} == {
            (160, 224): True,
            (224, 160): True,
            (160, 320): False,
        }
        assert loop.redone == 0
        assert level in deepest
