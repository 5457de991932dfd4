"""ONNX Runtime's CUDA provider as far as it can be seen without a GPU: what is asked of ONNX Runtime.

Sessions run on the CPU, behind a device that is called cuda: every array knows where it lies, and a graph
that is bound to anything on the host fails.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError
from support.detection_samples import assert_same
from support.tiny_bundle import backbone, make_bundle, picture

Session = onnxruntime.InferenceSession
PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Gpu:
    """What was put on the device, read from it, and asked of sessions."""

    def __init__(self) -> None:
        self.options: list[Any] = []
        self.uploads: list[tuple[int, ...]] = []
        self.downloads: list[tuple[int, ...]] = []


class Value:
    """An OrtValue on the device."""

    gpu: Gpu
    of_numpy = staticmethod(onnxruntime.OrtValue.ortvalue_from_numpy)

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @classmethod
    def ortvalue_from_numpy(cls, array: NDArray[Any], device: str) -> Any:
        if device == "cpu":
            return cls.of_numpy(array, device)
        assert device == "cuda"
        cls.gpu.uploads.append(array.shape)
        return cls(cls.of_numpy(array.copy(), "cpu"))

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: list[int], dtype: Any, device: str, number: int) -> Any:
        assert (device, number) == ("cuda", 0)
        return cls(cls.of_numpy(np.zeros(shape, dtype), "cpu"))

    def shape(self) -> list[int]:
        found: list[int] = self.inner.shape()
        return found

    def numpy(self) -> NDArray[Any]:
        array: NDArray[Any] = self.inner.numpy()
        self.gpu.downloads.append(array.shape)
        return array


class Binding:
    """An IOBinding that takes what lies on the device, and leaves its outputs there."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        assert isinstance(value, Value), f"{name} lies on the host"
        self.inner.bind_ortvalue_input(name, value.inner)

    def bind_output(self, name: str, device: str) -> None:
        assert device == "cuda"
        self.inner.bind_output(name, "cpu")

    def get_outputs(self) -> list[Value]:
        return [Value(value) for value in self.inner.get_outputs()]


