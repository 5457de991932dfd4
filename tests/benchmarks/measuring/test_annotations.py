"""`asag-bench annotations`: it runs, and a large annotation file takes little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asag_bench.cli import main
from asag_bench.measuring.annotation_files import write_annotated
from asag_bench.measuring.annotations import _alone
from asag_evaluation.data.coco import TRAIN_SPLIT, CocoDataset


@pytest.mark.slow
def test_a_small_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    options = ["--images", "60", "--objects", "3000", "--repeats", "1", "--output", str(file)]
    assert main(["annotations", *options]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == result
    assert (result["images"], result["objects"]) == (60, 3000)
    assert result["file_mb"] > 1  # so that it is kept
    for name in ("first", "again", "without_msgspec", "of_another_kind"):
        assert result[name]["objects"] == 3000
        assert result[name]["seconds"] > 0
    assert len(result["four_at_once_first"]["seconds"]) == 4
    assert result["evaluation"]["detections"] == 6000


def test_the_generated_file_is_like_cocos(tmp_path: Path) -> None:
    file = write_annotated(tmp_path, images=20, objects=300)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert 400 < file.stat().st_size / 300 < 650
    dataset = CocoDataset.open(tmp_path)
    assert (len(dataset), dataset.counts.objects, len(dataset.categories)) == (20, 300, 80)
    assert dataset.doubts == ()
    for annotation in content["annotations"]:
        (outline,) = annotation["segmentation"]
        x, y, w, h = annotation["bbox"]
        assert len(outline) >= 12
        assert all(x - 0.01 <= value <= x + w + 0.01 for value in outline[::2])
        assert all(y - 0.01 <= value <= y + h + 0.01 for value in outline[1::2])
    other = write_annotated(tmp_path / "other", images=20, objects=300, as_text=True)
    counts = CocoDataset.from_files(other, tmp_path / "other" / TRAIN_SPLIT).counts
    assert (counts.objects, other.stat().st_size) == (300, file.stat().st_size + 2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_annotated(folder, images=2000, objects=40_000)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", ["open", "open without msgspec"])
def test_a_large_file_takes_little_memory(what: str, large: Path, tmp_path: Path) -> None:
    size = next(large.glob("annotations/*")).stat().st_size / 2**20
    first = _alone(what, large, tmp_path)
    again = _alone(what, large, tmp_path)
    assert first["objects"] == again["objects"] == 40_000
    assert first["peak_mib"] < 2 * size  # as JSON in memory it would be six times as much
    assert again["peak_mib"] < size / 3


@pytest.mark.slow
def test_a_worker_takes_less(large: Path, tmp_path: Path) -> None:
    size = next(large.glob("annotations/*")).stat().st_size / 2**20
    assert _alone("hand to a worker", large, tmp_path)["own_mib"] < size / 10


@pytest.mark.parametrize("option", ["--images", "--objects", "--repeats"])
def test_bad_options_are_one_sentence(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["annotations", option, "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"asag-bench: error: {option} is 0; it must be")
