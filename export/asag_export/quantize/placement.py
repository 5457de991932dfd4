"""Which nodes of the backbone graph are quantised.

Everything that the feature maps P2..P5 come from: convolutions, and what lies between them, so that a map is
never turned back into float32 on its way.  That is 115 of 120 GMAC.  The anchor generator in the same graph
stays in float32, and so do coordinates.
"""

from __future__ import annotations

from collections import Counter

import onnx

from asag_deploy.errors import ConfigError

OPERATORS = ("Conv", "Add", "Relu", "MaxPool", "Resize")
"""The types of nodes that carry feature maps."""

FEATURES = ("p2", "p3", "p4", "p5")


def feature_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes to quantise, in graph order; raises ConfigError if there is no convolution among them."""
    producers = {output: node for node in model.graph.node for output in node.output}
    wanted = set(_ancestors(producers))
    found = [
        node
        for node in model.graph.node
        if node.output[0] in wanted and node.op_type in OPERATORS and _carries_a_map(node, producers)
    ]
    if not any(node.op_type == "Conv" for node in found):
        raise ConfigError(
            "the graph 'backbone' computes its feature maps without convolutions, so there is nothing to "
            "quantise; export the bundle again with `asag-export`"
        )
    return found


def rectified(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> dict[str, str]:
    """Tensors that only a ReLU among `nodes` reads, each with what that ReLU makes of it."""
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
    """All tensors that the feature maps are computed from, the maps included."""
    found: dict[str, None] = {}
    front = [name for name in FEATURES if name in producers]
    while front:
        name = front.pop()
        if name in producers and name not in found:
            found[name] = None
            front.extend(producers[name].input)
    return found


def _carries_a_map(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether it works on feature maps: sums of sizes are additions too."""
    if node.op_type != "Add":
        return True
    return all(name in producers and producers[name].op_type in OPERATORS for name in node.input)
