"""COCO's average precision and recall: the figures of pycocotools, by faster-coco-eval's compiled code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Category, distinct_names

_SIZES = ("all", "small", "medium", "large")
_IOU_50, _IOU_75 = 0, 5
"""Positions of the thresholds 0.5 and 0.75 among 0.5, 0.55, ..., 0.95."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoMetrics:
    """Values from 0 to 1; None where there was nothing to find (no objects of that size)."""

    ap: float | None
    """Average precision over IoU 0.50 to 0.95 and all classes."""
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    """Objects under 32 x 32 pixels."""
    ap_medium: float | None
    ap_large: float | None
    """Objects of 96 x 96 pixels and over."""
    ar_1: float | None
    """Average recall with one detection an image."""
    ar_10: float | None
    ar_100: float | None
    """With 100, or as many as were measured."""
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    ap_of_class: dict[str, float | None]
    """AP by class name; where several classes have one name, with their ids."""
    precision: dict[str, NDArray[np.float64]]
    """Precision at recall 0, 0.01, ..., 1, (101,) averaged over the classes, at IoU '0.50' and '0.75'."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain JSON, the curves rounded to four digits."""
        values = {name: value for name, value in vars(self).items() if name != "precision"}
        curves = {iou: [round(float(p), 4) for p in curve] for iou, curve in self.precision.items()}
        return {**values, "precision_at_recall": curves}


def coco_metrics(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, most: int = 100
) -> CocoMetrics:
    """Measure the best `most` detections of each image: COCO's 100, or more where there are more objects.

    `ground_truth` is the content of a COCO annotation file (`CocoDataset.ground_truth`), `results` are COCO
    results: `image_id`, `category_id`, `bbox` (x, y, w, h in pixels) and `score`.
    """
    class_ids = sorted(category["id"] for category in ground_truth["categories"])
    truth, found = _by_class(ground_truth["annotations"]), _by_class(results)
    measured = [
        _of_class(ground_truth, number, truth.get(number, []), found.get(number, []), most)
        for number in class_ids
    ]
    # Precision: IoU thresholds x recalls x classes x sizes x limits; recall: the same without recalls.
    precision = np.concatenate([each[0] for each in measured], axis=2)
    recall = np.concatenate([each[1] for each in measured], axis=1)
    names = distinct_names([Category(**category) for category in ground_truth["categories"]])
    positions = [class_ids.index(category["id"]) for category in ground_truth["categories"]]
    by_size = {size: _mean(precision[..., i, -1]) for i, size in enumerate(_SIZES)}
    recalled = {size: _mean(recall[..., i, -1]) for i, size in enumerate(_SIZES)}
    return CocoMetrics(
        ap=by_size["all"],
        ap50=_mean(precision[_IOU_50, ..., 0, -1]),
        ap75=_mean(precision[_IOU_75, ..., 0, -1]),
        ap_small=by_size["small"],
        ap_medium=by_size["medium"],
        ap_large=by_size["large"],
        ar_1=_mean(recall[..., 0, 0]),
        ar_10=_mean(recall[..., 0, 1]),
        ar_100=recalled["all"],
        ar_small=recalled["small"],
        ar_medium=recalled["medium"],
        ar_large=recalled["large"],
        ap_of_class={
            name: _mean(precision[:, :, i, 0, -1]) for name, i in zip(names, positions, strict=True)
        },
        precision={
            "0.50": _curve(precision[_IOU_50, ..., 0, -1]),
            "0.75": _curve(precision[_IOU_75, ..., 0, -1]),
        },
    )


def _by_class(entries: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Return annotations or results by the id of their class, in their order."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["category_id"], []).append(entry)
    return found


def _of_class(
    ground_truth: Mapping[str, Any],
    class_id: int,
    truth: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    most: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return precision and recall of one class.

    One class at a time, since of all that it is given the library keeps what it found of every image until
    the end.
    """
    listed = {"info": {}, "images": ground_truth["images"], "categories": [{"id": class_id}]}
    run = COCOeval_faster(
        _index(listed, truth),
        _index(listed, [_as_annotation(result) for result in results]),
        iouType="bbox",
    )
    run.params.maxDets = [1, 10, most]
    run.evaluate()
    run.accumulate()
    return run.eval["precision"], run.eval["recall"]


def _as_annotation(result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}


def _index(listed: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]) -> COCO:
    index = COCO()
    # Copies, numbered from 1: the evaluation writes into the annotations, and takes 0 for none.
    numbered = [{**annotation, "id": i} for i, annotation in enumerate(annotations, start=1)]
    index.dataset = {**listed, "annotations": numbered}
    index.createIndex()
    return index


def _mean(values: NDArray[np.float64]) -> float | None:
    """Average what was measured; -1 marks what could not be."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def _curve(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average (recalls, classes) over the classes that have objects -> (recalls,); zeros if none has."""
    measured = precision[:, (precision > -1).all(axis=0)]
    return np.asarray(measured.mean(axis=1)) if measured.size else np.zeros(len(precision))
