"""A decoder that is cut at the operators compiled for the CPU finds what the whole one finds."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from asag_deploy.backends import BACKENDS, Network, cutting, open_network
from asag_deploy.backends.cutting import Plan, cut, has_function
from asag_deploy.backends.pieces import (
    StageInPieces,
    graphs_run_whole,
    is_cut,
    is_cut_of,
    threads_of_an_operator,
    why_no_pieces,
)
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec
from asag_deploy.errors import BackendError, FieldError
from asag_deploy.kernels.cpu import CPU_LIBRARY_VARIABLE, CpuKernels
from asag_deploy.kernels.limits import MOST_ANCHORS
from asag_deploy.loop.patch_nms import patch_nms
from asag_deploy.loop.probing import detect
from asag_deploy.loop.stopping import StopRule

OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs OpenVINO")
CPU_BACKENDS = ["onnxruntime", pytest.param("openvino", marks=OPENVINO)]
OUTPUTS = ("logits", "boxes", "anchors", "anchor_count", "det_scores", "det_labels", "det_boxes")


@pytest.fixture
def compiled(host_library_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The operators, found where backends look for them; and a cache of this test alone."""
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(host_library_path))
    monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def run(network: Network, bundle: Bundle, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """What the network finds in a batch of two pictures, of which one is padded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    pixels = pixels.repeat(32, axis=1).repeat(32, axis=2)
    sizes = np.array([[160, 192], [130, 150]], dtype=np.int64)
    given = {"pixels": network.upload(pixels), "image_size": network.upload(sizes)}
    image = network.stage("normalize")(given)["image"]
    probed = detect(network, bundle.manifest.probing, StopRule(max_patches=60), image, sizes)
    assert len(probed.levels) == 3
    return {name: network.download(probed.outputs[name]) for name in OUTPUTS}


def without(monkeypatch: pytest.MonkeyPatch, name: str, bundle: Bundle) -> Network:
    with monkeypatch.context() as patch:
        patch.setenv(CPU_LIBRARY_VARIABLE, "")
        return open_network(name, bundle, threads=1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_pieces_find_what_the_whole_finds(
    compiled: Path, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    whole = without(monkeypatch, backend, small_bundle)
    pieces = open_network(backend, small_bundle, threads=2)
    assert isinstance(pieces.stage("decoder"), StageInPieces)
    assert not isinstance(whole.stage("decoder"), StageInPieces)
    finders = [network.patch_finder() for network in (whole, pieces)]
    assert finders[0] is patch_nms
    assert isinstance(getattr(finders[1], "__self__", None), CpuKernels)
    expected, found = run(whole, small_bundle), run(pieces, small_bundle)
    assert expected["anchor_count"].min() > 5
    for name in OUTPUTS:
        tolerance = 1e-3 if name == "anchors" else 1e-4  # anchors are in pixels
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_calls_from_several_threads(compiled: Path, small_bundle: Bundle, backend: str) -> None:
    network = open_network(backend, small_bundle, threads=2, requests=2)
    expected = [run(network, small_bundle, seed=seed) for seed in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: run(network, small_bundle, seed=i % 2), range(16)))
    for i, outputs in enumerate(found):
        for name in OUTPUTS:
            np.testing.assert_allclose(outputs[name], expected[i % 2][name], rtol=1e-5, atol=1e-4)


@OPENVINO
def test_pieces_are_compiled_once(
    compiled: Path, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(open_network("openvino", small_bundle, threads=1), small_bundle)
    entries = sorted(compiled.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "_Cutter", None)  # so that it cannot be cut again
        again = open_network("openvino", small_bundle, threads=1)
    assert sorted(compiled.iterdir()) == entries
    assert np.array_equal(run(again, small_bundle)["logits"], expected["logits"])
    for entry in entries:  # whatever of it is damaged is made anew
        content = entry.read_bytes()
        entry.write_bytes(content[:-3])
    again = open_network("openvino", small_bundle, threads=1)
    assert isinstance(again.stage("decoder"), StageInPieces)
    assert np.array_equal(run(again, small_bundle)["logits"], expected["logits"])


@OPENVINO
def test_products_are_in_bfloat16_and_coordinates_are_not(compiled: Path, small_bundle: Bundle) -> None:
    missing = BACKENDS["openvino-bf16"].problem()
    if missing is not None:
        pytest.skip(str(missing))
    exact = run(open_network("openvino", small_bundle, threads=1), small_bundle)
    network = open_network("openvino-bf16", small_bundle, threads=1)
    assert isinstance(network.stage("decoder"), StageInPieces)
    # The network before the decoder is in bfloat16 as well: detections are as close as that allows.
    found = run(network, small_bundle)
    assert np.abs(found["det_scores"] - exact["det_scores"]).max() < 0.02
    assert not np.array_equal(found["logits"], exact["logits"])


@OPENVINO
def test_only_large_products_and_what_moves_their_values_are_in_bfloat16() -> None:
    """A layer with a bias, split, times another value; beside it coordinates, and a small layer."""
    import openvino
    from openvino import opset13 as operators

    from asag_deploy.backends.openvino.products import multiply_in_bfloat16

    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return operators.constant(rng.normal(size=shape).astype(np.float32))

    x = operators.parameter([-1, 8, 64], openvino.Type.f32, name="x")
    y = operators.parameter([-1, 8, 32, 32], openvino.Type.f32, name="y")
    weight, bias = weights(64, 1024), weights(1024)
    layer = operators.add(operators.matmul(x, weight, False, False), bias)
    moved = operators.reshape(layer, np.array([0, 0, 32, 32]), True)
    product = operators.matmul(moved, y, False, False)
    coordinates = operators.exp(operators.matmul(x, weights(64, 4), False, False))
    outputs = {"layer": layer, "moved": moved, "product": product, "coordinates": coordinates}
    results = []
    for name, node in outputs.items():
        node.output(0).set_names({name})
        results.append(operators.result(node))
    model = multiply_in_bfloat16(openvino.Model(results, [x, y], "model"), {"layer", "coordinates"})
    kinds = {output.any_name: output.get_element_type().get_type_name() for output in model.outputs}
    assert kinds == {"layer": "f32", "moved": "bf16", "product": "bf16", "coordinates": "f32"}
    narrow = {
        node.get_type_name()
        for node in model.get_ordered_ops()
        if node.get_output_size() and node.output(0).get_element_type() == openvino.Type.bf16
    }
    assert narrow <= {"Convert", "MatMul", "Add", "Reshape", "Result"}
    converts = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convert"]
    assert len(converts) == 5  # x, the weights, the bias and y rounded, and the layer's output widened
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = [
        rng.normal(size=(2, 8, 64)).astype(np.float32),
        rng.normal(size=(2, 8, 32, 32)).astype(np.float32),
    ]
    found, expected = compiled(given)["layer"], given[0] @ weight.data + bias.data
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_plans_are_written_and_read(small_bundle: Bundle) -> None:
    found = cut(small_bundle.graph_path("decoder"))
    assert found is not None
    plan, models = found
    assert Plan.from_json(plan.to_json()) == plan
    contents = [b"".join(parts) for parts in models]
    assert len(contents) == len(plan.pieces) == len(plan.calls)
    operators = [[call.operator for call in calls] for calls in plan.calls]
    # Nothing lies between sampling and mixing, so that both are called at one cut.
    sampling = ["PyramidSample", "AdaptiveMixing"]
    assert operators == [["PadAnchors"], ["MultiscaleRoIAlign"], sampling, ["TopK"], []]
    declared = small_bundle.manifest.graph("decoder")
    assert [spec.name for spec in plan.inputs] == [spec.name for spec in declared.inputs]
    assert [spec.name for spec in plan.outputs] == [spec.name for spec in declared.outputs]
    for content in contents:
        onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    with pytest.raises(FieldError):
        Plan.from_json(b'{"pieces": []}')


def test_weights_are_in_one_piece_each_and_written_one_by_one(small_bundle: Bundle) -> None:
    path = small_bundle.graph_path("decoder")
    found = cut(path)
    assert found is not None
    weights = [len(value.raw_data) for value in onnx.load(str(path)).graph.initializer]
    sizes = [[len(part) for part in parts] for parts in found[1]]
    assert sum(map(sum, sizes)) < 1.2 * path.stat().st_size
    assert max(part for first, *others in sizes for part in others) < max(weights) + 1000
    assert sum(first for first, *_ in sizes) < path.stat().st_size - sum(weights) + 10_000


def test_graphs_that_are_not_cut(small_bundle: Bundle, tmp_path: Path) -> None:
    assert cut(small_bundle.graph_path("backbone")) is None
    model = onnx.load(str(small_bundle.graph_path("decoder")))
    for node in model.graph.node:
        node.op_type = node.op_type.replace("PadAnchors", "OfALaterRelease")
    onnx.save(model, str(tmp_path / "decoder.onnx"))
    assert cut(tmp_path / "decoder.onnx") is None


def test_an_operator_beyond_its_kernel_is_not_called(small_bundle: Bundle, tmp_path: Path) -> None:
    """A bundle with a larger cap runs whole."""
    model = onnx.load(str(small_bundle.graph_path("decoder")))
    (node,) = (node for node in model.graph.node if node.op_type == "PadAnchors")
    (cap,) = (each for each in node.attribute if each.name == "cap")
    for most in (MOST_ANCHORS, MOST_ANCHORS + 1):
        cap.i = most
        onnx.save(model, str(tmp_path / "decoder.onnx"))
        assert (cut(tmp_path / "decoder.onnx") is None) == (most > MOST_ANCHORS)


def test_values_without_a_type(small_bundle: Bundle, tmp_path: Path) -> None:
    """As quantising leaves them."""
    path = small_bundle.graph_path("decoder")
    expected, model = cut(path), onnx.load(str(path))
    del model.graph.value_info[:]
    onnx.save(model, str(tmp_path / "decoder.onnx"))
    found = cut(tmp_path / "decoder.onnx")
    assert expected is not None
    assert found is not None
    assert found[0] == expected[0]


@pytest.mark.parametrize(
    ("options", "is_called"),
    [({}, True), ({"axis": 1}, True), ({"axis": 0}, False), ({"largest": 0}, False), ({"sorted": 0}, False)],
)
def test_which_orders_are_called(tmp_path: Path, options: dict[str, Any], is_called: bool) -> None:
    nodes = [helper.make_node("TopK", ["values", "k"], ["best", "index"], **options)]
    found = cut(behind_an_operator(tmp_path / "graph.onnx", nodes, "best"))
    assert found is not None
    called = {call.operator for calls in found[0].calls for call in calls}
    assert called == ({"PadAnchors", "TopK"} if is_called else {"PadAnchors"})


def test_what_reads_a_constant_is_not_called(tmp_path: Path) -> None:
    """As the order of a number of queries that never changes does: constants are in the pieces alone."""
    file = behind_an_operator(
        tmp_path / "graph.onnx", [helper.make_node("TopK", ["values", "k"], ["best", "at"])], "best"
    )
    model = onnx.load(str(file))

    def with_constant(name: str) -> Path:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        (value,) = (value for value in changed.graph.input if value.name == name)
        changed.graph.input.remove(value)
        changed.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [1]))
        onnx.save(changed, str(tmp_path / f"{name}.onnx"))
        return tmp_path / f"{name}.onnx"

    found = cut(with_constant("k"))
    assert found is not None
    assert [[call.operator for call in calls] for calls in found[0].calls if calls] == [["PadAnchors"]]
    assert cut(with_constant("slots")) is None


def behind_an_operator(file: Path, nodes: list[onnx.NodeProto], output: str, **options: Any) -> Path:
    """Write a graph with an operator of the project's own, for without one nothing is cut, then `nodes`."""
    inputs = [
        helper.make_tensor_value_info("anchors", TensorProto.FLOAT, ["B", "N", 5]),
        helper.make_tensor_value_info("keep", TensorProto.BOOL, ["B", "N"]),
        helper.make_tensor_value_info("image_size", TensorProto.INT64, ["B", 2]),
        helper.make_tensor_value_info("slots", TensorProto.INT64, ["Q"]),
        helper.make_tensor_value_info("values", TensorProto.FLOAT, ["B", "N"]),
        helper.make_tensor_value_info("k", TensorProto.INT64, [1]),
    ]
    outputs = [
        helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["B", "Q", 4]),
        helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, None]),
    ]
    pad: dict[str, Any] = {"domain": "asag", "first_level": 1, "floor": 1, "cap": 1}
    operator = helper.make_node(
        "PadAnchors", ["anchors", "keep", "image_size", "slots"], ["queries", "n"], **pad
    )
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1, 1], [2.0])
    graph = helper.make_graph([operator, *nodes], "graph", inputs, outputs, [weight])
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 20), ("asag", 1), ("own", 1))]
    onnx.save(helper.make_model(graph, opset_imports=opsets, **options), str(file))
    return file


