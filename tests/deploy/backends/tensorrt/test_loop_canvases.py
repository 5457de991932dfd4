"""Pictures on canvases: the loop on the device runs the engines of one shape, on an imaginary GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.backends.tensorrt.loop_graph import LoopGraph
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.engines.sidecar import Format
from asag_deploy.loop.loop import HostLoop
from asag_deploy.processing.canvases import default_canvases
from asag_deploy.processing.preprocess import padded_shape
from support.detection_samples import assert_same
from support.simulated_gpu import fake_tensorrt
from support.simulated_gpu.device_loops import LONG, LYING, ON_CANVAS, STANDING, graphs_of
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels
from support.tiny_bundle import make_bundle, picture

STAGES = ["backbone", "probe_p4", "probe_p3", "decoder"]


@pytest.fixture
def bundle(canvas_bundle: Bundle) -> Bundle:
    return canvas_bundle


@pytest.fixture
def loaded(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Notes every engine that the library is given."""
    original = fake_tensorrt.Runtime.deserialize_cuda_engine
    seen: list[object] = []

    def note(runtime: fake_tensorrt.Runtime, engine: bytes) -> Any:
        seen.append(len(engine))
        return original(runtime, engine)

    monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", note)
    return seen


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def both(
    kernels: FakeKernels, bundle: Bundle, request: pytest.FixtureRequest
) -> Iterator[tuple[Detector, Detector]]:
    """The two loops over one kind of engines."""
    backend: Format = request.param
    with (
        Detector.load(bundle, backend=backend, loop="host") as host,
        Detector.load(bundle, backend=backend, loop="device") as device,
    ):
        yield host, device


def contexts(graph: LoopGraph) -> dict[str, fake_tensorrt.IExecutionContext]:
    return {name: call.context._context for name, call in graph._calls.items()}


def shape_of(detector: Detector, *images: NDArray[np.uint8]) -> tuple[int, ...]:
    """Of the batch that these images become."""
    network = detector._open_network()
    return network.shape(network.processing(detector.manifest).prepare(images, "rgb").image)


def test_a_picture_is_padded_to_its_canvas_whichever_loop_runs(both: tuple[Detector, Detector]) -> None:
    for detector in both:
        assert list(detector._open_network().canvases) == [LYING, STANDING]
        shapes = [shape_of(detector, image)[2:] for image in ON_CANVAS]
        assert shapes == [(64, 96), (64, 96), (64, 96), (96, 64)]
        assert shape_of(detector, LONG) == (1, 3, 64, 128)
        assert shape_of(detector, *ON_CANVAS[:2]) == (2, 3, 64, 96)
        assert shape_of(detector, ON_CANVAS[0], LONG) == (2, 3, 64, 128)


def test_the_engines_of_the_canvas_run(cuda: FakeCuda, both: tuple[Detector, Detector]) -> None:
    host, device = both
    for image in ON_CANVAS * 2:
        assert_same(host([image], channel_order="rgb"), device([image], channel_order="rgb"))
    graphs = graphs_of(device)
    assert list(graphs) == [(1, 3, 64, 96), (1, 3, 96, 64)]
    assert all(graph.fixed for graph in graphs.values())
    device._open_network().device.synchronize()  # type: ignore[attr-defined]
    for graph, pictures, to_p4, to_p3 in zip(graphs.values(), (6, 2), (4, 2), (2, 2), strict=True):
        runs = {name: context.runs for name, context in contexts(graph).items()}
        assert runs == dict(zip(STAGES, (1 + pictures, 1 + to_p4, 1 + to_p3, 1 + pictures), strict=True))
        shapes = {node.name: node.shape for node in contexts(graph)["probe_p4"]._engine.session.get_inputs()}
        assert shapes["slots"] == [18]  # nothing is dynamic
    every_shape = device._open_network()._stages  # type: ignore[attr-defined]
    assert not any(every_shape[name]._contexts for name in STAGES)


def test_what_no_canvas_holds_goes_by_the_engines_that_take_every_shape(
    both: tuple[Detector, Detector],
) -> None:
    host, device = both
    assert_same(host([LONG], channel_order="rgb"), device([LONG], channel_order="rgb"))
    assert [(shape, graph.fixed) for shape, graph in graphs_of(device).items()] == [((1, 3, 64, 128), False)]


def test_a_batch_is_padded_to_the_canvas_but_goes_by_the_engines_that_take_every_shape(
    both: tuple[Detector, Detector],
) -> None:
    host, device = both
    images = ON_CANVAS[:2]
    assert_same(host(images, channel_order="rgb"), device(images, channel_order="rgb"))
    assert [(shape, graph.fixed) for shape, graph in graphs_of(device).items()] == [((2, 3, 64, 96), False)]


