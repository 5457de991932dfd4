"""CrowdHuman's annotations become COCO's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.errors import DataError, OutputError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.crowdhuman import convert_crowdhuman
from support.coco_files import gradient, write_image


def person(fbox: Any, **more: Any) -> dict[str, Any]:
    return {"tag": "person", "fbox": fbox, "vbox": fbox, "hbox": fbox, **more}


def write_odgt(root: Path, *records: dict[str, Any]) -> Path:
    for record in records:
        write_image(root / "Images" / f"{record['ID']}.jpg", gradient(40, 60))
    path = root / "annotation_val.odgt"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_converts(tmp_path: Path) -> None:
    odgt = write_odgt(
        tmp_path,
        {
            "ID": "a,1",
            "gtboxes": [
                person([-5, 3, 20, 30], extra={"box_id": 0}),
                person([20, 3, 20, 30], extra={"ignore": "1"}),
                {"tag": "mask", "fbox": [1, 2, 3, 4]},
            ],
        },
        {"ID": "b,2", "gtboxes": [person([1, 2, 30, 30])]},
    )
    done: list[int] = []
    file = convert_crowdhuman(odgt, tmp_path / "Images", tmp_path / "out", split="val", progress=done.append)
    assert done == [1, 2]
    assert file == tmp_path / "out" / "annotations" / "instances_val.json"
    dataset = CocoDataset.open(tmp_path / "out", "val")
    assert [category.name for category in dataset.categories] == ["person"]
    assert (dataset.counts.objects, dataset.counts.crowd, dataset.counts.clipped) == (2, 2, 1)
    assert dataset[0].boxes.tolist() == [[0, 3, 15, 33]]
    assert dataset[1].image.shape == (40, 60, 3)
    convert_crowdhuman(odgt, tmp_path / "Images", tmp_path / "out", split="val")  # the link is there already


def test_images_elsewhere_are_not_replaced(tmp_path: Path) -> None:
    odgt = write_odgt(tmp_path, {"ID": "a", "gtboxes": []})
    (tmp_path / "val").mkdir()
    with pytest.raises(OutputError, match=r"val' already that does not lead to .*: remove it, or"):
        convert_crowdhuman(odgt, tmp_path / "Images", tmp_path, split="val")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1 of .* is not a CrowdHuman record"),
        ('{"ID": "a"}', "line 1 of .* is not a CrowdHuman record"),
        ('{"ID": "a", "gtboxes": [{"tag": "person"}]}', "a box without four numbers in fbox"),
        ('{"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 2]}]}', "a box without four numbers in fbox"),
        ('{"ID": "b", "gtboxes": []}', "image .*b.jpg' does not exist"),
        ("", "holds no images"),
    ],
)
def test_refusals(tmp_path: Path, line: str, problem: str) -> None:
    odgt = write_odgt(tmp_path, {"ID": "a", "gtboxes": []})
    odgt.write_text(line)
    with pytest.raises(DataError, match=problem):
        convert_crowdhuman(odgt, tmp_path / "Images", tmp_path / "out", split="val")
    assert not (tmp_path / "out").exists()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no annotation file"):
        convert_crowdhuman(tmp_path / "x.odgt", tmp_path, tmp_path, split="val")
