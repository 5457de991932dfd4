"""`Detections`: its checks, and the shapes it can be handed on in."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision
from PIL import Image
from pycocotools.coco import COCO

from asag_deploy.detections import Detections
from asag_deploy.errors import ConfigError, ImageError, OutputError
from support.detection_samples import CATEGORIES, make_detections


def nothing() -> Detections:
    return make_detections(xyxy=(), confidence=(), class_id=(), anchors=())


def test_length_and_names() -> None:
    found = make_detections()
    assert len(found) == 3
    assert found.names == ["cow", "car", "traffic light"]
    assert len(nothing()) == 0
    assert nothing().names == []


def test_classes_of_one_name_are_told_apart_wherever_names_stand() -> None:
    categories = (CATEGORIES[0], *(dataclasses.replace(c, name="pear") for c in CATEGORIES[1:]))
    found = dataclasses.replace(make_detections(), categories=categories)
    names = [f"pear (id {CATEGORIES[2].id})", CATEGORIES[0].name, f"pear (id {CATEGORIES[1].id})"]
    assert found.names == names
    assert [entry["name"] for entry in found.to_json()["detections"]] == names
    assert list(found.to_supervision().data["class_name"]) == names


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("xyxy", np.zeros((3, 5), np.float32), r"expected xyxy as float32 of shape \(3, 4\), got"),
        ("xyxy", np.zeros((3, 4), np.float64), "got float64"),
        ("confidence", np.zeros(2, np.float32), r"expected confidence as float32 of shape \(3,\)"),
        ("class_id", np.zeros(3, np.int32), "expected class_id as int64"),
        ("class_id", np.array([0, 1, 3]), "expected class_id from 0 to 2, got 0 to 3"),
        ("class_id", np.array([0, -1, 2]), "got -1 to 2"),
        ("confidence", np.array([0.1, 0.9, 0.2], np.float32), "descending order"),
        ("anchors", np.zeros((2, 3), np.float32), "expected anchors"),
        ("original_shape", (0, 10), r"got \(0, 10\)"),
        ("original_shape", (10,), r"expected original_shape \(height, width\)"),
    ],
)
def test_fields_must_fit_together(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(make_detections(), **{field: value})


def test_filter_keeps_what_is_at_least_as_confident() -> None:
    found = make_detections()
    kept = found.filter(0.5)
    assert kept.names == ["cow", "car"]
    np.testing.assert_array_equal(kept.xyxy, found.xyxy[:2])
    assert kept.trace is found.trace
    assert len(found.filter(0)) == 3
    assert len(found.filter(1)) == 0
    assert len(found) == 3


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_filter_refuses_impossible_thresholds(threshold: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        make_detections().filter(threshold)


def test_json_is_complete_and_plain() -> None:
    value = make_detections().to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert (value["width"], value["height"]) == (100, 80)
    assert value["detections"][1] == {
        "box": [50, 5, 99, 30],
        "confidence": 0.5,
        "class_id": 0,
        "category_id": 3,
        "name": "car",
    }
    assert len(value["anchors"]) == 2
    assert value["trace"]["exit_level"] == "P4"
    assert value["trace"]["stop"] == "nothing selected"
    assert value["trace"]["levels"][1]["patch_boxes"] == [[10, 10, 30, 30]]
    assert value["times_ms"] == {"preprocess": 1.25, "backbone": 20.5, "decoder": 3.0}


def test_json_of_nothing() -> None:
    value = nothing().to_json()
    assert value["detections"] == []
    assert value["anchors"] == []


def test_coco_results_are_what_pycocotools_loads(capsys: pytest.CaptureFixture[str]) -> None:
    results = make_detections().to_coco(139)
    first = results[0]
    assert first["bbox"] == [10, 20, 30, 40]
    assert first["category_id"] == 21
    assert first["score"] == pytest.approx(0.9)
    ground_truth = COCO()
    ground_truth.dataset = {
        "info": {},
        "images": [{"id": 139, "width": 100, "height": 80}],
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
        "annotations": [],
    }
    ground_truth.createIndex()
    loaded = ground_truth.loadRes(json.loads(json.dumps(results)))
    assert [a["area"] for a in loaded.loadAnns(loaded.getAnnIds())] == [1200, 1225, 108]
    assert nothing().to_coco(1) == []
    assert "error" not in capsys.readouterr().out.lower()


def test_supervision() -> None:
    found = make_detections()
    handed = found.to_supervision()
    assert isinstance(handed, supervision.Detections)
    np.testing.assert_array_equal(handed.xyxy, found.xyxy)
    assert handed.confidence is not None
    np.testing.assert_array_equal(handed.confidence, found.confidence)
    assert list(handed.data["class_name"]) == found.names
    assert not np.shares_memory(handed.xyxy, found.xyxy)
    assert len(nothing().to_supervision()) == 0


def test_without_supervision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match=r"pip install 'asag-deploy\[supervision\]'"):
        make_detections().to_supervision()


def test_plot_draws_on_a_copy_in_the_same_order() -> None:
    image = np.full((80, 100, 3), (40, 90, 160), dtype=np.uint8)
    before = image.copy()
    as_bgr = make_detections().plot(image)
    as_rgb = make_detections().plot(image[..., ::-1], channel_order="rgb")
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(as_bgr, as_rgb[..., ::-1])
    assert as_bgr.flags.c_contiguous
    assert (as_bgr != image).any()


def test_plot_with_trace_adds_red_and_white() -> None:
    grey = np.full((80, 100, 3), 90, dtype=np.uint8)
    plain = make_detections().plot(grey, channel_order="rgb")
    traced = make_detections().plot(grey, trace=True, channel_order="rgb")
    red, white = (255, 32, 32), (255, 255, 255)
    assert not (plain == red).all(axis=2).any()
    assert (traced == red).all(axis=2).any()
    assert (traced == white).all(axis=2).sum() > (plain == white).all(axis=2).sum()


def test_plot_takes_a_path(tmp_path: Path) -> None:
    pixels = np.full((80, 100, 3), (200, 10, 60), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = make_detections().plot(tmp_path / "a.png", channel_order="rgb")
    np.testing.assert_array_equal(picture, make_detections().plot(pixels, channel_order="rgb"))


def test_plot_of_nothing_is_the_image() -> None:
    image = np.full((80, 100, 3), 90, dtype=np.uint8)
    np.testing.assert_array_equal(nothing().plot(image), image)


def test_plot_refuses_another_image() -> None:
    with pytest.raises(ImageError, match="100 x 80 pixels"):
        make_detections().plot(np.zeros((100, 80, 3), dtype=np.uint8))


def test_save(tmp_path: Path) -> None:
    image = np.full((80, 100, 3), (40, 90, 160), dtype=np.uint8)
    path = tmp_path / "new" / "out.png"
    make_detections().save(path, image, trace=True)
    with Image.open(path) as saved:
        stored = np.asarray(saved)
    np.testing.assert_array_equal(stored[..., ::-1], make_detections().plot(image, trace=True))
    assert [file.name for file in path.parent.iterdir()] == ["out.png"]


@pytest.mark.parametrize("name", ["out.txt", "out", "file/out.png"])
def test_save_where_it_cannot(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="could not write"):
        make_detections().save(tmp_path / name, np.zeros((80, 100, 3), dtype=np.uint8))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
