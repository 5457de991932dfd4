"""What the loop must not be built of, and that the simulated GPU would not let it pass.

Engines with a loop in them, which TensorRT decides on the host; sizes that it brings from the host where a
graph decides; and captures into the bodies of conditional nodes, which end the process when they fail.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.cuda import Cuda, open_cuda
from asag_deploy.detector import Detector
from asag_deploy.errors import BackendError, CaptureError
from support import tiny_bundle, tiny_graphs
from support.simulated_gpu.device_loops import MIXED, STOPS, assert_same
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels
from support.simulated_gpu.fake_tensorrt import computes_with_sizes, has_control_flow
from support.tiny_bundle import make_bundle

Change = Callable[[onnx.ModelProto], None]


def with_a_loop(model: onnx.ModelProto) -> None:
    """Let the counts pass through a loop, as greedy NMS in a graph does."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["more"], ["go_on"]), helper.make_node("Identity", ["old"], ["new"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("old", TensorProto.INT64, ["b", 4]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("new", TensorProto.INT64, ["b", 4]),
        ],
    )
    rounds = helper.make_tensor("rounds", TensorProto.INT64, [], [2])
    more = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    model.graph.initializer.extend([rounds, more])
    _before_counts(model, helper.make_node("Loop", ["rounds", "yes", "first"], ["counts"], body=body))


def with_sizes_from_the_host(model: onnx.ModelProto) -> None:
    """Let the height of the map be a number that is computed with: here, added as nothing."""
    largest = next(given.name for given in model.graph.input if given.name in ("feature", "image"))
    model.graph.node.extend(
        [
            helper.make_node("Shape", [largest], ["height"], start=2, end=3),
            helper.make_node("Sub", ["height", "height"], ["nothing_high"]),
        ]
    )
    _before_counts(model, helper.make_node("Add", ["first", "nothing_high"], ["counts"]))


