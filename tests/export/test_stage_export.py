"""The exported graphs: valid, static, self-contained, and the same every time."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch._subclasses.fake_tensor import FakeTensorMode

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing, Probing, TensorSpec
from asag_deploy.engines.adapter import open_library
from asag_deploy.errors import ConfigError, ExportError
from asag_export.choices import DEFAULT_OPSET, OPSETS
from asag_export.onnx_operators import DOMAIN
from asag_export.stage_export import _quiet, check, export_stage, prepare_for_export
from asag_training.checkpoints import select_head
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import StageModule
from support.rtx_engines import HAS_RTX, assert_can_be_captured, compile_stage
from support.small_network import small_checkpoint, small_config
from support.tiny_bundle import tiny_manifest

GRAPHS = ("normalize", "backbone", "probe_p4", "probe_p3", "decoder")
FUNCTIONS = {
    "normalize": set(),
    "backbone": set(),
    "probe_p4": set(),
    "probe_p3": set(),
    "decoder": {"MultiscaleRoIAlign", "PyramidSample", "AdaptiveMixing", "PadAnchors"},
}
DATA_DEPENDENT = {
    "Loop",
    "If",
    "Scan",
    "NonZero",
    "Compress",
    "Unique",
    "NonMaxSuppression",
    "SequenceAt",
    "StringNormalizer",
}


def load(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph_path(name))


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of functions and of loop bodies too."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            waiting += attribute.g.node
            waiting += [inner for graph in attribute.graphs for inner in graph.node]


def weights(model: onnx.ModelProto) -> list[np.ndarray]:
    return [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]


def stage_of(
    name: str, variant: str = "asag-a-r50-100", levels: str = "p3-p6"
) -> tuple[StageModule, Probing]:
    checkpoint = select_head(small_checkpoint(variant), "main")
    probing = probing_plan(checkpoint.config, levels)
    stages = build_stages(prepare_for_export(build(checkpoint.config, checkpoint.state), "fp32"), probing)
    return next(stage for stage in stages if stage.name == name), probing


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
class TestEveryGraph:
    def test_is_valid(self, small_bundle: Bundle, name: str) -> None:
        onnx.checker.check_model(load(small_bundle, name), full_check=True)

    def test_has_no_shapes_that_depend_on_values(self, small_bundle: Bundle, name: str) -> None:
        model = load(small_bundle, name)
        found = {node.op_type for node in nodes(model)}
        assert found
        assert not found & DATA_DEPENDENT
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        ranks = {len(value.type.tensor_type.shape.dim) for value in inferred.graph.output}
        assert ranks <= {1, 2, 3, 4}

    def test_carries_the_functions_it_uses(self, small_bundle: Bundle, name: str) -> None:
        model = load(small_bundle, name)
        assert {function.name for function in model.functions} == FUNCTIONS[name]
        assert {node.op_type for node in model.graph.node if node.domain == DOMAIN} == FUNCTIONS[name]
        assert {node.domain for node in nodes(model)} <= {"", DOMAIN}
        versions = {imported.domain: imported.version for imported in model.opset_import}
        assert versions[""] == small_bundle.manifest.opset == DEFAULT_OPSET

    def test_is_what_the_manifest_says(self, small_bundle: Bundle, name: str) -> None:
        graph, spec = load(small_bundle, name).graph, small_bundle.manifest.graph(name)
        assert tuple(tensor_spec(value) for value in graph.input) == spec.inputs
        assert tuple(tensor_spec(value) for value in graph.output) == spec.outputs

    def test_knows_nothing_of_the_machine_it_was_made_on(self, small_bundle: Bundle, name: str) -> None:
        content = small_bundle.graph_path(name).read_bytes()
        package = str(Path(torch.__file__).parent.parent)
        for trace in (
            str(Path.cwd()),
            sys.prefix,
            package,
            str(Path.home()),
            "site-packages",
            ".py",
            'File "',
        ):
            assert trace.encode() not in content, trace

    def test_has_dynamic_sizes_only_in_batch_and_image(self, small_bundle: Bundle, name: str) -> None:
        spec = small_bundle.manifest.graph(name)
        named = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
        sizes = {"batch", "height", "width", "patches", "queries", "anchors_p4", "anchors_p3"}
        assert {n for n in named if not n.startswith(("height_", "width_"))} <= sizes
        assert all(tensor.shape[0] == "batch" for tensor in spec.outputs)


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


class Holders:
    """Which graphs hold a weight of the network, in whatever shape."""

    def __init__(self, bundle: Bundle) -> None:
        self.state = small_checkpoint().state
        self.held = {name: weights(load(bundle, name)) for name in GRAPHS}

    def __call__(self, weight: str) -> set[str]:
        values = np.sort(self.state[weight].numpy(), axis=None)
        return {
            name
            for name, arrays in self.held.items()
            if any(a.size == values.size and np.array_equal(np.sort(a, axis=None), values) for a in arrays)
        }


@pytest.mark.slow
def test_a_level_that_is_not_probed_costs_nothing(small_bundle: Bundle) -> None:
    holders = Holders(small_bundle)
    for layer in (0, 2):
        assert holders(f"anchor_generator.compress.0.{layer}.weight") == {"probe_p3"}
        assert holders(f"anchor_generator.compress.1.{layer}.weight") == {"probe_p4"}
        assert holders(f"anchor_generator.compress.2.{layer}.weight") == {"backbone"}
    assert holders("anchor_generator.proj_all.layers.1.weight") == {"backbone"}
    assert holders("anchor_generator.proj_patch.layers.1.weight") == {"probe_p4", "probe_p3"}
    assert holders("rpn.roi.weight") == {"decoder"}


@pytest.mark.slow
def test_what_inference_does_without_is_left_out(small_bundle: Bundle) -> None:
    holders = Holders(small_bundle)
    heads = [holders(f"decoder.bbox_head.{i}.fc_cls.weight") for i in range(4)]
    assert heads == [set(), set(), set(), {"decoder"}]
    assert holders("rpn.fc_reg.weight") == {"decoder"}
    assert holders("rpn.fc_cls.weight") == {"decoder"}  # which says how good the proposals are


@pytest.mark.slow
def test_graphs_hold_no_words_of_the_source(small_bundle: Bundle) -> None:
    """A docstring that is reworded would be another graph, and make the engines of it stale."""
    for name in GRAPHS:
        model = load(small_bundle, name)
        assert {each.doc_string for each in (model, model.graph, *model.functions, *nodes(model))} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normalize", "probe_p3"])
def test_the_same_network_is_the_same_file(small_bundle: Bundle, name: str) -> None:
    stage, probing = stage_of(name)
    model, inputs, outputs = export_stage(
        stage, small_config(), probing, precision="fp32", opset=DEFAULT_OPSET
    )
    assert model.SerializeToString() == small_bundle.graph_path(name).read_bytes()
    spec = small_bundle.manifest.graph(name)
    assert (inputs, outputs) == (spec.inputs, spec.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
def test_opset(opset: int) -> None:
    stage, probing = stage_of("probe_p4")
    model, _, _ = export_stage(stage, small_config(), probing, precision="fp32", opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert {
        i.version for holder in (model, *model.functions) for i in holder.opset_import if not i.domain
    } == {opset}
    arguments = {
        "feature": torch.randn(3, 25, 31, 32),
        "feature_size": torch.tensor([25, 31]),
        "image_size": torch.tensor([[400, 490], [231, 302], [16, 9]]),
        "patches": torch.randint(0, 10, (3, probing.levels[0].capacity, 2)),
        "patch_count": torch.tensor([5, 2, 0]),
        "slots": torch.arange(6),
    }
    with torch.no_grad():
        expected = stage(*arguments.values())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actual = session.run(None, {name: tensor.numpy() for name, tensor in arguments.items()})
    for name, got, tensor in zip(stage.outputs, actual, expected, strict=True):
        bound = 0 if name != "anchors" else 1e-3
        np.testing.assert_allclose(np.asarray(got), tensor.numpy(), rtol=0, atol=bound, err_msg=name)


@pytest.mark.slow
def test_decoder_that_keeps_every_query() -> None:
    stage, probing = stage_of("decoder", "asag-s-r50-crowdhuman", "p5-p6")
    config = small_config("asag-s-r50-crowdhuman")
    exported = export_stage(stage, config, probing, precision="fp32", opset=DEFAULT_OPSET)
    model, _, _ = exported
    assert {function.name for function in model.functions} == {"MultiscaleRoIAlign", "PadAnchors"}
    if HAS_RTX:
        manifest = dataclasses.replace(tiny_manifest(), probing=probing, preprocessing=Preprocessing())
        assert_can_be_captured(
            "decoder", compile_stage(open_library("tensorrt-rtx"), "decoder", exported, manifest)
        )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for height, width, queries in ((203, 317, 600), (64, 33, 5)):
        features = [torch.randn(2, -(-height // s), -(-width // s), 32) for s in (4, 8, 16, 32)]
        anchors = torch.rand(2, 750, 5) * torch.tensor([width, height, width, height, 1])
        anchors[1, :, 4] *= 0.06  # few of which pass
        arguments = [*features, anchors, torch.tensor([[height, width]] * 2), torch.arange(queries)]
        with torch.no_grad():
            expected = dict(zip(stage.outputs, stage(*arguments), strict=True))
        feeds = {name: t.numpy() for name, t in zip(stage.inputs, arguments, strict=True)}
        actual = dict(zip(stage.outputs, map(np.asarray, session.run(None, feeds)), strict=True))
        assert actual["det_scores"].shape == (2, queries)
        np.testing.assert_array_equal(actual["anchor_count"], expected["anchor_count"])
        for name, bound in (("anchors", 0), ("logits", 1e-4), ("boxes", 1e-4), ("det_scores", 1e-5)):
            np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("opset", [0, 17, 24])
def test_opset_that_is_not_supported(opset: int) -> None:
    stage, probing = stage_of("normalize")
    with pytest.raises(ConfigError, match=f"opset {opset} is not supported; choose 18 to 23"):
        export_stage(stage, small_config(), probing, precision="fp32", opset=opset)


def test_graph_that_is_no_valid_onnx() -> None:
    node = onnx.helper.make_node("Relu", ["missing"], ["out"])
    output = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "broken", [], [output]))
    with pytest.raises(ExportError, match="the exported graph 'backbone' is not valid ONNX"):
        check(model, "backbone")


@torch.library.custom_op("asag_tests::interrupted", mutates_args=())
def interrupted(image: torch.Tensor) -> torch.Tensor:
    return image.clone()


@interrupted.register_fake
def _(image: torch.Tensor) -> torch.Tensor:
    raise TypeError("which is what becomes of Ctrl-C amid PyTorch's own calls")


def test_pytorch_logs_nothing_of_what_ends_its_tracing() -> None:
    said = Mock(spec=logging.Handler, level=logging.NOTSET)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(said)
    try:
        with FakeTensorMode():
            with _quiet(), pytest.raises(TypeError, match="Ctrl-C"):
                interrupted(torch.zeros(1))
            said.handle.assert_not_called()
            with pytest.raises(TypeError, match="Ctrl-C"):
                interrupted(torch.zeros(1))
            said.handle.assert_called()
    finally:
        logger.removeHandler(said)
