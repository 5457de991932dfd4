"""Real engines on a real GPU: exported, judged stage by stage, and run as a detector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.engines.build import BuildOptions, build_engines
from asag_deploy.engines.sidecar import Format
from asag_deploy.kernels import LIBRARY_VARIABLE, cuda_library_path
from asag_deploy.processing.on_host import OnHost
from asag_evaluation.data.doodles import draw_doodles
from asag_export.bundle_export import export_bundle
from support.small_network import small_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FORMATS: tuple[Format, ...] = ("tensorrt-rtx", "tensorrt")
SIZES = ((256, 320), (224, 320))


@pytest.fixture(scope="module", params=FORMATS)
def backend(request: pytest.FixtureRequest) -> Format:
    name: Format = request.param
    missing = BACKENDS[name].problem()
    if missing is not None:
        pytest.skip(str(missing))
    return name


@pytest.fixture(scope="module")
def bundle(shared_bundle: Callable[..., Bundle], backend: Format) -> Bundle:
    """The small network in float32, with engines for this GPU that have passed the gate."""

    def export(path: Path) -> None:
        options = BuildOptions(engine_format=backend)
        result = export_bundle(small_checkpoint(), path, engines=options)
        assert result.engines is not None
        assert result.engines.report.passed

    return shared_bundle(f"gpu-{backend}", export)


@pytest.fixture
def detectors(bundle: Bundle, backend: Format) -> tuple[Detector, Detector]:
    return Detector.load(bundle), Detector.load(bundle, backend=backend)


def test_detections_are_those_of_the_cpu(detectors: tuple[Detector, Detector]) -> None:
    """Also on the calls that replay captured graphs, and among images of other sizes."""
    on_cpu, on_gpu = detectors
    images = [draw_doodles(*size, seed=i) for i, size in enumerate(SIZES)]
    expected = [on_cpu(image) for image in images]
    for _ in range(5):
        for image, one in zip(images, expected, strict=True):
            found = on_gpu(image)
            assert found.trace.exit_level == one.trace.exit_level
            assert found.trace.stop == one.trace.stop
            np.testing.assert_allclose(found.confidence[:10], one.confidence[:10], atol=2e-3)


def test_equal_images_in_a_batch_are_equal(detectors: tuple[Detector, Detector]) -> None:
    _, on_gpu = detectors
    image = draw_doodles(*SIZES[0], seed=3)
    alone, (first, second) = on_gpu(image), on_gpu([image, image])
    np.testing.assert_array_equal(first.xyxy, second.xyxy)
    np.testing.assert_array_equal(first.confidence, second.confidence)
    np.testing.assert_allclose(alone.confidence, first.confidence, atol=2e-3)


def test_memory_does_not_grow(bundle: Bundle, backend: Format) -> None:
    with Detector.load(bundle, backend=backend) as detector:
        network = detector._open_network()
        assert isinstance(network, EngineNetwork)
        for size in SIZES * 3:
            detector(draw_doodles(*size, seed=0))
        before = network.device.allocated
        for size in SIZES * 10:
            detector(draw_doodles(*size, seed=0))
        assert network.device.allocated == before


def test_half_precision_passes_the_gate_or_says_what_stays(tmp_path: Path, backend: Format) -> None:
    options = BuildOptions(engine_format=backend)
    result = export_bundle(small_checkpoint(), tmp_path / "bundle", precision="fp16", engines=options)
    assert result.engines is not None
    assert result.engines.report.passed
    assert all(reason for reason in result.engines.full_precision.values())
    build_engines(result.bundle, options)
    assert callable(open_network(backend, result.bundle).stage("decoder"))


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_arrays_of_other_libraries(bundle: Bundle, backend: Format, library: str) -> None:
    module: Any = pytest.importorskip(library, reason=f"needs {library} with CUDA")
    if library == "torch" and not module.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, 3, 256, 320)).astype(np.float32)
    sizes = np.array([[256, 320]])
    on_gpu = module.from_numpy(images).cuda() if library == "torch" else module.asarray(images)
    with Detector.load(bundle, backend=backend) as detector:
        expected = detector.forward(images, sizes)
        np.testing.assert_array_equal(detector.forward(on_gpu, sizes).logits, expected.logits)
        outputs = detector.forward_on_device(on_gpu, sizes)
        logits = module.from_dlpack(outputs["logits"])
        host = logits.cpu().numpy() if library == "torch" else module.asnumpy(logits)
    np.testing.assert_array_equal(host[:, : expected.logits.shape[1]], expected.logits)


def test_pictures_prepared_on_the_gpu(
    bundle: Bundle, backend: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels and without, from the host and where they lie: the same inputs to the bit."""
    if cuda_library_path() is None:
        pytest.skip(f"needs the compiled kernels: {LIBRARY_VARIABLE} is not set")
    images = [draw_doodles(*size, seed=i) for i, size in enumerate((*SIZES, (500, 333), (90, 200)))]
    with_kernels = open_network(backend, bundle)
    assert isinstance(with_kernels, EngineNetwork)
    assert with_kernels.kernels is not None
    on_gpu = with_kernels.processing(bundle.manifest)
    on_host = OnHost(open_network(None, bundle), bundle.manifest)
    for image in images:
        expected = on_host.prepare([image], "bgr").image.numpy()
        for given in (image, with_kernels.upload(image)):
            prepared = on_gpu.prepare([given], "bgr").image
            np.testing.assert_array_equal(with_kernels.download(prepared), expected)
    monkeypatch.delenv(LIBRARY_VARIABLE)
    with Detector.load(bundle, backend=backend) as plain:
        without = [plain(image) for image in images]
    monkeypatch.undo()
    with Detector.load(bundle, backend=backend) as detector:
        for image, one in zip(images, without, strict=True):
            found = detector(image)
            assert found.trace.exit_level == one.trace.exit_level
            np.testing.assert_allclose(found.confidence[:10], one.confidence[:10], atol=2e-3)
