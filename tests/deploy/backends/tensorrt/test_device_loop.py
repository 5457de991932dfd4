"""The probing loop as one CUDA graph, on an imaginary GPU whose conditional nodes decide when reached."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy.backends.tensorrt import backend as tensorrt
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.backends.tensorrt.device_loop import MOST_GRAPHS
from asag_deploy.backends.tensorrt.loop_graph import Workspace
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level, Mode
from asag_deploy.cuda import Device, open_cuda
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.engines.shapes import fixed_slots
from asag_deploy.errors import BackendError
from asag_deploy.loop.stopping import StopRule
from asag_deploy.processing.canvases import Canvas
from support.detection_samples import assert_same
from support.simulated_gpu.device_loops import MIXED, STOPS, loop_of, stage_graphs
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels
from support.tiny_bundle import batch, make_bundle, picture


@pytest.mark.parametrize("level", STOPS)
def test_an_image_stops_where_it_does_on_the_host(host: Detector, device: Detector, level: Level) -> None:
    expected = host([STOPS[level]], channel_order="rgb")
    assert expected[0].trace.levels[-1].level == level
    assert_same(expected, device([STOPS[level]], channel_order="rgb"))


def test_one_graph_serves_images_that_stop_elsewhere(
    cuda: FakeCuda, host: Detector, device: Detector
) -> None:
    """In every order, so that nothing of the image before is left."""
    for _ in range(2):
        for image in [*MIXED, *reversed(MIXED)]:
            assert_same(host([image], channel_order="rgb"), device([image], channel_order="rgb"))
    assert len(loop_of(device)._graphs) == 1
    assert loop_of(device).redone == 0


def test_a_mixed_batch(host: Detector, device: Detector) -> None:
    for images in (MIXED, MIXED[::-1], MIXED[:2], MIXED[2:]):
        assert_same(host(images, channel_order="rgb"), device(images, channel_order="rgb"))


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("max_level", ["P5", "P4", "P3"])
def test_every_rule(kernels: FakeKernels, bundle: Bundle, mode: Mode, max_level: Level) -> None:
    def found(loop: Any) -> list[Detections]:
        options = {"backend": "tensorrt", "mode": mode, "max_level": max_level, "loop": loop}
        with Detector.load(bundle, **options) as detector:
            return detector([picture(2), *MIXED[1:]], channel_order="rgb")

    assert_same(found("host"), found("device"))


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("max_level", ["P5", "P4", "P3"])
def test_engines_of_one_shape(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, mode: Mode, max_level: Level
) -> None:
    """They have one number of patches a level, whatever the rule, and take a single image."""
    options: dict[str, Any] = {"backend": "tensorrt-rtx", "mode": mode, "max_level": max_level}
    with (
        Detector.load(bundle, loop="host", **options) as host,
        Detector.load(bundle, loop="device", **options) as device,
    ):
        network = device._open_network()
        assert isinstance(network, EngineNetwork)
        loop = loop_of(device)
        loop._on_canvas = {Canvas(64, 64): network._stages}
        for image in MIXED:
            assert_same(host([image], channel_order="rgb"), device([image], channel_order="rgb"))
        assert_same(host(MIXED, channel_order="rgb"), device(MIXED, channel_order="rgb"))
        alone, together = loop._graphs.values()
        levels = device.manifest.probing.levels
        assert alone.slots == tuple(fixed_slots(level) for level in levels[: len(alone.levels)])
        assert together.slots == ((16, 6) if mode == "fast" else (18, 6))[: len(together.levels)]
        decoder = alone._calls["decoder"].context._context._shapes
        for level in levels:
            anchors = fixed_slots(level) * level.anchors_per_patch
            assert decoder[f"anchors_{level.level.lower()}"] == (1, anchors, 5)


def test_a_bundle_with_fewer_levels(kernels: FakeKernels, tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle", levels=("P4",))
    write_engines(made)
    with (
        Detector.load(made, backend="tensorrt-rtx", loop="host") as host,
        Detector.load(made, backend="tensorrt-rtx", loop="device") as device,
    ):
        assert_same(host(MIXED, channel_order="rgb"), device(MIXED, channel_order="rgb"))


def test_levels_that_nobody_asks_for_are_not_run(cuda: FakeCuda, device: Detector) -> None:
    device(STOPS["P3"], channel_order="rgb")  # which captures the graph
    network = device._open_network()
    (graph,) = loop_of(device)._graphs.values()
    contexts = {name: call.context._context for name, call in graph._calls.items()}
    for level, ran in (("P5", (0, 0)), ("P4", (1, 0)), ("P3", (1, 1))):
        before = {name: context.runs for name, context in contexts.items()}
        device(STOPS[level], channel_order="rgb")
        network.device.synchronize()  # type: ignore[attr-defined]
        runs = {name: context.runs - before[name] for name, context in contexts.items()}
        assert runs == {"backbone": 1, "probe_p4": ran[0], "probe_p3": ran[1], "decoder": 1}


def test_a_detection_is_one_launch_and_one_wait(
    cuda: FakeCuda, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, sizes = batch(STOPS["P3"]), np.array([[64, 64]])
    for _ in range(3):
        device.forward_on_device(images, sizes)
    launches, allocated = cuda.launches, cuda.allocations
    waits: list[int] = []
    reached = cuda.cudaEventSynchronize

    def wait(event: int) -> Any:
        waits.append(event)
        return reached(event)

    monkeypatch.setattr(cuda, "cudaEventSynchronize", wait)
    device.forward_on_device(images, sizes)
    assert (cuda.launches - launches, len(waits), cuda.allocations) == (1, 1, allocated)


def test_outputs_can_be_used_before_the_host_has_read_anything(
    cuda: FakeCuda, host: Detector, device: Detector
) -> None:
    sizes = np.array([[64, 64]])
    network, probing = device._open_network(), device.manifest.probing
    for image in MIXED:
        expected = host.forward(batch(image), sizes)
        begun = loop_of(device).begin(network, probing, StopRule(), network.upload(batch(image)), sizes)
        ahead = network.device.begin_download([begun.outputs["logits"]])  # type: ignore[attr-defined]
        probed = begun.finish()
        assert probed.outputs is begun.outputs
        (logits,) = ahead()
        np.testing.assert_array_equal(logits[:, : int(expected.anchor_count[0])], expected.logits)


def test_a_deadline_is_kept_by_the_host_also_where_the_loop_is_begun(
    cuda: FakeCuda, host: Detector, device: Detector
) -> None:
    network, probing = device._open_network(), device.manifest.probing
    image = network.upload(batch(MIXED[1]))
    rule = StopRule(deadline=0.0)
    for found in (
        loop_of(device)(network, probing, rule, image, np.array([[64, 64]])),
        loop_of(device).begin(network, probing, rule, image, np.array([[64, 64]])).finish(),
    ):
        assert [reason.value for reason in found.stop] == ["deadline"]
        assert len(found.levels) == 1


def test_post_processing_is_begun_before_the_host_waits(
    cuda: FakeCuda, kernels: FakeKernels, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(MIXED[1], channel_order="rgb")
    before, calls_at_the_waits = len(kernels.calls), []
    reached = cuda.cudaEventSynchronize

    def wait(event: int) -> Any:
        calls_at_the_waits.append(kernels.calls[before:])
        return reached(event)

    monkeypatch.setattr(cuda, "cudaEventSynchronize", wait)
    device(MIXED[1], channel_order="rgb")
    assert calls_at_the_waits[0] == kernels.calls[before:] == ["preprocess", "postprocess"]


def test_more_patches_than_there_is_room_for_are_detected_by_the_host(
    kernels: FakeKernels, bundle: Bundle, host: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asag_deploy.backends.tensorrt.loop_graph.MOST_SLOTS", 4)
    monkeypatch.setattr("asag_deploy.backends.tensorrt.loop_graph.PATCH_BUCKET", 4)
    with Detector.load(bundle, backend="tensorrt-rtx", loop="device") as device:
        few, on_p4, on_p3 = picture(4, 2), picture(5, 2), picture(4, 6)
        for images, redone in (([few], 0), ([on_p4], 1), ([few], 1), ([few, on_p3], 2), ([on_p3, on_p4], 3)):
            assert_same(host(images, channel_order="rgb"), device(images, channel_order="rgb"))
            assert loop_of(device).redone == redone


def test_outputs_outlive_later_calls(host: Detector, device: Detector) -> None:
    sizes = np.array([[64, 64]])
    held = [device.forward_on_device(batch(image), sizes) for image in MIXED]
    for image, outputs in zip(MIXED, held, strict=True):
        expected = host.forward(batch(image), sizes)
        count = int(expected.anchor_count[0])
        logits = device._open_network().download(outputs["logits"])
        np.testing.assert_array_equal(logits[:, :count], expected.logits)


def test_many_threads(host: Detector, device: Detector) -> None:
    """Four of them, and every image again and again."""
    expected = [host([image], channel_order="rgb") for image in MIXED]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: device([MIXED[i % 4]], channel_order="rgb"), range(100)))
    for i, one in enumerate(found):
        assert_same(expected[i % 4], one)
    assert len(loop_of(device)._graphs) == 1


def test_more_shapes_than_graphs(
    cuda: FakeCuda, host: Detector, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of forty shapes captures each once; beyond what is kept, the one used longest ago goes."""
    assert MOST_GRAPHS >= 40
    monkeypatch.setattr("asag_deploy.backends.tensorrt.device_loop.MOST_GRAPHS", 3)
    for side in (64, 72, 80, 64, 88, 96, 72):
        images = batch(picture(5, 2, size=(64, side)))
        sizes = np.array([[64, side]])
        expected, found = host.forward(images, sizes), device.forward(images, sizes)
        np.testing.assert_array_equal(found.logits, expected.logits)
        assert [t.to_dict() for t in found.trace] == [t.to_dict() for t in expected.trace]
    assert [key[0][3] for key in loop_of(device)._graphs] == [88, 96, 72]
    assert len(cuda.launchable) == 3 + len(stage_graphs(host))
    assert cuda.graphs == {}


