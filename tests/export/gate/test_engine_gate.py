"""Engines that are wrong in float16 stay in float32, stage by stage, and the report says which and why."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level, Precision, TensorSpec
from asag_deploy.cuda.driver import Gpu
from asag_deploy.detector import Detector
from asag_deploy.engines.build import BuildOptions
from asag_deploy.engines.shapes import Batches
from asag_deploy.errors import EngineUnfitError
from asag_deploy.loop.stages import FEATURE_TENSORS
from asag_evaluation.data.doodles import draw_doodles
from asag_export import bundle_export
from asag_export.bundle_export import export_bundle
from asag_export.gate import engines as engine_gate
from asag_export.gate import gate
from asag_export.gate.checks import IDENTICAL_ROWS, OTHER_SHAPES
from asag_export.gate.engines import EngineParity, engines_can_run
from asag_export.gate.gate import Limits
from asag_export.gate.parity import Check, ParityReport, RunParity, StageParity
from asag_export.half_precision import with_half_features
from support.simulated_gpu.fake_cuda import FakeCuda
from support.simulated_gpu.fake_gpu import install_cuda, install_tensorrt, write_engines
from support.small_network import replay_exports, small_checkpoint

STAGES = ("backbone", "probe_p4", "probe_p3", "decoder")


def report(differences: Mapping[str, float], *, runs_pass: bool = True) -> ParityReport:
    """A report in which each stage has one output, for which 1 is allowed."""
    rows = [
        StageParity(
            stage=stage,
            output="anchors",
            difference=differences.get(stage, 0.1),
            tolerance=1.0,
            cases=1,
            passed=differences.get(stage, 0.1) <= 1,
        )
        for stage in STAGES
    ]
    run = RunParity(case="one", stops=(), same_stops=runs_pass, agreement=1, passed=runs_pass)
    return ParityReport(backend="test", precision="fp16", stages=rows, runs=[run])


class Rounds:
    """The gate on engines: stages that are wrong in float16, and right in float32."""

    def __init__(self, wrong: Mapping[str, float], *, together: str | None = None) -> None:
        self.wrong = dict(wrong)
        self.together = together
        """The stage that is right by itself, but spoils the runs unless it is in float32."""
        self.made: list[set[str]] = []
        """The stages that were in float32, round by round."""

    def judge(self, kept: set[str]) -> ParityReport:
        left = {stage: value for stage, value in self.wrong.items() if stage not in kept}
        return report(left, runs_pass=self.together is None or self.together in kept)

    def __call__(
        self, reference: object, bundle: Bundle, options: BuildOptions
    ) -> tuple[ParityReport, dict[str, Any]]:
        manifest = bundle.manifest
        self.made.append({name for name in STAGES if manifest.precision_of(name) == "fp32"})
        for name in STAGES:
            features = {spec.dtype for spec in manifest.graph(name).outputs if spec.name in FEATURE_TENSORS}
            assert features <= {"float16" if manifest.precision == "fp16" else "float32"}
        return self.judge(self.made[-1]), {}


@pytest.fixture
def fall_back(parity: ParityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that exports, with these rounds of the gate on engines, and gives what it found."""

    def export(rounds: Rounds, precision: Precision = "fp16") -> EngineParity | None:
        monkeypatch.setattr(bundle_export, "engines_can_run", lambda options: True)
        monkeypatch.setattr(bundle_export, "judge_engines", rounds)
        result = export_bundle(
            small_checkpoint(),
            tmp_path / "bundle",
            precision=precision,
            engines=BuildOptions(),
            keep_failed=True,
        )
        told = None if result.engines is None else json.loads(json.dumps(result.engines.to_dict()))
        assert result.bundle.manifest.parity.get("engines") == told
        return result.engines

    return export


def test_nothing_stays_where_all_is_well(fall_back: Callable[..., Any]) -> None:
    rounds = Rounds({})
    found = fall_back(rounds)
    assert found.report.passed
    assert found.full_precision == {}
    assert rounds.made == [set()]


def test_what_fails_stays_in_float32(fall_back: Callable[..., Any]) -> None:
    rounds = Rounds({"probe_p4": 2, "decoder": 3.5})
    found = fall_back(rounds)
    assert found.report.passed
    assert rounds.made == [set(), {"probe_p4", "decoder"}]
    assert list(found.full_precision) == ["decoder", "probe_p4"]
    assert found.full_precision["decoder"] == "'anchors' differs by 3.5 where 1 is allowed"
    assert found.to_dict()["full_precision"] == found.full_precision


