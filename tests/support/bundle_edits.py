"""Bundles that say or compute something else than the one they were copied from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from asag_deploy.bundle.bundle import Bundle, write_bundle
from asag_deploy.bundle.manifest import TensorSpec


def edit_graph(bundle: Bundle, name: str, edit: Callable[[onnx.ModelProto], None], path: Path) -> Bundle:
    """A copy at `path` whose graph `name` went through `edit`, with the SHA-256 to match."""
    model = onnx.load(bundle.graph_path(name))
    before = model.SerializeToString()
    edit(model)
    assert model.SerializeToString() != before, "the edit changed nothing"
    return replace_graph(bundle, name, model.SerializeToString(), path)


def give_proposals(bundle: Bundle, path: Path) -> Bundle:
    """A copy at `path` of a tiny bundle whose decoder gives out proposals: its boxes, and scores of them."""
    model = onnx.load(bundle.graph_path("decoder"))
    shapes: dict[str, tuple[str | int, ...]] = {"scores": ("B", "Q"), "boxes": ("B", "Q", 4)}
    added = []
    for (part, shape), source in zip(shapes.items(), ("best", "boxes"), strict=True):
        name = f"proposal_{part}"
        model.graph.node.append(onnx.helper.make_node("Identity", [source], [name]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        added.append(TensorSpec(name=name, dtype="float32", shape=shape))
    return replace_graph(bundle, "decoder", model.SerializeToString(), path, added)


def replace_graph(
    bundle: Bundle, name: str, content: bytes, path: Path, added: Sequence[TensorSpec] = ()
) -> Bundle:
    """A copy at `path` with another file for the graph `name`, which has the outputs `added` too."""
    with write_bundle(path) as writer:
        for graph in bundle.manifest.graphs:
            same = bundle.graph_path(graph.name).read_bytes()
            writer.add_graph(
                graph.name,
                content if graph.name == name else same,
                inputs=graph.inputs,
                outputs=(*graph.outputs, *added) if graph.name == name else graph.outputs,
            )
        writer.finish(dataclasses.replace(bundle.manifest, graphs=()))
    return Bundle.open(path)
