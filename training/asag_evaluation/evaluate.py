"""Run a detector over a data set and measure all there is to measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from asag_deploy.bundle.manifest import Category
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.errors import ConfigError
from asag_deploy.processing.postprocess import Found
from asag_evaluation.data.annotations import labels_of
from asag_evaluation.data.coco import CocoDataset, Sample
from asag_evaluation.data.records import ImageRecord
from asag_evaluation.metrics.anchors import (
    AnchorMetrics,
    ProbedImage,
    anchor_metrics,
    average_recall,
    best_anchors,
)
from asag_evaluation.metrics.coco import CocoMetrics, coco_metrics
from asag_evaluation.metrics.crowdhuman import CrowdHumanMetrics, PersonImage, crowdhuman_metrics
from asag_evaluation.metrics.overlaps import Boxes, clip_boxes

ProposalSource = Callable[[Sequence[int]], list[Boxes]]
"""A way to the boxes that the relation block gave the decoder for the last batch: given how many queries of
each image are real, (n, 4) x1, y1, x2, y2 relative to the image, best scored first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The figures of one evaluation."""

    images: int
    objects: int
    coco: CocoMetrics
    anchors: AnchorMetrics
    anchor_recall: dict[int, float | None]
    """Average recall of the 100, 300 and 1000 best anchors."""
    proposal_recall: dict[int, float | None] | None
    """The same of the relation block's boxes; None where they could not be had (bundles of old releases)."""
    crowdhuman: CrowdHumanMetrics | None
    """Measured where there is one class."""
    ms_per_image: float
    """Mean wall time of a call, divided by its batch."""
    results: list[dict[str, Any]]
    """All detections as COCO results."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the detections as plain JSON values."""
        return {name: _plain(value) for name, value in vars(self).items() if name != "results"}


def _plain(figures: Any) -> Any:
    if isinstance(figures, dict):
        return {str(key): value for key, value in figures.items()}
    return figures.to_dict() if hasattr(figures, "to_dict") else figures


def evaluate(
    detector: Detector,
    dataset: CocoDataset,
    *,
    proposals: ProposalSource | None = None,
    batch: int = 1,
    on_image: Callable[[Sample, Detections], object] = lambda sample, detections: None,
) -> Evaluation:
    """Measure a detector on all images of a data set, in their order.

    The data set must have been opened with the classes of the detector.  `on_image` is told of each image
    when it is done.  Raises DataError for other classes or an image that cannot be read, ConfigError for an
    impossible batch or for no images.
    """
    measured = evaluate_together([(detector, proposals)], dataset, batch=batch, on_image=on_image)
    return measured[0]


def evaluate_together(
    detectors: Sequence[tuple[Detector, ProposalSource | None]],
    dataset: CocoDataset,
    *,
    batch: int = 1,
    on_image: Callable[[Sample, Detections], object] = lambda sample, detections: None,
) -> list[Evaluation]:
    """Measure several detectors, each with the way to its proposals; each image goes through all of them.

    So those that share what they compute can keep it from one to the next.  `on_image` is told once for each
    detector.  Otherwise as `evaluate`.
    """
    if batch < 1:
        raise ConfigError(f"batch is {batch}; expected 1 or more")
    if not len(dataset):
        raise ConfigError("there are no images to evaluate on")
    for detector, _ in detectors:
        if dataset.categories != detector.manifest.categories:
            labels_of(dataset.categories, detector.manifest.categories, str(dataset.image_dir))
            raise ConfigError(
                "the data set's labels are not the network's: open it with the network's categories"
            )
    measured = [_Measured(dataset) for _ in detectors]
    for start in range(0, len(dataset), batch):
        numbers = range(start, min(start + batch, len(dataset)))
        samples = [dataset[i] for i in numbers]
        images = [sample.image for sample in samples]
        for (detector, proposals), of_detector in zip(detectors, measured, strict=True):
            explained = detector(images, channel_order="rgb", explain=True)
            anchors = [best_anchors(detections.trace) for detections in explained]
            found = [_without_explanation(detections) for detections in explained]
            relative: Sequence[Boxes | None] = [None] * len(samples)
            if proposals is not None:
                relative = proposals([detections.trace.anchor_count for detections in found])
            for i, each in enumerate(found):
                of_detector.add(dataset.records[numbers[i]], each, anchors[i], relative[i], len(samples))
                on_image(samples[i], each)
    return [of_detector.evaluation() for of_detector in measured]


class _Measured:
    """The detections so far, and what they are to be measured with."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset
        self.results: list[dict[str, Any]] = []
        self.probed: list[ProbedImage] = []
        self.persons: list[PersonImage] = []
        self.anchors: list[Boxes] = []
        self.proposals: list[Boxes] = []
        self.times: list[float] = []

    def add(
        self, record: ImageRecord, found: Detections, anchors: Boxes, relative: Boxes | None, batch: int
    ) -> None:
        """Take note of one image; `anchors` are best first, `relative` are its proposals."""
        self.results += coco_results(record.image_id, found, found.categories)
        self.probed.append(ProbedImage(len(record.boxes), record.kind, found.trace))
        self.anchors.append(anchors)
        if relative is not None:
            self.proposals.append(relative * np.array([record.width, record.height] * 2))
        if len(self.dataset.categories) == 1:
            self.persons.append(_persons(record, found))
        self.times.append(found.times_ms["total"] / batch)

    def evaluation(self) -> Evaluation:
        """Measure all images that were added."""
        objects = [record.boxes for record in self.dataset.records]
        return Evaluation(
            images=len(self.dataset),
            objects=sum(len(boxes) for boxes in objects),
            coco=coco_metrics(self.dataset.ground_truth(), self.results),
            anchors=anchor_metrics(self.probed),
            anchor_recall=average_recall(objects, self.anchors),
            proposal_recall=average_recall(objects, self.proposals) if self.proposals else None,
            crowdhuman=crowdhuman_metrics(self.persons) if self.persons else None,
            ms_per_image=mean(self.times),
            results=self.results,
        )


def _without_explanation(found: Detections) -> Detections:
    """Return detections as of a call that did not ask to explain: neither every anchor nor its time."""
    levels = tuple(dataclasses.replace(level, candidates=None) for level in found.trace.levels)
    times = dict(found.times_ms)
    times["total"] -= times.pop("explain")
    trace = dataclasses.replace(found.trace, levels=levels)
    return dataclasses.replace(found, trace=trace, times_ms=times)


def coco_results(
    image_id: int, found: Detections | Found, categories: Sequence[Category]
) -> Iterator[dict[str, Any]]:
    """Return what was found in an image as COCO results, unrounded."""
    for (x1, y1, x2, y2), score, label in zip(
        found.xyxy.astype(float).tolist(), found.confidence.tolist(), found.class_id.tolist(), strict=True
    ):
        yield {
            "image_id": image_id,
            "category_id": categories[label].id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }


def _persons(record: ImageRecord, found: Detections) -> PersonImage:
    xywh = np.array([a.xywh for a in record.annotations if a.crowd], dtype=np.float64).reshape(-1, 4)
    ignored = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return PersonImage(
        persons=record.boxes,
        ignored=clip_boxes(ignored, record.height, record.width),
        found=found.xyxy,
        scores=found.confidence,
    )
