"""Graphs as the parser is to read them compute what they computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from asag_deploy.engines.parser_graph import (
    Plugin,
    computes_with_sizes,
    control_flow,
    for_parser,
    operators_of,
)
from asag_deploy.errors import BundleCorruptError
from asag_deploy.kernels.limits import MOST_ANCHORS
from support import engine_bundle

SIZES = {"batch": 2, "height": 64, "width": 96, "height_p5": 2, "width_p5": 3, "queries": 5}


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


def read(content: bytes) -> onnx.ModelProto:
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(model: onnx.ModelProto) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed = {}
    for value in model.graph.input:
        shape = [dim.dim_value or SIZES[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = (127 + 20 * rng.normal(size=shape)).astype(dtype)
    return [np.asarray(out) for out in session.run(None, feed)]


@pytest.mark.parametrize("turing", [False, True])
@pytest.mark.parametrize("name", ["normalize", "backbone", "decoder"])
def test_the_graph_computes_the_same(name: str, turing: bool) -> None:
    model = engine_bundle.graphs()[name]
    rewritten = read(for_parser(model.SerializeToString(), name=name, plugins=(), turing=turing))
    for before, after in zip(outputs(model), outputs(rewritten), strict=True):
        assert np.ptp(before) > 0
        np.testing.assert_allclose(after, before, rtol=1e-6)
    assert [value.name for value in rewritten.graph.input] == [value.name for value in model.graph.input]


def test_nothing_but_a_cast_reads_bytes() -> None:
    model = engine_bundle.graphs()["normalize"]
    rewritten = read(for_parser(model.SerializeToString(), name="normalize", plugins=(), turing=False))
    readers = [node.op_type for node in rewritten.graph.node if "pixels" in node.input]
    assert readers == ["Cast"]


def test_products_are_spelt_out_for_turing_alone_and_inside_loops_too() -> None:
    content = engine_bundle.graphs()["decoder"].SerializeToString()
    for turing, products in ((False, 4), (True, 0)):
        rewritten = read(for_parser(content, name="decoder", plugins=(), turing=turing))
        assert [node.op_type for node in nodes(rewritten.graph)].count("MatMul") == products


def test_weights_that_became_kernels_are_not_there_twice() -> None:
    content = engine_bundle.graphs()["decoder"].SerializeToString()
    rewritten = read(for_parser(content, name="decoder", plugins=(), turing=True))
    names = {tensor.name for tensor in rewritten.graph.initializer}
    assert "weights_as_kernel" in names
    assert "weights" not in names


def test_half_precision_products_stay() -> None:
    content = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float16[a, b] x, float16[b, c] y) => (float16[a, c] z)'
        "{ z = MatMul (x, y) }"
    ).SerializeToString()
    rewritten = read(for_parser(content, name="g", plugins=(), turing=True))
    assert [node.op_type for node in rewritten.graph.node] == ["MatMul"]


def test_operators_are_expanded_where_there_is_no_plugin() -> None:
    content = engine_bundle.graphs()["backbone"].SerializeToString()
    assert operators_of(content, "backbone") == {"PadAnchors"}
    rewritten = read(for_parser(content, name="backbone", plugins=(), turing=False))
    assert not rewritten.functions
    assert operators_of(rewritten.SerializeToString(), "backbone") == set()


def test_a_plugin_takes_the_place_of_an_operator_and_of_its_body() -> None:
    content = engine_bundle.graphs()["backbone"].SerializeToString()
    plugin = Plugin(operator="PadAnchors")
    rewritten = onnx.load_model_from_string(
        for_parser(content, name="backbone", plugins=[plugin], turing=False)
    )
    assert not rewritten.functions
    (node,) = (node for node in rewritten.graph.node if node.op_type == "AsagPadAnchors")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"cap": 4, "plugin_version": b"1"}
    assert list(node.input) == ["other", "keep"]


def test_an_operator_beyond_its_kernel_keeps_its_body() -> None:
    model = engine_bundle.graphs()["backbone"]
    (node,) = (node for node in model.graph.node if node.op_type == "PadAnchors")
    node.attribute[0].i = MOST_ANCHORS + 1
    content = model.SerializeToString()
    assert operators_of(content, "backbone") == set()
    plugin = Plugin(operator="PadAnchors")
    rewritten = read(for_parser(content, name="backbone", plugins=[plugin], turing=False))
    for before, after in zip(outputs(model), outputs(rewritten), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-6)


HIDDEN = """
g (float[n, m] x) => (float[n, m] y) { y = asag.Settle (x) }
<domain: "asag", opset_import: ["" : 20]>
Settle (x) => (y)
{
    yes = Constant <value = bool {1}> ()
    y = If <
        then_branch = then () => (float[n, m] a) {
            rows = Shape (x)
            a = Expand (x, rows)
        },
        else_branch = other () => (float[n, m] b) { b = Identity (x) }
    > (yes)
}
"""


def test_what_decides_is_seen_in_functions_but_not_behind_plugins() -> None:
    content = onnx.parser.parse_model(engine_bundle.HEADER + HIDDEN).SerializeToString()
    expanded = for_parser(content, name="g", plugins=(), turing=False)
    assert [found.partition(" ")[0] for found in control_flow(expanded, "g")] == ["If"]
    assert computes_with_sizes(expanded, "g")  # inside the branch
    replaced = for_parser(content, name="g", plugins=[Plugin(operator="Settle")], turing=False)
    assert control_flow(replaced, "g") == ()
    assert not computes_with_sizes(replaced, "g")


def test_what_decides_is_named() -> None:
    decoder = engine_bundle.graphs()["decoder"]
    next(node for node in decoder.graph.node if node.op_type == "Loop").name = "rounds"
    assert control_flow(decoder.SerializeToString(), "decoder") == ("Loop 'rounds'",)
    assert control_flow(engine_bundle.graphs()["normalize"].SerializeToString(), "normalize") == ()


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(BundleCorruptError, match="the graph 'decoder' is not an ONNX model"):
        for_parser(b"no model", name="decoder", plugins=(), turing=False)
