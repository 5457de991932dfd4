"""The graphs of every variant become TensorRT-RTX engines for four generations of GPUs, without a GPU.

In half precision they do here, narrowed, with every value of every setting; in full precision networks of
full size do where they are compared with the reference, in `test_reference_bundle.py`.  That they compute the
same can be seen on a GPU only; that rewriting them for the compiler changes nothing is held here, in ONNX
Runtime.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Manifest, Preprocessing, TensorSpec
from asag_deploy.engines.adapter import open_library
from asag_deploy.engines.cli import main as build_main
from asag_deploy.engines.host_work import read_host_work
from asag_deploy.engines.parser_graph import for_parser
from asag_deploy.engines.sidecar import read_sidecar
from asag_export.choices import DEFAULT_OPSET
from asag_export.cli import main as export_main
from asag_export.onnx_operators import DOMAIN, DeformableSample, function_of
from asag_export.stage_export import export_stage, prepare_for_export
from asag_training.checkpoints import save_checkpoint, untrained_checkpoint
from asag_training.network.config import VARIANTS, AsagConfig
from asag_training.network.model import build
from asag_training.network.operators import ONNX_VERSION
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import StageModule
from support.rtx_engines import GPUS, assert_can_be_captured, compile_stage, needs_rtx
from support.small_network import OF_NO_MATTER, replay_exports, small_checkpoint, small_config, what_matters
from support.tiny_bundle import tiny_manifest

BUILT = (("asag-a-r50-100", "backbone"), ("asag-a-r50-100", "probe_p4"), ("asag-a-r50-100", "decoder"))
"""Stages of `half_bundle`."""
NARROWED = (
    ("asag-d-r101-300", "backbone"),
    ("asag-a-lite-s", "backbone"),
    ("asag-a-lite-m", "backbone"),
    ("asag-a-r50-crowdhuman", "probe_p3"),
    ("asag-a-lite-s", "probe_p3"),
    ("asag-s-r50-300", "decoder"),
    ("asag-d-r50-crowdhuman", "decoder"),
    ("asag-a-lite-s", "decoder"),
)
"""As few as have every value of every setting with those, for each takes a while."""


def stages_of(config: AsagConfig) -> tuple[list[StageModule], Manifest]:
    """In half precision."""
    probing = probing_plan(config, "p3-p6", "exact")
    model = prepare_for_export(build(config, untrained_checkpoint(config).state), "fp16")
    manifest = dataclasses.replace(tiny_manifest(), probing=probing, preprocessing=Preprocessing())
    return build_stages(model, probing), manifest


def settings_of(variant: str, stage: str) -> set[tuple[str, str, Any]]:
    """What makes a stage what it is; both probes are one kind of stage."""
    name, settings = what_matters(stage, small_config(variant))
    return {(name.partition("_")[0], *setting) for setting in settings}


def test_stages_that_compile_have_every_value_of_every_setting() -> None:
    compiled = set().union(*(settings_of(*stage) for stage in (*BUILT, *NARROWED)))
    assert {stage for _, stage in (*BUILT, *NARROWED)} == set(OF_NO_MATTER)
    for variant in VARIANTS:
        for stage in OF_NO_MATTER:
            assert settings_of(variant, stage) <= compiled, (variant, stage)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "name"), NARROWED)
def test_stages_compile_in_half_precision(variant: str, name: str) -> None:
    config = small_config(variant)
    stages, manifest = stages_of(config)
    assert {stage.name for stage in stages} == {"normalize", *OF_NO_MATTER}
    (stage,) = (stage for stage in stages if stage.name == name)
    exported = export_stage(stage, config, manifest.probing, precision="fp16", opset=DEFAULT_OPSET)
    engine = compile_stage(open_library("tensorrt-rtx"), name, exported, manifest)
    assert len(engine) > 10_000
    assert_can_be_captured(name, engine)


@needs_rtx
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_deformable_sampling_can_be_captured(dtype: str) -> None:
    """Also as part of what a conditional node holds: no size is copied from the host."""
    maps = [
        TensorSpec(name=f"p{i}", dtype=dtype, shape=("batch", f"height_p{i}", f"width_p{i}", 16))
        for i in (2, 3, 4, 5)
    ]
    where = TensorSpec(name="xy", dtype="float32", shape=("batch", "queries", 2, 4, 4, 2))
    weight = TensorSpec(name="weight", dtype="float32", shape=("batch", "queries", 2, 4, 4))
    inputs, outputs = (
        (*maps, where, weight),
        (TensorSpec(name="out", dtype=dtype, shape=("batch", "queries", 16)),),
    )
    node = onnx.helper.make_node("DeformableSample", [spec.name for spec in inputs], ["out"], domain=DOMAIN)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "sampling", _values(inputs), _values(outputs)),
        functions=[function_of(DeformableSample, [node], DEFAULT_OPSET)],
        opset_imports=[
            onnx.helper.make_opsetid("", DEFAULT_OPSET),
            onnx.helper.make_opsetid(DOMAIN, ONNX_VERSION),
        ],
    )
    engine = compile_stage(open_library("tensorrt-rtx"), "decoder", (model, inputs, outputs), tiny_manifest())
    assert_can_be_captured("decoder", engine)
    assert read_host_work(engine).shape_copies == 0


def _values(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
    kind = onnx.helper.np_dtype_to_tensor_dtype
    return [
        onnx.helper.make_tensor_value_info(spec.name, kind(np.dtype(spec.dtype)), spec.shape)
        for spec in specs
    ]


@needs_rtx
@pytest.mark.slow
def test_export_and_build_in_one_go(
    half_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of the first variant in FP16, one engine for every generation."""
    assert replay_exports(half_bundle, monkeypatch) == []
    checkpoint, output = tmp_path / "small.safetensors", tmp_path / "bundle"
    save_checkpoint(checkpoint, small_checkpoint())
    options = "--head aux_1 --levels p4-p6 --precision fp16 --shorter-side 160 --longer-side 320"
    engines = ["--format", "tensorrt-rtx", *for_gpus(*GPUS), "--shared"]
    arguments = ["--checkpoint", str(checkpoint), "--output-dir", str(output), *options.split(), *engines]
    assert export_main(arguments) == 0
    assert "built 4 engines with TensorRT-RTX" in capsys.readouterr().out
    assert_every_engine(output, "+".join(GPUS))
    assert build_main([str(output), *for_gpus(*GPUS), "--shared", "--precision", "fp16"]) == 0
    assert "nothing to do: all 4 engines" in capsys.readouterr().out


