"""The network that comes with the project detects, and looks closer where there is something to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.examples import PHOTOGRAPHS, PHOTOGRAPHS_SPLIT, photographs
from asag_deploy.images.reading import read_image
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from asag_evaluation.data.scenes import SCENE_CATEGORIES
from asag_evaluation.evaluate import evaluate
from asag_evaluation.predictor import bundle_predictor
from asag_evaluation.report import table
from asag_export.demo import networks, scenes
from asag_export.demo.cli import main
from asag_training.checkpoints import load_checkpoint
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor
from support.demo_run import SCENES, DemoRun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", [networks.CHECKPOINT, networks.PHOTOGRAPHS_CHECKPOINT])
def test_checkpoints_are_small_and_trained(path: Path) -> None:
    assert path.stat().st_size < 15 * 2**20
    assert load_checkpoint(path).trained


def test_checkpoints_know_their_classes() -> None:
    assert load_checkpoint(networks.CHECKPOINT).categories == SCENE_CATEGORIES
    of_photographs = load_checkpoint(networks.PHOTOGRAPHS_CHECKPOINT).categories
    assert of_photographs == CocoDataset.open(PHOTOGRAPHS, PHOTOGRAPHS_SPLIT).categories
    assert [category.name for category in of_photographs] == ["RBC", "WBC", "Platelets"]


def test_photographs_come_first(demo_run: DemoRun) -> None:
    lines = demo_run.printed.splitlines()
    rows = {path.name: next(line for line in lines if path.name in line).split() for path in photographs()}
    assert len(rows) == 6
    stopped_at = {name: row[1] for name, row in rows.items()}
    assert len(set(stopped_at.values())) > 1, "the photographs shall show that the network adapts"
    hits = next(line for line in lines if "annotated cells are among" in line).split()
    found, objects = int(hits[0]), int(hits[2])
    assert found > 0.85 * objects > 40
    scenes_begin = next(i for i, line in enumerate(lines) if "generated scenes" in line)
    assert max(i for i, line in enumerate(lines) if photographs()[0].name in line) < scenes_begin


def test_more_anchors_find_more_objects(demo_run: DemoRun) -> None:
    lines = demo_run.printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:2] == ["anchors", "at"])
    rows = [list(map(float, line.split())) for line in lines[first + 1 : first + 5]]
    assert [(cap, most) for cap, most, *_ in rows] == [(150, 100), (150, 600), (300, 600), (600, 600)]
    recall = [row[2] for row in rows]
    assert recall[0] < recall[1] < recall[2] < recall[3]
    assert recall[3] > recall[0] + 0.15


def test_it_detects(demo_run: DemoRun) -> None:
    assert demo_run.figures["images"] == SCENES
    assert demo_run.figures["coco"]["ap"] > 0.5
    assert demo_run.figures["coco"]["ap50"] > 0.75


def test_it_adapts(demo_run: DemoRun) -> None:
    by_kind = demo_run.figures["anchors"]["exit_levels_of_kind"]
    large, tiny = by_kind["large"], by_kind["tiny"]
    assert tiny["P3"] > 0.9 * sum(tiny.values())
    assert large["P5"] > 0.4 * sum(large.values())
    assert demo_run.figures["anchors"]["correlation"] > 0.5


def test_the_bundle_detects_and_proposes_what_the_checkpoint_does(demo_run: DemoRun) -> None:
    bundle = Bundle.open(demo_run.folder / "bundle")
    assert bundle.manifest.parity["passed"] is True
    scenes = CocoDataset.open(demo_run.folder / "scenes", VAL_SPLIT).first(12)
    as_trained = DetectorOptions(anchor_cap=150, max_detections=100)  # it is exported for more
    of_bundle, of_checkpoint = (
        evaluate(predictor.detector, scenes, proposals=predictor.proposals, batch=2)
        for predictor in (bundle_predictor(bundle, as_trained), checkpoint_predictor(networks.CHECKPOINT))
    )
    assert of_checkpoint.coco.ap is not None
    assert of_bundle.coco.ap == pytest.approx(of_checkpoint.coco.ap, abs=1e-6)
    assert of_bundle.anchors == of_checkpoint.anchors
    assert of_checkpoint.proposal_recall is not None
    assert (of_checkpoint.proposal_recall[100] or 0) > 0.25
    assert of_bundle.proposal_recall == pytest.approx(of_checkpoint.proposal_recall, abs=0.02)
    assert of_bundle.anchor_recall == pytest.approx(of_checkpoint.anchor_recall, abs=0.02)
    assert "AR of proposals: " in table(of_bundle)


def test_probing_is_worth_it(demo_run: DemoRun) -> None:
    lines = [line.strip() for line in demo_run.printed.splitlines()]
    ap = {
        way: float(line.removeprefix(way).split()[0])
        for way in scenes._WAYS
        for line in lines
        if line.startswith(f"{way} ") and len(line.removeprefix(way).split()) == 8
    }
    assert ap.keys() == {"exact", "fast", "stop at P4", "stop at P5"}
    assert ap["exact"] > ap["stop at P4"] > ap["stop at P5"]


def test_what_the_bundle_is_exported_for_is_said(demo_run: DemoRun) -> None:
    manifest = Bundle.open(demo_run.folder / "bundle").manifest
    limits = manifest.probing.anchor_cap, manifest.postprocessing.max_detections
    said = f"bundle is exported for {limits[0]} anchors and {limits[1]} detections; "
    assert f"{said}--anchor-cap 150 --max-detections 100 give the table above" in demo_run.printed


def test_the_ways_take_turns(demo_run: DemoRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = list[tuple[str, int]]()
    detect = Detector.__call__

    def noting(detector: Detector, images: Any, **options: Any) -> Any:
        found = detect(detector, images, **options)
        if isinstance(images, list):  # the gallery's are single ones
            rule = detector._limits.rule
            called.append((rule.max_level, rule.min_selected))
        return found

    monkeypatch.setattr(Detector, "__call__", noting)
    bundle = Bundle.open(demo_run.folder / "bundle")
    dataset = CocoDataset.open(demo_run.folder / "scenes", VAL_SPLIT).first(3)
    measured = scenes._measure(bundle, dataset, tmp_path / "gallery.jpg")
    assert list(measured) == list(scenes._WAYS)
    ways = called[:4]
    assert len(set(ways)) == 4
    assert called == ways * 3
    assert [found.anchors.exit_levels for found in measured.values()][3] == {"P5": 3, "P4": 0, "P3": 0}


def test_pictures(demo_run: DemoRun) -> None:
    assert read_image(str(demo_run.folder / "gallery.jpg")).shape == (1280, 1920, 3)
    assert read_image(str(demo_run.folder / "photographs.jpg")).shape == (960, 1920, 3)
    assert {path.name for path in (demo_run.folder / "evaluation").glob("*.png")} >= {"exit_levels.png"}


def test_a_second_demo_takes_the_scenes_of_the_first(demo_run: DemoRun, tmp_path: Path) -> None:
    assert len(scenes._scenes(demo_run.folder / "scenes", SCENES)) == SCENES
    other = scenes._scenes(demo_run.folder / "scenes", 3)
    assert len(other) == 3
    assert len(scenes._scenes(demo_run.folder / "scenes", 3)) == 3


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scenes", "some"]) == 2
    assert capsys.readouterr().err.startswith("demo: error: --scenes is some; it must be a whole number")
