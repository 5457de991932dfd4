"""Data sets in COCO layout: what is read, what is counted, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import DataError
from asag_evaluation.data.coco import CocoDataset
from support.coco_files import CATEGORIES, box, gradient, write_coco, write_image, write_json


def test_reads_images_boxes_and_labels(tmp_path: Path) -> None:
    write_coco(tmp_path, [box(2, [5, 6, 10, 20], 7), box(1, [0, 0, 4, 4]), box(2, [1, 2, 3, 4])])
    dataset = CocoDataset.open(tmp_path)
    assert len(dataset) == 2
    assert dataset.categories == (Category(id=3, name="ball"), Category(id=7, name="cup"))
    sample = dataset[1]
    assert sample.image_id == 2
    assert sample.original_shape == (50, 50)
    assert np.array_equal(sample.image, gradient(50, 50))
    assert sample.boxes.dtype == np.float32
    assert sample.boxes.tolist() == [[5, 6, 15, 26], [1, 2, 4, 6]]
    assert sample.labels.tolist() == [1, 0]


def test_odd_annotations_are_counted(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        [
            box(1, [10, 10, 5, 5]),
            box(1, [-5, 30, 20, 20]),  # beyond the left and the bottom
            box(1, [10, 10, 30, 20], iscrowd=1),
            box(1, [60, 0, 5, 5]),  # right of the image
            box(1, [3, 3, 0, 9]),
            box(1, [3, 3, 9, -1]),
            box(1, [3, 3, 9, 9], 99),
            box(55, [3, 3, 9, 9]),
        ],
    )
    dataset = CocoDataset.open(tmp_path)
    counts = dataset.counts
    assert (counts.images, counts.objects, counts.empty_images) == (2, 2, 1)
    assert (counts.crowd, counts.clipped, counts.outside, counts.zero_sized) == (1, 1, 1, 2)
    assert (counts.unknown_class, counts.unknown_image) == (1, 1)
    assert dataset[0].boxes.tolist() == [[10, 10, 15, 15], [0, 30, 15, 40]]
    assert counts.describe() == (
        "2 images, 2 objects, 1 empty image, 1 crowd, 1 clipped, 1 outside, 2 zero sized, "
        "1 unknown class, 1 unknown image"
    )


def test_ground_truth_is_unclipped_and_has_the_crowds(tmp_path: Path) -> None:
    write_coco(tmp_path, [box(1, [-5, 30, 20, 20], 7, area=123), box(1, [1, 1, 30, 20], iscrowd=1)])
    truth = CocoDataset.open(tmp_path).ground_truth()
    assert [a["bbox"] for a in truth["annotations"]] == [[-5, 30, 20, 20], [1, 1, 30, 20]]
    assert [a["area"] for a in truth["annotations"]] == [123, 600]
    assert [a["category_id"] for a in truth["annotations"]] == [7, 3]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1]
    assert [image["id"] for image in truth["images"]] == [1, 2]


def test_image_without_annotations_is_empty(tmp_path: Path) -> None:
    write_coco(tmp_path, [])
    sample = CocoDataset.open(tmp_path)[0]
    assert sample.boxes.shape == (0, 4)
    assert sample.labels.shape == (0,)


def test_training_leaves_out_empty_and_tiny_images(tmp_path: Path) -> None:
    write_coco(tmp_path, [box(1, [0, 0, 4, 4]), box(3, [0, 0, 4, 4])], shapes=((40, 60), (50, 50), (20, 60)))
    dataset = CocoDataset.open(tmp_path).for_training()
    assert [record.image_id for record in dataset.records] == [1]
    assert dataset.counts.objects == 1
    whole = CocoDataset.open(tmp_path)
    assert whole.left_out_of_training() == "left out: 1 without objects, 1 under 32 pixels"
    assert dataset.left_out_of_training() == ""
    with pytest.raises(DataError, match=r"nothing to train on.*3 images, 2 objects"):
        CocoDataset.open(tmp_path).for_training(min_side=100)


def test_classes_of_a_checkpoint_decide_the_labels(tmp_path: Path) -> None:
    write_coco(tmp_path, [box(1, [0, 0, 4, 4], 7)])
    known = (Category(id=1, name="fork"), Category(id=7, name="cup"), Category(id=3, name="ball"))
    dataset = CocoDataset.open(tmp_path, categories=known)
    assert dataset.categories == known
    assert dataset[0].labels.tolist() == [1]
    renumbered = (Category(id=0, name="cup"), Category(id=7, name="ball"))  # as another tool counts them
    dataset = CocoDataset.open(tmp_path, categories=renumbered)
    assert (dataset.categories, dataset[0].labels.tolist()) == (renumbered, [0])
    assert [each["category_id"] for each in dataset.ground_truth()["annotations"]] == [0]
    for part, remedy in ((known[2:], r" \(.*`asag-data voc --classes`.*\)$"), (known[:1], "classes$")):
        unknown = rf"'(cup|ball)', which the network does not know \(it knows {part[0].name}\)"
        with pytest.raises(DataError, match=f"has the class {unknown}") as caught:
            CocoDataset.open(tmp_path, categories=part)
        assert re.search(remedy, str(caught.value))
    many = [Category(id=i, name=f"c{i}") for i in range(9)]
    with pytest.raises(DataError, match=r"it knows c0, c1, c2, c3, c4, c5 and 3 more\)"):
        CocoDataset.open(tmp_path, categories=many)
    twice = (Category(id=3, name="ball"), Category(id=8, name="cup"), Category(id=9, name="cup"))
    with pytest.raises(DataError, match=r"class id 7 is 'cup', but in the network it has no such id, and as"):
        CocoDataset.open(tmp_path, categories=twice)
    turned = (Category(id=3, name="cup"), Category(id=7, name="ball"), Category(id=9, name="cup"))
    with pytest.raises(DataError, match="id 3 is 'ball', but in the network it is 'cup', and as several"):
        CocoDataset.open(tmp_path, categories=turned)


def test_orientation_that_the_annotations_ignore(tmp_path: Path) -> None:
    stored = np.full((40, 60, 3), 128, dtype=np.uint8)
    data = cv2.imencode(".jpg", stored)[1].tobytes()
    turned = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    segment = b"\xff\xe1" + (len(turned) + 2).to_bytes(2, "big") + turned
    file = write_coco(tmp_path, [box(1, [0, 0, 4, 4])], shapes=((40, 60),))
    (tmp_path / "train2017" / "1.png").write_bytes(data[:2] + segment + data[2:])
    assert CocoDataset.open(tmp_path)[0].image.shape == (40, 60, 3)
    content = json.loads(file.read_text())
    content["images"][0].update(height=60, width=40)  # annotated as it is shown
    write_json(file, content)
    assert CocoDataset.open(tmp_path)[0].image.shape == (60, 40, 3)


class TestRefusals:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"there is no data folder '.*nowhere'"):
            CocoDataset.open(tmp_path / "nowhere")

    def test_no_annotations(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"not a data set in COCO layout.*no folder 'annotations'"):
            CocoDataset.open(tmp_path)

    def test_other_split(self, tmp_path: Path) -> None:
        write_coco(tmp_path, [], split="val2017")
        with pytest.raises(DataError, match=r"no split 'train2017'.*its splits are val2017"):
            CocoDataset.open(tmp_path)

    def test_no_annotation_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no annotation file"):
            CocoDataset.from_files(tmp_path / "a.json", tmp_path)

    def test_missing_images(self, tmp_path: Path) -> None:
        write_coco(tmp_path, [])
        (tmp_path / "train2017" / "2.png").unlink()
        with pytest.raises(DataError, match=r"1 of the 2 images .* missing from .*the first is '2.png'"):
            CocoDataset.open(tmp_path)

    def test_missing_image_folder(self, tmp_path: Path) -> None:
        file = write_coco(tmp_path, [])
        with pytest.raises(DataError, match="there is no image folder"):
            CocoDataset.from_files(file, tmp_path / "elsewhere")

    def test_damaged_image(self, tmp_path: Path) -> None:
        write_coco(tmp_path, [])
        path = tmp_path / "train2017" / "2.png"
        path.write_bytes(path.read_bytes()[:80])
        dataset = CocoDataset.open(tmp_path)
        assert dataset[0].image_id == 1
        with pytest.raises(DataError, match=r"2\.png' is truncated.*\(image 2 of the data set\)"):
            dataset[1]

    def test_image_of_another_size(self, tmp_path: Path) -> None:
        write_coco(tmp_path, [])
        write_image(tmp_path / "train2017" / "1.png", gradient(41, 60))
        with pytest.raises(DataError, match=r"is 60 x 41 pixels, but its annotations are for 60 x 40"):
            CocoDataset.open(tmp_path)[0]

    @pytest.mark.parametrize(
        "bad", [["1", "2", "x", "4"], [1, 2, 3], "1 2 3 4", {}, [1, 2, float("nan"), 4], [True, 1, 2, 3]]
    )
    def test_box_that_is_no_box(self, tmp_path: Path, bad: Any) -> None:
        write_coco(tmp_path, [box(1, [0, 0, 4, 4]), box(1, bad, id=17)])
        with pytest.raises(DataError, match=r"annotation 17 has the box .* which is not four numbers"):
            CocoDataset.open(tmp_path)

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ([], "it holds a list"),
            ({}, "it has no list of categories"),
            ({"categories": []}, "there are no categories"),
            (
                {"categories": [{"id": "one", "name": "a"}]},
                "category 0 has the id 'one', which is no whole number",
            ),
            ({"categories": [{"id": 1, "name": " "}]}, r"category 0 \(id 1\) has no name"),
            (
                {"categories": [*CATEGORIES, {"id": 7, "name": "mug"}]},
                "two of its categories have the id 7: 'cup' and 'mug'",
            ),
            ({"categories": CATEGORIES}, "it has no list of images"),
            ({"categories": CATEGORIES, "images": []}, "there are no images"),
            ({"categories": CATEGORIES, "images": [5]}, "number 0 of its images is no object, but 5"),
            (
                {"categories": CATEGORIES, "images": [{"id": 1}]},
                r"image 0 \(id 1\) has no file_name",
            ),
            (
                {"categories": CATEGORIES, "images": [{"id": 1, "file_name": "a.jpg", "width": 4}]},
                "image 'a.jpg' has no height and width",
            ),
            (
                {
                    "categories": CATEGORIES,
                    "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}],
                },
                "it has no list of annotations",
            ),
        ],
    )
    def test_malformed_file(self, tmp_path: Path, content: Any, problem: str) -> None:
        with pytest.raises(DataError, match=problem):
            CocoDataset.from_files(write_json(tmp_path / "a.json", content), tmp_path)

    def test_file_that_is_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("{")
        with pytest.raises(DataError, match="is not valid JSON"):
            CocoDataset.from_files(tmp_path / "a.json", tmp_path)
