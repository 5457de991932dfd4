"""Building: what is built, what is left alone, and what is said where it cannot be done."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.cuda.driver import Gpu
from asag_deploy.engines import BuildOptions, BuildReport, Canvas, build_engines, check
from asag_deploy.engines.shapes import Batches
from asag_deploy.errors import (
    BackendError,
    BundleCorruptError,
    ConfigError,
    EngineError,
    EngineStaleError,
    OutputError,
)
from support.bundle_edits import edit_graph
from support.recorded_tensorrt import NEWEST, OLDEST, RTX, RecordedModule

STAGES = ("normalize", "backbone", "decoder")
Install = Callable[[str], RecordedModule]


def relative(bundle: Bundle, paths: tuple[Path, ...]) -> list[str]:
    return [str(path.relative_to(bundle.path / "engines")) for path in paths]


@pytest.fixture
def rtx(install: Install, no_gpu: None) -> RecordedModule:
    return install(RTX)


def test_one_engine_and_one_sidecar_for_each_stage_and_gpu(bundle: Bundle, rtx: RecordedModule) -> None:
    report = build_engines(bundle, BuildOptions(gpus=("8.6", "sm75")))
    expected = [f"tensorrt-rtx/{gpu}/{stage}.engine" for gpu in ("sm75", "sm86") for stage in STAGES]
    assert relative(bundle, report.built) == expected
    assert report.current == ()
    assert report.library == "TensorRT-RTX 1.7.1.116"
    files = {path.name for path in (bundle.path / "engines" / "tensorrt-rtx" / "sm86").iterdir()}
    assert files == {f"{stage}.{suffix}" for stage in STAGES for suffix in ("engine", "json")}
    data = json.loads(report.built[-1].with_suffix(".json").read_text())
    assert data["recipe"]["capabilities"] == ["sm86"]
    assert data["recipe"]["graph_sha256"] == bundle.manifest.graph("decoder").sha256
    assert data["engine_bytes"] == len(report.built[-1].read_bytes())


def test_what_was_built_can_be_loaded(bundle: Bundle, rtx: RecordedModule) -> None:
    build_engines(bundle, BuildOptions(gpus=("sm86",)))
    options: dict[str, Any] = {"engine_format": "tensorrt-rtx", "capability": "sm86"}
    assert check(bundle, "decoder", sdk_version=rtx.__version__, **options).content == b"serialized"
    with pytest.raises(EngineStaleError, match=r"1.8 is installed"):
        check(bundle, "decoder", sdk_version="1.8", **options)


def test_without_a_gpu_the_usual_ones_are_built_for(bundle: Bundle, rtx: RecordedModule) -> None:
    report = build_engines(bundle, BuildOptions())
    assert {path.parent.name for path in report.built} == {"sm75", "sm86", "sm89", "sm120"}


def test_with_a_gpu_it_alone_is_built_for(bundle: Bundle, install: Install, gpu: Gpu) -> None:
    install(RTX)
    report = build_engines(bundle, BuildOptions())
    assert {path.parent.name for path in report.built} == {"sm86"}


def test_one_engine_for_several_gpus(bundle: Bundle, rtx: RecordedModule) -> None:
    report = build_engines(bundle, BuildOptions(gpus=("sm120", "sm86"), shared=True))
    assert {path.parent.name for path in report.built} == {"sm86+sm120"}
    assert len(report.built) == len(STAGES)


def test_a_second_build_does_nothing(bundle: Bundle, rtx: RecordedModule) -> None:
    options = BuildOptions(gpus=("sm86",))
    first = build_engines(bundle, options)
    times = [path.stat().st_mtime_ns for path in first.built]
    rtx.calls.clear()
    second = build_engines(bundle, options)
    assert second.built == ()
    assert second.current == first.built
    assert not rtx.called("Builder.build_serialized_network")
    assert [path.stat().st_mtime_ns for path in first.built] == times
    assert build_engines(bundle, dataclasses.replace(options, force=True)).built == first.built


@pytest.mark.parametrize("changes", [{"tf32": True}, {"optimization_level": 2}, {"batches": Batches(most=8)}])
def test_other_options_build_again(bundle: Bundle, rtx: RecordedModule, changes: dict[str, Any]) -> None:
    options = BuildOptions(gpus=("sm86",))
    build_engines(bundle, options)
    assert len(build_engines(bundle, dataclasses.replace(options, **changes)).built) == len(STAGES)


def test_only_what_is_damaged_is_built_again(bundle: Bundle, rtx: RecordedModule) -> None:
    options = BuildOptions(gpus=("sm86",))
    first = build_engines(bundle, options)
    first.built[1].write_bytes(b"half an eng")
    again = build_engines(bundle, options)
    assert relative(bundle, again.built) == ["tensorrt-rtx/sm86/backbone.engine"]
    assert len(again.current) == 2


@pytest.mark.parametrize(("most", "cap"), [(3841, 4000), (3840, 4000), (9999, 1920)])
def test_more_detections_than_an_engine_gives(
    bundle: Bundle, rtx: RecordedModule, most: int, cap: int
) -> None:
    manifest = bundle.manifest
    changed = dataclasses.replace(
        manifest,
        probing=dataclasses.replace(manifest.probing, anchor_cap=cap),
        postprocessing=dataclasses.replace(manifest.postprocessing, max_detections=most),
        categories=manifest.categories[:2],
    )
    many = dataclasses.replace(bundle, manifest=changed)
    if most == 3841:
        with pytest.raises(ConfigError, match=r"gives 3840 .* at most, and .* gives 3841"):
            build_engines(many, BuildOptions(gpus=("sm86",)))
        int8 = dataclasses.replace(many, manifest=dataclasses.replace(changed, precision="int8"))
        with pytest.raises(
            ConfigError, match=r"export its float32 bundle again .* --max-detections 3840`, and"
        ):
            build_engines(int8, BuildOptions(gpus=("sm86",)))
    else:
        assert len(build_engines(many, BuildOptions(gpus=("sm86",))).built) == 3


def test_progress_is_told(bundle: Bundle, rtx: RecordedModule) -> None:
    told: list[tuple[str, int, int]] = []
    build_engines(bundle, BuildOptions(gpus=("sm86",)), progress=lambda *args: told.append(args))
    steps = [(f"sm86 {stage}", i, 3) for i, stage in enumerate(STAGES)]
    assert told == [*steps, ("", 3, 3)]


def test_turing_gets_a_graph_of_its_own(bundle: Bundle, rtx: RecordedModule) -> None:
    build_engines(bundle, BuildOptions(gpus=("sm75", "sm86")))
    parsed = [onnx.load_model_from_string(call["model"]) for call in rtx.called("OnnxParser.parse")]
    products = [sum(node.op_type == "MatMul" for node in model.graph.node) for model in parsed]
    assert products == [0, 0, 0, 0, 0, 3]


def test_plugins_are_used_where_there_are_some(
    bundle: Bundle, install: Install, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(NEWEST)
    monkeypatch.setattr("asag_deploy.engines.adapter._register", lambda path: None)
    report = build_engines(bundle, BuildOptions(engine_format="tensorrt", plugins=tmp_path / "plugins.so"))
    assert report.plugins == ("AsagPadAnchors",)
    models = [onnx.load_model_from_string(call["model"]) for call in module.called("OnnxParser.parse")]
    assert ["AsagPadAnchors" in [node.op_type for node in m.graph.node] for m in models] == [
        False,
        True,
        False,
    ]
    written = [json.loads(path.with_suffix(".json").read_text())["recipe"] for path in report.built]
    assert [recipe["plugins"] for recipe in written] == [[], ["AsagPadAnchors"], []]
    assert {recipe["device"] for recipe in written} == {gpu.name}


def said(report: BuildReport, field: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.with_suffix(".json").read_text())[field] for path in report.built}


def test_what_decides_on_the_host_is_known_from_the_graph(bundle: Bundle, install: Install, gpu: Gpu) -> None:
    """TensorRT decides loops and branches on the host; the decoder has a loop."""
    install(NEWEST)
    report = build_engines(bundle, BuildOptions(engine_format="tensorrt"))
    assert said(report, "capturable") == {"normalize": True, "backbone": True, "decoder": False}
    assert said(report, "host_memory") == {"normalize": False, "backbone": False, "decoder": True}


def test_tensorrt_copies_sizes_that_are_not_known_from_the_start(
    bundle: Bundle, install: Install, gpu: Gpu, tmp_path: Path
) -> None:
    install(NEWEST)

    def add_shape(model: onnx.ModelProto) -> None:
        model.graph.node.append(onnx.helper.make_node("Shape", ["p5"], ["cells"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("cells", 7, [4]))

    edited = edit_graph(bundle, "backbone", add_shape, tmp_path / "edited")
    options = BuildOptions(engine_format="tensorrt", canvases=(Canvas(64, 64),))
    report = build_engines(edited, options)
    sidecars = [json.loads(path.with_suffix(".json").read_text()) for path in report.built]
    memory = {(s["recipe"]["canvas"] is None, s["recipe"]["stage"]): s["host_memory"] for s in sidecars}
    assert memory[True, "backbone"]
    assert not memory[False, "backbone"]


@pytest.mark.parametrize(
    ("plan", "capturable", "host_memory"),
    [
        (b"stream_capturable=1\n", True, False),
        (b"stream_capturable=1\n[ShapeHostToDeviceCopy 0]", True, True),
        (b"stream_capturable=0\n", False, False),
        (b"serialized", False, False),
    ],
)
def test_rtx_writes_it_into_its_engines(
    bundle: Bundle, rtx: RecordedModule, plan: bytes, capturable: bool, host_memory: bool
) -> None:
    rtx.answers["Builder.build_serialized_network"] = plan
    report = build_engines(bundle, BuildOptions(gpus=("sm86",)))
    assert set(said(report, "capturable").values()) == {capturable}
    assert set(said(report, "host_memory").values()) == {host_memory}
    recipe = said(report, "recipe")["decoder"]
    assert (recipe["user_allocation"], recipe["auxiliary_streams"]) == (True, 0)


def test_a_gpu_of_this_machine_that_the_library_does_not_serve(
    bundle: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(RTX)
    card = Gpu(name="NVIDIA H100 PCIe", capability="sm90")
    monkeypatch.setattr("asag_deploy.engines.build.find_gpu", lambda: card)
    with pytest.raises(ConfigError, match=r"cannot build for sm90 \(H100, H200\); .*onnxruntime-cuda"):
        build_engines(bundle, BuildOptions())
    assert len(build_engines(bundle, BuildOptions(gpus=("sm86",))).built) == len(STAGES)


@pytest.mark.parametrize("record", [OLDEST, NEWEST])
def test_tensorrt_builds_for_the_gpu_at_hand(bundle: Bundle, install: Install, gpu: Gpu, record: str) -> None:
    install(record)
    options = BuildOptions(engine_format="tensorrt")
    report = build_engines(bundle, options)
    assert relative(bundle, report.built) == [f"tensorrt/sm86/{stage}.engine" for stage in STAGES]
    assert (bundle.path / "engines" / "tensorrt" / "sm86" / "timing.cache").read_bytes() == b"serialized"
    assert build_engines(bundle, options).built == ()
    with pytest.raises(ConfigError, match="on this machine cannot build for sm89; it builds for sm86"):
        build_engines(bundle, dataclasses.replace(options, gpus=("sm89",)))
    with pytest.raises(ConfigError, match="--compatibility ampere_plus"):
        build_engines(bundle, dataclasses.replace(options, shared=True))


def test_tensorrt_needs_a_gpu(bundle: Bundle, install: Install, no_gpu: None) -> None:
    install(NEWEST)
    with pytest.raises(BackendError, match=r"builds engines only on the GPU they are for.*tensorrt-rtx"):
        build_engines(bundle, BuildOptions(engine_format="tensorrt"))


def test_a_capability_that_the_library_cannot_target(bundle: Bundle, rtx: RecordedModule) -> None:
    with pytest.raises(
        ConfigError,
        match=r"RTX 1.7.1.116 cannot build for sm90 \(H100, H200\); it builds for sm75, sm80, sm86, .*; "
        "use the backend onnxruntime-cuda on that GPU, or build on it with --format tensorrt$",
    ):
        build_engines(bundle, BuildOptions(gpus=("sm90",)))


def test_another_precision_than_the_bundles(bundle: Bundle, rtx: RecordedModule) -> None:
    build_engines(bundle, BuildOptions(gpus=("sm86",), precision="fp32"))
    with pytest.raises(ConfigError, match=r"are fp32, .*`asag-export --precision fp16`"):
        build_engines(bundle, BuildOptions(gpus=("sm86",), precision="fp16"))
    with pytest.raises(ConfigError, match=r"are fp32, .*with `asag-quantize`"):
        build_engines(bundle, BuildOptions(gpus=("sm86",), precision="int8"))


def test_activations_that_tensorrt_does_not_take(bundle: Bundle, rtx: RecordedModule) -> None:
    parity = {"quantization": {"activations": "uint8"}}
    manifest = dataclasses.replace(bundle.manifest, precision="int8", parity=parity)
    with pytest.raises(ConfigError, match=r"--activations uint8, .*`asag-quantize --activations int8`"):
        build_engines(dataclasses.replace(bundle, manifest=manifest), BuildOptions(gpus=("sm86",)))


def test_a_bundle_without_graphs(bundle: Bundle, rtx: RecordedModule) -> None:
    empty = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=()))
    with pytest.raises(BundleCorruptError, match="holds no graphs; export it again"):
        build_engines(empty, BuildOptions(gpus=("sm86",)))


def test_a_graph_that_was_changed_since(bundle: Bundle, rtx: RecordedModule) -> None:
    bundle.graph_path("decoder").write_bytes(bundle.graph_path("backbone").read_bytes())
    with pytest.raises(EngineError, match=r"'decoder' of '.*' was changed since the bundle was opened"):
        build_engines(bundle, BuildOptions(gpus=("sm86",)))


def test_without_onnx(bundle: Bundle, rtx: RecordedModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"needs the package onnx, .*asag-deploy\[engines\]"):
        build_engines(bundle, BuildOptions(gpus=("sm86",)))


def test_a_full_disk_leaves_nothing_half_written(
    bundle: Bundle, rtx: RecordedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "backbone" in path.name:
            write(path, content[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"could not write '.*backbone.engine': no space left on device"):
        build_engines(bundle, BuildOptions(gpus=("sm86",)))
    monkeypatch.undo()
    files = sorted(path.name for path in (bundle.path / "engines" / "tensorrt-rtx" / "sm86").iterdir())
    assert files == ["normalize.engine", "normalize.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compatibility": "all"}, "unknown hardware compatibility 'all'; choose one of none, ampere_plus"),
        ({"precision": "int4"}, "unknown precision 'int4'; choose one of fp32, fp16, int8"),
        ({"optimization_level": 6}, "the optimization level is 6; choose 0 to 5"),
        ({"plugins": Path("p.so")}, "TensorRT-RTX has no plugins; leave --plugins out"),
        ({"version_compatible": True}, "has no version compatibility; leave --version-compatible out"),
        ({"compatibility": "ampere_plus"}, "has no hardware compatibility; leave --compatibility out"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildOptions(**options)


def test_a_graph_in_another_precision_than_the_bundle(bundle: Bundle, rtx: RecordedModule) -> None:
    """The sidecar says what the engine computes in, not what most of the bundle does."""
    graphs = [
        dataclasses.replace(graph, precision="fp16" if graph.name == "backbone" else None)
        for graph in bundle.manifest.graphs
    ]
    mixed = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=tuple(graphs)))
    report = build_engines(mixed, BuildOptions(gpus=("sm86",)))
    said = {path.stem: json.loads(path.with_suffix(".json").read_text()) for path in report.built}
    assert {name: data["recipe"]["precision"] for name, data in said.items()} == {
        "normalize": "fp32",
        "backbone": "fp16",
        "decoder": "fp32",
    }