class CudaSession:
    """A session on the device."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.get_inputs, self.get_outputs = inner.get_inputs, inner.get_outputs
        self.get_overridable_initializers = inner.get_overridable_initializers

    def get_providers(self) -> list[str]:
        return PROVIDERS

    def io_binding(self) -> Binding:
        return Binding(self.inner.io_binding())

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self.inner.run_with_iobinding(binding.inner, options)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(Value, "gpu", made, raising=False)

    def open_session(path: object, options: object, *, providers: list[Any], **_: object) -> object:
        if providers == ["CPUExecutionProvider"]:
            return Session(path, options, providers=providers)
        made.options.append(providers)
        return CudaSession(Session(path, options, providers=["CPUExecutionProvider"]))

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("onnxruntime-cuda") / "bundle")


@pytest.fixture
def network(gpu: Gpu, bundle: Bundle) -> Network:
    return open_network("onnxruntime-cuda", bundle)


def test_detections_are_those_of_the_cpu(gpu: Gpu, bundle: Bundle) -> None:
    images = [picture(5, 2), picture(18, 6, 1, size=(64, 100))]
    with (
        Detector.load(bundle, threads=1) as expected,
        Detector.load(bundle, backend="onnxruntime-cuda") as detector,
    ):
        assert_same(detector(images), expected(images))


def test_features_never_come_to_the_host(gpu: Gpu, bundle: Bundle) -> None:
    """Small arrays alone: what NMS needs, four counts of each image and level, and the decoder's small
    outputs."""
    with Detector.load(bundle, backend="onnxruntime-cuda") as detector:
        found = detector([picture(5, 2), picture(3, 1)], channel_order="rgb")
    levels = max(len(detections.trace.levels) for detections in found)
    assert levels == 3
    of_nms = 4  # anchors, which are selected, image size, counts
    of_results = 5 + 2  # scores, labels, boxes, anchors and their count; origins of two levels
    assert len(gpu.downloads) == 2 * of_nms + levels + of_results
    assert gpu.downloads.count((2, 4)) == 2 + levels
    assert max(int(np.prod(shape)) for shape in gpu.downloads) < 2 * 32 * 5


def test_what_was_uploaded_is_not_copied_again(gpu: Gpu, bundle: Bundle) -> None:
    with Detector.load(bundle, backend="onnxruntime-cuda") as detector:
        first = detector(picture(5, 2), channel_order="rgb")
        gpu.uploads.clear()
        again = detector(picture(5, 2), channel_order="rgb")
        assert gpu.uploads == [(1, 64, 64, 3)]  # the pixels; sizes, slots and counts are there
    assert again.trace.to_dict() == first.trace.to_dict()


def test_arrays_of_equal_bytes_are_told_apart(gpu: Gpu, network: Network) -> None:
    arrays = [
        np.zeros((2, 2), np.int64),
        np.zeros(4, np.int64),
        np.zeros(4),
        np.zeros((0, 5)),
        np.zeros((5, 0)),
    ]
    for array in arrays * 2:
        back = network.download(network.upload(array))
        assert (back.shape, back.dtype) == (array.shape, array.dtype)
    assert len(gpu.uploads) == len(arrays)


def test_an_array_may_be_written_to_once_it_is_uploaded(network: Network) -> None:
    array = np.full(3, 7)
    uploaded = network.upload(array)
    array[:] = 0
    assert network.download(uploaded).tolist() == [7, 7, 7]


def test_few_constants_are_kept(gpu: Gpu, network: Network) -> None:
    for value in range(300):
        network.upload(np.array([value]))
    network.upload(np.array([299]))
    assert len(gpu.uploads) == 300
    network.upload(np.array([0]))
    assert len(gpu.uploads) == 301


def test_many_threads(gpu: Gpu, bundle: Bundle) -> None:
    with Detector.load(bundle, backend="onnxruntime-cuda") as detector:
        expected = [detector(picture(red, red % 3)).trace.to_dict() for red in range(8)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda red: detector(picture(red, red % 3)), list(range(8)) * 3))
    assert [one.trace.to_dict() for one in found] == expected * 3


@pytest.mark.parametrize(("backend", "tf32"), [("onnxruntime-cuda", "0"), ("onnxruntime-cuda-tf32", "1")])
def test_what_the_provider_is_told(gpu: Gpu, bundle: Bundle, backend: str, tf32: str) -> None:
    open_network(backend, bundle)
    assert len(gpu.options) == 5
    for (name, options), fallback in gpu.options:
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        assert options["arena_extend_strategy"] == "kSameAsRequested"
        assert options["cudnn_conv_algo_search"] == "HEURISTIC"
        assert options["use_tf32"] == tf32  # ONNX Runtime's own default is 1
        assert "prefer_nhwc" not in options  # for float16 only
        assert all(isinstance(value, str) for value in options.values())


@pytest.fixture
def half(bundle: Bundle) -> Bundle:
    """A bundle that says it computes in float16, but for its decoder."""
    graphs = bundle.manifest.graphs
    told = tuple(replace(graph, precision="fp32") if graph.name == "decoder" else graph for graph in graphs)
    return replace(bundle, manifest=replace(bundle.manifest, precision="fp16", graphs=told))


def test_float16_is_tried_with_channels_last(gpu: Gpu, half: Bundle) -> None:
    open_network("onnxruntime-cuda", half)
    asked = [options.get("prefer_nhwc") for (_, options), _ in gpu.options]
    assert sorted(asked, key=str) == ["1"] * 4 + [None]


@pytest.mark.parametrize("silently", [False, True])
def test_without_channels_last_where_they_cannot_be(
    gpu: Gpu, half: Bundle, monkeypatch: pytest.MonkeyPatch, silently: bool
) -> None:
    """ONNX Runtime either raises, or falls back to the CPU without a word."""
    on_gpu = onnxruntime.InferenceSession

    def refuse(path: object, options: object, *, providers: list[Any], **_: object) -> object:
        if "prefer_nhwc" not in providers[0][1] or "backbone" not in str(path):
            return on_gpu(path, options, providers=providers)
        if silently:
            return Session(path, options, providers=["CPUExecutionProvider"])
        raise RuntimeError("no kernel for Conv(1) with channels last\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.warns(RuntimeWarning, match="'backbone' runs with channels first.*onnxruntime-cuda") as told:
        network = open_network("onnxruntime-cuda", half)
    assert len(told) == 1
    assert backbone(network, picture(5, 2))


def test_a_float16_graph_that_cannot_be_loaded_at_all(
    gpu: Gpu, half: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, options: object, *, providers: list[Any], **_: object) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(BackendError, match=r"'onnxruntime-cuda' could not load .*out of memory"):
        open_network("onnxruntime-cuda", half)


@pytest.mark.parametrize(
    "reason",
    [
        "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
        "CUDA failure 209: no kernel image is available for execution on the device",
    ],
)
def test_a_driver_or_a_gpu_that_does_not_fit(
    gpu: Gpu, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, reason: str, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(f"cuda_call.cc:154 CudaCall(ERRTYPE) {reason} ; GPU=-1 ; line=160\nmore")

    monkeypatch.setattr(Value, "ortvalue_from_shape_and_type", refuse)
    with pytest.raises(BackendError, match=f"no usable CUDA device .{reason}.; check with `nvidia-smi`"):
        open_network("onnxruntime-cuda", bundle)
    assert gpu.options == []  # no graph was loaded
