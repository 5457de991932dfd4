"""Detectors run over data sets: bundles and checkpoints by the same code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.detector import Detector
from asag_deploy.errors import ConfigError, DataError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.scenes import SCENE_CATEGORIES, write_scenes
from asag_evaluation.evaluate import evaluate
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.evaluation.cli import main
from asag_training.evaluation.predictor import load_predictor, network_predictor
from asag_training.network.model import build
from support.checkpoint_files import random_state, tiny_checkpoint, tiny_config
from support.coco_files import box, write_coco
from support.tiny_bundle import make_bundle, picture

PICTURES = [picture(0), picture(3), picture(5, 2)]
"""That end on P5, P4 and P3."""
KINDS = ["large", "mixed", "tiny"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle").path


@pytest.fixture
def data(tmp_path: Path, bundle: Path) -> Path:
    """Pictures whose objects of the first class are where the bundle finds them."""
    with Detector.load(bundle) as detector:
        found = detector(PICTURES, channel_order="rgb")
        categories = detector.manifest.categories
    objects = []
    for image_id, detections in enumerate(found, start=1):
        best = detections.class_id == 0
        for x1, y1, x2, y2 in detections.xyxy[best].astype(float).tolist():
            objects.append(box(image_id, [x1, y1, x2 - x1, y2 - y1], categories[0].id))
    write_coco(
        tmp_path / "data",
        objects,
        split="val2017",
        pictures=PICTURES,
        categories=[dataclasses.asdict(category) for category in categories],
        kinds=KINDS,
    )
    return tmp_path / "data"


def scene_checkpoint(**changes: Any) -> Checkpoint:
    """A network for scenes, with random weights."""
    config = tiny_config(num_classes=len(SCENE_CATEGORIES), backbone_width=8, **changes)
    state = random_state(config)
    return tiny_checkpoint(config=config, state=state, categories=SCENE_CATEGORIES, trained=False)


def test_bundle(bundle: Path, data: Path) -> None:
    seen: list[int] = []
    predictor = load_predictor(bundle)
    assert predictor.proposals is None
    dataset = CocoDataset.open(data, "val2017", categories=predictor.detector.manifest.categories)
    one_by_one = evaluate(predictor.detector, dataset, on_image=lambda s, d: seen.append(s.image_id))
    assert seen == [1, 2, 3]
    assert (one_by_one.images, one_by_one.objects) == (3, dataset.counts.objects)
    assert one_by_one.anchors.exit_levels == {"P5": 1, "P4": 1, "P3": 1}
    assert one_by_one.anchors.exit_levels_of_kind["tiny"] == {"P5": 0, "P4": 0, "P3": 1}
    assert one_by_one.anchors.patches_p4 == pytest.approx(8 / 3)
    assert one_by_one.proposal_recall is None
    assert one_by_one.crowdhuman is None
    # Every object lies where the detector found it, best scored first.
    assert one_by_one.coco.ap_of_class == {"round": pytest.approx(1), "square": None, "other": None}
    assert (one_by_one.anchor_recall[100] or 0) > 0.9  # anchors, unlike detections, are not clipped

    together = evaluate(predictor.detector, dataset, batch=2)
    assert [r["bbox"] for r in together.results] == [r["bbox"] for r in one_by_one.results]
    assert together.coco.ap == one_by_one.coco.ap


def test_max_level_is_kept_to(bundle: Path, data: Path) -> None:
    predictor = load_predictor(bundle, max_level="P4")
    dataset = CocoDataset.open(data, "val2017", categories=predictor.detector.manifest.categories)
    assert evaluate(predictor.detector, dataset).anchors.exit_levels == {"P5": 1, "P4": 2, "P3": 0}


def test_checkpoint_with_proposals(tmp_path: Path) -> None:
    write_scenes(tmp_path, count=2, seed=0, size=96, split="val2017")
    save_checkpoint(tmp_path / "c.safetensors", scene_checkpoint())
    small = Preprocessing(shorter_side=96, longer_side=160)
    predictor = load_predictor(tmp_path / "c.safetensors", preprocessing=small)
    dataset = CocoDataset.open(tmp_path, "val2017", categories=SCENE_CATEGORIES)
    evaluation = evaluate(predictor.detector, dataset, proposals=predictor.proposals, batch=2)
    assert evaluation.proposal_recall is not None
    assert all(0 <= (value or 0) <= 1 for value in evaluation.proposal_recall.values())
    assert len(evaluation.results) > 0
    assert evaluation.anchors.anchors >= 5
    assert json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))["images"] == 2


def test_proposals_are_those_of_the_relation_block() -> None:
    torch.manual_seed(0)
    checkpoint = scene_checkpoint(heads=1)
    model = build(checkpoint.config, checkpoint.state)
    predictor = network_predictor(model, SCENE_CATEGORIES, preprocessing=Preprocessing(shorter_side=64))
    source = predictor.proposals
    assert source is not None
    outputs: list[Any] = []
    handle = model.rpn.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    count = predictor.detector([image])[0].trace.anchor_count
    (boxes,) = source([count])
    handle.remove()
    assert boxes.shape == (count, 4)
    best = int(outputs[0].logits[0, :count].amax(dim=-1).argmax())
    cx, cy, w, h = outputs[0].boxes[0, best].tolist()
    assert boxes[0].tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=1e-5)
    rest = outputs[0].logits[0, :count].amax(dim=-1).sort(descending=True, stable=True).indices
    assert boxes[:, 2].tolist() == pytest.approx(
        (outputs[0].boxes[0, rest, 0] + outputs[0].boxes[0, rest, 2] / 2).tolist(), abs=1e-5
    )


def test_one_class_is_measured_as_crowdhuman(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        [box(1, [1, 1, 30, 40], 1), box(1, [20, 1, 30, 40], 1, iscrowd=1)],
        categories=[{"id": 1, "name": "person"}],
    )
    dataset = CocoDataset.open(tmp_path)
    checkpoint = scene_checkpoint()
    config = checkpoint.config.with_changes(num_classes=1)
    model = build(config)
    predictor = network_predictor(model, dataset.categories, preprocessing=Preprocessing(shorter_side=64))
    evaluation = evaluate(predictor.detector, dataset)
    assert evaluation.crowdhuman is not None
    assert 0 <= evaluation.crowdhuman.mmr <= 1
    assert "mMR" not in evaluation.coco.to_dict()


def test_other_labels_are_refused(bundle: Path, data: Path) -> None:
    detector = load_predictor(bundle).detector
    dataset = CocoDataset.open(data, "val2017")
    with pytest.raises(ConfigError, match="batch is 0"):
        evaluate(detector, dataset, batch=0)
    with pytest.raises(ConfigError, match="no images"):
        evaluate(detector, dataset.subset([]))
    dataset.categories = dataset.categories[::-1]
    with pytest.raises(ConfigError, match="open it with the network's categories"):
        evaluate(detector, dataset)
    dataset.categories = SCENE_CATEGORIES
    with pytest.raises(DataError):
        evaluate(detector, dataset)


def test_options_that_do_not_go_together(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a bundle, whose head"):
        load_predictor(bundle, head="main")
    with pytest.raises(ConfigError, match="which PyTorch does not run"):
        load_predictor(bundle, backend="torch")
    with pytest.raises(ConfigError, match="which only PyTorch runs, not onnxruntime"):
        load_predictor(tmp_path / "c.safetensors", backend="onnxruntime")


class TestCommand:
    def test_table_and_files(self, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = data / "report"
        assert main([str(bundle), "--data", str(data), "--output-dir", str(output)]) == 0
        text = capsys.readouterr().out
        assert "exit levels: P5 1 (33%), P4 1 (33%), P3 1 (33%)" in text
        assert "round 100.0" in text
        content = json.loads((output / "evaluation.json").read_text())
        assert content["coco"]["ap50"] == pytest.approx(1)
        assert content["anchors"]["exit_levels"] == {"P5": 1, "P4": 1, "P3": 1}
        assert len(json.loads((output / "detections.json").read_text())) > 0
        for name in ("precision_recall", "exit_levels", "anchors_objects"):
            assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    def test_limit_and_quiet(self, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(bundle), "--data", str(data), "--limit", "1"]) == 0
        assert "1 images" in capsys.readouterr().out
        assert main([str(bundle), "--data", str(data), "--quiet"]) == 0
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (["--data", "nowhere"], "there is no data folder 'nowhere'"),
            (["--split", "test"], "there is no split 'test'"),
            (["--limit", "0"], "--limit is 0"),
            (["--batch", "0"], "batch is 0"),
            (["--shorter-side", "320"], "is a bundle"),
            (["--shorter-side", "0"], "--shorter-side 0"),
            (["--mode", "slow"], "see asag-eval --help"),
        ],
    )
    def test_errors_are_one_sentence(
        self, bundle: Path, data: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(bundle), "--data", str(data), *options]) == 2
        error = capsys.readouterr().err
        line = next(line for line in error.splitlines() if line.startswith("asag-eval: error: "))
        assert problem in line
        assert "Traceback" not in error

    def test_classes_that_the_checkpoint_lacks(
        self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_checkpoint(tmp_path / "c.safetensors", scene_checkpoint())
        assert main([str(tmp_path / "c.safetensors"), "--data", str(data)]) == 2
        assert "which is not among the 5 classes of the network" in capsys.readouterr().err