def test_a_canvas_is_what_the_engines_of_every_shape_find_on_it(
    both: tuple[Detector, Detector], kernels: FakeKernels, tmp_path: Path
) -> None:
    """A picture that fills its canvas is detected alike without canvases."""
    plain = make_bundle(tmp_path / "plain")
    write_engines(plain)
    with Detector.load(plain, backend="tensorrt-rtx", loop="host") as without:
        assert list(without._open_network().canvases) == []
        for image in (ON_CANVAS[2], picture(4, 3, size=(96, 64))):
            assert_same(without([image], channel_order="rgb"), both[1]([image], channel_order="rgb"))


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_several_images_of_which_one_does_not_fit(both: tuple[Detector, Detector], batch_size: int) -> None:
    """Six images are more than the engines take at once, too."""
    host, device = both
    images = [ON_CANVAS[1], LONG, *ON_CANVAS[1:3], LONG[:, ::-1], *ON_CANVAS[2:]]
    together = device(images[:2], channel_order="rgb")
    assert_same(host(images[:2], channel_order="rgb"), together)
    found = list(device.stream(iter(images), batch_size=batch_size, channel_order="rgb"))
    assert_same([host(image, channel_order="rgb") for image in images], found)


def test_more_images_of_one_size_than_the_engines_take(both: tuple[Detector, Detector]) -> None:
    host, device = both
    images = [picture(i, i // 2) for i in range(7)]
    found = list(device.stream(iter(images), batch_size=7, channel_order="rgb"))
    assert_same([host(image, channel_order="rgb") for image in images], found)


def test_each_canvas_of_a_data_set_is_captured_once(
    cuda: FakeCuda, kernels: FakeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's pictures have some 36 padded shapes; here are 37."""
    bundle = make_bundle(tmp_path / "bundle", longer_side=640)
    canvases = default_canvases(bundle.manifest.preprocessing)
    sizes = [(64, side) for side in range(64, 641, 32)] + [(side, 64) for side in range(96, 641, 32)]
    pictures = [picture(i % 20, i % 7, size=size) for i, size in enumerate(sizes)]
    spec = bundle.manifest.preprocessing
    assert len({padded_shape(np.array([size]), spec) for size in sizes}) == 37
    made: list[int] = []
    original = cuda.cudaGraphInstantiate

    def instantiate(graph: int, flags: int) -> Any:
        made.append(graph)
        return original(graph, flags)

    monkeypatch.setattr(cuda, "cudaGraphInstantiate", instantiate)
    captures = []
    for of_bundle in ((), canvases):
        write_engines(bundle, canvases=of_bundle)
        with Detector.load(bundle, backend="tensorrt-rtx", loop="device") as detector:
            made.clear()
            for image in (*pictures, *reversed(pictures)):
                assert detector(image, channel_order="rgb").trace.levels
            captures.append(len(made))
            assert len(graphs_of(detector)) == len(made)
    assert len(canvases) == 5
    assert captures == [37, 5]


def test_kernels_are_compiled_for_the_shape(kernels: FakeKernels, bundle: Bundle) -> None:
    with Detector.load(bundle, backend="tensorrt-rtx", loop="device") as device:
        device([ON_CANVAS[1]])
        device([LONG])
        compiled = [
            {
                name: context.config.dynamic_shapes_kernel_specialization_strategy.name
                for name, context in contexts(graph).items()
                if context.config is not None
            }
            for graph in graphs_of(device).values()
        ]
    assert compiled == [
        dict.fromkeys(STAGES, "EAGER"),
        {"backbone": "EAGER", "probe_p4": "NONE", "probe_p3": "NONE", "decoder": "NONE"},
    ]


@pytest.mark.parametrize(("loop", "count"), [("host", 5), ("device", 13), ("auto", 13)])
def test_they_are_loaded_for_the_loop_on_the_device_alone(
    kernels: FakeKernels, bundle: Bundle, loaded: list[object], loop: Any, count: int
) -> None:
    with Detector.load(bundle, backend="tensorrt-rtx", loop=loop) as detector:
        assert len(loaded) == count
        detector([ON_CANVAS[1]])
        assert len(loaded) == count


def test_without_kernels_pictures_are_padded_alike(
    cuda: FakeCuda, bundle: Bundle, loaded: list[object]
) -> None:
    with Detector.load(bundle, backend="tensorrt-rtx") as detector, Detector.load(bundle) as on_cpu:
        assert len(loaded) == 5
        assert isinstance(detector._loop, HostLoop)
        assert [shape_of(detector, image)[2:] for image in ON_CANVAS[::3]] == [(64, 96), (96, 64)]
        assert list(on_cpu._open_network().canvases) == []
        assert shape_of(on_cpu, ON_CANVAS[0]) == (1, 3, 64, 64)
        full = ON_CANVAS[2]
        assert_same(on_cpu([full], channel_order="rgb"), detector([full], channel_order="rgb"))


def test_everything_is_released(cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle) -> None:
    detector = Detector.load(bundle, backend="tensorrt-rtx", loop="device")
    for image in (*ON_CANVAS, LONG):
        detector([image])
    detector.close()
    del detector
    gc.collect()
    assert cuda.leaked() == {}
