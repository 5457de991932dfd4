"""Cutting a graph at the operators that are compiled for the CPU.

What lies before, between and behind them stays a graph, a *piece*, that the backend's library runs.  A graph
is cut when it is loaded, so that bundles know nothing of it; it takes the package `onnx`.

    with cut_into_files(path) as found:     # None if it holds no such operator, or cannot be cut
        if found is not None:
            plan, files = found
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from asag_deploy.bundle.manifest import TensorSpec
from asag_deploy.errors import Problem, first_line
from asag_deploy.kernels.limits import is_taken
from asag_deploy.scratch import file_in_memory, path_in_utf8
from asag_deploy.typed_json import parse_json, read_fields

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

DOMAIN = "asag"
TOP_K = "TopK"
_FUNCTIONS = 25
"""The field of a model that holds its functions, in protobuf; and how numbers and bytes are written there."""
_NUMBER, _BYTES = 0, 2
_SIZES = frozenset({6, 7, 9})
"""The types of sizes, and of what is asked about them: int32, int64 and bool."""
DEFORMABLE = "DeformableSample"
"""The operator that every graph is cut at: in an encoder it takes longer than the layers around it."""
OPERATORS = ("MultiscaleRoIAlign", "PyramidSample", DEFORMABLE, "AdaptiveMixing", "PadAnchors")
"""Those of the domain `asag` that a cut is made at; `TOP_K` of rows is the standard operator."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A graph of standard operators."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operator between two pieces."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, tuple[int, ...]]

    @property
    def gives_features(self) -> bool:
        """Whether it gives features, which may be less precise than coordinates."""
        return self.operator in OPERATORS and self.operator != "PadAnchors"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a graph is, cut: its interface, and what is run one after the other."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    pieces: tuple[Piece, ...]
    calls: tuple[tuple[Call, ...], ...]
    """Those that follow each piece, in an order in which they can be called; none follow the last."""

    def to_json(self) -> bytes:
        """Write it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Plan:
        """Read what `to_json` has written.  Raises ValueError or FieldError for anything else."""
        return cast(Plan, read_fields(cls, parse_json(text)))


def can_cut() -> bool:
    """Return whether what cutting takes is installed; loading it would take longer than all the rest."""
    return importlib.util.find_spec("onnx") is not None


def why_no_cutting() -> Problem | None:
    """Say why no graph can be cut here, and what to do; None if graphs can be."""
    if not can_cut():
        return Problem("the package onnx is not installed", "install it with `pip install onnx`")
    try:
        import onnx  # noqa: F401
    except Exception as error:  # whatever keeps it from being loaded, such as another package's old version
        return Problem(
            f"the package onnx cannot be loaded ({first_line(error)})",
            "install it again with `pip install --force-reinstall onnx`",
        )
    return None


def cut(path: Path) -> tuple[Plan, Iterator[Iterator[bytes]]] | None:
    """Cut the graph in a file; return the plan, and the parts of a file for every piece, an ONNX model.

    None if it holds none of the operators, or something that pieces cannot have: a value of a type that is
    not known, or another function.  None too for a file that `onnx` cannot read.
    """
    try:
        import onnx

        with path_in_utf8(path) as known:
            model = onnx.load(known)
        if not any(node.domain == DOMAIN and node.op_type in OPERATORS for node in model.graph.node):
            return None
        found = _Cutter(model).cut()
        if found is None:
            # Quantising leaves values without a type; to find them takes as long as reading: only if needed.
            found = _Cutter(onnx.shape_inference.infer_shapes(model)).cut()
    except Exception:  # of onnx, of whatever version: who loads the graph whole says better what is wrong
        return None
    return found


def has_function(path: Path, name: str) -> bool:
    """Tell whether a model has a function of this name, such as an operator's body.

    Of its graph, with the weights, nothing is read.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            while (tag := _varint(stream)) is not None:
                length = _varint(stream)  # or a number, which takes nothing more
                if length is None or tag & 7 not in (_NUMBER, _BYTES):
                    return False
                if tag & 7 == _NUMBER:
                    continue
                if length > size - stream.tell():
                    return False
                if tag >> 3 != _FUNCTIONS:
                    stream.seek(length, os.SEEK_CUR)
                elif name.encode() in stream.read(length):
                    return True
    except OSError:
        pass  # who loads it says what is wrong, as with what is no model
    return False


