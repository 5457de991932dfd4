"""Engines that the loop on the device must not be built of.

Those with a loop in them, which TensorRT decides on the host, and those that bring sizes from the host where
a graph decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import CaptureError
from support import tiny_bundle, tiny_graphs
from support.detection_samples import assert_same
from support.simulated_gpu.device_loops import MIXED, STOPS
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels
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


def test_sizes_from_the_host_may_be_in_the_root(
    kernels: FakeKernels, host: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the shapes that the graph is for, and the context keeps them."""
    made = bundle_with(monkeypatch, tmp_path / "bundle", "backbone", with_sizes_from_the_host)
    with Detector.load(made, backend="tensorrt-rtx", loop="device") as device:
        for image in MIXED:
            assert_same(host([image], channel_order="rgb"), device([image], channel_order="rgb"))
