"""What an INT8 graph hands out as feature maps.

A quantised graph ends with rounding its maps to integers and turning these into floats.  Whoever can read
integers with a scale, such as the operators that are compiled for the CPU, is given them as they are; to all
others go the floats that would have been rounded.  Both spare passes over the maps, which in INT8 are a
quarter of ResNet-50's time and more of a light network's.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from asag_deploy.backends.openvino.one_size import takes_pictures
from asag_deploy.bundle.manifest import Manifest
from asag_deploy.loop.stages import FEATURES, features_among

if TYPE_CHECKING:
    from openvino import Model, Node, Output

SCALE = "_scale"
"""Ends the name of the output that holds the scale of a map."""


def maps_for_the_decoder(manifest: Manifest) -> frozenset[str]:
    """Return the maps that only the decoder reads: those that no probe looks at again."""
    backbones = [graph for graph in manifest.graphs if takes_pictures(graph)]
    made = frozenset(features_among(spec.name for graph in backbones for spec in graph.outputs))
    return made - {probed.level.lower() for probed in manifest.probing.levels}


def shorten_ends(model: Model, integers: Container[str]) -> None:
    """Let a model put out its feature maps without turning them into integers and back.

    Those of `integers` come as int8, each with its scale as another output; the others as they were before
    they were rounded.  What else reads a map sees no change, and maps that are not rounded stay as they are.
    """
    for result in list(model.get_results()):
        value = result.input_value(0)
        name = next((each for each in value.names if each in FEATURES), None)
        found = None if name is None else _Rounded.behind(value.get_node())
        if name is None or found is None:
            continue
        if name in integers and found.integers is not None:
            _replace(result, name, _transposed(found.integers, value))
            model.add_results([_number(found.scale, name + SCALE)])
        else:
            _replace(result, name, _transposed(found.floats, value))
    model.validate_nodes_and_infer_types()


@dataclass(frozen=True, kw_only=True)
class _Rounded:
    """A map that is rounded to integers, before it is transposed."""

    floats: Output
    """As it was before."""
    integers: Output | None
    """As int8, if that times the scale is what comes out."""
    scale: Output

    @classmethod
    def behind(cls, transposed: Node) -> Self | None:
        """Find the map of which this is what is handed out; None if it is not rounded."""
        if transposed.get_type_name() != "Transpose":
            return None
        scaled = transposed.input_value(0).get_node()
        if scaled.get_type_name() != "Multiply" or not _is_one_number(scaled.input_value(1)):
            return None
        centred, centre = scaled.input_value(0).get_node(), None
        if centred.get_type_name() == "Subtract":
            centred, centre = centred.input_value(0).get_node(), centred.input_value(1)
        narrow = centred.input_value(0).get_node()
        if (centred.get_type_name(), narrow.get_type_name()) != ("Convert", "Convert"):
            return None
        rounded = narrow.input_value(0).get_node()
        if rounded.get_type_name() != "FakeQuantize":
            return None
        integers = narrow.output(0)
        plain = integers.get_element_type().get_type_name() == "i8" and (centre is None or _is_zero(centre))
        scale = scaled.input_value(1)
        return cls(floats=rounded.input_value(0), integers=integers if plain else None, scale=scale)


def _transposed(value: Output, like: Output) -> Output:
    from openvino import opset13 as operators

    return operators.transpose(value, like.get_node().input_value(1)).output(0)


def _replace(result: Node, name: str, value: Output) -> None:
    """Let a result be another value, which takes over its name."""
    before = result.input_value(0)
    before.set_names(before.names - {name})
    value.set_names({name})
    value.get_node().friendly_name = name
    result.input(0).replace_source_output(value)


def _number(value: Output, name: str) -> Node:
    """Return a result (1,) of a constant number."""
    from openvino import opset13 as operators

    number = operators.reshape(value, [1], special_zero=False)
    number.output(0).set_names({name})
    number.friendly_name = name
    return operators.result(number)


def _is_one_number(value: Output) -> bool:
    constant = value.get_node()
    return bool(constant.get_type_name() == "Constant" and constant.get_data().size == 1)


def _is_zero(value: Output) -> bool:
    constant = value.get_node()
    if constant.get_type_name() == "Convert":
        constant = constant.input_value(0).get_node()
    return bool(constant.get_type_name() == "Constant" and not constant.get_data().any())
