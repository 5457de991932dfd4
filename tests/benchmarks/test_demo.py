"""`asag-bench demo`: what it asks for; the export and the measurement have tests of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asag_bench import demo
from asag_bench.cli import main
from asag_bench.measuring.plan import Plan
from asag_bench.runners.references import check_references
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import BackendError
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from support.tiny_bundle import make_bundle


def test_it_exports_draws_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Plan] = []
    written: list[Path] = []

    def export(checkpoint: Any, path: Path, *, overwrite: bool) -> Bundle:
        assert overwrite
        assert checkpoint.config.variant == "asag-a-scenes"
        return make_bundle(path)

    monkeypatch.setattr(demo, "export_bundle", export)
    monkeypatch.setattr(demo, "run", asked.append)
    monkeypatch.setattr(demo, "write_report", lambda result, folder, *, plots: written.append(folder))
    monkeypatch.setattr(demo, "on_screen", lambda result: "the table")
    assert main(["demo", "--output-dir", str(tmp_path), "--scenes", "3", "--duration", "5"]) == 0
    assert len(CocoDataset.open(tmp_path / "scenes-3", VAL_SPLIT)) == 3
    (plan,) = asked
    assert plan.command == f"asag-bench demo --output-dir {tmp_path} --scenes 3 --duration 5"
    assert plan.bundles == (tmp_path / "bundle",)
    assert plan.data == tmp_path / "scenes-3"
    assert plan.options.backends[0] == "onnxruntime"
    assert plan.options.duration_s == 5
    assert plan.checkpoint is not None
    assert plan.checkpoint.is_file()
    check_references(plan.options.references, plan.checkpoint, Bundle.open(tmp_path / "bundle").manifest)
    assert written == [tmp_path]
    out = capsys.readouterr().out
    assert "the table" in out
    assert f"{tmp_path / 'result.md'}" in out


def test_scenes_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Plan) -> None:
        raise BackendError("it cannot be measured")

    monkeypatch.setattr(demo, "export_bundle", lambda *_, overwrite: None)
    monkeypatch.setattr(demo, "run", fail)
    for _ in range(2):
        assert main(["demo", "--output-dir", str(tmp_path), "--scenes", "1"]) == 2
        monkeypatch.setattr(demo, "write_scenes", None)
