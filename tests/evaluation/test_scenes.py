"""Generated scenes: repeatable, exact, and of the sizes they promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asag_deploy.errors import ConfigError, OutputError
from asag_evaluation.data import scenes
from asag_evaluation.data.cli import main
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.scenes import KINDS, SCENE_CATEGORIES, draw, write_scenes
from asag_evaluation.data.shapes import CLASSES, DETAIL, outline_mask


def test_same_arguments_give_the_same_scene() -> None:
    first, again, other = draw(96, 128, 1), draw(96, 128, 1), draw(96, 128, 1, number=1)
    assert first.image.shape == (96, 128, 3)
    assert first.image.dtype == np.uint8
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.boxes, again.boxes)
    assert (first.image != other.image).any()


@pytest.mark.parametrize("kind", KINDS)
def test_objects_have_the_sizes_of_their_kind(kind: scenes.Kind) -> None:
    drawn = [draw(192, 192, 7, number, (kind,)) for number in range(8)]
    sides = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1) for scene in drawn])
    counts = [len(scene.boxes) for scene in drawn]
    assert all(scene.kind == kind for scene in drawn)
    assert sides.max() <= 192 / 2 + 1
    if kind == "large":
        assert sides.min() > 192 / 6
        assert max(counts) <= 4
    elif kind == "crowd":
        assert sides.max() < 20
        assert max(counts) > 60
        assert max(counts) > 3 * len(draw(192, 192, 7, 0, ("mixed",)).boxes)
    elif kind == "tiny":
        assert np.median(sides) < 14
        assert sides.min() > 3
        assert min(counts) > 20
    else:
        assert sides.min() < 16
        assert sides.max() > 192 / 5
    labels = np.concatenate([scene.labels for scene in drawn])
    assert set(labels.tolist()) == set(range(len(SCENE_CATEGORIES)))


def test_boxes_enclose_what_is_visible() -> None:
    """Drawn apart from the scene itself: a box is exactly the extent of the details its object owns."""
    layout = scenes._Layout(160, 160)
    rng = np.random.default_rng(3)
    for diameter in scenes._diameters("mixed", 160, rng):
        layout.add(diameter, rng)
    boxes, areas = layout.visible()
    assert len(boxes) == len(layout.objects) > 5
    hidden = 0
    for number, item in enumerate(layout.objects):
        rows, columns = np.nonzero(layout.owner == number)
        extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / DETAIL
        assert np.allclose(boxes[number], extent)
        assert areas[number] * DETAIL**2 == pytest.approx(len(rows))
        assert len(rows) >= 0.3 * item.mask.sum()
        hidden += len(rows) < item.mask.sum()
    assert hidden > 0  # some lie under others, or partly outside


def test_pixels_are_where_the_boxes_say() -> None:
    layout = scenes._Layout(96, 96)
    rng = np.random.default_rng(0)
    layout.add(40.0, rng)
    ((x1, y1, x2, y2),) = layout.visible()[0]
    picture = layout.render(np.random.default_rng(5)).astype(int)
    layout.objects.clear()
    ground = layout.render(np.random.default_rng(5)).astype(int)
    # The shadow falls to the bottom right, and hides nothing of the other two edges.
    rows, columns = np.nonzero(np.abs(picture - ground).max(axis=2) > 25)
    assert abs(rows.min() - y1) < 2
    assert abs(columns.min() - x1) < 2
    assert rows.max() < y2 + 8
    assert columns.max() < x2 + 8


def test_classes_differ_in_shape() -> None:
    masks = [outline_mask(shape, 90, 40.0, 0.0, 1.0) for shape in CLASSES]
    for i, mask in enumerate(masks):
        assert 0.2 < mask.mean() < 0.8
        for other in masks[:i]:
            assert (mask & other).sum() / (mask | other).sum() < 0.8
    ring = masks[[shape.name for shape in CLASSES].index("ring")]
    assert not ring[45, 45]


def test_writes_a_data_set(tmp_path: Path) -> None:
    done: list[int] = []
    write_scenes(tmp_path, count=5, seed=2, size=96, split="train2017", progress=done.append)
    write_scenes(tmp_path, count=1, seed=3, size=96, split="val2017")
    assert done == [1, 2, 3, 4, 5]
    dataset = CocoDataset.open(tmp_path)
    assert dataset.categories == SCENE_CATEGORIES
    assert {record.kind for record in dataset.records} <= set(KINDS)
    assert dataset.counts.clipped == dataset.counts.outside == dataset.counts.zero_sized == 0
    scene = draw(96, 96, 2, 3)
    sample = dataset[3]
    assert dataset.records[3].kind == scene.kind
    assert np.abs(sample.boxes - scene.boxes).max() < 1e-2
    assert sample.labels.tolist() == scene.labels.tolist()
    assert np.abs(sample.image.astype(int) - scene.image.astype(int)).mean() < 4  # JPEG
    assert len(CocoDataset.open(tmp_path, "val2017")) == 1


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = write_scenes(tmp_path, count=1, seed=0, size=64)
    before = file.read_bytes()
    with pytest.raises(OutputError, match=r"there is a .*train2017' already"):
        write_scenes(tmp_path, count=1, seed=1, size=64)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("count", "seed", "size", "problem"),
    [
        (0, 0, 64, "count is 0"),
        (1, -1, 64, "seed is -1"),
        (1, 0, 32, "32 x 32 pixels is too small"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, count: int, seed: int, size: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        write_scenes(tmp_path, count=count, seed=seed, size=size)
    assert list(tmp_path.iterdir()) == []


class TestCommand:
    def test_kinds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        place = ["--output-dir", str(tmp_path), "--size", "128"]
        assert main(["scenes", *place, "--count", "6", "--kinds", "large", "crowd"]) == 0
        assert "large" in capsys.readouterr().out
        assert {record.kind for record in CocoDataset.open(tmp_path).records} == {"large", "crowd"}
        assert main(["scenes", *place, "--kinds", "huge"]) == 2

    def test_scenes_and_check(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        place = ["--output-dir", str(tmp_path), "--size", "64"]
        assert main(["scenes", *place, "--count", "3", "--seed", "1"]) == 0
        assert "3 images" in capsys.readouterr().out
        assert main(["check", str(tmp_path)]) == 0
        assert "all images can be read" in capsys.readouterr().out
        (tmp_path / "train2017" / "000002.jpg").write_bytes(b"")
        assert main(["check", str(tmp_path)]) == 1
        output = capsys.readouterr()
        assert "1 image cannot be read" in output.out
        assert "000002.jpg' is empty" in output.err
        assert main(["scenes", *place]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_errors_are_one_sentence(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err.startswith("asag-data: error: there is no data folder")
        assert main(["bake"]) == 2
        assert "see asag-data --help" in capsys.readouterr().err
        assert main(["--help"]) == 0


def test_annotations_of_others_are_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.parent.mkdir()
    for content in ('{"images": []}', "by hand", '{"info": {"description": "of others"}}'):
        file.write_text(content)
        with pytest.raises(OutputError, match="that was not written by this"):
            write_scenes(tmp_path, count=1, seed=0, size=64)
        assert file.read_text() == content
    file.write_text(
        '{"info": {"description": "3 generated scenes, seed 1"}}'
    )  # left by a run that was killed
    write_scenes(tmp_path, count=1, seed=0, size=64)
    assert len(json.loads(file.read_text())["images"]) == 1
