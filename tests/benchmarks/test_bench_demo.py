"""`make bench`: what it asks of `asag-bench`; the export and the measurement have tests of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asag_bench import cli, demo
from asag_bench.runners.peers import check_peers
from asag_deploy.bundle.bundle import Bundle
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from support.tiny_bundle import make_bundle


def test_it_exports_draws_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def export(checkpoint: Any, path: Path, *, overwrite: bool) -> Bundle:
        assert overwrite
        assert checkpoint.config.variant == "asag-a-scenes"
        return make_bundle(path)

    def measure(arguments: list[str]) -> int:
        asked.append(arguments)
        return 0

    monkeypatch.setattr(demo, "export_bundle", export)
    monkeypatch.setattr(demo, "bench", measure)
    assert demo.main(["--output-dir", str(tmp_path), "--scenes", "3", "--duration", "5"]) == 0
    assert len(CocoDataset.open(tmp_path / "scenes-3", VAL_SPLIT)) == 3
    plan = cli._plan(cli._parser().parse_args(asked[0]), "asag-bench")
    assert plan.bundles == (tmp_path / "bundle",)
    assert plan.data == tmp_path / "scenes-3"
    assert plan.backends[0] == "onnxruntime"
    assert plan.duration == 5
    assert plan.checkpoint is not None
    assert plan.checkpoint.is_file()
    check_peers(plan.peers, plan.checkpoint, Bundle.open(tmp_path / "bundle").manifest)
    assert f"{tmp_path / 'result.md'}" in capsys.readouterr().out


def test_scenes_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "export_bundle", lambda *_, overwrite: None)
    monkeypatch.setattr(demo, "bench", lambda arguments: 2)
    for _ in range(2):
        assert demo.main(["--output-dir", str(tmp_path), "--scenes", "1"]) == 2
        monkeypatch.setattr(demo, "write_scenes", None)
