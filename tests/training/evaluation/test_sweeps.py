"""Sweeps: one checkpoint under many settings, as each of them by itself measures."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.scenes import SCENE_CATEGORIES, write_scenes
from asag_evaluation.evaluate import evaluate
from asag_training.checkpoints import Checkpoint, save_checkpoint, select_head
from asag_training.evaluation.checkpoint_predictor import network_predictor
from asag_training.evaluation.cli import main
from asag_training.evaluation.sweep import MOST, SWEPT, Way, evaluate_ways, read_ways
from asag_training.evaluation.sweep_report import figures_of
from asag_training.network.config import AsagConfig
from asag_training.network.model import build
from support.checkpoint_files import tiny_config
from support.coco_files import box, write_coco
from support.small_network import small_checkpoint
from support.tiny_bundle import make_bundle

SMALL = Preprocessing(shorter_side=96, longer_side=160)


def scene_checkpoint(**changes: Any) -> Checkpoint:
    """Random weights whose anchors differ, so that every setting matters; four decoders."""
    made = small_checkpoint(num_classes=len(SCENE_CATEGORIES), patch_size=6, **changes)
    return dataclasses.replace(made, categories=SCENE_CATEGORIES, preprocessing=SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, count=3, seed=0, size=96, split="val2017")
    return folder


def test_every_way_measures_what_it_measures_alone(data: Path) -> None:
    checkpoint = select_head(scene_checkpoint(), "main")
    changes = ("score_low=0.05,0.3,0.5", "patch_nms_iou=0.1,0.6", "anchor_cap=40,200")
    ways = [*read_ways(changes, checkpoint.config), Way(max_level="P5"), Way(changes={"max_patches": None})]
    assert len(ways) == 14  # more than share their maps
    dataset = CocoDataset.open(data, "val2017", categories=SCENE_CATEGORIES)
    seen = list[int]()
    measured = list(evaluate_ways(checkpoint, ways, dataset, batch=2, on_image=lambda: seen.append(1)))
    assert [way for way, _ in measured] == ways
    assert len(seen) == len(ways) * len(dataset)
    for way, found in measured:
        config = checkpoint.config.with_changes(**way.changes)
        options = DetectorOptions(max_level=way.max_level)
        model = build(config, checkpoint.state)
        alone = network_predictor(model, SCENE_CATEGORIES, options, preprocessing=SMALL)
        expected = evaluate(alone.detector, dataset, proposals=alone.proposals, batch=2)
        assert found.results == expected.results, way
        assert found.anchors == expected.anchors
        assert found.proposal_recall == expected.proposal_recall
    counts = {(found.anchors.anchors, found.anchors.patches_p4) for _, found in measured}
    assert len(counts) > 4  # the settings matter


def test_combinations_are_all_there_in_order() -> None:
    ways = read_ways(("score_low=0.05,0.1", "max_patches=null,15"), tiny_config())
    assert [dict(way.changes) for way in ways] == [
        {"score_low": 0.05, "max_patches": None},
        {"score_low": 0.05, "max_patches": 15},
        {"score_low": 0.1, "max_patches": None},
        {"score_low": 0.1, "max_patches": 15},
    ]


def test_what_can_be_swept_changes_no_weight() -> None:
    other: dict[str, Any] = {
        "replace_anchors": False,
        "max_patches": 7,
        "detection_nms_iou": 0.5,
        "score_high": 0.9,
    }
    state = {name: tensor.shape for name, tensor in build(tiny_config()).state_dict().items()}
    for name in SWEPT:
        value = getattr(tiny_config(), name)
        changed = tiny_config(**{name: other.get(name, value and value * 2)})
        assert {key: tensor.shape for key, tensor in build(changed).state_dict().items()} == state, name
    assert set(SWEPT) <= {field.name for field in dataclasses.fields(AsagConfig)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["patch_size=12"],
            "cannot change 'patch_size' of a network that is trained: what changes no weight",
        ),
        (["score_low"], "expected NAME=VALUE"),
        (["score_low=low"], "'low' is no number, true, false or null"),
        (["score_low=0.1,"], "'' is no number"),
        (["score_low=0.1", "score_low=0.2"], "--set score_low is given twice"),
        (["score_low=0.1,0.9"], "0 <= score_low < score_high <= 1"),
        (["anchor_cap=1.5"], "anchor_cap"),
        ([f"anchor_cap={','.join(map(str, range(10, 11 + MOST)))}"], f"of which {MOST} are the most"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_ways(changes, tiny_config())
    assert sentence in str(caught.value)


def test_the_program_prints_and_writes_a_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "c.safetensors", scene_checkpoint())
    output = tmp_path / "sweep"
    command = [str(tmp_path / "c.safetensors"), "--data", str(data), "--output-dir", str(output)]
    command += ["--set", "score_low=0.05,0.5", "--set", "detection_nms_iou=0.5", "--limit", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("3 images, ")
    assert "measured on 2 of 3 images" in out
    assert out[-3].split()[:3] == ["score_low", "detection_nms_iou", "AP"]
    assert [line.split()[0] for line in out[-2:]] == ["0.05", "0.5"]
    written = json.loads((output / "sweep.json").read_text())
    assert (written["images"], len(written["rows"])) == (2, 2)
    assert written["rows"][0]["figures"].keys() >= {"AP", "APs", "#An", "N_P4", "N_P3"}
    with (output / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["score_low"] for row in table] == ["0.05", "0.5"]
    assert "| score_low | detection_nms_iou | AP |" in (output / "sweep.md").read_text()
    assert main(command) == 0  # what it has written it may replace
    (output / "sweep.json").write_text("{}")
    assert main(command) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err


def test_persons_are_measured_as_in_table_6(tmp_path: Path) -> None:
    write_coco(tmp_path, [box(1, [1, 1, 30, 40], 1)], categories=[{"id": 1, "name": "person"}])
    dataset = CocoDataset.open(tmp_path)
    checkpoint = dataclasses.replace(
        small_checkpoint(num_classes=1, patch_size=6), categories=dataset.categories, preprocessing=SMALL
    )
    ((_, found),) = evaluate_ways(select_head(checkpoint, "main"), [Way()], dataset)
    assert figures_of(found).keys() >= {"CrowdHuman AP", "mMR", "R"}


def test_a_bundle_and_a_deadline_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(tmp_path / "bundle")
    assert main([str(tmp_path / "bundle"), "--data", str(data), "--set", "score_low=0.1"]) == 2
    assert "is a bundle, whose settings are in its graphs" in capsys.readouterr().err
    save_checkpoint(tmp_path / "c.safetensors", scene_checkpoint())
    timed = [str(tmp_path / "c.safetensors"), "--data", str(data), "--set", "score_low=0.1"]
    assert main([*timed, "--deadline-ms", "5"]) == 2
    assert "leave it out of a --set" in capsys.readouterr().err
    assert main([*timed, "--backend", "openvino"]) == 2
    assert "which only PyTorch runs" in capsys.readouterr().err
