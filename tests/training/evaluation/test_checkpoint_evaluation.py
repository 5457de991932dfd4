"""Checkpoints run over data sets, by the code that measures bundles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.scenes import SCENE_CATEGORIES, write_scenes
from asag_evaluation.evaluate import evaluate
from asag_export.cli import main as export
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.checkpoints.checkpoint import change_settings
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor, network_predictor
from asag_training.evaluation.cli import main
from asag_training.network.model import build
from support.checkpoint_files import random_state, tiny_checkpoint, tiny_config
from support.coco_files import box, write_coco


def scene_checkpoint(**changes: Any) -> Checkpoint:
    """A network for scenes, with random weights."""
    config = tiny_config(num_classes=len(SCENE_CATEGORIES), backbone_width=8, **changes)
    state = random_state(config)
    return tiny_checkpoint(config=config, state=state, categories=SCENE_CATEGORIES, trained=False)


def test_checkpoint_with_proposals(tmp_path: Path) -> None:
    write_scenes(tmp_path, count=2, seed=0, size=96, split="val2017")
    save_checkpoint(tmp_path / "c.safetensors", scene_checkpoint())
    small = Preprocessing(shorter_side=96, longer_side=160)
    predictor = checkpoint_predictor(tmp_path / "c.safetensors", preprocessing=small)
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


def test_how_far_to_probe_is_an_option(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, scene_checkpoint())
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    small = Preprocessing(shorter_side=96)
    stopped = checkpoint_predictor(path, DetectorOptions(max_level="P5"), preprocessing=small)
    assert stopped.detector(image).trace.exit_level == "P5"
    assert checkpoint_predictor(path, preprocessing=small).detector(image).trace.exit_level != "P5"
    with pytest.raises(ConfigError, match="loop 'device' needs a backend that runs on a GPU"):
        checkpoint_predictor(path, DetectorOptions(loop="device"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--backend", "onnxruntime"], "which only PyTorch runs, not onnxruntime: export it"),
        (["--threads", "2"], "--threads and --requests are for bundles"),
        (["--requests", "2"], "--threads and --requests are for bundles"),
        (["--head", "aux_7"], "there is no head 'aux_7'"),
        ([], "has the class 'ball', which the network does not know (it knows disc"),
        (["--backend", "torch"], "has the class 'ball', which the network does not know"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "c.safetensors", scene_checkpoint())
    write_coco(tmp_path, [box(1, [1, 1, 30, 40])], split="val2017")
    assert main([str(tmp_path / "c.safetensors"), "--data", str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asag-eval: error: ")
    assert problem in line


OWN = Preprocessing(
    shorter_side=96, longer_side=128, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 3.0), size_divisor=64
)
"""How images are prepared for a checkpoint: nothing of it is what is usual."""


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], {}),
        (["--longer-side", "1000"], {"longer_side": 1000}),
        (["--shorter-side", "64"], {"shorter_side": 64}),
        (["--shorter-side", "200", "--longer-side", "300"], {"shorter_side": 200, "longer_side": 300}),
        (["--max-level", "P4", "--mode", "fast"], {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("program", ["asag-eval", "asag-export"])
def test_only_what_is_named_changes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    options: list[str],
    changed: dict[str, Any],
) -> None:
    """Side, mean and deviation that are not named stay the checkpoint's."""
    path, seen = tmp_path / "c.safetensors", list[Preprocessing]()
    save_checkpoint(path, dataclasses.replace(scene_checkpoint(), preprocessing=OWN))
    write_scenes(tmp_path, count=1, seed=0, size=96, split="val2017")

    def stop(*given: Any, **named: Any) -> None:
        seen.append(named.get("preprocessing") or given[0].manifest.preprocessing)
        raise ConfigError("enough is seen")

    if program == "asag-eval":
        monkeypatch.setattr("asag_evaluation.evaluate.evaluate", stop)
        assert main([str(path), "--data", str(tmp_path), *options]) == 2
    else:
        monkeypatch.setattr("asag_export.bundle_export.export_bundle", stop)
        options = [word.replace("--max-level", "--levels").replace("P4", "p4-p6") for word in options]
        assert export(["--checkpoint", str(path), "--output-dir", str(tmp_path / "out"), *options]) == 2
    assert seen == [dataclasses.replace(OWN, **changed)]


def test_a_side_that_does_not_fit_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, dataclasses.replace(scene_checkpoint(), preprocessing=OWN))
    assert main([str(path), "--data", str(tmp_path), "--shorter-side", "200"]) == 2
    message = (
        "image sides 200 and 128 make no sense; expected 1 <= shorter <= longer (without --longer-side it"
    )
    assert message in capsys.readouterr().err


def test_what_a_file_does_not_say_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Averaged weights are beside them, and neither image sizes nor classes are in the file."""
    state = dict(scene_checkpoint().state)
    torch.save({"model": state, "model_ema": state}, tmp_path / "c.pth")
    names = ("ball", "box", "cup", "dog", "egg")
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(names)]
    write_coco(tmp_path, [box(1, [1, 1, 30, 40], 12)], categories=categories, split="val2017")
    words = [str(tmp_path / "c.pth"), "--data", str(tmp_path), "--shorter-side", "64", "--longer-side", "64"]
    assert main([*words, "--weights", "ema", "--quiet"]) == 0
    error = capsys.readouterr().err
    for said in (
        "averaged weights (EMA) were taken, from 'model_ema'",
        "there are weights too, in 'model'",
        "of its 4 decoders 'main' is taken, and --head takes another: most published AP are of aux_2",
        "the file does not say how images are prepared",
        "it does not name its classes",
        "its 5 classes are taken for those of the data, in the order of their ids",
    ):
        assert f"asag-eval: note: '{tmp_path / 'c.pth'}': {said}" in error


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "unknown device 'tpu'; choose cpu, or cuda"),
        ("", "unknown device ''"),
        ("mps", "device 'mps' is not one that networks run on here"),
        ("cuda", "PyTorch"),
        ("cuda:7", "PyTorch"),
    ],
)
def test_devices_that_are_not_there(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_checkpoint(tmp_path / "c.safetensors", scene_checkpoint())
    words = [str(tmp_path / "c.safetensors"), "--data", str(tmp_path), "--device", device]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asag-eval: error: ")
    assert message in line


@pytest.mark.parametrize("name", ["anchor_cap", "max_detections"])
def test_more_than_a_checkpoint_is_set_to_is_a_setting(name: str) -> None:
    checkpoint = scene_checkpoint(heads=1)
    model = build(checkpoint.config, checkpoint.state)
    said = (
        rf"^--{name.replace('_', '-')} is 2000, and the network's settings allow \d+; give --set {name}=2000$"
    )
    asked: dict[str, Any] = {name: 2000}
    with pytest.raises(ConfigError, match=said):
        network_predictor(model, SCENE_CATEGORIES, dataclasses.replace(DetectorOptions(), **asked))
    assert getattr(change_settings(checkpoint, [f"{name}=2000"]).config, name) == 2000
