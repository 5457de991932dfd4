"""What it changes that pictures are padded to a few canvases, and not just to a multiple of 32 pixels.

The network of the demo on scenes of all formats that its recipe's canvases are for, in ONNX Runtime.
docs/engines.md has the numbers that this test prints with ASAG_PADDING_SCENES=200.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from asag_deploy import Detector
from asag_deploy.backends.onnxruntime import OrtNetwork
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.detections import Detections
from asag_deploy.processing.canvases import Canvas, default_canvases, smallest_holding
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from asag_evaluation.data.scenes import write_scenes
from asag_evaluation.evaluate import evaluate
from asag_export.gate.parity import Found, in_common
from support.demo_run import DemoRun

SHORTER, LONGER = 208, 320
SPEC = Preprocessing(shorter_side=SHORTER, longer_side=LONGER)
SCENES = int(os.environ.get("ASAG_PADDING_SCENES", "80"))
_SURE = 0.5
_LEAST_VISIBLE = 0.5
"""Of an object at the edge of a crop; what is visible of less of it is left out of the truth."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square scenes cut to 208 pixels by 208 to 320, lying and standing, each of another length."""
    folder = tmp_path_factory.mktemp("formats")
    annotations = write_scenes(folder, count=SCENES, seed=2, size=LONGER, split=VAL_SPLIT)
    data = json.loads(annotations.read_text())
    rng = np.random.default_rng(0)
    for number, record in enumerate(data["images"]):
        sides = (SHORTER, int(rng.integers(SHORTER, LONGER + 1)))
        record["height"], record["width"] = sides if number % 2 else sides[::-1]
        path = next(folder.rglob(record["file_name"]))
        picture = cv2.imread(str(path))
        assert picture is not None
        cv2.imwrite(str(path), picture[: record["height"], : record["width"]])
    shapes = {record["id"]: record for record in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if _cut(a, shapes[a["image_id"]])]
    annotations.write_text(json.dumps(data))
    return folder


def _cut(annotation: dict[str, object], record: dict[str, int]) -> bool:
    """Cut its box (xywh in pixels) to the picture; whether enough of it is left."""
    x, y, width, height = np.array(annotation["bbox"], dtype=float)
    right, bottom = min(x + width, record["width"]), min(y + height, record["height"])
    if (right - x) * (bottom - y) < _LEAST_VISIBLE * width * height or right <= x or bottom <= y:
        return False
    annotation["bbox"] = [x, y, right - x, bottom - y]
    annotation["area"] = (right - x) * (bottom - y)
    annotation.pop("segmentation", None)
    return True


@pytest.fixture(scope="module")
def bundle(demo_run: DemoRun) -> Bundle:
    """The demo's, for pictures of this size."""
    made = Bundle.open(demo_run.folder / "bundle")
    graphs_have = dataclasses.replace(made.manifest.preprocessing, shorter_side=SHORTER, longer_side=LONGER)
    assert graphs_have == SPEC
    return dataclasses.replace(made, manifest=dataclasses.replace(made.manifest, preprocessing=SPEC))


def detect_all(
    bundle: Bundle, folder: Path, canvases: tuple[Canvas, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[float, list[Detections]]:
    """AP in percent, and what was found in every scene."""
    monkeypatch.setattr(OrtNetwork, "canvases", canvases)
    found: list[Detections] = []
    with Detector.load(bundle, threads=1) as detector:
        data = CocoDataset.open(folder, VAL_SPLIT, categories=detector.manifest.categories)
        measured = evaluate(detector, data, on_image=lambda sample, detections: found.append(detections))
    assert measured.coco.ap is not None
    return 100 * measured.coco.ap, found


@pytest.mark.slow
def test_padding_to_canvases_changes_next_to_nothing(
    bundle: Bundle, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = default_canvases(SPEC)
    data = CocoDataset.open(scenes, VAL_SPLIT, categories=bundle.manifest.categories)
    shapes = [data[i].image.shape[:2] for i in range(len(data))]
    expected_ap, expected = detect_all(bundle, scenes, (), monkeypatch)
    assert expected_ap > 50
    print(f"\npadded to multiples of 32: AP {expected_ap:.2f}")
    for canvases, least_larger, least_common in ((usual, 0.2, 0.9), (usual[-2:], 0.5, 0.8)):
        added = np.array([_padding_added(canvases, *shape) for shape in shapes])
        assert (added > 0).mean() > least_larger  # else there would be nothing to see
        ap, found = detect_all(bundle, scenes, canvases, monkeypatch)
        pairs = list(zip(expected, found, strict=True))
        stops = np.mean([one.trace.exit_level == other.trace.exit_level for one, other in pairs])
        common = np.mean([in_common(_sure(one), _found(other)) for one, other in pairs])
        print(
            f"on {len(canvases)} canvases: AP {ap:.2f}; {100 * (added > 0).mean():.0f}% of the pictures have "
            f"another size, {100 * added.mean():.0f}% more pixels in all; the same stop {100 * stops:.1f}%, "
            f"of detections of at least {_SURE} in common {100 * common:.1f}%"
        )
        assert abs(ap - expected_ap) < 0.5
        assert common > least_common  # to within 0.01 of the score and 0.9 of the box
        assert stops > 0.95


def _padding_added(canvases: tuple[Canvas, ...], height: int, width: int) -> float:
    """By what share of the pixels the canvas is larger than the next multiples of 32."""
    canvas = smallest_holding(canvases, height, width)
    assert canvas is not None
    usual = (-(-height // 32) * 32) * (-(-width // 32) * 32)
    return canvas.area / usual - 1


def _sure(detections: Detections) -> Found:
    """Those that anyone would look at: of the rest, scores next to nothing change places."""
    found = _found(detections)
    sure = found.scores >= _SURE
    return Found(scores=found.scores[sure], classes=found.classes[sure], boxes=found.boxes[sure])


def _found(detections: Detections) -> Found:
    return Found(scores=detections.confidence, classes=detections.class_id, boxes=detections.xyxy)