@needs_rtx
@pytest.mark.slow
def test_a_bundle_is_built_by_asag_build(
    small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage of the first variant in FP32: for Turing, whose graphs are others, and for later ones."""
    shutil.copytree(small_bundle.path, tmp_path / "bundle")
    turing, *later = GPUS
    assert build_main([str(tmp_path / "bundle"), *for_gpus(turing)]) == 0
    assert build_main([str(tmp_path / "bundle"), *for_gpus(*later), "--shared"]) == 0
    assert capsys.readouterr().out.count("built 5 engines") == 2
    assert_every_engine(tmp_path / "bundle", turing, "+".join(later))


def for_gpus(*gpus: str) -> list[str]:
    return [word for gpu in gpus for word in ("--gpu", gpu)]


def assert_every_engine(path: Path, *targets: str) -> None:
    for target in targets:
        engines = list((path / "engines" / "tensorrt-rtx" / target).glob("*.engine"))
        assert {engine.stem for engine in engines} == {graph.stem for graph in path.glob("*.onnx")}
        for engine in engines:
            content, sidecar = engine.read_bytes(), read_sidecar(engine.with_suffix(".json"), "")
            assert_can_be_captured(engine.stem, content)
            assert sidecar.capturable
            assert sidecar.host_memory == read_host_work(content).host_memory


@pytest.mark.parametrize("stage", ["normalize", "backbone", "probe_p4", "probe_p3", "decoder"])
def test_rewriting_for_the_compiler_changes_nothing(small_bundle: Bundle, stage: str) -> None:
    content = small_bundle.graph_path(stage).read_bytes()
    rewritten = for_parser(content, name=stage, plugins=(), turing=True)
    graph = onnx.load_model_from_string(rewritten).graph
    assert not [node for node in graph.node if node.op_type == "MatMul" or node.domain == "asag"]
    feed = _inputs(small_bundle, stage)
    expected, actual = _run(content, feed), _run(rewritten, feed)
    for spec in small_bundle.manifest.graph(stage).outputs:
        assert expected[spec.name].size > 0, spec.name
        if np.issubdtype(expected[spec.name].dtype, np.floating):
            scale = float(np.abs(expected[spec.name]).max())
            np.testing.assert_allclose(actual[spec.name], expected[spec.name], rtol=0, atol=1e-5 * scale)
        else:
            np.testing.assert_array_equal(actual[spec.name], expected[spec.name])


def test_engines_that_cannot_be_built_are_refused_before_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    arguments = ["--untrained", "--variant", "asag-a-r50-100", "--output-dir", str(output)]
    for options, message in (
        (["--format", "engine"], "unknown format 'engine'; choose one of onnx, tensorrt-rtx, tensorrt"),
        (["--gpu", "sm86"], "--gpu is for engines; give --format tensorrt-rtx too"),
        (["--format", "tensorrt-rtx", "--max-batch", "0"], "--max-batch is 0; it must be"),
        (
            ["--format", "tensorrt"],
            "tensorrt is not installed; install it with `pip install 'asag-deploy[tensorrt]' tensorrt`",
        ),
    ):
        if "tensorrt" in options:
            monkeypatch.setitem(sys.modules, "tensorrt", None)
        assert export_main([*arguments, *options]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()


@needs_rtx
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--gpu", "smx", "unknown GPU 'smx'; name its compute capability"),
        ("--gpu", "sm90", "cannot build for sm90 (H100, H200)"),
        ("--canvas", "801x1088", "the canvas 801x1088 is no multiple of 32 pixels; use 832x1088"),
    ],
)
def test_so_are_gpus_and_canvases(
    option: str,
    value: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An export would fail here."""
    monkeypatch.setattr("asag_export.bundle_export.export_bundle", None)
    checkpoint = tmp_path / "small.safetensors"
    save_checkpoint(checkpoint, small_checkpoint())
    given = ["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "bundle")]
    assert export_main([*given, "--format", "tensorrt-rtx", option, value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def _run(content: bytes, feed: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def _inputs(bundle: Bundle, stage: str) -> dict[str, Any]:
    """Random inputs of one shape, with anchors and patches inside the image."""
    height, width, batch = 160, 224, 2
    level = {"probe_p4": 4, "probe_p3": 3}.get(stage, 2)
    sizes: dict[str, int] = {"batch": batch, "height": height, "width": width, "patches": 6, "queries": 60}
    sizes |= {
        "anchors_p4": 40,
        "anchors_p3": 60,
        "height_feature": height >> level,
        "width_feature": width >> level,
    }
    for i in (2, 3, 4, 5):
        sizes |= {f"height_p{i}": height >> i, f"width_p{i}": width >> i}
    rng = np.random.default_rng(0)
    feed = {}
    for spec in bundle.manifest.graph(stage).inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        if spec.name == "image_size":
            value = np.array([[height, width], [height - 30, width - 9]])
        elif spec.name.endswith("slots"):
            value = np.arange(shape[0])
        elif spec.name == "patch_count":
            value = np.array([6, 3])
        elif spec.name == "patches":
            value = rng.integers(0, 5, shape)
        elif spec.name == "pixels":
            value = rng.integers(0, 256, shape)
        elif spec.dtype == "bool":
            value = rng.random(shape) < 0.3
        elif spec.name.startswith("anchors"):
            value = rng.random(shape) * (width, height, 80, 80, 1)
        else:
            value = rng.normal(size=shape)
        feed[spec.name] = value.astype(spec.dtype)
    return feed
