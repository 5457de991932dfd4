"""A detector with each of the two loops, on an imaginary GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.engines.sidecar import Format
from support.simulated_gpu.device_loops import LYING, STANDING
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels
from support.tiny_bundle import make_bundle

FORMATS: tuple[Format, ...] = ("tensorrt-rtx", "tensorrt")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = make_bundle(tmp_path_factory.mktemp("device") / "bundle")
    for engine_format in FORMATS:
        write_engines(made, engine_format)
    return made


@pytest.fixture(scope="session")
def canvas_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With engines of two canvases, beside those that take every shape."""
    made = make_bundle(tmp_path_factory.mktemp("canvases") / "bundle")
    for engine_format in FORMATS:
        write_engines(made, engine_format, canvases=(LYING, STANDING))
    return made


@pytest.fixture
def host(kernels: FakeKernels, bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(bundle, backend="tensorrt-rtx", loop="host") as made:
        yield made


@pytest.fixture
def device(kernels: FakeKernels, bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(bundle, backend="tensorrt-rtx", loop="device") as made:
        yield made
