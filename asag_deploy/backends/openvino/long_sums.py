"""INT8 products of very long rows, cut into several that OpenVINO computes faster.

Each output of the layer behind adaptive mixing is a sum of 32768 terms (256 channels of 128 points).  In one
product OpenVINO 2026.4 goes through rows and weights once for every block of outputs, and takes four times as
long as for products of 8192 terms each, whose results are added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openvino import Model, Node, Output

_LONGEST = 2**13
"""Terms of a sum that are left in one product."""
_SCALING = frozenset({"Multiply", "Subtract", "Convert"})
"""What turns integers into what they stand for, from the last to the first."""


def split_long_sums(model: Model) -> Model:
    """Cut the sums of products with INT8 weights where they are long; the model is changed and returned.

    Sums of floats are taken in another order, so that results differ by rounding.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            _split(node)
    model.validate_nodes_and_infer_types()
    return model


def _split(product: Node) -> None:
    """Replace a product by a sum of products, if its weights are INT8 and its sums long."""
    from openvino import opset13 as operators

    if any(product.get_attributes()[which] for which in ("transpose_a", "transpose_b")):
        return
    weights = int8_weights(product.input_value(1))
    if weights is None or len(weights.shape) != 2 or weights.shape[0] <= _LONGEST:
        return
    parts, rest = divmod(weights.shape[0], _LONGEST)
    if rest:
        return
    factors = operators.split(product.input_value(0), -1, parts).outputs()
    first, *others = (
        operators.matmul(factor, _scaled(product.input_value(1), weights, part), False, False).output(0)
        for part, factor in enumerate(factors)
    )
    for other in others:
        first = operators.add(first, other).output(0)
    names = product.output(0).names
    product.output(0).set_names(set())
    first.set_names(names)
    for reader in list(product.output(0).get_target_inputs()):
        reader.replace_source_output(first)


def int8_weights(value: Output) -> Node | None:
    """Return the constant of int8 that a value is, scaled by a number for each column; None if it is none."""
    import openvino

    node = value.get_node()
    while node.get_type_name() in _SCALING:
        if node.get_type_name() != "Convert" and not _of_columns(node.input_value(1)):
            return None
        node = node.input_value(0).get_node()
    integers = node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8
    return node if integers else None


def _of_columns(value: Output) -> bool:
    """Tell whether a value is the same for all rows."""
    shape = value.get_partial_shape()
    return shape.is_static and (len(shape) < 2 or shape[len(shape) - 2].get_length() == 1)


def _scaled(value: Output, weights: Node, part: int) -> Output:
    """Write one part of the weights' rows, scaled as all of them are."""
    from openvino import opset13 as operators

    node = value.get_node()
    if node.get_type_name() == "Constant":
        rows = weights.data[part * _LONGEST : (part + 1) * _LONGEST]
        return operators.constant(rows).output(0)
    inner = _scaled(node.input_value(0), weights, part)
    if node.get_type_name() == "Convert":
        return operators.convert(inner, "f32").output(0)
    make = operators.multiply if node.get_type_name() == "Multiply" else operators.subtract
    return make(inner, node.input_value(1)).output(0)