def test_what_spoils_the_runs_goes_in_order_of_its_difference(fall_back: Callable[..., Any]) -> None:
    rounds = Rounds({"backbone": 0.4, "decoder": 0.9, "probe_p3": 0.6}, together="probe_p3")
    found = fall_back(rounds)
    assert found.report.passed
    assert rounds.made == [set(), {"decoder"}, {"decoder", "probe_p3"}]
    assert found.full_precision["probe_p3"].startswith("end to end the detections differ, and its 'anchors'")


def test_a_stage_that_fails_a_check_stays_too(fall_back: Callable[..., Any]) -> None:
    """But not for the shapes that ran, which its precision does not change."""
    row = dataclasses.replace(report({}).stages[0], stage="probe_p4", difference=3.0, passed=False)
    shapes = dataclasses.replace(row, stage="decoder")

    class Checked(Rounds):
        def judge(self, kept: set[str]) -> ParityReport:
            checks = [] if kept else [Check(name=IDENTICAL_ROWS, rows=(row,))]
            return dataclasses.replace(report({}), checks=[*checks, Check(name=OTHER_SHAPES, rows=(shapes,))])

    found = fall_back(Checked({}))
    assert not found.report.passed
    assert found.full_precision == {
        "probe_p4": "'anchors' differs by 3 where 1 is allowed, which is the check 'identical rows'"
    }


def test_what_is_wrong_in_float32_too_stays_wrong(fall_back: Callable[..., Any]) -> None:
    class Wrong(Rounds):
        def judge(self, kept: set[str]) -> ParityReport:
            return report(self.wrong)

    found = fall_back(Wrong({"decoder": 5}))
    assert not found.report.passed
    assert list(found.full_precision) == ["decoder"]


def test_nothing_is_tried_where_nothing_may_change(fall_back: Callable[..., Any]) -> None:
    rounds = Rounds({"decoder": 5})
    rounds.judge = lambda kept: report(rounds.wrong)  # type: ignore[method-assign]
    assert not fall_back(rounds, precision="fp32").report.passed
    assert rounds.made == [set(STAGES)]


def test_a_bundle_that_fails_by_itself_is_not_tried_on_engines(
    parity: ParityReport, fall_back: Callable[..., Any]
) -> None:
    parity.stages[0] = dataclasses.replace(parity.stages[0], passed=False)
    rounds = Rounds({})
    assert fall_back(rounds) is None
    assert rounds.made == []


def test_engines_of_other_gpus_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_gate, "find_gpu", lambda: None)
    assert not engines_can_run(BuildOptions())
    monkeypatch.setattr(engine_gate, "find_gpu", lambda: Gpu(name="GPU", capability="sm86"))
    cuda = FakeCuda()
    install_cuda(monkeypatch, cuda)
    install_tensorrt(monkeypatch, cuda)
    assert engines_can_run(BuildOptions())
    assert engines_can_run(BuildOptions(gpus=("8.6", "sm75")))
    assert not engines_can_run(BuildOptions(gpus=("sm75",)))


def test_limits() -> None:
    limits = Limits(size_divisor=32, longer_side=400, images=1)
    assert limits.allow([(400, 2)])
    assert not limits.allow([(2, 401)])
    assert not limits.allow([(2, 2), (2, 2)])
    pixels, sizes = gate._pictures(((2, 70), (33, 5)), 32)
    assert pixels.shape == (2, 64, 96, 3)
    assert sizes.tolist() == [[2, 70], [33, 5]]
    assert not pixels[0, 2:].any()


def test_a_float32_stage_between_half_features() -> None:
    """Also where a feature map is used in a branch."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    stage (float[n] feature, bool yes) => (float[n] p2, float[n] other)
    {
        p2 = Add (feature, feature)
        other = If (yes) <
            then_branch = then () => (float[n] a) { a = Sub (p2, feature) },
            else_branch = otherwise () => (float[n] b) { b = Identity (feature) }
        >
    }"""
    specs = [TensorSpec(name=name, dtype="float32", shape=("n",)) for name in ("feature", "p2", "other")]
    model, inputs, outputs = with_half_features(onnx.parser.parse_model(text), specs[:1], specs[1:])
    onnx.checker.check_model(model, full_check=True)
    assert [spec.dtype for spec in (*inputs, *outputs)] == ["float16", "float16", "float32"]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feature = np.array([1, 2048.0], np.float16)
    p2, other = session.run(["p2", "other"], {"feature": feature, "yes": np.array(True)})
    assert (p2.dtype, p2.tolist()) == (np.float16, [2, 4096])
    assert (other.dtype, other.tolist()) == (np.float32, [1, 2048])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """An imaginary GPU, and engines for it that are the graphs themselves."""
    cuda = FakeCuda()
    install_cuda(monkeypatch, cuda)
    install_tensorrt(monkeypatch, cuda)
    monkeypatch.setattr(engine_gate, "find_gpu", lambda: Gpu(name="Imaginary GPU", capability="sm86"))
    monkeypatch.setattr(engine_gate, "build_engines", lambda bundle, options: write_engines(bundle))
    monkeypatch.setattr(gate, "_SIZES", (((64, 96),),))
    return cuda


