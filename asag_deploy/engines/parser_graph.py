"""Rewrite a stage graph for TensorRT's parser.

The bundle's graphs suit every runtime.  What TensorRT needs beyond that is done here, on a copy:

- The `asag` operators are replaced by plugins where there are some, the others by the bodies they come with.
  (The parser could expand those itself, but binds a function's input to a tensor of the same name outside.)
- Images of bytes become floats first of all: nothing else accepts bytes.
- For Turing, products of float32 matrices are spelt out, see `asag_deploy.engines.matmul_as_conv`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asag_deploy.engines.matmul_as_conv import bodies, spell_out_products
from asag_deploy.errors import BackendError, BundleCorruptError
from asag_deploy.extras import missing
from asag_deploy.kernels.limits import is_taken

if TYPE_CHECKING:
    import onnx

OPERATOR_DOMAIN = "asag"
_PLUGIN_PREFIX = "Asag"
_FLOAT = 1  # onnx.TensorProto.FLOAT
_UINT8 = 2  # onnx.TensorProto.UINT8
_CONTROL_FLOW = {"Loop", "If", "Scan"}
_SIZES = {"Shape", "Size"}


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin that takes the place of an `asag` operator."""

    operator: str
    """Such as `PatchNMS`; the plugin is called `AsagPatchNMS`."""
    version: str = "1"

    @property
    def name(self) -> str:
        """The name that the library has registered."""
        return _PLUGIN_PREFIX + self.operator


def require_onnx() -> None:
    """Raise BackendError if the package `onnx` is not installed, which rewriting a graph takes."""
    try:
        import onnx  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise BackendError(missing(error, "asag-build", purpose="building engines")) from None


def for_parser(content: bytes, *, name: str, plugins: Collection[Plugin], turing: bool) -> bytes:
    """Rewrite the stage graph `name`, a serialised model, as the parser is to read it.

    Raises BundleCorruptError if it is not an ONNX model.
    """
    model = _read(content, name)
    _use_plugins(model, {plugin.operator: plugin for plugin in plugins})
    model = _expand_functions(model)
    _cast_bytes(model.graph)
    if turing:
        model = spell_out_products(model)
    return bytes(model.SerializeToString())


def operators_of(content: bytes, name: str) -> set[str]:
    """Find the `asag` operators of a stage graph that a plugin can take the place of.

    Raises BundleCorruptError if it is not an ONNX model.
    """
    return {node.op_type for node in _read(content, name).graph.node if _can_be_a_plugin(node)}


def control_flow(content: bytes, name: str) -> tuple[str, ...]:
    """Name the nodes that decide what runs next, such as `Loop 'rounds'`, those in bodies included.

    `content` is the graph as the parser reads it: what is in a function or behind a plugin is not looked at.
    Raises BundleCorruptError if it is not an ONNX model.
    """
    return tuple(
        f"{n.op_type} '{n.name}'" for n in _nodes(_read(content, name)) if n.op_type in _CONTROL_FLOW
    )


def computes_with_sizes(content: bytes, name: str) -> bool:
    """Return whether a graph, as the parser reads it, asks for the size of a tensor, which the host knows.

    Raises BundleCorruptError if it is not an ONNX model.
    """
    return any(node.op_type in _SIZES for node in _nodes(_read(content, name)))


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield all nodes, those inside other nodes too."""
    waiting = [model.graph]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting.extend(bodies(node))


def _read(content: bytes, name: str) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's exception has no name that every release shares
        raise BundleCorruptError(
            f"the graph '{name}' is not an ONNX model; export the bundle again"
        ) from error


def _use_plugins(model: onnx.ModelProto, plugins: dict[str, Plugin]) -> None:
    """Name the nodes after their plugins and take away the bodies, so that the parser has no other choice."""
    import onnx

    for node in model.graph.node:
        if node.op_type in plugins and _can_be_a_plugin(node):
            plugin = plugins[node.op_type]
            node.op_type = plugin.name
            node.attribute.append(onnx.helper.make_attribute("plugin_version", plugin.version))
    left = {node.op_type for node in model.graph.node}
    kept = [each for each in model.functions if each.name not in plugins or each.name in left]
    del model.functions[:]
    model.functions.extend(kept)


def _can_be_a_plugin(node: onnx.NodeProto) -> bool:
    """Tell whether a node is an `asag` operator with attributes that its kernel takes."""
    return node.domain == OPERATOR_DOMAIN and is_taken(node)


def _expand_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx.inliner

    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _cast_bytes(graph: onnx.GraphProto) -> None:
    """Let everything read floats where it read an input of bytes; a cast that follows does nothing then."""
    import onnx

    # What was noted about tensors of bytes in between is not so any more.
    kept = [value for value in graph.value_info if value.type.tensor_type.elem_type != _UINT8]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for value in graph.input:
        if value.type.tensor_type.elem_type != _UINT8:
            continue
        as_float = f"{value.name}_as_float"
        for node in graph.node:
            for i, source in enumerate(node.input):
                if source == value.name:
                    node.input[i] = as_float
        cast = onnx.helper.make_node("Cast", [value.name], [as_float], name=f"{as_float}_cast", to=_FLOAT)
        graph.node.insert(0, cast)
