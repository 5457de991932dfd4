"""What several tests share: a bundle in float16, the demo, and exports that take no time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import TensorSpec
from asag_export import bundle_export
from asag_export.cli import main
from asag_export.gate.parity import ParityReport, RunParity, StageParity
from asag_export.stage_export import stage_inputs, stage_outputs
from asag_training.checkpoints import save_checkpoint
from support.demo_run import DemoRun, read_run, run_demo
from support.small_network import small_checkpoint


@pytest.fixture(scope="session")
def half_bundle(shared_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small network's head `aux_1` up to P4 in float16, made by `asag-export`."""

    def export(path: Path) -> None:
        checkpoint = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
        save_checkpoint(checkpoint, small_checkpoint())
        options = "--head aux_1 --levels p4-p6 --precision fp16 --shorter-side 160 --longer-side 320 --quiet"
        assert main(["--checkpoint", str(checkpoint), "--output-dir", str(path), *options.split()]) == 0

    return shared_bundle("half", export)


@pytest.fixture(scope="session")
def demo_run(shared_folder: Callable[..., Path]) -> DemoRun:
    return read_run(shared_folder("demo", run_demo))


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ParityReport:
    """Exports are instant, of empty graphs, and the gate reports this."""
    row = StageParity(stage="decoder", output="logits", difference=0.5, tolerance=1.0, cases=1, passed=True)
    run = RunParity(case="1x1 to P5", stops=("max level",), same_stops=True, agreement=1.0, passed=True)
    report = ParityReport(backend="onnxruntime", precision="fp32", stages=[row], runs=[run])

    def export_nothing(stage: Any, config: Any, probing: Any, *, precision: Any, opset: int) -> Any:
        model = onnx.helper.make_model(onnx.GraphProto(name=stage.name))
        specs: list[tuple[TensorSpec, ...]] = [
            function(stage, config, probing, precision) for function in (stage_inputs, stage_outputs)
        ]
        return model, *specs

    monkeypatch.setattr(bundle_export, "export_stage", export_nothing)
    monkeypatch.setattr(bundle_export, "open_network", lambda backend, bundle: bundle)
    monkeypatch.setattr(bundle_export, "run_gate", lambda *args, **options: report)
    return report
