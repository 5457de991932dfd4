"""Bundles that say or compute something else than the one they were copied from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx

from asag_deploy.bundle import Bundle, write_bundle


def edit_graph(bundle: Bundle, name: str, edit: Callable[[onnx.ModelProto], None], path: Path) -> Bundle:
    """A copy at `path` whose graph `name` went through `edit`, with the SHA-256 to match."""
    model = onnx.load(bundle.graph_path(name))
    before = model.SerializeToString()
    edit(model)
    assert model.SerializeToString() != before, "the edit changed nothing"
    return replace_graph(bundle, name, model.SerializeToString(), path)


def replace_graph(bundle: Bundle, name: str, content: bytes, path: Path) -> Bundle:
    """A copy at `path` with another file for the graph `name`."""
    with write_bundle(path) as writer:
        for graph in bundle.manifest.graphs:
            same = bundle.graph_path(graph.name).read_bytes()
            writer.add_graph(
                graph.name,
                content if graph.name == name else same,
                inputs=graph.inputs,
                outputs=graph.outputs,
            )
        writer.finish(dataclasses.replace(bundle.manifest, graphs=()))
    return Bundle.open(path)
