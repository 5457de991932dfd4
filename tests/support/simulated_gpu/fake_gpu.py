"""A machine with an imaginary GPU: `fake_cuda` and `fake_tensorrt` installed, and engines for them."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import onnx
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec
from asag_deploy.engines.parser_graph import control_flow, for_parser
from asag_deploy.engines.shapes import Batches, InputRange, depends_on_canvas, profile
from asag_deploy.engines.sidecar import Format, Recipe, Sidecar, engine_folder, engine_path, sidecar_to_json
from asag_deploy.processing.canvases import Canvas
from support.simulated_gpu import fake_tensorrt
from support.simulated_gpu.fake_cuda import FakeCuda

MODULES: dict[Format, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
MOST_IMAGES = 4
_LARGEST = 4096


def install_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A simulated GPU, with TensorRT and TensorRT-RTX on it."""
    cuda = FakeCuda()
    install_cuda(monkeypatch, cuda)
    for engine_format in MODULES:
        install_tensorrt(monkeypatch, cuda, engine_format)
    return cuda


def install_cuda(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    """Let `cuda.bindings.runtime` be `cuda`; None: as if it were not installed."""
    for name in ("cuda", "cuda.bindings"):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    if cuda is not None:
        cuda.__spec__ = importlib.machinery.ModuleSpec("cuda.bindings.runtime", None)


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch,
    cuda: FakeCuda,
    engine_format: Format = "tensorrt-rtx",
    version: str = fake_tensorrt.VERSION,
) -> ModuleType:
    """Let TensorRT's module be the fake one."""
    name = MODULES[engine_format]
    module = fake_tensorrt.module(name, cuda, version)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def write_engines(
    bundle: Bundle,
    engine_format: Format = "tensorrt-rtx",
    capability: str = "sm86",
    *,
    batches: Batches | None = None,
    canvases: Sequence[Canvas] = (),
    **changes: Any,
) -> None:
    """An engine for each graph of a bundle: the graph itself, and a sidecar (with `changes`).

    With `batches` it takes the shapes that a real one would be built for, else any.  For each of `canvases`
    there are others, which take the one shape that a real one would be built for.
    """
    for graph in bundle.manifest.graphs:
        ranges = _ranges(graph) if batches is None else profile(graph, bundle.manifest, batches)
        write_engine(bundle, graph, engine_format, capability, ranges, **changes)
        for canvas in canvases if depends_on_canvas(graph) else ():
            ranges = profile(graph, bundle.manifest, Batches(), canvas)
            write_engine(bundle, graph, engine_format, capability, ranges, canvas=canvas, **changes)


def write_engine(
    bundle: Bundle,
    graph: GraphSpec,
    engine_format: Format,
    capability: str,
    ranges: tuple[InputRange, ...],
    **changes: Any,
) -> None:
    """One engine that takes inputs of these shapes."""
    content = bundle.graph_path(graph.name).read_bytes()
    recipe = {
        "producer": "tests",
        "format": engine_format,
        "sdk_version": fake_tensorrt.VERSION,
        "stage": graph.name,
        "graph_sha256": graph.sha256,
        "precision": "fp32",
        "tf32": False,
        "capabilities": (capability,),
        "compatibility": "none",
        "version_compatible": False,
        "device": None,
        "optimization_level": None,
        "plugins": (),
        "user_allocation": engine_format == "tensorrt-rtx",
        "auxiliary_streams": 0,
        "canvas": None,
        "inputs": ranges,
        "outputs": graph.outputs,
        **changes,
    }
    parsed = for_parser(content, name=graph.name, plugins=(), turing=False)
    content = _of_one_shape(content, ranges) if recipe["canvas"] is not None else content
    sidecar = Sidecar(
        recipe=Recipe(**recipe),
        engine_sha256=hashlib.sha256(content).hexdigest(),
        engine_bytes=len(content),
        capturable=not control_flow(parsed, graph.name),
        host_memory=False,
        layers=None,
    )
    path = engine_path(engine_folder(bundle, engine_format, capability), graph.name, recipe["canvas"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.with_suffix(".json").write_text(sidecar_to_json(sidecar), encoding="utf-8")


def _of_one_shape(content: bytes, ranges: tuple[InputRange, ...]) -> bytes:
    """A graph that takes nothing else, as the simulated TensorRT tells from its inputs."""
    model = onnx.load_from_string(content)
    shapes = {range_.name: range_.most for range_ in ranges}
    for value in model.graph.input:
        for size, number in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            size.dim_value = number
    return bytes(model.SerializeToString())


def _ranges(graph: GraphSpec) -> tuple[InputRange, ...]:
    """Every dynamic size from 1 on, and at most `MOST_IMAGES` images."""
    return tuple(
        InputRange(
            name=spec.name,
            dtype=spec.dtype,
            least=tuple(size if isinstance(size, int) else 1 for size in spec.shape),
            usual=tuple(size if isinstance(size, int) else 1 for size in spec.shape),
            most=tuple(
                size if isinstance(size, int) else MOST_IMAGES if size == "batch" else _LARGEST
                for size in spec.shape
            ),
        )
        for spec in graph.inputs
    )