ENCODER = """
<ir_version: 10, opset_import: ["" : 20, "asag" : 1]>
backbone (float[batch, 3, height, width] image, int64[batch, 2] image_size)
    => (float[batch, cells, 8] refined)
{
    map3 = Conv <kernel_shape = [8, 8], strides = [8, 8]> (image, filters)
    map4 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (map3)
    map5 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (map4)
    map6 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (map5)
    p3 = Transpose <perm = [0, 2, 3, 1]> (map3)
    p4 = Transpose <perm = [0, 2, 3, 1]> (map4)
    p5 = Transpose <perm = [0, 2, 3, 1]> (map5)
    p6 = Transpose <perm = [0, 2, 3, 1]> (map6)
    size = Shape <start = 0, end = 1> (p3)
    row = Concat <axis = 0> (size, as_row)
    cells = Reshape (p3, row)
    canvas = Shape <start = 2> (image)
    canvas_float = Cast <to = 1> (canvas)
    valid = Cast <to = 1> (image_size)
    share = Div (valid, canvas_float)
    ratio = Reshape (share, as_ratio)
    offsets = MatMul (cells, to_offsets)
    places = Sigmoid (offsets)
    by_point = Reshape (places, as_points)
    xy = Mul (by_point, ratio)
    scores = MatMul (cells, to_weights)
    shares = Softmax (scores)
    weight = Reshape (shares, as_weights)
    attended = asag.DeformableSample (p3, p4, p5, p6, xy, weight)
    second = Add (cells, attended)
    offsets_2 = MatMul (second, to_offsets)
    places_2 = Sigmoid (offsets_2)
    points_2 = Add (places_2, unread)
    shape_2 = Concat <axis = 0> (size, as_points_2)
    by_point_2 = Reshape (points_2, shape_2)
    xy_2 = Mul (by_point_2, ratio)
    attended_2 = asag.DeformableSample (p3, p4, p5, p6, xy_2, weight)
    refined = Add (second, attended_2)
}
"""
"""Two layers over the maps of a picture, which they share."""


