"""Engines really built by TensorRT-RTX, which takes no GPU.  (Those of real networks: tests/export.)"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.engines import BuildOptions, Canvas, build_engines, check
from asag_deploy.engines.adapter import open_library
from asag_deploy.engines.cli import main
from asag_deploy.engines.host_work import read_host_work
from asag_deploy.engines.sidecar import canvas_engines, read_sidecar
from asag_deploy.errors import BackendError, EngineError, EngineStaleError
from support.bundle_edits import edit_graph
from support.plugin_builds import missing_gpu
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import install_cuda

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install tensorrt-rtx")

GPUS = ("sm75", "sm86", "sm89", "sm120")


def test_engines_for_four_generations_of_gpus(bundle: Bundle) -> None:
    report = build_engines(bundle, BuildOptions(gpus=GPUS))
    assert len(report.built) == 12
    contents = set()
    for gpu in GPUS:
        for stage in ("normalize", "backbone", "decoder"):
            engine = check(
                bundle,
                stage,
                engine_format="tensorrt-rtx",
                sdk_version=tensorrt_rtx.__version__,
                capability=gpu,
            )
            assert len(engine.content) > 1000
            assert engine.sidecar.recipe.capabilities == (gpu,)
            contents.add(engine.content)
    assert len(contents) == 12
    assert len(build_engines(bundle, BuildOptions(gpus=GPUS)).current) == 12


def test_a_loop_is_never_captured(bundle: Bundle) -> None:
    """The decoder of this bundle has one.  The library decides it on the host, and says so in the engine."""
    report = build_engines(bundle, BuildOptions(gpus=("sm86", "sm120"), shared=True))
    plans = {path.stem: read_host_work(path.read_bytes()) for path in report.built}
    assert plans["normalize"].capturable
    assert plans["backbone"].capturable
    decoder = plans["decoder"]
    assert not decoder.stream_capturable
    assert decoder.decisions >= 1
    assert not decoder.capturable
    sidecars = {path.stem: read_sidecar(path.with_suffix(".json"), "") for path in report.built}
    assert {name: s.capturable for name, s in sidecars.items()} == {
        name: plan.capturable for name, plan in plans.items()
    }


def test_an_engine_of_one_shape_needs_no_sizes_from_the_host(bundle: Bundle, tmp_path: Path) -> None:
    """The same graph as an engine that takes every shape does, since it computes with a size."""

    def use_size(model: onnx.ModelProto) -> None:
        nodes, outputs = model.graph.node, model.graph.output
        nodes.append(onnx.helper.make_node("Shape", ["image"], ["sizes"]))
        nodes.append(onnx.helper.make_node("Add", ["sizes", "image_size_sum"], ["shifted"]))
        nodes.append(onnx.helper.make_node("ReduceSum", ["image_size"], ["image_size_sum"], keepdims=0))
        nodes.insert(0, nodes.pop())
        outputs.append(onnx.helper.make_tensor_value_info("shifted", 7, [4]))

    edited = edit_graph(bundle, "backbone", use_size, tmp_path / "edited")
    report = build_engines(edited, BuildOptions(gpus=("sm86",), canvases=(Canvas(64, 64),)))
    plans = {
        path.parent.name: read_host_work(path.read_bytes())
        for path in report.built
        if path.stem == "backbone"
    }
    assert plans["sm86"].shape_copies == 1
    assert not plans["64x64"].host_memory
    assert all(plan.capturable for plan in plans.values())


def test_engines_of_a_canvas_are_found_up_to_loading_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `asag-build` writes passes every check; the library itself then asks for a driver."""
    missing = missing_gpu()
    if missing is None:
        pytest.skip("this machine has a GPU, so tests/gpu load them")
    cuda = FakeCuda()
    install_cuda(monkeypatch, cuda)
    options = [str(bundle.path), "--gpu", "sm86", "--quiet"]
    assert main([*options, "--canvas", "64x96", "--canvas", "64x64"]) == 0
    here: dict[str, Any] = {"sdk_version": tensorrt_rtx.__version__, "capability": "sm86"}
    found = canvas_engines(bundle, engine_format="tensorrt-rtx", **here)
    assert {canvas: [e.sidecar.recipe.stage for e in engines] for canvas, engines in found.items()} == {
        Canvas(64, 64): ["backbone", "decoder"],
        Canvas(64, 96): ["backbone", "decoder"],
    }
    fixed = {
        range_.least == range_.most
        for engine in found[Canvas(64, 96)]
        for range_ in engine.sidecar.recipe.inputs
    }
    assert fixed == {True}
    with pytest.raises(BackendError, match="the NVIDIA driver is too old for TensorRT-RTX"):
        open_network("tensorrt-rtx", bundle)
    assert cuda.leaked() == {}

    path = found[Canvas(64, 96)][0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineStaleError, match=r"backbone\.engine' is truncated or was altered") as error:
        open_network("tensorrt-rtx", bundle)
    (command,) = re.findall("`asag-build (.*?)`", str(error.value))
    assert main([*shlex.split(command), "--quiet"]) == 0
    with pytest.raises(BackendError, match="the NVIDIA driver is too old for TensorRT-RTX"):
        open_network("tensorrt-rtx", bundle)


