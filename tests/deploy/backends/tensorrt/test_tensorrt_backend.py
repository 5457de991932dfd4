"""The TensorRT backends on an imaginary GPU, beyond what every backend does (`test_backends.py`)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.bundle import Bundle, stage_names
from asag_deploy.detector import Detector
from asag_deploy.engines.sidecar import Format
from asag_deploy.errors import BackendError, EngineUnfitError
from asag_deploy.loop.stages import LevelOutputs
from support.simulated_gpu import fake_tensorrt
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import MOST_IMAGES, write_engines
from support.simulated_gpu.fake_kernels import install_kernels
from support.simulated_gpu.fake_tensorrt import view
from support.tiny_bundle import backbone, batch, counts, make_bundle, picture

SIZES = np.array([[64, 64]], dtype=np.int64)
FORMATS: tuple[Format, ...] = ("tensorrt-rtx", "tensorrt")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = make_bundle(tmp_path_factory.mktemp("engines") / "bundle")
    for engine_format in FORMATS:
        write_engines(made, engine_format)
    return made


@pytest.fixture(params=FORMATS)
def backend(request: pytest.FixtureRequest) -> Format:
    name: Format = request.param
    return name


@pytest.fixture
def network(cuda: FakeCuda, bundle: Bundle, backend: Format) -> Iterator[EngineNetwork]:
    made = open_network(backend, bundle)
    assert isinstance(made, EngineNetwork)
    yield made
    made.close()


def test_a_scalar_comes_back_as_it_went(network: EngineNetwork) -> None:
    back = network.download(network.upload(np.array(7)))
    assert (back.dtype.name, back.shape, back.tolist()) == ("int64", (), 7)


def test_an_array_may_be_written_to_once_it_is_uploaded(network: EngineNetwork) -> None:
    arrays = [np.full(size, 7, dtype=np.float32) for size in (3, 50_000)]
    uploaded = [network.upload(array) for array in arrays]
    for array in arrays:
        array[:] = 0
    assert [int(network.download(array).min()) for array in uploaded] == [7, 7]


def test_features_never_leave_the_gpu(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    """Without the kernels the host reads small arrays alone: what NMS needs, counts, detections."""
    with Detector.load(bundle, backend=backend) as detector:
        found = detector([picture(5, 2), picture(3, 1)], channel_order="rgb")
        assert max(len(detections.trace.levels) for detections in found) == 3
        read = [size for direction, size, _ in cuda.copies if direction == "DeviceToHost"]
        of_nms = {"anchors", "selected", "image_size", "counts"}
        of_results = {
            "det_scores",
            "det_labels",
            "det_boxes",
            "anchors",
            "anchor_count",
            "origins P4",
            "origins P3",
        }
        assert len(read) == 2 * len(of_nms) + 3 + len(of_results)
        assert max(read) <= 2 * 32 * 5 * 4  # 32 anchors of two images, five floats each


def test_a_loop_that_repeats_itself_replays_graphs(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    images = [picture(5, 2), picture(3, 0), picture(5, 2)]
    with Detector.load(bundle, backend=backend) as detector:
        first = [detector(image, channel_order="rgb").trace.to_dict() for image in images]
        for _ in range(4):
            for image, expected in zip(images, first, strict=True):
                assert detector(image, channel_order="rgb").trace.to_dict() == expected
        launched, allocated, copied = cuda.launches, cuda.allocations, len(cuda.copies)
        assert detector(images[0], channel_order="rgb").trace.to_dict() == first[0]
        assert cuda.launches - launched == 5  # every stage: normalize, backbone, two probes, decoder
        assert cuda.allocations == allocated
        to_device = [entry for entry in cuda.copies[copied:] if entry[0] == "HostToDevice"]
        assert [size for _, size, _ in to_device] == [64 * 64 * 3]  # the picture; all else is there already


def test_more_sizes_than_contexts(
    cuda: FakeCuda, network: EngineNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asag_deploy.backends.tensorrt.stage.MOST_CONTEXTS", 16)
    for _ in range(2):
        for i in range(20):
            side = 64 + 16 * i
            outputs = backbone(network, picture(i % 20, size=(side, 64)))
            assert network.download(outputs["counts"])[0, 0] == i % 20
    assert cuda.launches == 0  # none was kept long enough to be captured


def test_what_cannot_be_captured_is_run_as_it_is(
    cuda: FakeCuda, network: EngineNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "is_stream_capturable", lambda *_: False)
    assert [counts(network, 3) for _ in range(5)] == [[3, 0, 20, 17]] * 5
    assert cuda.launches == 0


def test_a_capture_that_fails_does_no_harm(
    cuda: FakeCuda, network: EngineNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = cuda.cudaStreamEndCapture

    def fail(stream: int) -> Any:
        _, graph = ended(stream)
        assert graph is not None
        cuda.cudaGraphDestroy(graph)
        return cuda.cudaError_t.cudaErrorStreamCaptureInvalidated, None

    monkeypatch.setattr(cuda, "cudaStreamEndCapture", fail)
    assert [counts(network, 3) for _ in range(5)] == [[3, 0, 20, 17]] * 5
    assert cuda.launches == 0


def test_a_batch_beyond_the_profile(network: EngineNetwork) -> None:
    too_many = MOST_IMAGES + 1
    inputs = {
        "image": network.upload(batch(*[picture(1)] * too_many)),
        "image_size": network.upload(np.repeat(SIZES, too_many, axis=0)),
    }
    with pytest.raises(EngineUnfitError, match=r"takes 'image' of shapes .*got 5x3x64x64; .*--max-batch"):
        network.stage("backbone")(inputs)
    assert counts(network, 7) == [7, 0, 20, 13]


def test_input_of_another_type(network: EngineNetwork) -> None:
    inputs = {
        "image": network.upload(batch(picture(1))),
        "image_size": network.upload(SIZES.astype(np.int32)),
    }
    message = "the graph 'backbone' takes 'image_size' as int64, got int32"
    with pytest.raises(BackendError, match=message):
        network.stage("backbone")(inputs)


def test_shapes_that_the_library_refuses(network: EngineNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asag_deploy.engines.sidecar.Sidecar.check_shapes", lambda *_: None)
    flat = {"image": network.upload(np.zeros((3, 64), np.float32)), "image_size": network.upload(SIZES)}
    with pytest.raises(EngineUnfitError, match=r"graph 'backbone'.*refused 'image'.*no profile holds image"):
        network.stage("backbone")(flat)
    assert counts(network, 7) == [7, 0, 20, 13]


def test_a_run_that_cannot_start(network: EngineNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", lambda *_: False)
    with pytest.raises(BackendError, match=r"failed in the graph 'backbone': it could not be started \(it"):
        counts(network, 1)


def test_memory_that_runs_out_is_one_sentence(cuda: FakeCuda, network: EngineNetwork) -> None:
    assert counts(network, 1) == [1, 0, 20, 19]
    cuda.limit = 0
    with pytest.raises(
        BackendError, match=r"CUDA could not allocate [\d.]+ MiB on the GPU: MemoryAllocation"
    ):
        backbone(network, picture(1, size=(1024, 1024)))
    cuda.limit = None
    assert counts(network, 2) == [2, 0, 20, 18]


def test_everything_is_released(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    with Detector.load(bundle, backend=backend) as detector:
        for _ in range(4):
            detector(picture(5, 2), channel_order="rgb")
        assert cuda.launches
        assert cuda.leaked()
    gc.collect()
    assert cuda.leaked() == {}


def test_arrays_may_outlive_the_network(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    network = open_network(backend, bundle)
    assert isinstance(network, EngineNetwork)
    outputs = backbone(network, picture(3))
    network.close()
    network.close()
    assert set(cuda.leaked()) == {"device"}
    assert len(cuda.device.alive) == len(outputs)
    del outputs
    gc.collect()
    assert cuda.leaked() == {}


def test_an_engine_that_cannot_be_loaded_leaves_nothing(
    cuda: FakeCuda, bundle: Bundle, backend: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", lambda *_: None)
    with pytest.raises(Exception, match=r"could not load '.*normalize\.engine'.*asag-build"):
        open_network(backend, bundle)
    gc.collect()
    assert cuda.leaked() == {}


def test_rtx_keeps_what_it_has_compiled(
    cuda: FakeCuda, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path))
    with Detector.load(bundle, backend="tensorrt-rtx") as detector:
        assert detector(picture(5, 2), channel_order="rgb").trace.exit_level == "P3"
        kept = list((tmp_path / "tensorrt-rtx").iterdir())  # already, for it may never be closed
    gc.collect()
    assert len(kept) == len(bundle.manifest.graphs)
    given: list[bytes] = []
    monkeypatch.setattr(fake_tensorrt.IRuntimeCache, "deserialize", lambda _, blob: given.append(blob))
    open_network("tensorrt-rtx", bundle)
    assert given == [b"compiled"] * len(kept)


class OnGpu:
    """Another library's batch on the GPU."""

    def __init__(self, cuda: FakeCuda, content: NDArray[Any]) -> None:
        self.cuda = cuda
        self.pointer = cuda.device.allocate(content.nbytes)
        view(cuda, self.pointer, content.shape, content.dtype)[...] = content
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": content.shape,
            "typestr": content.dtype.str,
            "data": (self.pointer, False),
        }

    def __del__(self) -> None:
        self.cuda.device.free(self.pointer)