def test_what_was_compiled_for_a_graph_is_kept_at_once(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only in the end, to which a server that is killed does not come."""
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path))
    with Detector.load(bundle, backend="tensorrt-rtx", loop="device") as detector:
        detector.forward_on_device(batch(STOPS["P3"]), np.array([[64, 64]]))
        assert len(list((tmp_path / "tensorrt-rtx").iterdir())) == 4  # all stages but `normalize`


def test_everything_is_released(cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle) -> None:
    detector = Detector.load(bundle, backend="tensorrt-rtx", loop="device")
    detector(MIXED, channel_order="rgb")
    assert cuda.leaked()["graphs"]
    detector.close()
    del detector
    gc.collect()
    assert cuda.leaked() == {}


def test_a_gpu_that_decides_otherwise_is_found_out(
    cuda: FakeCuda, device: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(STOPS["P4"], channel_order="rgb")
    (graph,) = loop_of(device)._graphs.values()
    original = cuda.cudaGraphLaunch

    def launch(graph_handle: int, stream: int) -> Any:
        answer = original(graph_handle, stream)
        probed = graph.results["probed"]
        cuda.cudaMemsetAsync(probed.pointer, 0, probed.nbytes, stream)
        return answer

    monkeypatch.setattr(cuda, "cudaGraphLaunch", launch)
    with pytest.raises(BackendError, match=r"probed other levels than the host would have; .*loop='host'"):
        device(STOPS["P4"], channel_order="rgb")


def test_graphs_work_in_the_same_memory(host: Detector, device: Detector) -> None:
    """Whatever their shape, if the largest came first; and so one image leaves nothing to the next."""
    sides = [*range(128, 64, -8), 128, 96]
    for side in sides:
        images, sizes = batch(picture(5, 2, size=(64, side))), np.array([[64, side]])
        np.testing.assert_array_equal(
            device.forward(images, sizes).logits, host.forward(images, sizes).logits
        )
    graphs = loop_of(device)._graphs.values()
    assert len(graphs) == len(set(sides))
    assert len({id(graph.results.whole.owner) for graph in graphs}) == 1


def test_memory_stays_within_bounds_if_shapes_grow(cuda: FakeCuda) -> None:
    workspace = Workspace(Device(open_cuda()))
    held = [workspace.take(1000 * i) for i in range(1, 100)]
    assert all(one.nbytes >= 1000 * i for i, one in enumerate(held, start=1))
    assert sum({one.pointer: one.nbytes for one in held}.values()) < 3 * held[-1].nbytes


def test_auto_uses_the_device_where_it_can(kernels: FakeKernels, bundle: Bundle) -> None:
    with Detector.load(bundle, backend="tensorrt-rtx") as detector:
        assert list(detector(STOPS["P3"]).times_ms).count("loop") == 1
    with Detector.load(bundle, backend="tensorrt-rtx", deadline_ms=1e6) as detector:
        assert "backbone" in detector(STOPS["P3"]).times_ms


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ((12080, 12080), r"take cuda-bindings 13, but the one here is for CUDA 12\.8"),
        ((12080, 13000), r"take a driver for CUDA 13, but the one here supports CUDA 12\.8"),
    ],
)
def test_an_older_cuda(
    cuda: FakeCuda, kernels: FakeKernels, bundle: Bundle, versions: tuple[int, int], message: str
) -> None:
    cuda.driver_version, cuda.runtime_version = versions
    with pytest.raises(BackendError, match=message):
        Detector.load(bundle, backend="tensorrt-rtx", loop="device")
    with Detector.load(bundle, backend="tensorrt-rtx") as detector:
        assert "backbone" in detector(STOPS["P3"]).times_ms


def test_without_the_kernels(cuda: FakeCuda, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "open_cuda_library", lambda capability: None)
    with pytest.raises(BackendError, match=r"takes the compiled kernels; .*ASAG_KERNELS_LIBRARY"):
        Detector.load(bundle, backend="tensorrt-rtx", loop="device")
