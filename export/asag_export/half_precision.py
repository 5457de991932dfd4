"""Fit a stage in float32 among stages in float16: it computes in float32 between feature maps in float16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx
from onnx import TensorProto, helper

from asag_deploy.bundle.manifest import TensorSpec
from asag_deploy.engines.matmul_as_conv import bodies
from asag_deploy.loop.stages import FEATURE_TENSORS
from asag_export.stage_export import ExportedStage


def with_half_features(
    model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ExportedStage:
    """Copy a float32 stage and its interface so that feature maps come and go as float16."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    given = [value for value in graph.input if value.name in FEATURE_TENSORS]
    made = [value for value in graph.output if value.name in FEATURE_TENSORS]
    renamed = {value.name: f"{value.name}_in_float32" for value in (*given, *made)}
    _rename(graph.node, renamed)
    casts = [_cast(value.name, renamed[value.name], TensorProto.FLOAT) for value in given]
    nodes = [*casts, *graph.node]
    nodes += [_cast(renamed[value.name], value.name, TensorProto.FLOAT16) for value in made]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    for value in (*given, *made):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return copy, _half(inputs), _half(outputs)


def _half(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(
        dataclasses.replace(spec, dtype="float16") if spec.name in FEATURE_TENSORS else spec for spec in specs
    )


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=kind)


def _rename(nodes: Iterable[onnx.NodeProto], names: dict[str, str]) -> None:
    """Rename values, also in the bodies of loops and branches, which see the values outside."""
    for node in nodes:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for body in bodies(node):
            _rename(body.node, names)
            for value in body.output:
                value.name = names.get(value.name, value.name)