def test_the_inspector_takes_a_gpu(bundle: Bundle) -> None:
    """If this fails, sidecars can say what was built also where there is no GPU."""
    missing = missing_gpu()
    if missing is None:
        pytest.skip("this machine has a GPU, so the engine can be loaded")
    (path, *_) = build_engines(bundle, BuildOptions(gpus=("sm86",))).built
    library = open_library("tensorrt-rtx")
    assert library.layers(path.read_bytes(), version_compatible=False) is None
    assert "driver version is insufficient" in library.messages.first_error
    assert read_sidecar(path.with_suffix(".json"), "").layers is None


def test_one_engine_for_all(bundle: Bundle) -> None:
    assert main([str(bundle.path), "--shared", "--quiet", *(o for gpu in GPUS for o in ("--gpu", gpu))]) == 0
    path = bundle.path / "engines" / "tensorrt-rtx" / "sm75+sm86+sm89+sm120" / "decoder.engine"
    assert path.stat().st_size > 1000


def test_turing_needs_its_products_spelt_out(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the library has learnt it, and `asag_deploy.engines.matmul_as_conv` can go."""
    monkeypatch.setattr("asag_deploy.engines.build._spells_out_products", lambda target, library: False)
    with pytest.raises(EngineError, match=r"compile the stage 'decoder' for sm75: .*FP32 GEMM"):
        build_engines(bundle, BuildOptions(gpus=("sm75",)))


def test_a_node_that_the_library_refuses_is_named(bundle: Bundle, tmp_path: Path) -> None:
    def add_non_zero(model: onnx.ModelProto) -> None:
        node = onnx.helper.make_node("NonZero", ["p5"], ["places"], name="find_places")
        model.graph.node.append(node)
        model.graph.output.append(onnx.helper.make_tensor_value_info("places", 7, [4, None]))

    edited = edit_graph(bundle, "decoder", add_non_zero, tmp_path / "edited")
    with pytest.raises(EngineError, match=r"TensorRT-RTX .* could not .* the stage 'decoder'") as error:
        build_engines(edited, BuildOptions(gpus=("sm86",)))
    assert "\n" not in str(error.value)
    assert "find_places" in str(error.value)


def test_the_library_says_what_it_builds_for() -> None:
    library = open_library("tensorrt-rtx")
    assert library.version == tensorrt_rtx.__version__
    assert set(GPUS) <= set(library.capabilities or ())


def test_it_is_not_imported_before_it_is_asked_for() -> None:
    code = "import sys, asag_deploy.engines; print({'tensorrt', 'tensorrt_rtx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
