"""An engine of nothing beside a bundle, with a sidecar that fits: what tests of sidecars begin with."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.engines.shapes import Batches, profile
from asag_deploy.engines.sidecar import Recipe, Sidecar, engine_folder, engine_path, sidecar_to_json

CONTENT = b"an engine"
VERSION = "1.7.1.116"


def recipe(bundle: Bundle, **changes: Any) -> Recipe:
    graph = bundle.manifest.graph("decoder")
    made = Recipe(
        producer="asag-deploy 0.1.0",
        format="tensorrt-rtx",
        sdk_version=VERSION,
        stage="decoder",
        graph_sha256=graph.sha256,
        precision="fp32",
        tf32=False,
        capabilities=("sm86",),
        compatibility="none",
        version_compatible=False,
        device=None,
        optimization_level=None,
        plugins=(),
        user_allocation=True,
        auxiliary_streams=0,
        canvas=None,
        inputs=profile(graph, bundle.manifest, Batches(most=2)),
        outputs=graph.outputs,
    )
    return dataclasses.replace(made, **changes)


def put(bundle: Bundle, made: Recipe, *, folder: str | None = None) -> Path:
    """Write an engine and its sidecar; returns the engine's path."""
    target = folder or "+".join(made.capabilities)
    path = engine_path(engine_folder(bundle, made.format, target), "decoder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    sidecar = Sidecar(
        recipe=made,
        engine_sha256=hashlib.sha256(CONTENT).hexdigest(),
        engine_bytes=len(CONTENT),
        capturable=True,
        host_memory=False,
        layers={"fp16": 3},
    )
    path.with_suffix(".json").write_text(sidecar_to_json(sidecar))
    return path
