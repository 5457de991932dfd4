"""Pre- and post-processing with the kernels, on an imaginary GPU: the same detections, and bytes travel."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.cuda import Device, open_cuda
from asag_deploy.cuda.memory import PinnedSlot
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError, ConfigError, ImageError
from asag_deploy.images.reading import ChannelOrder
from asag_deploy.kernels import LIBRARY_VARIABLE
from asag_deploy.processing import on_gpu as processing_gpu
from asag_deploy.processing import preprocess
from asag_deploy.processing.canvases import Canvas
from support.detection_samples import assert_same
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels, ReadyLibrary
from support.tiny_bundle import make_bundle, picture

ORDERS: tuple[ChannelOrder, ...] = ("rgb", "bgr")


@pytest.fixture(scope="module", params=[None, 0.5], ids=["no NMS", "NMS"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = make_bundle(tmp_path_factory.mktemp("processing") / "bundle", nms_iou=request.param)
    write_engines(made)
    return made


@pytest.fixture
def detector(kernels: FakeKernels, bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(bundle, backend="tensorrt-rtx", loop="host") as made:
        yield made


class GpuImage:
    """An image in the memory of the imaginary GPU, as PyCUDA would have it."""

    def __init__(self, cuda: FakeCuda, pixels: NDArray[Any], strides: tuple[int, ...] | None = None) -> None:
        self.pointer = cuda.device.allocate(max(pixels.nbytes, 1))
        ctypes.memmove(self.pointer, np.ascontiguousarray(pixels).ctypes.data, pixels.nbytes)
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": pixels.shape,
            "typestr": pixels.dtype.str,
            "data": (self.pointer, False),
            "strides": strides,
        }


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same(found: Detections, expected: Detections) -> None:
    assert_same(found, expected)
    assert list(found.times_ms) == list(expected.times_ms)


def images() -> list[NDArray[Any]]:
    """Larger and smaller than the network's 64 pixels, and every kind that a detector takes."""
    return [
        picture(5, 2),
        picture(18, 6, 1, size=(100, 130)),
        picture(7, 3, size=(20, 33)),
        np.full((50, 80), 6, dtype=np.uint8),
        np.full((64, 70, 4), (4, 2, 3, 255), dtype=np.uint8),
        np.full((64, 64, 3), 5 * 257, dtype=np.uint16),
        picture(9, 4, size=(80, 200))[:, ::2],
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_detections_are_those_of_the_cpu(
    kernels: FakeKernels, detector: Detector, bundle: Bundle, order: ChannelOrder
) -> None:
    with Detector.load(bundle, threads=1) as on_host:
        for image in images():
            same(detector(image, channel_order=order), on_host(image, channel_order=order))
        for found, expected in zip(
            detector(images()[:3], channel_order=order),
            on_host(images()[:3], channel_order=order),
            strict=True,
        ):
            same(found, expected)
    calls = len(images()) + 1
    assert kernels.calls.count("postprocess") == calls
    assert kernels.calls.count("preprocess") == len(images()) + 3
    assert sum(len(found.xyxy) for found in detector(images()[:3], channel_order=order)) > 0


def test_more_detections_than_the_kernel_takes_are_finished_on_the_host(
    kernels: FakeKernels, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = detector(images()[:3], channel_order="rgb")
    assert sum(map(len, expected)) > 0
    calls = kernels.calls.count("postprocess")
    monkeypatch.setattr(processing_gpu, "MOST_DETECTIONS", 9)  # the network gives 10
    for found, one in zip(detector(images()[:3], channel_order="rgb"), expected, strict=True):
        same(found, one)
    assert kernels.calls.count("postprocess") == calls


SMALL = Preprocessing(shorter_side=48, longer_side=100)


@pytest.mark.parametrize("order", ORDERS)
def test_the_input_is_that_of_the_cpu(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, order: ChannelOrder
) -> None:
    """To the bit, on noise: a batch of images that shrink, grow and stay."""
    given = [noise(90, 120, 3), noise(33, 70, 3, seed=1), noise(48, 64, 3, seed=2)]
    rgb = [np.ascontiguousarray(image[..., ::-1]) if order == "bgr" else image for image in given]
    np.testing.assert_array_equal(prepared(cuda, kernels, bundle, given, order), normalized(rgb))
    on_gpu = [GpuImage(cuda, image) for image in given]
    np.testing.assert_array_equal(prepared(cuda, kernels, bundle, on_gpu, order), normalized(rgb))


@pytest.mark.parametrize("count", [1, 3])
def test_canvases_are_those_of_the_cpu(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, count: int
) -> None:
    canvases = (Canvas(64, 96), Canvas(96, 64))
    given = [noise(90, 120, 3), noise(33, 50, 3, seed=1), noise(48, 64, 3, seed=2)][:count]
    found = prepared(cuda, kernels, bundle, given, "rgb", canvases)
    assert found.shape == (count, 3, 64, 96)
    np.testing.assert_array_equal(found, normalized(given, canvases))
    tall = [noise(100, 20, 3)]
    found = prepared(cuda, kernels, bundle, tall, "rgb", canvases)
    assert found.shape == (1, 3, 128, 32)
    np.testing.assert_array_equal(found, normalized(tall, canvases))


def test_images_that_grow_one_way_and_shrink_the_other(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule for resizing never asks for that, but the kernel would not do it as OpenCV does."""
    for module in (preprocess, processing_gpu):
        monkeypatch.setattr(module, "resized_shape", lambda height, width, spec: (50, 40))
    for image in (noise(30, 60, 3), noise(70, 20, 3)):
        expected = normalized([image])
        for given in (image, GpuImage(cuda, image)):
            np.testing.assert_array_equal(prepared(cuda, kernels, bundle, [given], "rgb"), expected)


def prepared(
    cuda: FakeCuda,
    kernels: FakeKernels,
    bundle: Bundle,
    given: list[Any],
    order: ChannelOrder,
    canvases: Sequence[Canvas] = (),
) -> NDArray[Any]:
    """What `OnGpu` makes of images, on the host."""
    device = Device(open_cuda())
    manifest = dataclasses.replace(bundle.manifest, preprocessing=SMALL)
    processing = processing_gpu.OnGpu(device, kernels, manifest, canvases)
    return device.download(processing.prepare(given, order).image)


def normalized(images: list[NDArray[np.uint8]], canvases: Sequence[Canvas] = ()) -> NDArray[np.float32]:
    """What the CPU makes of RGB images: `make_batch`, and the arithmetic of the stage `normalize`."""
    pixels, sizes = preprocess.make_batch(images, SMALL, canvases)
    mean, deviation = np.array(SMALL.mean, np.float32), np.array(SMALL.std, np.float32)
    batch = (pixels.astype(np.float32) - mean) / deviation
    for slot, (height, width) in zip(batch, sizes.tolist(), strict=True):
        slot[height:], slot[:, width:] = 0, 0
    return batch.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_images_on_the_gpu_stay_there(
    cuda: FakeCuda, detector: Detector, bundle: Bundle, order: ChannelOrder
) -> None:
    given = [picture(5, 2, size=(90, 130)), picture(18, 6, 1, size=(40, 70))]
    with Detector.load(bundle, threads=1) as on_host:
        expected = on_host(given, channel_order=order)
    on_gpu = [GpuImage(cuda, image) for image in given]
    for found, one in zip(detector(on_gpu, channel_order=order), expected, strict=True):
        same(found, one)
    sizes = [size for direction, size, _ in cuda.copies if direction != "DeviceToDevice"]
    assert max(sizes) < min(image.nbytes for image in given) / 2
    mixed = detector([on_gpu[0], given[1]], channel_order=order)
    for found, one in zip(mixed, expected, strict=True):
        same(found, one)


def test_what_travels(cuda: FakeCuda, kernels: FakeKernels, detector: Detector) -> None:
    """There: the bytes of the image as given.  Back: four counts a level, then detections with one wait."""
    image = picture(5, 2, size=(90, 130))
    detector(image, channel_order="rgb")
    cuda.copies.clear()
    levels = len(detector(image, channel_order="rgb").trace.levels)
    assert levels == 3
    there = [size for direction, size, _ in cuda.copies if direction == "HostToDevice"]
    back = [size for direction, size, _ in cuda.copies if direction == "DeviceToHost"]
    assert there == [image.nbytes]
    assert back[:levels] == [4 * 8] * levels
    detections = 10 * (8 + 16 + 4) + 8  # class, box and confidence of each, and how many
    assert back[levels] == detections
    assert len(back) == levels + 3 + 2  # also anchors and their count, and the origins of two levels
    assert kernels.calls.count("patch_nms") == 2 * 2, "patches are found where the anchors are"


def test_a_loop_that_repeats_itself_replays_graphs(cuda: FakeCuda, detector: Detector) -> None:
    image = picture(5, 2, size=(90, 130))
    for _ in range(4):
        first = detector(image, channel_order="rgb")
    launched, allocated = cuda.launches, cuda.allocations
    same(detector(image, channel_order="rgb"), first)
    assert cuda.launches - launched == 4  # backbone, two probes, decoder: the kernel normalises
    assert cuda.allocations == allocated


def test_many_threads(detector: Detector) -> None:
    given = [picture(red, red % 4, size=(64 + red, 80)) for red in range(12)]
    expected = [detector(image, channel_order="rgb") for image in given]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda image: detector(image, channel_order="rgb"), given * 3))
    for one, other in zip(found, expected * 3, strict=True):
        same(one, other)


def test_images_are_copied_into_pinned_memory_at_once(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads meet while they copy, which they could not if either held the device's lock."""
    given = [picture(5, 2, size=(90, 130)), picture(18, 6, size=(90, 130))]
    expected = [detector(image, channel_order="rgb") for image in given]
    meeting = Barrier(2)
    view = PinnedSlot.view

    def meet(slot: PinnedSlot, shape: tuple[int, ...], *rest: Any) -> NDArray[Any]:
        if shape == given[0].shape:
            meeting.wait(20)
        return view(slot, shape, *rest)

    monkeypatch.setattr(PinnedSlot, "view", meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda image: detector(image, channel_order="rgb"), given))
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_nothing_is_left(cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle) -> None:
    with Detector.load(bundle, backend="tensorrt-rtx", loop="host") as detector:
        detector([picture(5, 2), picture(3, size=(90, 70))])
    gc.collect()
    assert cuda.leaked() == {}


@pytest.mark.parametrize(
    ("pixels", "strides", "message"),
    [
        (
            noise(64, 64),
            None,
            r"expected a uint8 image \(H, W, 3\) on the GPU, got uint8 \(64, 64\); convert",
        ),
        (noise(64, 64, 4), None, r"got uint8 \(64, 64, 4\)"),
        (noise(0, 64, 3), None, r"got uint8 \(0, 64, 3\)"),
        (np.zeros((8, 8, 3), np.float32), None, r"got float32 \(8, 8, 3\)"),
        (noise(64, 64, 3), (256, 3, 1), r"of shape \(64, 64, 3\) is not contiguous; pass a contiguous copy"),
    ],
)
def test_gpu_images_that_are_none(
    cuda: FakeCuda,
    detector: Detector,
    pixels: NDArray[Any],
    strides: tuple[int, ...] | None,
    message: str,
) -> None:
    with pytest.raises(ImageError, match=message):
        detector(GpuImage(cuda, pixels, strides))


def test_what_else_is_refused(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown channel_order 'gbr'"):
        detector(picture(5), channel_order="gbr")  # type: ignore[call-overload]
    with pytest.raises(ImageError, match="does not exist"):
        detector(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="expected an image with 1, 3 or 4 channels"):
        detector(noise(64, 64, 5))
    assert detector([]) == []


def test_gpu_images_without_the_kernels(cuda: FakeCuda, bundle: Bundle) -> None:
    image = GpuImage(cuda, picture(5, 2))
    with (
        Detector.load(bundle, backend="tensorrt-rtx", loop="host") as detector,
        pytest.raises(
            ImageError, match=r"takes the compiled kernels; build them as plugins/README\.md says and"
        ),
    ):
        detector(image)
    with (
        Detector.load(bundle, threads=1) as detector,
        pytest.raises(ImageError, match="lies on a GPU, but this backend takes arrays on the host"),
    ):
        detector(image)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            209,
            "were not compiled for this GPU, sm86; build them again with -DCMAKE_CUDA_ARCHITECTURES=86, as",
        ),
        (98, "were not compiled for this GPU, sm86"),
        (35, "cannot run on this GPU, sm86: the driver is too old; install a newer driver, or build them"),
    ],
)
def test_kernels_that_do_not_fit_the_gpu(
    cuda: FakeCuda,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    message: str,
) -> None:
    """Found before any engine is loaded."""
    path = tmp_path / "libasag_kernels.so"
    path.touch()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: ReadyLibrary(status))
    with pytest.raises(BackendError, match=message) as refusal:
        Detector.load(bundle, backend="tensorrt-rtx")
    assert str(path) in str(refusal.value)
    assert cuda.allocations == 0
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: ReadyLibrary(0))
    with Detector.load(bundle, backend="tensorrt-rtx"):
        assert cuda.streams


def test_kernels_that_are_not_there(
    cuda: FakeCuda, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match="which is no file"):
        Detector.load(bundle, backend="tensorrt-rtx")
    assert cuda.allocations == 0
