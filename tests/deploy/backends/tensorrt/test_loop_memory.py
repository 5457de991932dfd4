"""No room on an imaginary GPU: engines of canvases give way, and one image without room loses no others."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from asag_deploy.backends import open_network
from asag_deploy.backends.tensorrt.loop_graph import LoopGraph
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.command_line import ALL_FINE, SOME_FAILED
from asag_deploy.detect import cli
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.errors import CaptureError, EngineStaleError, GpuMemoryError
from asag_deploy.pipeline import detect_all
from support.detection_samples import assert_same
from support.simulated_gpu import fake_tensorrt
from support.simulated_gpu.device_loops import LONG, LYING, ON_CANVAS, STANDING, graphs_of
from support.simulated_gpu.fake_cuda import CudaError, FakeCuda
from support.simulated_gpu.fake_kernels import FakeKernels
from support.tiny_bundle import picture


@pytest.fixture
def bundle(canvas_bundle: Bundle) -> Bundle:
    return canvas_bundle


def test_an_image_without_room_on_the_gpu_loses_no_others(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    sizes = {"a": (64, 80), "b": (2500, 4000), "c": (64, 96), "d": (64, 100)}
    for name, size in sizes.items():
        Image.fromarray(picture(5, 2, size=size)).save(folder / f"{name}.png")
    written = tmp_path / "found.json"
    arguments = [str(bundle.path), str(folder), "--backend", "tensorrt-rtx", "--json", str(written)]
    assert cli.main([*arguments, "--quiet"]) == ALL_FINE
    assert len(json.loads(written.read_text())) == 4
    cuda.limit = 20 << 20
    for batch in ("1", "4"):
        capsys.readouterr()
        assert cli.main([*arguments, "--quiet", "--batch", batch, "--threshold", "0"]) == SOME_FAILED
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"asag-detect: skipped: '{folder / 'b.png'}': CUDA could not allocate 30.0 MiB"
        )
        assert line.endswith("; end other programs on the GPU, or use smaller batches or images")
        names = [Path(entry["source"]).stem for entry in json.loads(written.read_text())]
        assert names == ["a", "c", "d"]


@pytest.mark.parametrize("fitting", [0, 1])
@pytest.mark.parametrize("loop", ["auto", "device"])
def test_no_room_for_all_canvases(
    cuda: FakeCuda,
    kernels: FakeKernels,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    loop: Any,
    fitting: int,
) -> None:
    """Those that there is room for are used, and of the others nothing stays on the GPU."""
    monkeypatch.setattr(fake_tensorrt, "WORKING_MEMORY", 1 << 24)
    with Detector.load(bundle, backend="tensorrt-rtx", loop="host") as host:
        expected = [host([image], channel_order="rgb") for image in ON_CANVAS]
    del host
    gc.collect()
    assert cuda.leaked() == {}
    cuda.limit = (5 + 4 * fitting + 3) * (1 << 24) + (1 << 20)
    left = ", ".join(map(str, [LYING, STANDING][fitting:]))
    sentence = (
        rf"^pictures on the canvas {left} go through the engines that take every shape: there is no room"
    )
    with pytest.warns(RuntimeWarning, match=sentence) as warned:
        detector = Detector.load(bundle, backend="tensorrt-rtx", loop=loop)
    assert len(warned) == 1
    engines = [size for _, size in cuda.device.alive.values() if size > 1 << 24]
    assert len(engines) == 5 + 4 * fitting
    cuda.limit = None
    for image, before in zip(ON_CANVAS, expected, strict=True):
        assert_same(before, detector([image], channel_order="rgb"))
    device_loop = detector._open_network().open_device_loop()
    fixed = [graph.fixed for graph in device_loop._graphs.values()]  # type: ignore[attr-defined]
    assert fixed == [fitting > 0, False]
    detector.close()
    del detector, device_loop
    gc.collect()
    assert cuda.leaked() == {}


def test_an_engine_of_a_canvas_that_the_library_refuses(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = fake_tensorrt.Runtime.deserialize_cuda_engine, []

    def refuse_some(runtime: fake_tensorrt.Runtime, engine: bytes) -> Any:
        seen.append(engine)
        return None if len(seen) == 11 else original(runtime, engine)

    monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", refuse_some)
    with pytest.raises(EngineStaleError) as error:
        Detector.load(bundle, backend="tensorrt-rtx")
    sentence = str(error.value)
    assert "could not load '" in sentence
    assert "96x64/probe_p4.engine'" in sentence
    assert f"`asag-build '{bundle.path}' --format tensorrt-rtx --gpu sm86 --canvas 96x64`" in sentence
    del error
    gc.collect()
    assert cuda.leaked() == {}


def test_no_room_for_the_engines_that_take_every_shape(cuda: FakeCuda, bundle: Bundle) -> None:
    """To build them again, which is what is said of engines that are refused, would not help."""
    cuda.limit = 0
    with pytest.raises(
        GpuMemoryError, match=r"^there is no room on the GPU for '.*normalize\.engine' \(.*out of"
    ):
        open_network("tensorrt-rtx", bundle)
    gc.collect()
    assert cuda.leaked() == {}


def test_canvases_make_room_for_a_graph(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt, "WORKING_MEMORY", 1 << 20)
    with Detector.load(bundle, backend="tensorrt-rtx", loop="host") as host:
        expected = [host([image], channel_order="rgb") for image in (*ON_CANVAS, LONG)]
    detector = Detector.load(bundle, backend="tensorrt-rtx", loop="device")
    assert_same(expected[0], detector([ON_CANVAS[0]], channel_order="rgb"))
    assert [graph.fixed for graph in graphs_of(detector).values()] == [True]
    original = LoopGraph._plan

    def no_room(graph: LoopGraph, *arguments: Any) -> None:
        if cuda.limit is None:
            cuda.limit = sum(size for _, size in cuda.device.alive.values())
        original(graph, *arguments)

    monkeypatch.setattr(LoopGraph, "_plan", no_room)
    sentence = r"^pictures on the canvas 64x96, 96x64 go through the engines .*: CUDA could not allocate"
    with pytest.warns(RuntimeWarning, match=sentence) as warned:
        assert_same(expected[4], detector([LONG], channel_order="rgb"))
    assert len(warned) == 1
    assert len([size for _, size in cuda.device.alive.values() if size > 1 << 20]) == 5
    for image, before in zip(ON_CANVAS, expected[:4], strict=True):
        assert_same(before, detector([image], channel_order="rgb"))
    assert not any(graph.fixed for graph in graphs_of(detector).values())
    host.close()
    detector.close()
    del host, detector
    gc.collect()
    assert cuda.leaked() == {}


@pytest.mark.parametrize(
    "message",
    [
        "Error Code 2: OutOfMemory (no further information)",
        "Error Code 1: Cuda Runtime (out of memory)",
        "Requested amount of GPU memory (1 bytes) could not be allocated.",
    ],
)
def test_canvases_whose_contexts_have_no_room(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """The library says so in words alone, of which these are."""
    original = fake_tensorrt.ICudaEngine.create_execution_context

    def no_room(engine: fake_tensorrt.ICudaEngine, strategy: Any) -> Any:
        if engine.session.get_inputs()[0].shape[0] == 1:  # of one shape
            engine.runtime.logger.log(fake_tensorrt.ILogger.Severity.ERROR, message)
            return None
        return original(engine, strategy)

    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "create_execution_context", no_room)
    with (
        Detector.load(bundle, backend="tensorrt-rtx", loop="host") as host,
        Detector.load(bundle, backend="tensorrt-rtx") as detector,
    ):
        sentence = r"^pictures on the canvas .*'backbone': it could not create an execution context \(\w"
        with pytest.warns(RuntimeWarning, match=sentence) as warned:
            found = [detector([image], channel_order="rgb") for image in ON_CANVAS]
        assert len(warned) == 1
        for image, one in zip(ON_CANVAS, found, strict=True):
            assert_same(host([image], channel_order="rgb"), one)
            assert "loop" in one[0].times_ms


def test_an_image_without_room_for_its_graph_loses_no_others(
    cuda: FakeCuda, kernels: FakeKernels, device: Detector, host: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the loop has to be the device's."""
    pictures = [ON_CANVAS[0], LONG, ON_CANVAS[2]]
    original = LoopGraph._plan

    def no_room(graph: LoopGraph, workspace: Any, image: Any) -> None:
        if image.shape[3] > 96:
            raise GpuMemoryError("CUDA could not allocate 30.0 MiB; use smaller images")
        original(graph, workspace, image)

    monkeypatch.setattr(LoopGraph, "_plan", no_room)
    with pytest.warns(RuntimeWarning, match="^pictures on the canvas"):
        found = [result for _, result in detect_all(device, pictures, image_of=lambda image: image)]
    assert [type(result).__name__ for result in found] == ["Detections", "_NoRoomError", "Detections"]
    assert issubclass(type(found[1]), CaptureError)
    for image, one in ((pictures[0], found[0]), (pictures[2], found[2])):
        assert isinstance(one, Detections)
        assert_same(host([image], channel_order="rgb"), [one])


