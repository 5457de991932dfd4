"""Choose the nodes that are quantised.

In the backbone graph this is everything that the feature maps P2..P5 come from: convolutions, and what lies
between them, so that a map is never turned back into float32 on its way.  That is 115 of 120 GMAC.  The
anchor generator in the same graph stays in float32, and so do coordinates, and an encoder after the
convolutions: where its layers look is decided by small differences.

In the decoder it is the few products that have most of its weights: those on the RoI features, and those
before and after the adaptive mixing (4 of the decoder's 5 GMAC).  Sums, attention, and what makes
classes and boxes of a query stay in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from asag_deploy.engines.matmul_as_conv import names_read
from asag_deploy.errors import ConfigError
from asag_deploy.loop.stages import FEATURES

OPERATORS = ("Conv", "Add", "Relu", "MaxPool", "Resize")
"""The types of nodes that carry feature maps."""

LEAST_SHARE = 0.1
"""Of the weights of all products of a graph: those that have less are not worth their rounding."""

_MOVES = ("Reshape", "Transpose")


def feature_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Find the nodes to quantise, in graph order; raises ConfigError if no convolution is among them."""
    producers = {output: node for node in model.graph.node for output in node.output}
    wanted = set(_ancestors(producers))
    carried: set[str] = set()
    found = []
    for node in model.graph.node:
        if node.output[0] in wanted and node.op_type in OPERATORS and _carries_a_map(node, carried):
            carried.update(node.output)
            found.append(node)
    if not any(node.op_type == "Conv" for node in found):
        raise ConfigError(
            "the graph 'backbone' computes its feature maps without convolutions, so there is nothing to "
            "quantise; export the bundle again with `asag-export`"
        )
    return found


def product_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Find the products with weights to quantise, in graph order; raises ConfigError if there is none."""
    sizes = {item.name: int(np.prod(item.dims)) for item in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in sizes]
    least = LEAST_SHARE * sum(sizes[node.input[1]] for node in products)
    found = [node for node in products if sizes[node.input[1]] >= least]
    if not found:
        raise ConfigError(
            "the graph 'decoder' multiplies by no weights, so there is nothing to quantise; export the "
            "bundle again with `asag-export`"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Choice of what is quantised in one graph."""

    operators: tuple[str, ...]
    """Types of nodes; no other is."""
    choose: Callable[[onnx.ModelProto], list[onnx.NodeProto]]
    results: bool
    """True if the nodes' results are quantised too, and not only their inputs."""


PLACEMENTS = {
    "backbone": Placement(operators=OPERATORS, choose=feature_nodes, results=True),
    "decoder": Placement(operators=("MatMul",), choose=product_nodes, results=False),
}
"""Of each graph that is quantised; all others stay as they are."""


def settle_weights(model: onnx.ModelProto) -> None:
    """Put in place the weights of products that the graph itself transposes or reshapes at each run."""
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {item.name: item for item in model.graph.initializer}

    def constant(name: str) -> bool:
        node = producers.get(name)
        if node is None:
            return name in constants
        return node.op_type in _MOVES and all(constant(source) for source in node.input)

    settled = dict.fromkeys(
        node.input[1]
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in producers and constant(node.input[1])
    )  # in the graph's order, so that the same bundle gives the same file

    def value(name: str) -> NDArray[Any]:
        if name in constants:
            return numpy_helper.to_array(constants[name])
        node = producers[name]
        moved: Any = ReferenceEvaluator(node).run(None, {source: value(source) for source in node.input})
        return np.ascontiguousarray(moved[0])

    for name in settled:
        model.graph.initializer.append(numpy_helper.from_array(value(name), name))
        model.graph.node.remove(producers[name])
    _drop_unread(model)


def _drop_unread(model: onnx.ModelProto) -> None:
    """Remove moved constants that nothing reads any more: a float32 weight would stay in the file."""
    graph = model.graph
    for node in reversed(list(graph.node)):
        if node.op_type in _MOVES and node.output[0] not in names_read(graph):
            graph.node.remove(node)
    read = names_read(graph)
    for item in [item for item in graph.initializer if item.name not in read]:
        graph.initializer.remove(item)


def rectified(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> dict[str, str]:
    """Map each tensor that only a ReLU among `nodes` reads to that ReLU's result."""
    readers = Counter(name for node in model.graph.node for name in node.input)
    return {
        node.input[0]: node.output[0]
        for node in nodes
        if node.op_type == "Relu" and readers[node.input[0]] == 1
    }


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, by which the quantiser knows it."""
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"


def _ancestors(producers: dict[str, onnx.NodeProto]) -> dict[str, None]:
    """Collect all tensors that the feature maps are computed from, the maps included."""
    found: dict[str, None] = {}
    front = [name for name in FEATURES if name in producers]
    while front:
        name = front.pop()
        if name in producers and name not in found:
            found[name] = None
            front.extend(producers[name].input)
    return found


def _carries_a_map(node: onnx.NodeProto, carried: set[str]) -> bool:
    """Return whether a node works on feature maps, given the maps before it.

    Sums of sizes are additions too, and an encoder's layers have activations between products.
    """
    return node.op_type not in ("Add", "Relu") or carried.issuperset(node.input)
