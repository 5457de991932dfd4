"""COCO's figures, beside those of pycocotools on the same random data."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from asag_evaluation.data.values import box_around
from asag_evaluation.metrics.coco import coco_metrics

CLASSES = (11, 3, 7, 2)
"""Not in order; of the last there are no objects."""
IMAGES = (30, 4, 19, 8, 27, 5)
"""Not in order; the last has neither objects nor detections."""


def box(rng: np.random.Generator, class_id: int, image_id: int) -> dict[str, Any]:
    """A box of one of the three sizes, on a grid so that many overlap exactly, or off it."""
    side = float(rng.choice([12, 40, 130]))
    step = side / 2 if rng.random() < 0.5 else 1.0
    x, y = (float(v) * step for v in rng.integers(0, int(200 / step), 2))
    w, h = (side * float(v) for v in rng.choice([0.8, 1, 1.2], 2))
    return {"image_id": image_id, "category_id": class_id, "bbox": [x, y, w, h]}


def objects(rng: np.random.Generator, crowds: float) -> list[dict[str, Any]]:
    found = []
    for number in range(1, 200):
        entry = box(rng, int(rng.choice(CLASSES[:-1])), int(rng.choice(IMAGES[:-1])))
        outlined = entry["bbox"][2] * entry["bbox"][3] * float(rng.choice([0.5, 1.0]))
        found.append({**entry, "id": number, "area": outlined, "iscrowd": int(rng.random() < crowds)})
    return found


def detections(
    rng: np.random.Generator, near: list[dict[str, Any]], count: int, digits: int
) -> list[dict[str, Any]]:
    """Half of them shifted objects, half anywhere; scores of few digits are equal often."""
    found = []
    for number in range(count):
        if near and number % 2:
            source = near[int(rng.integers(len(near)))]
            x, y, w, h = source["bbox"]
            shift = float(rng.choice([0, 1, 3, 8]))
            entry = {**source, "bbox": [x + shift, y, w, h]}
        else:
            entry = box(rng, int(rng.choice(CLASSES)), int(rng.choice(IMAGES[:-1])))
        wanted = {name: entry[name] for name in ("image_id", "category_id", "bbox")}
        found.append({**wanted, "score": round(float(rng.random()), digits)})
    return found


def by_pycocotools(
    truth: dict[str, Any], results: list[dict[str, Any]], most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of pycocotools, of everything at once."""
    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCO()
        whole.dataset = copy.deepcopy(truth)
        whole.createIndex()
        found = COCO()
        listed = [
            {**result, "id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
            for i, result in enumerate(results, start=1)
        ]
        found.dataset = {**truth, "annotations": listed}
        found.createIndex()
        run = COCOeval(whole, found, iouType="bbox")
        run.params.maxDets = [1, 10, most]
        run.evaluate()
        run.accumulate()
    return run.eval["precision"], run.eval["recall"]


def mean(values: NDArray[np.float64]) -> float | None:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("crowds", "count", "digits", "most"),
    [
        *((0.0, 400, 6, 100), (0.2, 400, 1, 100), (0.5, 900, 2, 300), (0.2, 900, 1, 20), (1.0, 200, 3, 100)),
        (0.1, 0, 1, 100),
    ],
)
def test_every_figure_is_that_of_pycocotools(
    seed: int, crowds: float, count: int, digits: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    annotations = objects(rng, crowds)
    results = detections(rng, annotations, count, digits)
    truth = {
        "info": {},
        "images": [{"id": i, "height": 400, "width": 400} for i in IMAGES],
        "categories": [{"id": i, "name": f"class {i}"} for i in CLASSES],
        "annotations": annotations,
    }
    before = copy.deepcopy((truth, results))
    metrics = coco_metrics(truth, results, most=most)
    assert (truth, results) == before, "what is measured is not written to"
    precision, recall = by_pycocotools(truth, results, most)
    expected = {
        "ap": mean(precision[..., 0, -1]),
        "ap50": mean(precision[0, ..., 0, -1]),
        "ap75": mean(precision[5, ..., 0, -1]),
        "ar_1": mean(recall[..., 0, 0]),
        "ar_10": mean(recall[..., 0, 1]),
        "ar_100": mean(recall[..., 0, -1]),
    }
    for position, size in enumerate(("small", "medium", "large"), start=1):
        expected[f"ap_{size}"] = mean(precision[..., position, -1])
        expected[f"ar_{size}"] = mean(recall[..., position, -1])
    assert {name: getattr(metrics, name) for name in expected} == pytest.approx(expected, abs=1e-12)
    of_class = {f"class {i}": mean(precision[:, :, sorted(CLASSES).index(i), 0, -1]) for i in CLASSES}
    assert metrics.ap_of_class == pytest.approx(of_class, abs=1e-12)
    for name, threshold in (("0.50", 0), ("0.75", 5)):
        of_threshold = precision[threshold, :, :, 0, -1]
        with_objects = of_threshold[:, (of_threshold > -1).all(axis=0)]
        curve = with_objects.mean(axis=1) if with_objects.size else np.zeros(101)
        assert metrics.precision[name] == pytest.approx(curve, abs=1e-12)
    if count and crowds < 1:
        assert metrics.ap is not None
        assert 0 < metrics.ap < 1


def test_packed_masks_have_the_box_that_pycocotools_says() -> None:
    from pycocotools import mask as masks

    rng = np.random.default_rng(0)
    for _ in range(20):
        picture = np.zeros((31, 47), dtype=np.uint8, order="F")
        top, left = rng.integers(0, 20, 2)
        picture[top : top + 9, left : left + 13] = rng.integers(0, 2, (9, 13))
        packed = masks.encode(picture)
        mask = {"size": [31, 47], "counts": packed["counts"].decode()}
        assert box_around(mask, 31, 47) == pytest.approx(tuple(masks.toBbox(packed)))