@pytest.mark.parametrize("loop", ["auto", "device"])
def test_no_room_for_any_graph(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, loop: Any
) -> None:
    """`auto` goes on with the host's loop, on the same canvases."""
    with Detector.load(bundle, backend="tensorrt-rtx", loop="host") as host:
        expected = [host([image], channel_order="rgb") for image in ON_CANVAS]
    full = (CudaError.cudaErrorMemoryAllocation, None)
    with Detector.load(bundle, backend="tensorrt-rtx", loop=loop) as detector:
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "cudaGraphInstantiate", lambda graph, flags: full)
            if loop == "device":
                with (
                    pytest.warns(RuntimeWarning, match="^pictures on the canvas"),
                    pytest.raises(CaptureError, match=r"could not be captured .*CUDA could not instantiate"),
                ):
                    detector([ON_CANVAS[0]], channel_order="rgb")
                return
            with pytest.warns(RuntimeWarning) as warned:
                assert_same(expected[0], detector([ON_CANVAS[0]], channel_order="rgb"))
        first, second = (str(one.message) for one in warned)
        assert first.startswith("pictures on the canvas 64x96, 96x64 go through the engines")
        assert second.startswith(
            "the probing loop runs on the host from now on: the loop could not be captured"
        )
        for image, before in zip(ON_CANVAS, expected, strict=True):
            assert_same(before, detector([image], channel_order="rgb"))