@pytest.mark.slow
def test_whatever_the_loop_asks_for_engines_are_built_for(
    gpu: FakeCuda, small_bundle: Bundle, tmp_path: Path
) -> None:
    """Sizes, buckets of patches and queries, levels that were not run: all lie within the profiles."""
    bundle = Bundle.open(shutil.copytree(small_bundle.path, tmp_path / "bundle"))
    write_engines(bundle, batches=Batches(most=2))
    sizes = [(160, 200), (2, 2), (90, 400), (400, 90), (400, 20)]
    images = [draw_doodles(height, width, seed=i) for i, (height, width) in enumerate(sizes)]
    levels: tuple[Level, ...] = ("P5", "P4", "P3")
    for level in levels:
        with (
            Detector.load(bundle, max_level=level) as expected,
            Detector.load(bundle, backend="tensorrt-rtx", max_level=level) as detector,
        ):
            for image in images:
                assert detector(image).trace.to_dict() == expected(image).trace.to_dict()
            assert len(detector(images[:2])) == 2
            with pytest.raises(EngineUnfitError, match="--max-batch"):
                detector(images[:3])
            # So narrow that the rule for resizing, which rounds the shorter side, exceeds the longer one.
            with pytest.raises(EngineUnfitError, match="or resize the image"):
                detector(draw_doodles(1000, 3, seed=0))


@pytest.mark.slow
def test_an_export_falls_back(
    gpu: FakeCuda, half_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's engine is wrong as long as it computes in float16."""
    exported = replay_exports(half_bundle, monkeypatch)

    def build(bundle: Bundle, options: BuildOptions) -> None:
        write_engines(bundle)
        graph = bundle.graph_path("decoder").read_bytes()
        if _computes_in_half(graph):
            _replace_engine(bundle, "decoder", _off_by(graph, "logits", 1.0))

    monkeypatch.setattr(engine_gate, "build_engines", build)
    options: dict[str, Any] = {
        "head": "aux_1",
        "levels": "p4-p6",
        "precision": "fp16",
        "preprocessing": half_bundle.manifest.preprocessing,
    }
    result = export_bundle(small_checkpoint(), tmp_path / "bundle", engines=BuildOptions(), **options)
    assert exported == ["decoder"]
    assert result.parity.passed
    assert result.engines is not None
    assert result.engines.report.passed
    assert list(result.engines.full_precision) == ["decoder"]
    reason = result.engines.full_precision["decoder"]
    assert re.fullmatch(r"'(logits|det_scores)' differs by [\d.]+ where [\d.]+ is allowed", reason)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.parity["passed"] is True
    assert manifest.parity["engines"]["full_precision"] == result.engines.full_precision
    assert [manifest.precision_of(name) for name in ("normalize", "backbone", "decoder")] == [
        *("fp32", "fp16", "fp32")
    ]
    layers = manifest.parity["engines"]["layers"]
    assert layers == result.engines.layers
    assert list(layers) == [graph.name for graph in manifest.graphs]
    assert layers["normalize"] == {"fp32": 1}
    assert layers["backbone"] == {"fp16+fp32": 1}
    decoder = manifest.graph("decoder")
    assert {spec.dtype for spec in decoder.inputs if spec.name.startswith("p")} >= {"float16"}
    assert not _computes_in_half(result.bundle.graph_path("decoder").read_bytes())
    assert _computes_in_half(result.bundle.graph_path("backbone").read_bytes())
    network = open_network(None, result.bundle)
    assert callable(network.stage("decoder"))


def _computes_in_half(content: bytes) -> bool:
    graph = onnx.load_model_from_string(content).graph
    return any(tensor.data_type == TensorProto.FLOAT16 and tensor.dims for tensor in graph.initializer)


def _off_by(content: bytes, output: str, amount: float) -> bytes:
    model = onnx.load_model_from_string(content)
    for node in model.graph.node:
        node.output[:] = [f"{name}_right" if name == output else name for name in node.output]
        node.input[:] = [f"{name}_right" if name == output else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array(amount, np.float32), "amount_off"))
    model.graph.node.append(helper.make_node("Add", [f"{output}_right", "amount_off"], [output]))
    return bytes(model.SerializeToString())


def _replace_engine(bundle: Bundle, stage: str, content: bytes) -> None:
    path = bundle.path / "engines" / "tensorrt-rtx" / "sm86" / f"{stage}.engine"
    path.write_bytes(content)
    sidecar = json.loads(path.with_suffix(".json").read_text())
    sidecar["engine_sha256"] = hashlib.sha256(content).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(sidecar))
