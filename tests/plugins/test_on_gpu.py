"""The kernels on a GPU: against the same steps on the CPU, which the other tests hold against the references.

Memory and streams through cuda-python alone.  `asag_check_device` does the same without Python, and is what
to run under compute-sanitizer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import kernels
from asag_deploy.errors import BackendError
from asag_deploy.kernels import Buffer, KernelLibrary
from support import naive_operators as naive
from support.naive_operators import STRIDES, NmsSettings, PadSettings

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


class Gpu:
    """Device memory for the arrays of one test, and the stream they are used on."""

    def __init__(self, cudart: ModuleType) -> None:
        self.cudart = cudart
        self.memory: list[int] = []
        self.stream: Any = self._must(cudart.cudaStreamCreate())

    def upload(self, array: NDArray[Any]) -> Buffer:
        """The array on the device."""
        pointer = int(self._must(self.cudart.cudaMalloc(max(array.nbytes, 1))))
        self.memory.append(pointer)
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._must(self.cudart.cudaMemcpy(pointer, array.ctypes.data, array.nbytes, kind))
        return Buffer(pointer=pointer, shape=array.shape, dtype=array.dtype, on_device=True)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """What is on the device once the stream has done all it was given."""
        self._must(self.cudart.cudaStreamSynchronize(self.stream))
        array = np.empty(buffer.shape, buffer.dtype)
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._must(self.cudart.cudaMemcpy(array.ctypes.data, buffer.pointer, array.nbytes, kind))
        return array

    def close(self) -> None:
        for pointer in self.memory:
            self._must(self.cudart.cudaFree(pointer))
        self._must(self.cudart.cudaStreamDestroy(self.stream))

    def _must(self, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        assert int(status) == 0, self.cudart.cudaGetErrorString(status)
        return values[0] if values else None


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    pytest.importorskip("cuda.bindings", reason="needs cuda-python for memory on the GPU")
    made = Gpu(importlib.import_module("cuda.bindings.runtime"))
    yield made
    made.close()


@pytest.fixture
def on_gpu(cuda_library_path: Path) -> KernelLibrary:
    return KernelLibrary(cuda_library_path, "cuda")


@pytest.fixture
def on_host(host_library_path: Path) -> KernelLibrary:
    return KernelLibrary(host_library_path, "host")


Call = Callable[..., None]


def both(
    gpu: Gpu,
    libraries: tuple[KernelLibrary, KernelLibrary],
    call: Call,
    inputs: Sequence[NDArray[Any] | list[NDArray[Any]]],
    outputs: Sequence[NDArray[Any]],
    **options: Any,
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Run an operator on the host and on the GPU; its outputs there and here."""
    on_host, on_gpu = libraries
    here = [array.copy() for array in outputs]
    call(on_host, *inputs, *here, **options)
    given = [[gpu.upload(a) for a in i] if isinstance(i, list) else gpu.upload(i) for i in inputs]
    there = [gpu.upload(array) for array in outputs]
    call(on_gpu, *given, *there, stream=int(gpu.stream), **options)
    return [(gpu.download(buffer), array) for buffer, array in zip(there, here, strict=True)]


