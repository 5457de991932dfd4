"""Measures, against values worked out by hand."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from typing import Any, ClassVar

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from asag_evaluation.metrics.anchors import ProbedImage, anchor_metrics, average_recall, best_anchors
from asag_evaluation.metrics.coco import coco_metrics
from asag_evaluation.metrics.crowdhuman import PersonImage, crowdhuman_metrics
from asag_evaluation.metrics.overlaps import clip_boxes, covered, iou
from support.detection_samples import boxes, explained_trace, make_trace

PEOPLE = [(0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)]


class TestOverlaps:
    def test_iou_and_covered(self) -> None:
        a = np.array([[0, 0, 10, 10], [5, 5, 5, 9]])
        b = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [50, 50, 60, 60]])
        assert iou(a, b).tolist() == [[1, 1 / 3, 0], [0, 0, 0]]
        assert covered(a, b).tolist() == [[1, 0.5, 0], [0, 0, 0]]
        assert iou(a, b[:0]).shape == (2, 0)

    def test_clip(self) -> None:
        assert clip_boxes(np.array([[-4, 2, 99, 99]]), 20, 30).tolist() == [[0, 2, 30, 20]]


class TestCoco:
    TRUTH: ClassVar[dict[str, Any]] = {
        "info": {},
        "images": [{"id": 1, "height": 200, "width": 200}, {"id": 2, "height": 200, "width": 200}],
        "categories": [{"id": 5, "name": "ball"}, {"id": 2, "name": "cup"}, {"id": 9, "name": "none"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 5, "bbox": [0, 0, 20, 20], "area": 400, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [50, 50, 50, 50], "area": 2500, "iscrowd": 0},
            {"id": 3, "image_id": 2, "category_id": 2, "bbox": [0, 0, 120, 120], "area": 14400, "iscrowd": 0},
        ],
    }

    def results(self) -> list[dict[str, Any]]:
        return [
            {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}
            for a in self.TRUTH["annotations"]
        ]

    def test_perfect(self, capsys: pytest.CaptureFixture[str]) -> None:
        metrics = coco_metrics(self.TRUTH, self.results())
        assert (metrics.ap, metrics.ap50, metrics.ap75, metrics.ar_100) == pytest.approx((1, 1, 1, 1))
        assert (metrics.ap_small, metrics.ap_medium, metrics.ap_large) == pytest.approx((1, 1, 1))
        assert metrics.ap_of_class == {"ball": pytest.approx(1), "cup": pytest.approx(1), "none": None}
        assert metrics.precision["0.50"].shape == (101,)
        assert capsys.readouterr().out == ""

    def test_class_by_class_is_what_pycocotools_measures_of_all_at_once(self) -> None:
        rng = np.random.default_rng(3)
        images = [{"id": i, "height": 200, "width": 200} for i in (4, 2, 9)]
        found, objects = ([self._box(rng, i) for i in range(1, n)] for n in (150, 40))
        truth = {**self.TRUTH, "images": images, "annotations": objects}
        results = [{**each, "score": round(float(rng.random()), 1)} for each in found]  # with ties
        with contextlib.redirect_stdout(io.StringIO()):
            whole = COCO()
            whole.dataset = copy.deepcopy(truth)
            whole.createIndex()
            run = COCOeval(whole, whole.loadRes(copy.deepcopy(results)), iouType="bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
        metrics = coco_metrics(truth, results)
        said = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")
        expected = [None if value < 0 else value for value in run.stats.tolist()]
        names = (*said, "ar_small", "ar_medium", "ar_large")
        assert [getattr(metrics, name) for name in names] == expected
        assert metrics.ap not in (None, 0, 1)

    def _box(self, rng: np.random.Generator, number: int) -> dict[str, Any]:
        """Return an annotation of a random class in a random image; of large boxes, so that some overlap."""
        x, y, w, h = (rng.integers(0, 4, 4) * 20 + (0, 0, 20, 20)).tolist()
        class_id, image_id = (int(rng.choice(ids)) for ids in ([5, 2], [4, 2, 9]))
        entry = {"image_id": image_id, "category_id": class_id, "bbox": [x, y, w, h]}
        return {**entry, "id": number, "area": w * h, "iscrowd": int(number % 17 == 0)}

    def test_classes_of_one_name_are_told_apart(self) -> None:
        names = {5: "cup", 2: "cup", 9: "none"}
        categories = [{"id": number, "name": name} for number, name in names.items()]
        only_class_5 = self.results()[:1]
        metrics = coco_metrics({**self.TRUTH, "categories": categories}, only_class_5)
        assert metrics.ap_of_class == {"cup (id 5)": pytest.approx(1), "cup (id 2)": 0, "none": None}

    def test_more_detections_than_cocos_hundred(self) -> None:
        """In a picture with 150 objects, all found."""
        objects = [
            {"id": i, "image_id": 1, "category_id": 5, "bbox": [i, 0, 1, 9], "area": 9, "iscrowd": 0}
            for i in range(1, 151)
        ]
        found = [{"image_id": 1, "category_id": 5, "bbox": a["bbox"], "score": 0.5} for a in objects]
        truth = {**self.TRUTH, "annotations": objects}
        assert coco_metrics(truth, found).ar_100 == pytest.approx(100 / 150)
        assert coco_metrics(truth, found, most=300).ar_100 == pytest.approx(1)

    def test_nothing_found(self) -> None:
        metrics = coco_metrics(self.TRUTH, [])
        assert (metrics.ap, metrics.ap50, metrics.ar_100) == (0, 0, 0)
        assert metrics.to_dict()["precision_at_recall"]["0.50"] == [0] * 101

    def test_nothing_to_find(self) -> None:
        metrics = coco_metrics({**self.TRUTH, "annotations": []}, self.results())
        assert metrics.ap is None
        assert metrics.ap_of_class == {"ball": None, "cup": None, "none": None}

    def test_half(self) -> None:
        results = self.results()
        results[1]["bbox"] = [50, 50, 50, 30]  # IoU 0.6: right at three of ten thresholds
        results[2]["score"] = 0.8
        metrics = coco_metrics(self.TRUTH, results)
        assert metrics.ap_of_class["ball"] == pytest.approx(1)
        # Both are right at 0.50, 0.55 and 0.60; beyond, only the one with the lower score.
        after_a_miss = 0.5 * 51 / 101
        assert metrics.ap_of_class["cup"] == pytest.approx(0.3 + 0.7 * after_a_miss)
        assert metrics.ap50 == pytest.approx(1)
        assert metrics.ap75 == pytest.approx((1 + after_a_miss) / 2)
        assert metrics.ap == pytest.approx((1 + 0.3 + 0.7 * after_a_miss) / 2)

    def test_crowds_are_not_held_against_anyone(self) -> None:
        crowd = {"id": 4, "image_id": 2, "category_id": 5, "bbox": [0, 0, 90, 90], "area": 8100, "iscrowd": 1}
        truth = {**self.TRUTH, "annotations": [*self.TRUTH["annotations"], crowd]}
        extra = {"image_id": 2, "category_id": 5, "bbox": [10, 10, 30, 30], "score": 1.0}
        assert coco_metrics(truth, [*self.results(), extra]).ap == pytest.approx(1)
        assert coco_metrics(self.TRUTH, [*self.results(), extra]).ap == pytest.approx(0.75)


class TestAverageRecall:
    def test_counts_pairs_at_every_threshold(self) -> None:
        truth = [boxes((0, 0, 10, 10), (20, 0, 30, 10)), boxes()]
        found = [boxes((0, 0, 10, 10), (20, 0, 30, 7)), boxes((5, 5, 9, 9))]
        # One at all ten thresholds; one with IoU 0.7, at 0.50 to 0.70, though float32 may lose the last.
        assert average_recall(truth, found)[100] == pytest.approx(15 / 20, abs=0.051)
        assert average_recall(truth, found, limits=(1,))[1] == pytest.approx(10 / 20)

    def test_anchors_are_taken_by_score_not_by_level(self) -> None:
        trace = explained_trace()
        p5, p4 = trace.levels
        assert p5.candidates is not None
        assert p4.candidates is not None
        scores = np.array([0.95, 0.01], dtype=np.float32)  # P4's is better than the 0.9 of P5
        better = dataclasses.replace(p4, candidates=dataclasses.replace(p4.candidates, scores=scores))
        assert best_anchors(trace).tolist() == [[50, 20, 100, 60], [310, 310, 330, 330]]
        best = best_anchors(dataclasses.replace(trace, levels=(p5, better)))
        assert best.tolist() == [[310, 310, 330, 330], [50, 20, 100, 60]]
        assert average_recall([boxes((310, 310, 330, 330))], [best], limits=(1,)) == {1: pytest.approx(1)}

    def test_one_box_finds_one_object(self) -> None:
        truth = [boxes((0, 0, 10, 10), (0, 0, 10, 10))]
        assert average_recall(truth, [boxes((0, 0, 10, 10))])[300] == pytest.approx(0.5)
        assert average_recall(truth, [boxes((0, 0, 10, 10), (0, 0, 10, 10))])[300] == pytest.approx(1)

    def test_nothing_to_find_or_found(self) -> None:
        assert average_recall([boxes()], [boxes((0, 0, 1, 1))]) == {100: None, 300: None, 1000: None}
        assert average_recall([boxes((0, 0, 1, 1))], [boxes()]) == {100: 0, 300: 0, 1000: 0}


class TestAnchors:
    def test_levels_patches_and_correlation(self) -> None:
        first = ProbedImage(2, "large", make_trace(p4=None))
        second = ProbedImage(9, "tiny", make_trace(p4=[(0, 0, 9, 9)] * 3, p3=[(0, 0, 5, 5)] * 4))
        metrics = anchor_metrics([first, second, second])
        assert metrics.anchors == 12
        assert (metrics.patches_p4, metrics.patches_p3) == pytest.approx((2, 8 / 3))
        assert metrics.exit_levels == {"P5": 1, "P4": 0, "P3": 2}
        assert metrics.exit_levels_of_kind == {
            "large": {"P5": 1, "P4": 0, "P3": 0},
            "tiny": {"P5": 0, "P4": 0, "P3": 2},
        }
        assert metrics.correlation is None  # the number of anchors never varies
        assert metrics.points == ((2, 12), (9, 12), (9, 12))

    def test_correlation(self) -> None:
        def probed(objects: int, anchors: int) -> ProbedImage:
            trace = make_trace()
            object.__setattr__(trace, "anchor_count", anchors)
            return ProbedImage(objects, None, trace)

        rising = anchor_metrics([probed(1, 10), probed(2, 20), probed(4, 40)])
        assert rising.correlation == pytest.approx(1)
        assert rising.exit_levels_of_kind == {}
        assert anchor_metrics([probed(1, 10), probed(2, 9)]).correlation == pytest.approx(-1)
        assert anchor_metrics([probed(1, 10)]).correlation is None


class TestCrowdHuman:
    def image(self, found: list[tuple[Any, ...]], *, ignored: tuple[Any, ...] = ()) -> PersonImage:
        return PersonImage(
            persons=boxes(*PEOPLE),
            ignored=boxes(*ignored),
            found=boxes(*(row[:4] for row in found)),
            scores=np.array([row[4] for row in found], dtype=np.float32),
        )

    def test_perfect(self) -> None:
        metrics = crowdhuman_metrics([self.image([(*PEOPLE[0], 0.9), (*PEOPLE[1], 0.8)])])
        assert metrics is not None
        assert metrics.recall == 1
        assert metrics.ap == pytest.approx(0.5)  # measured from the first detection's recall on
        assert metrics.mmr < 1e-6

    def test_false_ones_cost(self) -> None:
        image = self.image([(50, 50, 60, 60, 0.95), (*PEOPLE[0], 0.9), (*PEOPLE[0], 0.7)])
        metrics = crowdhuman_metrics([image])
        assert metrics is not None
        assert metrics.recall == 0.5
        # Precision 0, 1/2, 1/3 at recall 0, 1/2, 1/2.
        assert metrics.ap == pytest.approx(0.5 * (0 + 0.5) / 2)
        # A false positive comes first, so everyone is missed at every rate up to 1 an image.
        assert metrics.mmr == pytest.approx(1.0)

    def test_ignored_regions_do_not_count(self) -> None:
        found = [(50, 50, 60, 60, 0.95), (*PEOPLE[0], 0.9), (*PEOPLE[1], 0.8)]
        with_region = crowdhuman_metrics([self.image(found, ignored=((45, 45, 70, 70),))])
        assert with_region == crowdhuman_metrics([self.image(found[1:])])
        assert with_region != crowdhuman_metrics([self.image(found)])

    def test_nobody_found_or_there(self) -> None:
        metrics = crowdhuman_metrics([self.image([])])
        assert metrics is not None
        assert metrics.to_dict() == {"ap": 0.0, "mmr": 1.0, "recall": 0.0}
        empty = PersonImage(persons=boxes(), ignored=boxes(), found=boxes(), scores=np.zeros(0))
        assert crowdhuman_metrics([empty]) is None
