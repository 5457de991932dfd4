"""Feature maps that an INT8 graph hands out as the integers that it computes them in.

A quantised graph ends with turning its maps into floats.  Whoever can read integers with a scale, such as the
operators that are compiled for the CPU, spares that, and most of the memory that the maps take.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.loop.stages import features_among

if TYPE_CHECKING:
    from openvino import Model, Node, Output

SCALE = "_scale"
"""Ends the name of the output that holds the scale of a map."""


def maps_for_the_decoder(manifest: Manifest) -> frozenset[str]:
    """Return the maps of `backbone` that only the decoder reads: those that no probe looks at again."""
    made = frozenset(features_among(spec.name for spec in manifest.graph("backbone").outputs))
    return made - {probed.level.lower() for probed in manifest.probing.levels}


def hand_out_integers(model: Model, names: Container[str]) -> None:
    """Let a model put out those maps of `names` that it has as int8 as such, each with its scale beside it.

    Maps that it has not, or whose integers stand for something else, stay as they are.
    """
    from openvino import opset13 as operators

    for result in list(model.get_results()):
        value = result.input_value(0)
        name = next((each for each in value.names if each in names), None)
        found = None if name is None else _integers_before(value.get_node())
        if name is None or found is None:
            continue
        integers, scale = found
        moved = operators.transpose(integers, value.get_node().input_value(1))
        moved.friendly_name = value.get_node().friendly_name
        value.set_names(set())
        moved.output(0).set_names({name})
        result.input(0).replace_source_output(moved.output(0))
        scale_result = operators.result(operators.reshape(scale, [1], special_zero=False))
        scale_result.input_value(0).set_names({name + SCALE})
        scale_result.input_value(0).get_node().friendly_name = name + SCALE
        model.add_results([scale_result])
    model.validate_nodes_and_infer_types()


def _integers_before(transposed: Node) -> tuple[Output, Output] | None:
    """Find the int8 values and the one scale of which a transposed map is the product."""
    import openvino

    if transposed.get_type_name() != "Transpose":
        return None
    scaled = transposed.input_value(0).get_node()
    if scaled.get_type_name() != "Multiply" or not _is_one_number(scaled.input_value(1)):
        return None
    centred = scaled.input_value(0).get_node()
    if centred.get_type_name() == "Subtract":
        if not _is_zero(centred.input_value(1)):
            return None
        centred = centred.input_value(0).get_node()
    if centred.get_type_name() != "Convert" or centred.input_value(0).get_element_type() != openvino.Type.i8:
        return None
    return centred.input_value(0), scaled.input_value(1)


def _is_one_number(value: Output) -> bool:
    constant = value.get_node()
    return bool(constant.get_type_name() == "Constant" and constant.get_data().size == 1)


def _is_zero(value: Output) -> bool:
    constant = value.get_node()
    if constant.get_type_name() == "Convert":
        constant = constant.input_value(0).get_node()
    return bool(constant.get_type_name() == "Constant" and not constant.get_data().any())