def assert_close(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """Sums may be fused otherwise; in half precision the result may then round the other way."""
    rtol, atol = (2**-10, 1e-5) if actual.dtype == np.float16 else (0, 5e-6)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("channels", [5, 64, 256])
def test_roi_align(
    gpu: Gpu, on_host: KernelLibrary, on_gpu: KernelLibrary, channels: int, dtype: type[np.floating[Any]]
) -> None:
    features = [f.astype(dtype) for f in naive.pyramid(0, 203, 317, channels=channels)]
    boxes = naive.roi_boxes(1, 203, 317)
    out = np.full((*boxes.shape[:2], 7, 7, channels), np.nan, dtype=dtype)
    libraries = (on_host, on_gpu)
    pairs = both(gpu, libraries, kernels.multiscale_roi_align, [features, boxes], [out], strides=STRIDES)
    for actual, expected in pairs:
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("channels", "groups"), [(6, 3), (64, 4), (256, 4)])
def test_pyramid_sample(
    gpu: Gpu,
    on_host: KernelLibrary,
    on_gpu: KernelLibrary,
    channels: int,
    groups: int,
    dtype: type[np.floating[Any]],
) -> None:
    features = [f.astype(dtype) for f in naive.pyramid(2, 203, 317, channels=channels)]
    xy, weight = naive.sample_points(3, 203, 317, groups=groups)
    out = np.full((*xy.shape[:4], channels // groups), np.nan, dtype=dtype)
    libraries = (on_host, on_gpu)
    pairs = both(gpu, libraries, kernels.pyramid_sample, [features, xy, weight], [out], strides=STRIDES)
    for actual, expected in pairs:
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("channels", "groups"), [(6, 3), (64, 8), (256, 8)])
def test_deformable_sample(
    gpu: Gpu,
    on_host: KernelLibrary,
    on_gpu: KernelLibrary,
    channels: int,
    groups: int,
    dtype: type[np.floating[Any]],
) -> None:
    features = naive.pyramid(4, 203, 317, channels=channels)
    xy, weight = naive.deformable_points(5, features, queries=100, groups=groups)
    out = np.full((*xy.shape[:2], channels), np.nan, dtype=dtype)
    given = [feature.astype(dtype) for feature in features]
    for actual, expected in both(
        gpu, (on_host, on_gpu), kernels.deformable_sample, [given, xy, weight], [out]
    ):
        assert_close(actual, expected)


@pytest.mark.parametrize("settings", [NmsSettings(), NmsSettings(stride=8, capacity=400, max_candidates=50)])
def test_patch_nms(gpu: Gpu, on_host: KernelLibrary, on_gpu: KernelLibrary, settings: NmsSettings) -> None:
    options = settings._asdict()
    capacity = options.pop("capacity")
    for _, anchors, selected, image_size in naive.nms_inputs(settings):
        outputs: list[NDArray[Any]] = [
            np.full((len(anchors), capacity, 2), -7, np.int64),
            np.full((len(anchors), 4), -7, np.int64),
        ]
        inputs = [anchors, selected, image_size]
        for actual, expected in both(gpu, (on_host, on_gpu), kernels.patch_nms, inputs, outputs, **options):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("settings", [PadSettings(), PadSettings(10, 9, 4), PadSettings(20, 7, 100)])
def test_pad_anchors(gpu: Gpu, on_host: KernelLibrary, on_gpu: KernelLibrary, settings: PadSettings) -> None:
    for _, anchors, keep, image_size, slots in naive.pad_inputs(settings):
        outputs: list[NDArray[Any]] = [
            np.full((len(anchors), slots, 4), np.nan, np.float32),
            np.full(len(anchors), -7, np.int64),
        ]
        inputs = [anchors, keep, image_size]
        for actual, expected in both(
            gpu, (on_host, on_gpu), kernels.pad_anchors, inputs, outputs, **settings._asdict()
        ):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("new_shape", [(400, 568), (100, 142), (95, 135), (190, 270)])
def test_preprocess(
    gpu: Gpu, on_host: KernelLibrary, on_gpu: KernelLibrary, new_shape: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (190, 270, 3), dtype=np.uint8)
    options: dict[str, Any] = {"new_shape": new_shape, "mean": (123.675, 116.28, 103.53)}
    for out in (np.full((416, 576, 3), 77, np.uint8), np.full((3, 416, 576), np.nan, np.float32)):
        for actual, expected in both(gpu, (on_host, on_gpu), kernels.preprocess, [image], [out], **options):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("nms_iou", [None, 0.5])
def test_postprocess(gpu: Gpu, on_host: KernelLibrary, on_gpu: KernelLibrary, nms_iou: float | None) -> None:
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.uniform(0, 1, (2, 300)), 2).astype(np.float32), rng.integers(0, 4, (2, 300))
    corner = rng.uniform(-0.1, 0.9, (2, 300, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 0.4, (2, 300, 2))], axis=-1).astype(np.float32)
    inputs: list[NDArray[Any]] = [scores, labels, boxes, np.array([[480, 640], [900, 33]])]
    outputs: list[NDArray[Any]] = [
        np.full((2, 300, 4), np.nan, np.float32),
        np.full((2, 300), np.nan, np.float32),
        np.full((2, 300), -7, np.int64),
        np.full(2, -7, np.int64),
    ]
    for actual, expected in both(
        gpu, (on_host, on_gpu), kernels.postprocess, inputs, outputs, nms_iou=nms_iou
    ):
        np.testing.assert_array_equal(actual, expected)


