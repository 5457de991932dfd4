"""Annotation files as other tools write them: read as they are meant, refused by name, counted."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import DataError
from asag_evaluation.data.cli import main
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.records import Counts
from support.coco_files import CATEGORIES, box, gradient, write_coco, write_image, write_json


def _file(root: Path, **changes: Any) -> Path:
    """Write a data set of one image of 60 x 40 pixels and return its annotation file, with parts replaced."""
    file = write_coco(root, [box(1, [5, 6, 10, 20], id=1)], shapes=((40, 60),))
    return write_json(file, {**json.loads(file.read_text()), **changes})


def _open(root: Path, **changes: Any) -> CocoDataset:
    return CocoDataset.from_files(_file(root, **changes), root / "train2017")


@pytest.mark.parametrize(
    ("given", "is_crowd"),
    [("0", False), ("1", True), (0.0, False), (True, True), (False, False), (None, False), ("false", False),
     ("True", True), (1, True), ("", False), ("0.0", False), ("None", False), ("1.0", True)],
)  # fmt: skip
def test_whether_an_object_is_a_crowd_is_read_as_it_is_meant(
    tmp_path: Path, given: Any, is_crowd: bool
) -> None:
    dataset = _open(tmp_path, annotations=[box(1, [5, 6, 10, 20], iscrowd=given)])
    assert (dataset.counts.crowd, dataset.counts.objects) == (int(is_crowd), int(not is_crowd))
    assert [a["iscrowd"] for a in dataset.ground_truth()["annotations"]] == [int(is_crowd)]


@pytest.mark.parametrize("given", ["maybe", 2, [], "-", -1])
def test_what_is_no_flag_is_refused_with_its_annotation(tmp_path: Path, given: Any) -> None:
    with pytest.raises(DataError, match=r"annotation 17 has iscrowd .* where 0 or 1 is expected"):
        _open(tmp_path, annotations=[box(1, [5, 6, 10, 20], id=17, iscrowd=given)])


@pytest.mark.parametrize("spelling", ["isCrowd", "is_crowd"])
def test_a_crowd_is_one_in_other_spellings(tmp_path: Path, spelling: str) -> None:
    annotation = {"image_id": 1, "category_id": 3, "bbox": [5, 6, 10, 20]}
    assert _open(tmp_path, annotations=[{**annotation, spelling: "true"}]).counts.crowd == 1
    with pytest.raises(DataError, match="annotation 0 has iscrowd 'maybe'"):
        _open(tmp_path, annotations=[{**annotation, spelling: "maybe"}])


def test_objects_to_be_ignored_are_not_learnt_from(tmp_path: Path) -> None:
    dataset = _open(tmp_path, annotations=[{**box(1, [5, 6, 10, 20]), "ignore": 1}])
    assert (dataset.counts.crowd, dataset.counts.objects) == (1, 0)


def test_numbers_as_text_and_with_a_point_are_numbers(tmp_path: Path) -> None:
    dataset = _open(
        tmp_path,
        images=[{"id": "12", "file_name": "1.png", "height": "40", "width": 60.0}],
        categories=[{"id": "3", "name": "ball"}, {"id": 7.0, "name": 8}],
        annotations=[
            {"image_id": 12.0, "category_id": "7", "bbox": ["5", "6.5", 10, "20"], "area": "77"},
            {"image_id": "12", "category_id": 3.0, "bbox": [1, 2, 3, 4], "area": "large"},
            {"image_id": 12, "category_id": "ball", "bbox": [1, 2, 3, 5]},
        ],
    )
    assert dataset.categories == (Category(id=3, name="ball"), Category(id=7, name="8"))
    assert dataset[0].boxes.tolist() == [[5, 6.5, 15, 26.5], [1, 2, 4, 6], [1, 2, 4, 7]]
    assert dataset[0].labels.tolist() == [1, 0, 0]
    assert [a["area"] for a in dataset.ground_truth()["annotations"]] == [77, 12, 15]
    assert dataset.counts.numbers_as_text == 6
    assert "6 numbers as text" in dataset.counts.describe()


@pytest.mark.parametrize("said", ["[5, 6.5, 10, 20]", "5,6.5,10,20", "(5.0, 6.5, 10.0, 20.0)"])
def test_a_box_written_as_one_text_is_read(tmp_path: Path, said: str) -> None:
    """As tables with a column of boxes become JSON."""
    dataset = _open(tmp_path, annotations=[{**box(1, [0, 0, 1, 1]), "bbox": said}])
    assert (dataset[0].boxes.tolist(), dataset.counts.numbers_as_text) == ([[5, 6.5, 15, 26.5]], 1)
    with pytest.raises(DataError, match="annotation 17 has the box '5,6,10'"):
        _open(tmp_path, annotations=[{**box(1, [0, 0, 1, 1], id=17), "bbox": "5,6,10"}])


def test_a_box_that_says_what_it_is_is_taken_for_that(tmp_path: Path) -> None:
    """Detectron2 says whether it is corners."""
    said = [(0, [5, 6, 15, 26]), ("BoxMode.XYXY_ABS", [5, 6, 15, 26]), (1, [5, 6, 10, 20])]
    dataset = _open(tmp_path, annotations=[{**box(1, xs), "bbox_mode": mode} for mode, xs in said])
    assert dataset[0].boxes.tolist() == [[5, 6, 15, 26]] * 3
    with pytest.raises(DataError, match="annotation 17 has a box of mode 4, where XYXY_ABS or XYWH_ABS"):
        _open(tmp_path, annotations=[{**box(1, [5, 6, 10, 20], id=17), "bbox_mode": 4}])


def test_boxes_that_are_missing_are_drawn_around_outlines(tmp_path: Path) -> None:
    runs = {"size": [40, 60], "counts": [40 * 7 + 5, 10, 30, 10, 40 * 51 - 15]}
    dataset = _open(
        tmp_path,
        annotations=[
            {"image_id": 1, "category_id": 3, "segmentation": [[5, 6, 15, 6, 15, 26], [20, 6, 21, 6, 20, 9]]},
            {"image_id": 1, "category_id": 3, "bbox": None, "segmentation": runs},
            {"image_id": 1, "category_id": 3, "bbox": [], "segmentation": []},
            {"image_id": 1, "caption": "a ball"},
        ],
    )
    assert dataset[0].boxes.tolist() == [[5, 6, 21, 26], [7, 5, 9, 15]]
    assert (dataset.counts.boxes_from_outlines, dataset.counts.without_box) == (2, 2)
    empty = {**box(1, [0, 0, 0, 0]), "segmentation": [[5, 6, 15, 6, 15, 26]]}
    dataset = _open(tmp_path, annotations=[empty, {**empty, "segmentation": [[]]}])
    assert dataset[0].boxes.tolist() == [[5, 6, 15, 26]]
    assert (dataset.counts.boxes_from_outlines, dataset.counts.zero_sized) == (1, 1)
    with pytest.raises(DataError, match="annotation 5 has no box, and a segmentation that cannot be read"):
        _open(tmp_path, annotations=[{"id": 5, "image_id": 1, "category_id": 3, "segmentation": [["a", 2]]}])


@pytest.mark.parametrize("missing", [{}, {"height": None, "width": None}, {"height": 0, "width": 0}])
def test_sizes_that_are_missing_are_read_from_the_file(tmp_path: Path, missing: dict[str, Any]) -> None:
    dataset = _open(tmp_path, images=[{"id": 1, "file_name": "1.png", **missing}])
    assert dataset[0].image.shape == (40, 60, 3)
    assert dataset.counts.sizes_from_files == 1


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("a b.png", "a%20b.png"),
        ("sub/1.png", "sub\\1.png"),
        ("1.png", "C:\\data\\train2017\\1.png"),
        ("1.png", "/home/somebody/data/train2017/1.png"),
        ("1.png", "train2017/1.png"),
        ("1.png", "./1.png"),
        ("1.png", "1.PNG"),
        ("sub/1.png", "Sub/1.Png"),
        ("1.png", "http://images.example.org/train2017/1.png"),
        ("f\u00fcr.png", "fu\u0308r.png"),
    ],
)
def test_files_are_found_under_the_names_that_tools_give_them(
    tmp_path: Path, stored: str, named: str
) -> None:
    write_image(tmp_path / "train2017" / stored, gradient(40, 60))
    if stored != "1.png":
        dataset = _open(tmp_path, images=[{"id": 1, "file_name": named, "height": 40, "width": 60}])
    else:
        dataset = _open(tmp_path, images=[{"id": 1, "coco_url": named, "height": 40, "width": 60}])
    assert dataset[0].image.shape == (40, 60, 3)
    assert dataset.path(0).name == Path(stored).name
    assert dataset.counts.names_found_otherwise == 1


def test_two_files_that_may_be_meant_are_neither(tmp_path: Path) -> None:
    for name in ("a.PNG", "A.png"):
        write_image(tmp_path / "train2017" / name, gradient(40, 60))
    with pytest.raises(DataError, match=r"1 of the 1 images .* missing .* the first is 'a\.png'"):
        _open(tmp_path, images=[{"id": 1, "file_name": "a.png", "height": 40, "width": 60}])


def test_what_stands_in_the_file_twice_is_taken_once_or_refused(tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "1.png", "height": 40, "width": 60}
    annotation = box(1, [5, 6, 10, 20], id=1)
    dataset = _open(
        tmp_path,
        images=[image, image],
        categories=[*CATEGORIES, CATEGORIES[0]],
        annotations=[annotation, annotation, {**annotation, "bbox": [1, 1, 2, 2]}],
    )
    assert (dataset.counts.images, dataset.counts.objects, dataset.counts.repeated) == (1, 2, 3)
    with pytest.raises(DataError, match=r"two of its images have the id 1: '1\.png' and '2\.png'"):
        _open(tmp_path, images=[image, {**image, "file_name": "2.png"}])
    with pytest.raises(DataError, match=r"images 1 and 2 are the same file '1\.png'"):
        _open(tmp_path, images=[image, {**image, "id": 2}])
    with pytest.raises(DataError, match=r"images 1 and 2 are the same file '1\.png'"):
        _open(tmp_path, images=[image, {**image, "id": 2, "file_name": ".\\1.png"}])


def test_objects_of_one_box_are_counted(tmp_path: Path) -> None:
    """Of files that were joined, or of somebody who clicked twice."""
    twice = [box(1, [5, 6, 10, 20], category, id=number) for number, category in enumerate((3, 3, 7))]
    dataset = _open(tmp_path, annotations=twice)
    assert (dataset.counts.objects, dataset.counts.objects_of_one_box) == (3, 1)


def test_sizes_that_are_exchanged_are_called_so(tmp_path: Path) -> None:
    dataset = _open(tmp_path, images=[{"id": 1, "file_name": "1.png", "height": 60, "width": 40}])
    with pytest.raises(DataError, match=r"60 x 40 pixels, but .* for 40 x 60: exchange these two there"):
        dataset[0]


def test_a_list_that_stands_in_the_file_twice_is_refused(tmp_path: Path) -> None:
    """Of which readers of JSON keep the last in silence."""
    file = _file(tmp_path)
    file.write_text(f'{file.read_text().rstrip()[:-1]}, "annotations": []}}')
    with pytest.raises(DataError, match="has two lists of annotations, of which only one would count"):
        CocoDataset.open(tmp_path)


def test_a_heading_that_is_listed_as_a_class_is_none(tmp_path: Path) -> None:
    classes = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 3, "name": "red", "supercategory": "cells"},
    ]
    dataset = _open(tmp_path, categories=classes)
    assert (dataset.categories, dataset.counts.supercategories) == ((Category(id=3, name="red"),), 1)
    used = _open(tmp_path, categories=classes, annotations=[box(1, [5, 6, 10, 20], 0)])
    assert len(used.categories) == 2


def test_names_of_classes_are_on_one_line(tmp_path: Path) -> None:
    dataset = _open(tmp_path, categories=[{"id": 3, "name": " traffic\n\x1b[31m light "}])
    assert dataset.categories == (Category(id=3, name="traffic [31m light"),)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    file = _file(tmp_path, categories=[{"id": 3, "name": "B\u00e4lle"}])
    file.write_text(file.read_text(), encoding=encoding)
    assert CocoDataset.open(tmp_path).categories[0].name == "B\u00e4lle"
    file.write_bytes(b'{"images": [], "categories": [{"id": 1, "name": "B\xe4lle"}]}')
    with pytest.raises(DataError, match=r"is not written in UTF-8 .*: save it in that encoding"):
        CocoDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<annotation><object/></annotation>", "it is Pascal VOC's XML of one image"),
        ("0 0.5 0.5 0.1 0.2\n1 0.1 0.1 0.1 0.1\n", "it is YOLO's text of one image"),
        ('{"ID": "a", "gtboxes": []}\n{"ID": "b", "gtboxes": []}\n', "asag-data crowdhuman"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]', "it is a list of detections"),
        ('{"shapes": [], "imagePath": "a.png"}', "it is LabelMe's JSON of one image"),
        ('[{"id": 1, "data": {}, "annotations": []}]', "it is Label Studio's JSON"),
        ("file,xmin,ymin,xmax,ymax,class\n", "it is a table with commas"),
        ("", "it is empty"),
        ('{"images": [1, 2, 3, 4, 5, 6], "annotations": [', "is not valid JSON .* ends early, copy it again"),
        ('{"images": []}\nthe end', "is not valid JSON .* mend it, or export it again"),
        ('var data = {"images": [1, 2, 3, 4, 5, 6]};', "is not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "it is a Git LFS pointer"),
        ("<!DOCTYPE html><html><p>not found", "it is a web page"),
        ("PK\x03\x04", "is compressed: unpack it"),
        ('{"annotations": [{"image_id": 1, "segments_info": []}]}', "it is COCO's panoptic form"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_names(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said) as raised:
        CocoDataset.from_files(tmp_path / "a.json", tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("annotations", "doubt"),
    [
        (
            [box(1, [10, 10, 50, 38]), box(1, [30, 5, 59, 39])],
            "2 of 2 boxes in .* as x1, y1, x2, y2",
        ),
        (
            [box(1, [0.1, 0.1, 0.5, 0.5]), box(1, [0, 0.2, 1, 0.3])],
            "all 2 boxes in .* relative to the image",
        ),
        (
            [{**box(1, [5, 6, 10, 20]), "attributes": {"rotation": turn}} for turn in (0, "30.5", 180)],
            "1 of 3 boxes in .* are said to be turned",
        ),
        ([{**box(1, [5, 6, 10, 20]), "rotation": 30}], "1 of 1 boxes in .* are said to be turned"),
        (
            [box(1, [5, 6, 10, 20], area=area) for area in (1.0, 150, 9000)],
            "2 of 3 objects in .* have an area that does not fit their box",
        ),
        ([box(1, [0, 0, 0, 0])], "none of the 1 annotation in .* is an object"),
        (
            [{**box(1, [5, 6, 10, 20]), "image_id": "1.png"}] * 2,
            "none of the 2 annotations in .* is an object",
        ),
    ],
)
def test_boxes_of_another_kind_are_doubted(
    tmp_path: Path, annotations: list[dict[str, Any]], doubt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _file(tmp_path, annotations=annotations)
    (said,) = CocoDataset.open(tmp_path).doubts
    assert main(["check", str(tmp_path)]) == 1
    assert said in capsys.readouterr().out
    assert re.search(doubt, said)


@pytest.mark.parametrize(
    ("annotations", "doubt"),
    [
        ([box(0, [5, 6, 10, 20]), box(1, [5, 6, 10, 20])], "name images 0 to 1, but 1 to 2 are listed"),
        (
            [box(2, [5, 6, 10, 20], 4), box(1, [5, 6, 10, 20], 8)],
            "name classes 4 to 8, but 3 to 7 are listed",
        ),
        ([box(2, [5, 6, 10, 20], 3), box(1, [5, 6, 10, 20], 9)], None),  # a class that is left out
    ],
)
def test_ids_that_count_from_another_number_are_doubted(
    tmp_path: Path, annotations: list[dict[str, Any]], doubt: str | None
) -> None:
    write_coco(tmp_path, annotations, shapes=((40, 60), (40, 60)))
    doubts = CocoDataset.open(tmp_path).doubts
    assert any(doubt in said for said in doubts) if doubt else not doubts


def test_counts_of_one_are_said_of_one() -> None:
    names = [field.name for field in dataclasses.fields(Counts)]
    assert Counts(**dict.fromkeys(names, 1)).describe() == (
        "1 image, 1 object, 1 empty image, 1 crowd, 1 clipped, 1 outside, 1 zero sized, 1 unknown class, "
        "1 unknown image, 1 without box, 1 repeated, 1 object of one box, 1 number as text, 1 box from an "
        "outline, 1 size from a file, 1 name found otherwise, 1 supercategory"
    )
    assert "2 empty images, 2 crowd, " in Counts(**dict.fromkeys(names, 2)).describe()


def test_counts_are_all_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of the counts can be left out of what `asag-data check` prints."""
    _file(
        tmp_path,
        annotations=[
            box(1, [5, 6, 10, 20], iscrowd="0"),
            box(1, [5, 6, 10, 21], iscrowd="1"),
            box(9, [5, 6, 10, 20]),
            box(1, [5, 6, 10, 20], 99),
            box(1, None),
            {**box(1, [90, 6, 10, 20]), "image_id": "1"},
        ],
    )
    assert main(["check", str(tmp_path)]) == 0
    assert (
        "1 image, 1 object, 1 crowd, 1 outside, 1 unknown class, 1 unknown image, 1 without box, "
        "1 number as text"
    ) in capsys.readouterr().out