def encoder(file: Path) -> Path:
    """Write it, with weights and the operator's body."""
    from asag_export.onnx_operators import DeformableSample, function_of

    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(ENCODER)
    constants: dict[str, NDArray[Any]] = {
        "filters": rng.normal(0, 0.1, (8, 3, 8, 8)).astype(np.float32),
        "to_offsets": rng.normal(size=(8, 2 * 4 * 3 * 2)).astype(np.float32),
        "to_weights": rng.normal(size=(8, 2 * 4 * 3)).astype(np.float32),
        "unread": np.zeros(1, dtype=np.float32),
        "as_row": np.array([-1, 8]),
        "as_ratio": np.array([-1, 1, 1, 1, 1, 2]),
        "as_points": np.array([0, -1, 2, 4, 3, 2]),
        "as_points_2": np.array([-1, 2, 4, 3, 2]),
        "as_weights": np.array([0, -1, 2, 4, 3]),
    }
    model.graph.initializer.extend(numpy_helper.from_array(each, name) for name, each in constants.items())
    calls = [node for node in model.graph.node if node.domain == "asag"]
    model.functions.append(function_of(DeformableSample, calls, 20))
    onnx.save(onnx.shape_inference.infer_shapes(model), str(file))
    return file


def test_layers_over_a_picture_are_cut_and_the_network_before_them_runs_once(
    host_library_path: Path, tmp_path: Path
) -> None:
    file = encoder(tmp_path / "backbone.onnx")
    found = cut(file)
    assert found is not None
    plan, parts = found
    contents = [b"".join(each) for each in parts]
    assert [[call.operator for call in calls] for calls in plan.calls] == [["DeformableSample"]] * 2 + [[]]
    used = [{node.op_type for node in onnx.load_from_string(each).graph.node} for each in contents]
    assert "Conv" in used[0]
    # What is of numbers is handed on, and only of sizes it is found out again what they are.
    assert used[1] == {"Add", "MatMul", "Sigmoid", "Concat", "Reshape", "Mul"}
    assert used[2] == {"Add"}
    assert set(plan.pieces[1].inputs) == {"cells", "attended", "ratio", "size"}

    rng = np.random.default_rng(1)
    image = rng.normal(size=(2, 3, 128, 192)).astype(np.float32)
    given: dict[str, Any] = {"image": image, "image_size": np.array([[128, 160], [100, 192]])}
    (expected,) = session(file.read_bytes()).run(None, given)
    kernels = CpuKernels(host_library_path)
    spec = GraphSpec(name="backbone", file="", sha256="", inputs=plan.inputs, outputs=plan.outputs)
    pieces = [as_stage(content) for content in contents]
    stage = StageInPieces(spec, plan, pieces, kernels, Plainly(), threads=2)
    np.testing.assert_allclose(stage(given)["refined"], expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 1


def session(content: bytes) -> Any:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def as_stage(content: bytes) -> Any:
    """A piece as ONNX Runtime runs it, on NumPy's arrays."""
    piece = session(content)
    inputs, outputs = ([node.name for node in side] for side in (piece.get_inputs(), piece.get_outputs()))

    def run(values: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(outputs, piece.run(None, {name: values[name] for name in inputs}), strict=True))

    return run


class Plainly:
    """NumPy's arrays, where they lie."""

    def view(self, array: Any) -> Any:
        return array

    def wrap(self, values: Any) -> Any:
        return values


def test_values_go_when_they_have_been_read(host_library_path: Path, tmp_path: Path) -> None:
    found = cut(encoder(tmp_path / "backbone.onnx"))
    assert found is not None
    plan, parts = found
    seen: list[set[str]] = []

    def watched(stage: Any) -> Any:
        def run(values: dict[str, Any]) -> dict[str, Any]:
            seen.append(set(values))
            outputs: dict[str, Any] = stage(values)
            return outputs

        return run

    pieces = [watched(as_stage(b"".join(each))) for each in parts]
    spec = GraphSpec(name="backbone", file="", sha256="", inputs=plan.inputs, outputs=plan.outputs)
    stage = StageInPieces(spec, plan, pieces, CpuKernels(host_library_path), Plainly(), threads=1)
    stage({"image": np.ones((1, 3, 128, 128), np.float32), "image_size": np.array([[128, 128]])})
    pictures = {"image", "image_size"}
    maps = {"p3", "p4", "p5", "p6"}
    assert seen[0] == pictures
    assert seen[1] == pictures | maps | {"cells", "attended", "ratio", "size", "weight"}
    assert seen[2] == pictures | {"second", "attended_2"}


def test_which_graphs_are_cut(small_bundle: Bundle, tmp_path: Path) -> None:
    file = encoder(tmp_path / "backbone.onnx")
    assert is_cut("backbone", file)
    assert is_cut("decoder", small_bundle.graph_path("decoder"))
    assert not is_cut("backbone", small_bundle.graph_path("backbone"))
    assert not is_cut("backbone", tmp_path / "none.onnx")
    assert has_function(small_bundle.graph_path("decoder"), "PadAnchors")
    content = file.read_bytes()
    for end in range(0, len(content), 97):  # whatever is left of it, nothing is raised
        file.write_bytes(content[:end])
        assert not is_cut("backbone", file)
    for text in (b"\xff" * 30, b"\xca\x01" + b"\xff" * 9 + b"\x01", b"\x08", b"\x0b\x00"):
        file.write_bytes(text)
        assert not is_cut("backbone", file)


def test_graphs_inside_nodes_keep_what_they_read_outside(tmp_path: Path) -> None:
    inner = [helper.make_node("Mul", ["values", "weight"], ["product"])]
    inner += [helper.make_node("Neg", ["product"], ["negative"])]
    results = [helper.make_tensor_value_info("negative", TensorProto.FLOAT, [None, None])]
    branch = helper.make_graph(inner, "branch", [], results)
    nodes = [
        helper.make_node("ReduceMax", ["keep_number"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["which"], to=TensorProto.BOOL),
        helper.make_node("If", ["which"], ["chosen"], then_branch=branch, else_branch=branch),
    ]
    nodes.insert(0, helper.make_node("Cast", ["keep"], ["keep_number"], to=TensorProto.FLOAT))
    found = cut(behind_an_operator(tmp_path / "graph.onnx", nodes, "chosen"))
    assert found is not None
    plan, models = found
    contents = [b"".join(parts) for parts in models]
    at = next(i for i, piece in enumerate(plan.pieces) if "chosen" in piece.outputs)
    piece = onnx.load_from_string(contents[at])
    assert [value.name for value in piece.graph.initializer] == ["weight"]
    assert {value.name for value in piece.graph.input} == {"values", "keep"}
    onnx.checker.check_model(piece, full_check=True)


def test_graphs_with_other_functions_or_outputs_that_nothing_computes_run_whole(tmp_path: Path) -> None:
    def calling(operator: str) -> Path:
        body = [helper.make_node("Neg", ["x"], ["y"])]
        function = helper.make_function("own", "Own", ["x"], ["y"], body, [helper.make_opsetid("", 20)])
        nodes = [helper.make_node(operator, ["values"], ["result"], domain="own" * (operator == "Own"))]
        return behind_an_operator(tmp_path / "graph.onnx", nodes, "result", functions=[function])

    assert cut(calling("Neg")) is not None
    assert cut(calling("Own")) is None
    assert cut(behind_an_operator(tmp_path / "graph.onnx", [], "weight")) is None


def test_an_onnx_that_cannot_be_loaded(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = behind_an_operator(tmp_path / "graph.onnx", [helper.make_node("Neg", ["values"], ["y"])], "y")
    assert cut(file) is not None
    (tmp_path / "onnx.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnx"]:
        monkeypatch.delitem(sys.modules, name)
    assert cut(file) is None
    assert "cannot be loaded (Descriptors cannot" in str(why_no_pieces())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_pieces_that_cannot_be_loaded(
    compiled: Path, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(cutting._Cutter, "_parts_of", lambda *_: iter([b"no", b" graph"]))
    with pytest.warns(RuntimeWarning, match="the graph 'decoder' runs whole, which is slower: "):
        network = open_network(backend, small_bundle, threads=1)
    assert not isinstance(network.stage("decoder"), StageInPieces)
    run(network, small_bundle)


def test_without_the_operators_or_onnx_graphs_run_whole(
    compiled: Path, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_no_pieces() is None
    with graphs_run_whole():
        whole = open_network("onnxruntime", small_bundle, threads=1)
    assert not isinstance(whole.stage("decoder"), StageInPieces)
    assert whole.patch_finder() is patch_nms
    with monkeypatch.context() as patch:
        for module in ("pieces", "cutting"):
            patch.setattr(f"asag_deploy.backends.{module}.can_cut", lambda: False)
        network = open_network("onnxruntime", small_bundle, threads=1)
        assert not isinstance(network.stage("decoder"), StageInPieces)
        assert "package onnx is not installed" in str(why_no_pieces())
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, "/no/such.so")
    with pytest.raises(BackendError, match="which is no file"):
        open_network("onnxruntime", small_bundle, threads=1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_graph_that_is_no_graph(compiled: Path, small_bundle: Bundle, tmp_path: Path, backend: str) -> None:
    """As where graphs run whole: one sentence that names the file."""
    shutil.copytree(small_bundle.path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.graph_path("decoder").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"could not load '.*decoder\.onnx'"):
        open_network(backend, bundle, threads=1)


@pytest.mark.parametrize(
    ("threads", "requests", "expected"), [(4, 1, 4), (4, 2, 2), (1, 3, 1), (1000, 1, 512)]
)
def test_threads_of_an_operator(threads: int, requests: int, expected: int) -> None:
    assert threads_of_an_operator(threads, requests) == expected


def test_graphs_in_float16_run_whole(small_bundle: Bundle) -> None:
    """The operators give float32, or bfloat16, which what stands between them would not take."""
    assert is_cut_of(small_bundle, "decoder")
    assert not is_cut_of(small_bundle, "backbone")
    manifest = dataclasses.replace(small_bundle.manifest, precision="fp16")
    assert not is_cut_of(dataclasses.replace(small_bundle, manifest=manifest), "decoder")