def _before_counts(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Put a node that makes `counts` of `first` where `counts` was made."""
    maker = next(one for one in model.graph.node if list(one.output) == ["counts"])
    maker.output[:] = ["first"]
    model.graph.node.append(node)


def bundle_with(monkeypatch: pytest.MonkeyPatch, path: Path, stage: str, change: Change) -> Bundle:
    """The tiny bundle, and engines, with one stage changed."""
    original = tiny_graphs.models

    def models(levels: Any) -> dict[str, onnx.ModelProto]:
        made = original(levels)
        change(made[stage])
        onnx.checker.check_model(made[stage])
        return made

    with monkeypatch.context() as patch:
        patch.setattr(tiny_bundle, "models", models)
        made = make_bundle(path)
    write_engines(made)
    return made


@pytest.mark.parametrize("stage", ["backbone", "probe_p4"])
def test_an_engine_with_a_loop_is_not_captured(
    cuda: FakeCuda,
    kernels: FakeKernels,
    host: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """Neither in the loop on the device, nor for that on the host, which goes on without."""
    made = bundle_with(monkeypatch, tmp_path / "bundle", stage, with_a_loop)
    with (
        Detector.load(made, backend="tensorrt-rtx", loop="device") as device,
        pytest.raises(CaptureError, match=f"'{stage}' waits for decisions of the host, .*; export the"),
    ):
        device(STOPS["P3"], channel_order="rgb")
    assert cuda.leaked().get("graphs") is None
    expected = host(MIXED, channel_order="rgb")
    with Detector.load(made, backend="tensorrt-rtx") as detector:
        with pytest.warns(RuntimeWarning, match=f"on the host from now on: .*graph '{stage}'") as warned:
            assert_same(expected, detector(MIXED, channel_order="rgb"))
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                assert_same(expected, detector(MIXED, channel_order="rgb"))
        context = next(iter(detector._open_network()._stages[stage]._contexts.values()))  # type: ignore[attr-defined]
        assert context._graphs == {}


@pytest.mark.parametrize("stage", ["probe_p4", "probe_p3"])
def test_sizes_from_the_host_are_not_put_into_bodies(
    cuda: FakeCuda, kernels: FakeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    made = bundle_with(monkeypatch, tmp_path / "bundle", stage, with_sizes_from_the_host)
    sentence = (
        f"what '{stage}' does cannot be .*: it copies from the host's memory, .*; export the bundle again"
    )
    with Detector.load(made, backend="tensorrt-rtx", loop="device") as device:
        with pytest.raises(CaptureError, match=sentence):
            device(STOPS["P3"], channel_order="rgb")
        assert cuda.leaked().get("graphs") is None


@pytest.mark.parametrize("stage", ["backbone"])
def test_sizes_from_the_host_may_be_in_the_root(
    kernels: FakeKernels, host: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """They are those of the shapes that the graph is for, and the context keeps them."""
    made = bundle_with(monkeypatch, tmp_path / "bundle", stage, with_sizes_from_the_host)
    with Detector.load(made, backend="tensorrt-rtx", loop="device") as device:
        for image in MIXED:
            assert_same(host([image], channel_order="rgb"), device([image], channel_order="rgb"))


def test_the_stages_as_they_are_hold_neither() -> None:
    for name, model in tiny_graphs.models().items():
        assert not has_control_flow(model), name
        assert not computes_with_sizes(model), name
    changed = tiny_graphs.models()
    with_a_loop(changed["backbone"])
    with_sizes_from_the_host(changed["probe_p3"])
    assert has_control_flow(changed["backbone"])
    assert computes_with_sizes(changed["probe_p3"])


class OldLoop:
    """The design that the project had: one capture of everything, and captures into the bodies."""

    def __init__(self, api: Cuda) -> None:
        self.api, self.module = api, api.module
        self.outer, self.inner = api.create_stream(), api.create_stream()

    def capture(self, in_body: Callable[[int], object]) -> int:
        module, outer, inner = self.module, self.outer, self.inner
        self.api.begin_capture(outer)
        _, _, _, graph, *_ = module.cudaStreamGetCaptureInfo(outer)
        condition = int(module.cudaGraphConditionalHandleCreate(graph, 0, 1)[1])
        module.put(outer, lambda: module.conditions.update({condition: 1}))
        _, _, _, _, before, *_ = module.cudaStreamGetCaptureInfo(outer)
        params = module.cudaGraphNodeParams()
        params.type = module.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle, params.conditional.size = condition, 1
        params.conditional.type = module.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        _, node = module.cudaGraphAddNode(graph, before, None, 1, params)
        module.cudaStreamUpdateCaptureDependencies(outer, [node], None, 1, 1)
        (body,) = params.conditional.phGraph_out
        module.cudaStreamBeginCaptureToGraph(inner, body, None, None, 0, 1)
        try:
            in_body(inner)
        except BackendError:
            module.cudaStreamEndCapture(inner)
            self.api.abandon_capture(outer)
            raise
        module.cudaStreamEndCapture(inner)
        return self.api.end_capture(outer)


def test_a_capture_into_a_body_that_is_invalidated_ends_the_process(cuda: FakeCuda) -> None:
    """It goes well as long as all does; once something invalidates it, there is nothing to fall back to."""
    old = OldLoop(open_cuda())
    memory = old.api.allocate(1)
    ctypes.memset(memory, 7, 1)
    graph = old.capture(lambda stream: old.api.clear(memory, 1, stream))
    launchable = old.api.instantiate(graph)
    old.api.launch(launchable, old.outer)
    old.api.synchronize(old.outer)
    assert ctypes.c_uint8.from_address(memory).value == 0
    with pytest.raises(AssertionError, match="the process would have ended"):
        old.capture(lambda stream: cuda.cudaDeviceSynchronize())  # as another thread may


def test_the_old_design_with_the_old_engines(
    cuda: FakeCuda, kernels: FakeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine with a loop, captured although it says that it cannot be, into a body."""
    made = bundle_with(monkeypatch, tmp_path / "bundle", "probe_p4", with_a_loop)
    with Detector.load(made, backend="tensorrt-rtx", loop="host") as detector:
        detector(STOPS["P3"], channel_order="rgb")
        probe = detector._open_network()._stages["probe_p4"]  # type: ignore[attr-defined]
        context = next(iter(probe._contexts.values()))
        addresses = next(iter(context._seen))
        with pytest.raises(AssertionError, match="the process would have ended"):
            OldLoop(open_cuda()).capture(lambda stream: context.enqueue(addresses, stream))


def test_the_old_design_with_sizes_from_the_host(
    cuda: FakeCuda, kernels: FakeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is captured, and then cannot be instantiated."""
    made = bundle_with(monkeypatch, tmp_path / "bundle", "probe_p4", with_sizes_from_the_host)
    with Detector.load(made, backend="tensorrt-rtx", loop="host") as detector:
        detector(STOPS["P3"], channel_order="rgb")
        probe = detector._open_network()._stages["probe_p4"]  # type: ignore[attr-defined]
        context = next(iter(probe._contexts.values()))
        addresses = next(iter(context._seen))
        old = OldLoop(open_cuda())
        graph = old.capture(lambda stream: context.enqueue(addresses, stream))
        with pytest.raises(BackendError, match="could not instantiate a graph: NotSupported"):
            old.api.instantiate(graph)
