"""Bundles: a manifest that says something else, and graphs that compute something else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from asag_deploy import Detector
from asag_deploy.bundle.bundle import MANIFEST, Bundle
from asag_deploy.bundle.manifest_json import manifest_to_json
from endurance.damage import damaged_json, damaged_messages
from endurance.judging import Target, WrongError
from endurance.targets import Part, one_of_parts
from support.tiny_bundle import make_bundle, picture

PICTURES = [picture(3, 2, 1), picture(20, 9), picture(0, size=(70, 90))]


def use(bundle: Path) -> None:
    """Load a bundle and detect in a few pictures; what is found has to make sense."""
    with Detector.load(bundle, backend="onnxruntime", threads=1) as detector:
        for found in detector(PICTURES):
            text = json.dumps(found.to_json(), allow_nan=False)
            text.encode()
            if not (np.isfinite(found.xyxy).all() and np.isfinite(found.confidence).all()):
                raise WrongError("boxes or confidences are not finite")
            if len(found.names) != len(found.xyxy):
                raise WrongError("not as many names as boxes")


@contextmanager
def open_manifests(folder: Path) -> Iterator[Target]:
    """The text of `manifest.json`."""
    bundles = [make_bundle(folder / "bundle"), make_bundle(folder / "other", levels=("P4",), nms_iou=0.5)]
    file = folder / "bundle" / MANIFEST
    use(file.parent)  # undamaged it has to work
    seeds: list[Any] = [json.loads((bundle.path / MANIFEST).read_bytes()) for bundle in bundles]

    def run(data: bytes) -> None:
        file.write_bytes(data)
        use(file.parent)

    yield Target(inputs=damaged_json(seeds), run=run, names=(str(folder / "bundle"), "graph", "ONNX Runtime"))


@contextmanager
def open_graphs(folder: Path) -> Iterator[Target]:
    """`onnxruntime/STAGE`, and on the next line a graph, whose checksum is made right.

    OpenVINO is left out: it does not check what a graph computes, neither when it compiles nor when it runs.
    One that divides by zero ends the process; one that splits along another axis writes beyond its memory.
    """
    bundle = make_bundle(folder / "bundle")
    use(bundle.path)  # undamaged it has to work
    originals = {graph.name: bundle.graph_path(graph.name).read_bytes() for graph in bundle.manifest.graphs}

    def part(name: str) -> Part:
        def run(data: bytes) -> None:
            for other, content in originals.items():
                bundle.graph_path(other).write_bytes(content)
            put_graph(bundle, name, data)
            use(bundle.path)

        return damaged_messages([onnx.load_from_string(originals[name])]), run

    inputs, run = one_of_parts({f"onnxruntime/{name}": part(name) for name in originals})
    yield Target(inputs=inputs, run=run)


def put_graph(bundle: Bundle, name: str, content: bytes) -> None:
    """Put another graph into a bundle, with its SHA-256."""
    bundle.graph_path(name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    specs = tuple(
        dataclasses.replace(graph, sha256=digest) if graph.name == name else graph
        for graph in bundle.manifest.graphs
    )
    manifest = dataclasses.replace(bundle.manifest, graphs=specs)
    (bundle.path / MANIFEST).write_text(manifest_to_json(manifest), encoding="utf-8")
