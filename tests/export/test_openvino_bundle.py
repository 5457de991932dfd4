"""Exported bundles in OpenVINO: float32 passes the parity gate, and what bfloat16 costs is known."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import TensorSpec
from asag_deploy.loop.stages import LevelOutputs
from asag_evaluation.data.doodles import draw_doodles
from asag_export.gate.gate import run_gate
from asag_export.stage_export import export_module
from asag_training.network.deformable import geometry_of
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages
from support.small_network import small_checkpoint

openvino = pytest.importorskip("openvino", reason="needs OpenVINO")

Arrays = dict[str, NDArray[Any]]

BFLOAT16_BOUNDS = {
    "backbone": {"p2": 0.02, "p3": 0.03, "p4": 0.03, "p5": 0.03, "anchors": 0.03},
    "probe_p4": {"anchors": 0.03},
    "decoder": {"logits": 0.01, "boxes": 0.01, "anchors": 1e-6},
}
"""The most that an output of a stage differs for the same inputs, as a share of its largest magnitude."""


def test_float32_passes_the_gate(small_bundle: Bundle) -> None:
    checkpoint = small_checkpoint()
    manifest = small_bundle.manifest
    stages = build_stages(
        build(checkpoint.config, checkpoint.state).requires_grad_(False),
        manifest.probing,
        preprocessing=manifest.preprocessing,
    )
    network = open_network("openvino", small_bundle, threads=1)
    report = run_gate(stages, network, manifest.probing, backend="openvino", precision="fp32")
    assert [row for row in report.stages if not row.passed] == []
    assert [run for run in report.runs if not run.passed] == []
    assert [check for check in report.checks if not check.passed] == []


@pytest.fixture
def expected(small_bundle: Bundle) -> dict[str, tuple[Arrays, Arrays]]:
    """Inputs and outputs of each stage in ONNX Runtime, on two images of which both are probed on P4."""
    network = open_network(None, small_bundle, threads=1)
    pixels = np.stack([draw_doodles(160, 224, seed) for seed in (1, 2)])
    size = np.array([[160, 224], [150, 200]])
    image = run(network, "normalize", {"pixels": pixels, "image_size": size})["image"]
    calls: dict[str, tuple[Arrays, Arrays]] = {}

    def call(name: str, inputs: Arrays) -> Arrays:
        calls[name] = (inputs, run(network, name, inputs))
        return calls[name][1]

    first = call("backbone", {"image": image, "image_size": size})
    p4 = small_bundle.manifest.probing.levels[0]
    asked = LevelOutputs.of({name: network.upload(array) for name, array in first.items()})
    probing = small_bundle.manifest.probing
    found = network.select(probing, p4, asked, network.upload(size))
    origins, counts = (network.download(array) for array in found)
    patches = counts[:, 1]
    assert (patches > 0).all()
    slots = np.arange(patches.max())
    second = call(
        "probe_p4",
        {
            "feature": first["p4"],
            "feature_size": np.array(first["p4"].shape[1:3]),
            "image_size": size,
            "patches": origins,
            "patch_count": patches,
            "slots": slots,
        },
    )
    empty = small_bundle.manifest.probing.levels[1].anchors_per_patch
    call(
        "decoder",
        {
            **{name: first[name] for name in ("p2", "p3", "p4", "p5")},
            "anchors_p5": first["anchors"],
            "selected_p5": first["selected"],
            "anchors_p4": second["anchors"],
            "selected_p4": second["selected"],
            "anchors_p3": np.zeros((2, empty, 5), np.float32),
            "probed": np.array([[True, False]] * 2),
            "image_size": size,
            "query_slots": np.arange(60),
        },
    )
    return calls


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_host_normalizes_as_the_graph_does(backend: str, small_bundle: Bundle) -> None:
    """To the bit in ONNX Runtime; OpenVINO multiplies by the reciprocal of the deviation."""
    network = open_network(backend, small_bundle, threads=1)
    images = [draw_doodles(160, 224, 1), draw_doodles(150, 200, 2)]
    manifest = dataclasses.replace(
        small_bundle.manifest,
        preprocessing=dataclasses.replace(
            small_bundle.manifest.preprocessing, shorter_side=150, longer_side=210
        ),
    )
    network.normalizes_on_host = False
    by_the_graph = network.processing(manifest).prepare(images, "rgb")
    watched = HookedNetwork(network, before=lambda name, _: pytest.fail(f"the stage {name} ran"))
    watched.normalizes_on_host = True
    on_host = watched.processing(manifest).prepare(images, "rgb")
    np.testing.assert_array_equal(on_host.sizes, by_the_graph.sizes)
    ours, theirs = (network.download(prepared.image) for prepared in (on_host, by_the_graph))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if backend == "onnxruntime" else 1e-6)
    assert open_network(backend, small_bundle, threads=1).normalizes_on_host


def run(network: Network, name: str, inputs: Arrays) -> Arrays:
    outputs = network.stage(name)({key: network.upload(array) for key, array in inputs.items()})
    return {key: network.download(array) for key, array in outputs.items()}


def differences(network: Network, expected: dict[str, tuple[Arrays, Arrays]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, bounds in BFLOAT16_BOUNDS.items():
        inputs, outputs = expected[name]
        actual = run(network, name, inputs)
        found[name] = {key: relative_difference(outputs[key], actual[key]) for key in bounds}
    return found


def relative_difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_what_bfloat16_costs(small_bundle: Bundle, expected: dict[str, tuple[Arrays, Arrays]]) -> None:
    missing = BACKENDS["openvino-bf16"].problem()
    if missing is not None:
        pytest.skip(str(missing))
    found = differences(open_network("openvino-bf16", small_bundle, threads=1), expected)
    over = {
        f"{name}.{key}": value
        for name, values in found.items()
        for key, value in values.items()
        if value > BFLOAT16_BOUNDS[name][key]
    }
    assert over == {}, found
    assert found["backbone"]["p2"] > 1e-4, "nothing was computed in bfloat16"


class _Covered(torch.nn.Module):
    """Which cells of maps of strides 8 to 64 the images cover."""

    def forward(self, image: Tensor, image_size: Tensor) -> Tensor:
        height, width = image.shape[2], image.shape[3]
        maps = [image[:, :, ::stride, ::stride].permute(0, 2, 3, 1) for stride in (8, 16, 32, 64)]
        return geometry_of(maps, image_size, (height, width)).covered


def test_whole_numbers_of_cells_stay_whole_in_openvino() -> None:
    """A runtime may multiply by the inverse of what it is to divide by."""
    image = torch.zeros(2, 1, 96, 160)
    size = torch.tensor([[96, 160], [80, 150]])
    given = (
        TensorSpec(name="image", dtype="float32", shape=("batch", 1, "height", "width")),
        TensorSpec(name="image_size", dtype="int64", shape=("batch", 2)),
    )
    gives = (TensorSpec(name="covered", dtype="float32", shape=("batch", 4, 2)),)
    dynamic = torch.export.Dim.DYNAMIC
    axes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})
    model = export_module(
        _Covered().eval(), "covered", (image, size), given, gives, opset=20, dynamic_shapes=axes
    )
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(model.SerializeToString())), "CPU")
    for side in range(32, 1345, 32):
        blank = np.zeros((1, 1, side, 96), dtype=np.float32)
        for height in (side, side - 8, side - 31):
            (found,) = compiled([blank, np.array([[height, 96]])]).values()
            rows = [-(-height * -(-side // stride) // side) for stride in (8, 16, 32, 64)]
            assert found[0, :, 1].tolist() == rows, (side, height)