def test_kernels_can_be_captured_in_a_graph(gpu: Gpu, on_gpu: KernelLibrary) -> None:
    """No kernel allocates or synchronises, and what was captured computes the same when it is replayed."""
    settings = NmsSettings()
    options = settings._asdict()
    capacity = options.pop("capacity")
    _, anchors, selected, image_size = list(naive.nms_inputs(settings))[6]
    origins, counts = np.zeros((len(anchors), capacity, 2), np.int64), np.zeros((len(anchors), 4), np.int64)
    inputs = [gpu.upload(array) for array in (anchors, selected, image_size)]
    outputs = [gpu.upload(array) for array in (origins, counts)]
    cudart = gpu.cudart
    mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
    gpu._must(cudart.cudaStreamBeginCapture(gpu.stream, mode))
    kernels.patch_nms(on_gpu, *inputs, *outputs, stream=int(gpu.stream), **options)
    graph = gpu._must(cudart.cudaStreamEndCapture(gpu.stream))
    executable = gpu._must(cudart.cudaGraphInstantiate(graph, 0))
    for _ in range(2):
        gpu._must(cudart.cudaGraphLaunch(executable, gpu.stream))
    expected_origins, counts[:, 1] = naive.patch_nms(anchors, selected, image_size, settings)
    for buffer, array in zip(outputs, (expected_origins, counts), strict=True):
        np.testing.assert_array_equal(gpu.download(buffer), array)
    gpu._must(cudart.cudaGraphExecDestroy(executable))
    gpu._must(cudart.cudaGraphDestroy(graph))


def test_decisions_as_nodes_of_a_graph(gpu: Gpu, on_host: KernelLibrary, on_gpu: KernelLibrary) -> None:
    """In a graph that another copy of the CUDA runtime has made: two levels, one after the other."""
    rng, cudart = np.random.default_rng(0), gpu.cudart
    counts = rng.integers(0, 9, (2, 30, 4))
    probed, patches, goes_on = np.ones((30, 2), np.bool_), np.ones(30, np.int64), np.ones(1, np.int32)
    levels, written = [gpu.upload(count) for count in counts], (probed, patches, goes_on)
    on_device = (gpu.upload(probed), gpu.upload(patches), gpu.upload(goes_on))
    graph = gpu._must(cudart.cudaGraphCreate(0))
    before: list[int] = []
    for level in range(2):
        settings = {"level": level, "min_selected": 3, "max_patches": 6}
        place: dict[str, Any] = {"graph": int(graph), "dependencies": before, **settings}
        before = [kernels.add_decide(on_gpu, levels[level], *on_device, **place)]
        kernels.decide(on_host, counts[level], *written, **settings)
    executable = gpu._must(cudart.cudaGraphInstantiate(graph, 0))
    gpu._must(cudart.cudaGraphLaunch(executable, gpu.stream))
    for buffer, array in zip(on_device, written, strict=True):
        np.testing.assert_array_equal(gpu.download(buffer), array)
    gpu._must(cudart.cudaGraphExecDestroy(executable))
    gpu._must(cudart.cudaGraphDestroy(graph))


def test_a_launch_that_fails_says_why(gpu: Gpu, on_gpu: KernelLibrary) -> None:
    boxes = gpu.upload(np.zeros((1, 1, 4), np.float32))
    feature = gpu.upload(np.zeros((1, 4, 4, 8), np.float32))
    nowhere = Buffer(pointer=0, shape=(1, 1, 7, 7, 8), dtype=np.dtype(np.float32), on_device=True)
    with pytest.raises(BackendError, match="out is a null pointer"):
        kernels.multiscale_roi_align(on_gpu, [feature], boxes, nowhere, strides=(4,))
