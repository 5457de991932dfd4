"""Products of float32 matrices without a matrix product, for GPUs whose compiler has none.

TensorRT-RTX refuses float32 matrix products on Turing (compute capability 7.5), but takes convolutions,
element-wise products and sums.  So a product with a matrix of weights becomes a 1x1 convolution, with every
row as an image of one pixel, and a product of two activations becomes what it is by definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_FLOAT = 1  # onnx.TensorProto.FLOAT

Shape = tuple[int | None, ...] | None
"""Sizes that are known, or None for one, or all, that are not."""


@dataclass(frozen=True)
class _Tensor:
    elem_type: int
    shape: Shape


@dataclass
class _Spelling:
    """The nodes that take a product's place, and the constants that they need, which all nodes share."""

    tensors: Mapping[str, _Tensor]
    initializers: dict[str, onnx.TensorProto]
    added: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, *values: int) -> str:
        """Add an int64 vector of these values and return its name."""
        return self.array(
            "asag_sizes_" + "_".join(str(v).replace("-", "m") for v in values), np.array(values)
        )

    def array(self, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        """Add a constant of this value and return its name."""
        from onnx import numpy_helper

        if name not in self.added:
            self.added[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name


def spell_out_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model without functions so that no MatMul has float32 operands.

    The results differ by the rounding of sums in another order.  Loop and If bodies are included.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    initializers = {tensor.name: tensor for tensor in copy.graph.initializer}
    spelling = _Spelling(_tensors(inferred.graph), initializers)
    _rewrite(copy.graph, inferred.graph, spelling)
    copy.graph.initializer.extend(spelling.added.values())
    _drop_unused(copy.graph)
    return copy


def _rewrite(graph: onnx.GraphProto, inferred: onnx.GraphProto, spelling: _Spelling) -> None:
    nodes = []
    for node, same in zip(graph.node, inferred.node, strict=True):
        for body, inferred_body in zip(bodies(node), bodies(same), strict=True):
            inner = _Spelling(
                {**spelling.tensors, **_tensors(inferred_body)}, spelling.initializers, spelling.added
            )
            _rewrite(body, inferred_body, inner)
        if node.op_type == "MatMul" and node.domain == "" and _is_float(node, spelling.tensors):
            nodes.extend(_product(node, spelling))
        else:
            nodes.append(node)
    copies = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs inside a node: the body of a loop, the branches of an If."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _is_float(node: onnx.NodeProto, tensors: Mapping[str, _Tensor]) -> bool:
    """Return whether a product is of float32: both operands have one type, and either may be known."""
    return any(tensors[name].elem_type == _FLOAT for name in node.input if name in tensors)


def _product(node: onnx.NodeProto, spelling: _Spelling) -> list[onnx.NodeProto]:
    right = spelling.tensors.get(node.input[1])
    if right is not None and right.shape is not None and len(right.shape) == 2:
        inner, outer = right.shape
        if inner is not None and outer is not None:
            return _convolution(node, inner, outer, spelling)
    return _sum_of_products(node, spelling)


def _convolution(node: onnx.NodeProto, inner: int, outer: int, spelling: _Spelling) -> list[onnx.NodeProto]:
    """Multiply (..., inner) by (inner, outer): every row is an image of one pixel and `inner` channels."""
    from onnx import helper, numpy_helper

    left, right = node.input
    (result,) = node.output
    stem = f"{node.name or result}_spelt"
    nodes = []
    if right in spelling.initializers:
        weights = numpy_helper.to_array(spelling.initializers[right])
        kernel = spelling.array(f"{right}_as_kernel", weights.T[:, :, None, None])
    else:
        kernel = f"{stem}_kernel"
        nodes += [
            helper.make_node("Transpose", [right], [f"{stem}_turned"], f"{stem}_turn", perm=[1, 0]),
            helper.make_node(
                "Reshape",
                [f"{stem}_turned", spelling.constant(outer, inner, 1, 1)],
                [kernel],
                f"{stem}_as_kernel",
            ),
        ]
    nodes += [
        helper.make_node(
            "Reshape", [left, spelling.constant(-1, inner, 1, 1)], [f"{stem}_pixels"], f"{stem}_as_pixels"
        ),
        helper.make_node("Conv", [f"{stem}_pixels", kernel], [f"{stem}_out"], node.name, kernel_shape=[1, 1]),
        helper.make_node("Shape", [left], [f"{stem}_rows"], f"{stem}_shape", end=-1),
        helper.make_node(
            "Concat", [f"{stem}_rows", spelling.constant(outer)], [f"{stem}_sizes"], f"{stem}_concat", axis=0
        ),
        helper.make_node("Reshape", [f"{stem}_out", f"{stem}_sizes"], [result], f"{stem}_as_rows"),
    ]
    return nodes


def _sum_of_products(node: onnx.NodeProto, spelling: _Spelling) -> list[onnx.NodeProto]:
    """Multiply (..., rows, inner, 1) by (..., 1, inner, columns) and sum over `inner`."""
    from onnx import helper

    left, right = node.input
    (result,) = node.output
    stem = f"{node.name or result}_spelt"
    return [
        helper.make_node("Unsqueeze", [left, spelling.constant(-1)], [f"{stem}_left"], f"{stem}_rows"),
        helper.make_node("Unsqueeze", [right, spelling.constant(-3)], [f"{stem}_right"], f"{stem}_columns"),
        helper.make_node("Mul", [f"{stem}_left", f"{stem}_right"], [f"{stem}_terms"], node.name),
        helper.make_node(
            "ReduceSum", [f"{stem}_terms", spelling.constant(-2)], [result], f"{stem}_sum", keepdims=0
        ),
    ]


def _tensors(graph: onnx.GraphProto) -> dict[str, _Tensor]:
    found = {
        value.name: _Tensor(value.type.tensor_type.elem_type, _shape(value))
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    for tensor in graph.initializer:
        found[tensor.name] = _Tensor(tensor.data_type, tuple(tensor.dims))
    return found


def _shape(value: onnx.ValueInfoProto) -> Shape:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim
    )


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Drop the weights that only products used: they would be in the engine twice."""
    used = names_read(graph)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Collect the values that are read in a graph or in bodies of its loops and branches, and its results."""
    found = {value.name for value in graph.output}
    for node in graph.node:
        found.update(node.input)
        found.update(*(names_read(body) for body in bodies(node)))
    return found