def test_forward_takes_what_lies_on_the_gpu(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    images = batch(picture(5, 2), picture(3))
    sizes = np.repeat(SIZES, 2, axis=0)
    with Detector.load(bundle, backend=backend) as detector:
        expected = detector.forward(images, sizes)
        copied = len(cuda.copies)
        found = detector.forward(OnGpu(cuda, images), sizes)
        to_device = [size for name, size, _ in cuda.copies[copied:] if name == "HostToDevice"]
        assert sum(to_device) == 0  # not the images, and all else was there
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert [t.to_dict() for t in found.trace] == [t.to_dict() for t in expected.trace]


def test_outputs_may_stay_on_the_gpu(cuda: FakeCuda, bundle: Bundle, backend: Format) -> None:
    """The input may go as soon as the call returns, although nothing has waited for the decoder."""
    images = batch(picture(5, 2))
    with Detector.load(bundle, backend=backend) as detector:
        expected = detector.forward(images, SIZES)
        outputs = detector.forward_on_device(OnGpu(cuda, images), SIZES)
        gc.collect()
        logits = detector._open_network().download(outputs["logits"])
        interface = outputs["boxes"].__cuda_array_interface__
    count = int(expected.anchor_count[0])
    np.testing.assert_array_equal(logits[:, :count], expected.logits)
    assert interface["shape"] == outputs["boxes"].shape
    del outputs
    gc.collect()
    assert cuda.leaked() == {}


def test_an_input_outlives_a_call_that_fails(
    cuda: FakeCuda, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU may not even have begun with it when the call has ended."""

    def fail(*_: object) -> Any:
        raise BackendError("the GPU is gone")

    with Detector.load(bundle, backend="tensorrt-rtx") as detector:
        network = detector._open_network()
        assert isinstance(network, EngineNetwork)
        with monkeypatch.context() as patch:
            patch.setattr(EngineNetwork, "download", fail)
            with contextlib.suppress(BackendError):  # pytest.raises would keep the frames, and the input
                detector.forward(OnGpu(cuda, batch(picture(5, 2))), SIZES)
        gc.collect()
        network.device.synchronize()  # in which the backbone runs, and reads it


def test_the_inspector_is_asked_once_engines_are_loaded(network: EngineNetwork) -> None:
    """For engines that were built where there was no GPU."""
    found = network.layers()
    assert list(found) == list(stage_names(("P4", "P3")))
    assert found["backbone"] == {"fp32": 1}


def test_selecting_does_not_write_to_what_is_uploaded_again(
    cuda: FakeCuda, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, host_library_path: Path
) -> None:
    install_kernels(monkeypatch, cuda, host_library_path)
    network = open_network("tensorrt-rtx", bundle)
    probing = bundle.manifest.probing
    anchors = np.array([[[16, 16, 9, 9, 0.5], [48, 48, 9, 9, 0.4]]], dtype=np.float32)
    given = LevelOutputs(anchors, np.ones((1, 2), np.bool_), np.array([[2, 0, 3, 1]]))
    for _ in range(2):
        uploaded = LevelOutputs(*(network.upload(array) for array in given))
        _, found = network.select(probing, probing.levels[0], uploaded, network.upload(SIZES))
        counts = network.download(found)
        assert counts[0, 1] > 0
        np.testing.assert_array_equal(np.delete(counts, 1, axis=1), [[2, 3, 1]])
        np.testing.assert_array_equal(network.download(network.upload(given.counts)), given.counts)
    network.close()
