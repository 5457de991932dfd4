"""Bundles run over data sets."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError, DataError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.scenes import SCENE_CATEGORIES
from asag_evaluation.evaluate import evaluate
from asag_evaluation.metrics.anchors import average_recall, best_anchors
from asag_evaluation.predictor import bundle_predictor
from asag_training.evaluation.cli import main
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


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it now raises
from asag_training.evaluation.cli import main
bundle, checkpoint, data, report = sys.argv[1:]
assert main([checkpoint, "--data", data]) == 2
sys.exit(main([bundle, "--data", data, "--output-dir", report]))
"""


def test_bundle(bundle: Path, data: Path) -> None:
    seen: list[int] = []
    predictor = bundle_predictor(Bundle.open(bundle))
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


def test_anchors_are_measured_best_first(bundle: Path, data: Path) -> None:
    predictor = bundle_predictor(Bundle.open(bundle))
    detector = predictor.detector
    dataset = CocoDataset.open(data, "val2017", categories=detector.manifest.categories)
    found = [
        detector(sample.image, channel_order="rgb", explain=True)
        for sample in map(dataset.__getitem__, range(len(dataset)))
    ]
    probed = [each for each in found if each.trace.exit_level != "P5"]
    assert probed
    for each in probed:
        best = best_anchors(each.trace)
        candidates = [level.candidates for level in each.trace.levels if level.candidates is not None]
        score_of = {
            box.tobytes(): score
            for level in candidates
            for box, score in zip(level.boxes[level.passed], level.scores[level.passed], strict=True)
        }
        assert {box.tobytes() for box in best} == {box.tobytes() for box in each.anchors}
        assert len(best) == each.trace.anchor_count
        scores = [score_of[box.tobytes()] for box in best]
        assert scores == sorted(scores, reverse=True)
    expected = average_recall(
        [record.boxes for record in dataset.records], [best_anchors(each.trace) for each in found]
    )
    seen: list[Detections] = []
    assert evaluate(detector, dataset, on_image=lambda s, d: seen.append(d)).anchor_recall == expected
    # What the caller sees is as of a call that did not ask to explain.
    assert all(level.candidates is None for each in seen for level in each.trace.levels)
    assert all("explain" not in each.times_ms for each in seen)


def test_max_level_is_kept_to(bundle: Path, data: Path) -> None:
    predictor = bundle_predictor(Bundle.open(bundle), DetectorOptions(max_level="P4"))
    dataset = CocoDataset.open(data, "val2017", categories=predictor.detector.manifest.categories)
    assert evaluate(predictor.detector, dataset).anchors.exit_levels == {"P5": 1, "P4": 2, "P3": 0}


def test_other_labels_are_refused(bundle: Path, data: Path) -> None:
    detector = bundle_predictor(Bundle.open(bundle)).detector
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
        output = capsys.readouterr().out
        assert "1 image, " in output
        assert "3 images, " in output  # what is in the whole file is said too
        assert "measured on 1 of 3 images\n" in output
        assert main([str(bundle), "--data", str(data), "--limit", "3"]) == 0
        assert "measured on" not in capsys.readouterr().out
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
            (["--shorter-side", "0"], "--shorter-side is 0"),
            (["--head", "main"], "is a bundle, whose head"),
            (["--device", "cuda"], "is a bundle, whose head"),
            (["--backend", "torch"], "which PyTorch does not run"),
            (["--threads", "0"], "--threads is 0"),
            (["--loop", "device"], "loop 'device' needs a backend that runs on a GPU"),
            (["--loop", "device", "--deadline-ms", "5"], "loop 'device' cannot keep a deadline"),
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

    def test_a_training_run(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "best.safetensors").touch()
        assert main([str(tmp_path), "--data", str(data)]) == 2
        assert (
            f"give the checkpoint file in it, such as '{tmp_path}/best.safetensors'"
            in capsys.readouterr().err
        )

    def test_no_torch_is_needed(self, bundle: Path, data: Path, tmp_path: Path) -> None:
        checkpoint = tmp_path / "c.safetensors"
        checkpoint.touch()
        arguments = [str(bundle), str(checkpoint), str(data), str(tmp_path / "report")]
        command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *arguments]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "round 100.0" in run.stdout
        assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["images"] == 3
        assert "this needs the package torch" in run.stderr
        assert "`pip install 'asag-deploy[train]'`" in run.stderr
