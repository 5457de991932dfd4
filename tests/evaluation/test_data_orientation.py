"""Photographs that say how they are to be turned, annotated upright or as they are stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from asag_deploy.errors import DataError
from asag_evaluation.data.cli import main
from asag_evaluation.data.coco import CocoDataset
from support.coco_files import CATEGORIES, box, write_json

_OBJECT = (4, 6, 10, 8)
"""x, y, w, h in stored pixels of the one red object in each picture."""


def _write(root: Path, pictures: Sequence[tuple[int, tuple[int, int], bool]], suffix: str = "jpg") -> None:
    """Write a data set of pictures: orientation, stored size (width, height), whether annotated upright."""
    images, annotations = [], []
    (root / "train2017").mkdir(parents=True)
    for number, (orientation, (width, height), upright) in enumerate(pictures, start=1):
        pixels = np.full((height, width, 3), 200, dtype=np.uint8)
        x, y, w, h = _OBJECT
        pixels[y : y + h, x : x + w] = (255, 0, 0)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(pixels)
        path = root / "train2017" / f"{number}.{suffix}"
        stored.save(path, exif=exif, quality=95)
        mask = Image.fromarray((pixels[..., 1] == 0).astype(np.uint8))
        if upright:
            mask.getexif()[0x0112] = orientation
            mask = ImageOps.exif_transpose(mask)
        rows, columns = np.nonzero(np.asarray(mask))
        left, top = int(columns.min()), int(rows.min())
        wide, high = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
        size = {"height": mask.height, "width": mask.width}
        images.append({"id": number, "file_name": path.name, **size})
        annotations.append(box(number, [left, top, wide, high]))
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_json(root / "annotations" / "instances_train2017.json", content)


def _box_is_on_object(dataset: CocoDataset, index: int) -> bool:
    sample = dataset[index]
    ((left, top, right, bottom),) = sample.boxes.astype(int).tolist()
    inside = sample.image[top + 1 : bottom - 1, left + 1 : right - 1].reshape(-1, 3).mean(axis=0)
    return bool(np.abs(inside - (255, 0, 0)).max() < 20)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_boxes_and_pixels_agree_in_every_orientation(tmp_path: Path, suffix: str, upright: bool) -> None:
    """The pictures whose size tells also decide for those whose size does not."""
    lying = [(orientation, (60, 40), upright) for orientation in range(1, 9)]
    _write(tmp_path, [*lying, (6, (40, 40), upright)], suffix)
    dataset = CocoDataset.open(tmp_path)
    assert [_box_is_on_object(dataset, i) for i in range(len(dataset))] == [True] * 9
    assert [_box_is_on_object(dataset.subset([2]), 0)] == [True]


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_setting_decides_where_no_size_tells(
    tmp_path: Path, orientation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, [(orientation, (60, 40), False), (1, (60, 40), False)])
    assert not _box_is_on_object(CocoDataset.open(tmp_path), 0)
    assert main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 images state an orientation" in said
    assert "if boxes lie on nothing, give --orientation stored" in said
    assert _box_is_on_object(CocoDataset.open(tmp_path, orientation="stored"), 0)
    assert main(["check", str(tmp_path), "--orientation", "stored"]) == 0
    assert "read as --orientation stored says" in capsys.readouterr().out


def test_sizes_that_contradict_each_other_leave_the_rest_to_the_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, [(6, (60, 40), True), (8, (60, 40), False), (3, (60, 40), False)])
    dataset = CocoDataset.open(tmp_path)
    assert _box_is_on_object(dataset, 0)
    assert _box_is_on_object(dataset, 1)
    with pytest.raises(DataError, match=r"3\.jpg' is to be turned.*: give --orientation upright or stored"):
        dataset[2]
    assert main(["check", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "1 were annotated upright and 1 as stored, and of 1 it does not tell" in output.out
    assert "1 image cannot be read" in output.out
    assert main(["check", str(tmp_path), "--orientation", "stored"]) == 0
    stored = CocoDataset.open(tmp_path, orientation="stored")
    assert [_box_is_on_object(stored, i) for i in range(3)] == [True] * 3


def test_nothing_is_said_where_nothing_is_to_be_turned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, [(1, (60, 40), True)])
    assert main(["check", str(tmp_path)]) == 0
    assert "orientation" not in capsys.readouterr().out


@pytest.mark.parametrize("says_sizes", [True, False])
def test_boxes_that_fit_the_stored_size_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], says_sizes: bool
) -> None:
    """Upright or no sizes in the file, and boxes that were drawn on the stored pixels."""
    _write(tmp_path, [(6, (60, 40), True), (8, (60, 40), True), (1, (60, 40), True)])
    path = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        if not says_sizes:
            del image["width"], image["height"]
    write_json(path, content)
    assert main(["check", str(tmp_path)]) == 0
    assert "only as they are stored" not in capsys.readouterr().out
    content["annotations"][0]["bbox"] = [30, 10, 28, 20]
    write_json(path, content)
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "1 of 3 images are to be turned, and have boxes that fit them only as they are stored" in said
    assert "(the first is '1.jpg')" in said
    assert "give --orientation stored" in said
    if not says_sizes:
        content["annotations"][1]["bbox"] = [30, 10, 28, 20]
        write_json(path, content)
        assert main(["check", str(tmp_path), "--orientation", "stored"]) == 0
        assert "only as they are stored" not in capsys.readouterr().out


def test_boxes_beyond_both_sizes_say_nothing_of_how_an_image_was_annotated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, [(6, (60, 40), True), (1, (60, 40), True)])
    path = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [30, 10, 50, 90]
    content["annotations"][1]["bbox"] = [10, 10, 20, 45]
    write_json(path, content)
    assert main(["check", str(tmp_path)]) == 0
    assert "only as they are stored" not in capsys.readouterr().out
