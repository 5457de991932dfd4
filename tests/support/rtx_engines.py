"""Compile graphs to TensorRT-RTX engines, which takes no GPU, and look at what they do on the host."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from asag_deploy.bundle.manifest import GraphSpec, Manifest
from asag_deploy.engines.adapter import Library
from asag_deploy.engines.host_work import read_host_work
from asag_deploy.engines.parser_graph import for_parser
from asag_deploy.engines.shapes import Batches, profile
from asag_export.stage_export import ExportedStage
from support.engine_bundle import PLAIN

GPUS = ("sm75", "sm86", "sm89", "sm120")
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="needs TensorRT-RTX: pip install tensorrt-rtx")

_ONE_FOR_ALL = dataclasses.replace(PLAIN, capabilities=GPUS, user_allocation=True)


def compile_stage(library: Library, name: str, exported: ExportedStage, manifest: Manifest) -> bytes:
    """Compile one stage for all generations of GPUs at once; returns its engine."""
    proto, inputs, outputs = exported
    spec = GraphSpec(name=name, file="", sha256="", inputs=inputs, outputs=outputs)
    graph = for_parser(proto.SerializeToString(), name=name, plugins=(), turing=True)
    return library.compile(graph, name, profile(spec, manifest, Batches()), _ONE_FOR_ALL)


def assert_can_be_captured(stage: str, engine: bytes) -> None:
    """No engine waits for the host, and none that a conditional body may hold reads its memory."""
    plan = read_host_work(engine)
    assert plan.stream_capturable, stage
    assert plan.decisions == 0, stage
    assert plan.copies_to_host == 0, stage
    if stage.startswith("probe_"):
        assert plan.shape_copies == 0, stage
