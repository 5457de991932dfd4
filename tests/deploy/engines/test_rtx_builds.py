"""Engines really built by TensorRT-RTX, which takes no GPU.  (Those of real networks: tests/export.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from asag_deploy.bundle import Bundle
from asag_deploy.engines import BuildOptions, build_engines, check
from asag_deploy.engines.adapter import open_library
from asag_deploy.engines.cli import main
from asag_deploy.engines.sidecar import read_sidecar
from asag_deploy.errors import EngineError
from bundle_edits import edit_graph
from plugin_builds import missing_gpu

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
    """If this fails, the library has learnt it, and `asag_deploy.engines.products` can go."""
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