def _varint(stream: BinaryIO) -> int | None:
    """Read a number as protobuf writes it; None at the end of the file, or if it is none."""
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


@contextmanager
def cut_into_files(path: Path) -> Iterator[tuple[Plan, list[Path]] | None]:
    """Cut the graph in a file as `cut` does; give the plan, and a file in memory for every piece.

    The graph itself is let go before: its weights are held once by then.
    """
    with ExitStack() as stack:
        files: list[Path] = []
        plan = None
        found = cut(path)
        if found is not None:
            plan, models = found
            for parts in models:
                files.append(stack.enter_context(file_in_memory()))
                with files[-1].open("wb") as stream:
                    stream.writelines(parts)
            del models, parts, found
        yield None if plan is None else (plan, files)


class _Cutter:
    """A graph, and for each of its values behind how many cuts it lies."""

    def __init__(self, model: ModelProto) -> None:
        self._model, self._graph = model, model.graph
        given = {value.name for value in self._graph.input}
        # An input may have a value of its own, which is not taken where another is given.
        self._constants = {value.name: value for value in self._graph.initializer if value.name not in given}
        self._functions = {(each.domain, each.name) for each in model.functions}
        self._types: dict[str, ValueInfoProto] = {
            value.name: value for value in (*self._graph.value_info, *self._graph.input, *self._graph.output)
        }
        self._nodes: list[NodeProto] = list(self._graph.node)
        self._maker = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._is_call = [self._can_be_called(node) for node in self._nodes]
        self._depth: dict[str, int] = {}
        self._varying = given  # and what depends on the inputs
        for i, node in enumerate(self._nodes):
            for name in node.output:
                self._depth[name] = self._depth_of(node, self._is_call[i])
            if not self._varying.isdisjoint(_reads(node)):
                self._varying.update(name for name in node.output if name)

    def cut(self) -> tuple[Plan, Iterator[Iterator[bytes]]] | None:
        """Return the pieces and the calls between them; None where that cannot be."""
        if not self._can_be_cut():
            return None
        last = max(self._depth.values())
        calls: list[list[Call]] = [[] for _ in range(last + 1)]
        for node, called in zip(self._nodes, self._is_call, strict=True):
            if called:
                calls[self._depth[node.output[0]] - 1].append(_call(node))
        pieces: list[Piece] = []
        nodes_of: list[set[int]] = []
        for outputs, inputs, nodes in self._wanted():
            if not {*inputs, *outputs} <= set(self._types):
                return None
            pieces.append(Piece(inputs=tuple(inputs), outputs=tuple(outputs)))
            nodes_of.append(nodes)
        plan = Plan(
            inputs=tuple(map(_spec, self._graph.input)),
            outputs=tuple(map(_spec, self._graph.output)),
            pieces=tuple(pieces),
            calls=tuple(tuple(of_piece) for of_piece in calls),
        )
        return plan, self._models(nodes_of, pieces)

    def _depth_of(self, node: NodeProto, called: bool) -> int:
        """Return behind how many cuts a node's values lie.  Calls of which one takes what another gives, and
        nothing that is computed in between, lie at the same cut."""
        depth = 0
        for name in _reads(node):
            from_piece = name not in self._maker or not self._is_call[self._maker[name]]
            depth = max(depth, self._depth.get(name, 0) + (called and from_piece))
        return depth

    def _is_kept(self, name: str) -> bool:
        """Tell whether what later pieces read of a value is handed on, and not computed again.

        Before the first cut sizes are computed again, for of them a library finds out shapes, and so is what
        is constant; the size of a value that is handed on is handed on too.
        """
        if self._depth[name] > 0:
            return True
        node = self._nodes[self._maker[name]]
        if node.op_type == "Shape" and not node.domain:
            return node.input[0] in self._maker and self._is_kept(node.input[0])
        values = self._types.get(name)
        is_size = values is not None and values.type.tensor_type.elem_type in _SIZES
        return not is_size and name in self._varying

    def _can_be_cut(self) -> bool:
        """Tell whether all nodes are called or standard, and all outputs computed."""
        ours = [node for node, called in zip(self._nodes, self._is_call, strict=True) if not called]
        if any(node.domain == DOMAIN or (node.domain, node.op_type) in self._functions for node in ours):
            return False
        return all(value.name in self._maker for value in self._graph.output)

    def _can_be_called(self, node: NodeProto) -> bool:
        if any(name in self._constants for name in node.input):
            return False  # which are in the pieces alone
        if node.domain == DOMAIN:
            return node.op_type in OPERATORS and is_taken(node)
        if node.op_type != TOP_K or node.domain:
            return False
        options = {attribute.name: attribute.i for attribute in node.attribute}
        values = self._types.get(node.input[0])
        rows = values is not None and len(values.type.tensor_type.shape.dim) == 2
        largest = options.get("largest", 1) == 1 and options.get("sorted", 1) == 1
        float32 = values is not None and values.type.tensor_type.elem_type == 1
        return rows and largest and float32 and options.get("axis", -1) in (1, -1)

    def _wanted(self) -> list[tuple[list[str], list[str], set[int]]]:
        """List what each piece has to give: inputs of calls, outputs, and what later pieces read.

        With what each reads that comes from elsewhere, and the nodes that it is made of.
        """
        wanted: list[dict[str, None]] = [{} for _ in range(max(self._depth.values()) + 1)]

        def want(name: str) -> None:
            maker = self._maker.get(name)
            if maker is not None and not self._is_call[maker]:
                wanted[self._depth[name]][name] = None

        for node, called in zip(self._nodes, self._is_call, strict=True):
            for name in _reads(node) if called else []:
                want(name)
        for value in self._graph.output:
            want(value.name)
        found = []
        for depth in reversed(range(len(wanted))):
            nodes, inputs = self._behind(wanted[depth], depth)
            for name in inputs:
                want(name)
            found.append((list(wanted[depth]), inputs, nodes))
        return found[::-1]

    def _models(self, nodes_of: Sequence[set[int]], pieces: Sequence[Piece]) -> Iterator[Iterator[bytes]]:
        for i, (nodes, piece) in enumerate(zip(nodes_of, pieces, strict=True)):
            yield self._parts_of(nodes, piece, f"{self._graph.name}_{i}")

    def _parts_of(self, nodes: set[int], piece: Piece, name: str) -> Iterator[bytes]:
        """Write a piece as a model: all but the weights, then these; parts of a message become one again."""
        from onnx import helper

        graph = helper.make_graph(
            [self._nodes[i] for i in sorted(nodes)],
            name,
            [self._types[name] for name in piece.inputs],
            [self._types[name] for name in piece.outputs],
        )
        standard = [entry for entry in self._model.opset_import if entry.domain != DOMAIN]
        model = helper.make_model(graph, opset_imports=standard, ir_version=self._model.ir_version)
        yield model.SerializeToString()
        read = {name for i in nodes for name in _reads(self._nodes[i])}
        for name, value in self._constants.items():
            if name in read:
                part = type(self._model)()
                part.graph.initializer.append(value)
                yield part.SerializeToString()

    def _behind(self, outputs: Iterable[str], depth: int) -> tuple[set[int], list[str]]:
        """Find the nodes that compute these outputs, and what they read that comes from elsewhere."""
        nodes: set[int] = set()
        inputs: dict[str, None] = {}
        front = list(outputs)
        while front:
            name = front.pop()
            maker = self._maker.get(name)
            if name in self._constants:
                continue
            if maker is None or self._is_call[maker] or (self._depth[name] < depth and self._is_kept(name)):
                inputs[name] = None
            elif maker not in nodes:
                nodes.add(maker)
                front += _reads(self._nodes[maker])
        return nodes, list(inputs)


def _reads(node: NodeProto) -> list[str]:
    """List the values that a node reads, also in graphs that it holds, which have values of their own."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in _graphs(attribute):
            own = {value.name for value in (*inner.input, *inner.initializer)}
            own.update(name for each in inner.node for name in each.output)
            names += [name for each in inner.node for name in _reads(each) if name not in own]
    return names


def _graphs(attribute: Any) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _call(node: NodeProto) -> Call:
    attributes = {each.name: tuple(each.ints) or (int(each.i),) for each in node.attribute}
    return Call(
        operator=node.op_type, inputs=tuple(node.input), outputs=tuple(node.output), attributes=attributes
    )


def _spec(value: ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    shape = tuple(size.dim_param or int(size.dim_value) for size in tensor.shape.dim)
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)
