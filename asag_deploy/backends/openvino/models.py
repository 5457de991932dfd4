"""Graphs as OpenVINO reads them, and what is changed in them before they are compiled."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_deploy.backends.openvino.one_size import KeptFile
from asag_deploy.backends.openvino.precision import keep_coordinates_precise
from asag_deploy.bundle.manifest import GraphSpec
from asag_deploy.loop.stages import FEATURE_TENSORS
from asag_deploy.scratch import file_in_memory, path_in_utf8, scratch_folder

if TYPE_CHECKING:
    from openvino import Core, Model


def read_graph(path: Path) -> Model:
    """Read an ONNX graph; ONNX Runtime, which is always there, inlines its functions."""
    import onnxruntime

    with contextlib.suppress(Exception):  # functions, or a broken file: ONNX Runtime tells which
        return convert(path)
    with file_in_memory() as inlined:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(inlined)
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # nothing is run
        with path_in_utf8(path) as known:
            onnxruntime.InferenceSession(
                known, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        return convert(inlined)


def read_kept(file: KeptFile, graph: GraphSpec) -> Model:
    """Read a graph as it was when the bundle was opened (OSError if it has been written to since)."""
    content = file.read()
    if hashlib.sha256(content).hexdigest() != graph.sha256:
        raise OSError(f"'{graph.file}' has changed since the bundle was opened")
    with file_in_memory() as copy:
        copy.write_bytes(content)
        return read_graph(copy)


def convert(path: Path) -> Model:
    """Read a file as ONNX alone; `Core.read_model` also tries other formats, which complain on stderr."""
    from openvino.frontend import FrontEndManager

    reader = FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(path))


def break_ties_by_index(model: Model) -> Model:
    """Let TopK give equal values in order, as ONNX has it: OpenVINO reads it as free to choose."""
    for node in model.get_ops():
        if node.get_type_name() == "TopK" and node.get_attributes().get("sort") == "value":
            node.set_attribute("stable", True)
    return model


def mixed_precision(core: Core, model: Model) -> Model:
    """Prepare a model for bfloat16: feature maps travel in it, coordinates stay in float32."""
    import openvino

    prepared = with_bfloat16(model, inputs=FEATURE_TENSORS, outputs=FEATURE_TENSORS)
    with scratch_folder() as folder, file_in_memory() as weights:
        description = folder / "graph.xml"  # OpenVINO insists on the suffix
        openvino.serialize(prepared, description, weights)
        description.write_bytes(keep_coordinates_precise(description.read_bytes()))
        return core.read_model(description, weights)


def in_bfloat16(ports: Sequence[Any]) -> set[str]:
    """Return the names of the ports that give bfloat16."""
    import openvino

    return {name for port in ports if port.get_element_type() == openvino.Type.bf16 for name in port.names}


def with_bfloat16(model: Model, *, inputs: Container[str], outputs: Container[str] = ()) -> Model:
    """Let the inputs and outputs of these names be bfloat16 outside, where they are float32."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    wrapped = PrePostProcessor(model)
    sides = ((model.inputs, wrapped.input, inputs), (model.outputs, wrapped.output, outputs))
    for ports, wrap, names in sides:
        for port in ports:
            if port.any_name in names and port.get_element_type() == openvino.Type.f32:
                wrap(port.any_name).tensor().set_element_type(openvino.Type.bf16)
    return wrapped.build()
