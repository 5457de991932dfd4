"""Products in bfloat16 inside a model that computes in float32.

What costs accuracy in bfloat16 is coordinates, logarithms and sums of many terms; what costs time is
products.  So the two factors of a product are rounded, and so is what only moves values between products;
everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

from asag_deploy.backends.openvino.long_sums import int8_weights

if TYPE_CHECKING:
    from openvino import Model, Node, Output

_LEAST_WEIGHTS = 2**15
"""Of a layer that is worth it: below, turning numbers around takes longer than the product saves."""
_LEAST_FACTOR = 2**9
"""Elements that the last two axes of a product of two computed factors have at least."""
_MOVING = frozenset({"Reshape", "Transpose", "VariadicSplit", "Split", "Slice", "StridedSlice", "Unsqueeze"})
"""Layers that move the values of their first input, and change none."""


def multiply_in_bfloat16(model: Model, outputs: Container[str] = ()) -> Model:
    """Round the factors of large products of float32 to bfloat16; the model is changed and returned.

    Those with INT8 weights stay what they are, which is faster still.

    outputs: those that stay float32; others may become bfloat16.
    """
    results = [(result, result.input_value(0).names) for result in model.get_results()]
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and _is_large(node):
            for port in node.inputs():
                port.replace_source_output(_rounded(port.get_source_output()))
            node.validate_and_infer_types()
            _widen(_with_bias(node))
        elif node.get_type_name() in _MOVING and _before_widening(node.input_value(0)) is not None:
            node.input(0).replace_source_output(_before_widening(node.input_value(0)))
            node.validate_and_infer_types()
            _widen(node)
    for result, names in results:
        narrow = _before_widening(result.input_value(0))
        if narrow is not None and names.isdisjoint(outputs):
            result.input_value(0).set_names(set())
            narrow.set_names(names)
            result.input(0).replace_source_output(narrow)
    model.validate_nodes_and_infer_types()
    return model


def _rounded(value: Output) -> Output:
    """Return a value in bfloat16: as it was before it was widened, or rounded."""
    from openvino import opset13 as operators

    return _before_widening(value) or operators.convert(value, "bf16").output(0)


def _before_widening(value: Output) -> Output | None:
    """Return the value in bfloat16 that this one in float32 is; None if it is none."""
    import openvino

    node = value.get_node()
    if node.get_type_name() != "Convert" or node.input_value(0).get_element_type() != openvino.Type.bf16:
        return None
    return node.input_value(0)


def _with_bias(product: Node) -> Node:
    """Add a layer's constant in bfloat16 too, which is then part of the product; return what adds it."""
    users = list(product.output(0).get_target_inputs())
    if len(users) != 1 or users[0].get_node().get_type_name() != "Add":
        return product
    sum_ = users[0].get_node()
    other = sum_.input(1 - users[0].get_index())
    if not _is_constant(other.get_source_output()):
        return product
    other.replace_source_output(_rounded(other.get_source_output()))
    sum_.validate_and_infer_types()
    return sum_


def _widen(node: Node) -> None:
    """Let all who read a node's outputs, now bfloat16, read them as float32."""
    from openvino import opset13 as operators

    for output in node.outputs():
        readers = list(output.get_target_inputs())
        widened = operators.convert(output, "f32").output(0)
        widened.set_names(output.names)
        output.set_names(set())
        for reader in readers:
            reader.replace_source_output(widened)


def _is_large(node: Node) -> bool:
    """Tell whether it is a product of float32 with many weights, or of two large factors of known sizes."""
    import openvino

    if node.get_element_type() != openvino.Type.f32 or int8_weights(node.input_value(1)) is not None:
        return False
    sizes = [_known_size(value) for value in node.input_values()]
    if _is_constant(node.input_value(1)):
        return sizes[1] is not None and sizes[1] >= _LEAST_WEIGHTS
    return all(size is not None and size >= _LEAST_FACTOR for size in sizes)


def _known_size(value: Output) -> int | None:
    """Return how many elements the last two axes have; None if that is decided by the images."""
    shape: Any = value.get_partial_shape()
    if shape.rank.is_dynamic or len(shape) < 2 or any(size.is_dynamic for size in list(shape)[-2:]):
        return None
    height, width = (size.get_length() for size in list(shape)[-2:])
    return int(height * width)


def _is_constant(value: Output) -> bool:
    """Tell whether a value is made of constants alone."""
    front, seen = [value.get_node()], set()
    while front:
        node = front.pop()
        if node.get_type_name() == "Parameter":
            return False
        if node.friendly_name not in seen:
            seen.add(node.friendly_name)
            front += [each.get_node() for each in node.input_values()]
    return True
