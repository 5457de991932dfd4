"""Annotation files: COCO's JSON, CrowdHuman's lines of it, and Pascal VOC's XML."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from asag_deploy.bundle.manifest import Category
from asag_deploy.detect.coco_ids import annotated_ids
from asag_deploy.images.sources import list_sources
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.crowdhuman import convert_crowdhuman
from asag_evaluation.data.voc import convert_voc
from endurance.damage import damaged_bytes, damaged_json
from endurance.judging import Target, WrongError
from endurance.targets import one_of_parts
from support.coco_files import box, gradient, write_coco, write_image

_PACKED = {"counts": "XU1S1", "size": [50, 50]}
_COCO_VALUES = (
    _PACKED,
    "1",
    "0",
    "true",
    "1.png",
    "2.png",
    "cup",
    [0, 0, 5, 5],
    [[0, 0, 5, 0, 5, 5]],
    1.0,
    3.0,
    "3",
    1,
    3,
    7,
)
_ODGT_VALUES = ("person", "mask", 1, 0, [1, 2, 3, 4], ["a", 1, 2, 3], {"ignore": 1}, {"ignore": "1"})

_XML = b"""<?xml version="1.0" encoding="utf-8"?>
<annotation><filename>a.jpg</filename><size><width>60</width><height>40</height></size>
<object><name>cup</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>21</xmax><ymax>40</ymax></bndbox></object>
<object><name>&#x1F42C; b</name><difficult>1</difficult>
<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>70</xmax><ymax>12</ymax></bndbox></object></annotation>"""


@contextmanager
def open_annotations(folder: Path) -> Iterator[Target]:
    """`coco`, `odgt`, `voc` or `ids` (of results, by names in it), and on the next lines the file."""
    file = write_coco(
        folder / "data",
        [
            box(1, [1, 2, 10, 12], area=99.5, segmentation=[[1, 2, 11, 2, 11, 14]]),
            box(2, [0, 0, 50, 50], 7, iscrowd=1, segmentation={"counts": [0, 2500], "size": [50, 50]}),
            box(2, [-3, 5.5, 20, 60], 3, score=0.5, ignore=0),
        ],
    )
    pictures = folder / "data" / "train2017"
    coco = json.loads(file.read_bytes()) | {"info": {"year": 2017}, "licenses": []}

    def run_coco(data: bytes) -> None:
        file.write_bytes(data)
        check(CocoDataset.from_files(file, pictures))

    image_dir = folder / "crowd"
    write_image(image_dir / "a.jpg", gradient(40, 60))
    odgt = folder / "a.odgt"
    odgt.write_bytes(b"")  # so that it is there when what is left behind is looked for

    def run_odgt(data: bytes) -> None:
        odgt.write_bytes(data)
        try:
            written = convert_crowdhuman(odgt, image_dir, folder / "out", split="val")
            check(CocoDataset.from_files(written, image_dir))
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)

    write_image(folder / "voc" / "a.jpg", gradient(40, 60))
    xml = folder / "voc" / "a.xml"
    xml.write_bytes(b"")

    def run_voc(data: bytes) -> None:
        xml.write_bytes(data)
        try:
            made = convert_voc(folder / "voc", folder / "out", split="val", count_from_one=True)
            json.dumps(made.remarks).encode()
            check(CocoDataset.from_files(made.file, folder / "voc"))
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)

    sources = list_sources([str(pictures)]).sources
    classes = [Category(id=1, name="ball"), Category(id=2, name="cup")]

    def run_ids(data: bytes) -> None:
        file.write_bytes(data)
        ids = annotated_ids(file, sources, classes)
        json.dumps([ids.image(source, i) for i, source in enumerate(sources)]).encode()
        json.dumps(ids.said).encode()

    inputs, run = one_of_parts(
        {
            "ids": (damaged_json([coco], values=_COCO_VALUES), run_ids),
            "coco": (damaged_json([coco], values=_COCO_VALUES), run_coco),
            "odgt": (damaged_json([_crowd()], values=_ODGT_VALUES, lines=True), run_odgt),
            "voc": (damaged_bytes([_XML]), run_voc),
        }
    )
    yield Target(inputs=inputs, run=run, names=(str(folder),))


def check(dataset: CocoDataset) -> None:
    """Use a data set that was taken: what it gives has to be what its own words promise."""
    dataset.counts.describe()
    labels = len(dataset.categories)
    for record in dataset.records:
        x1, y1, x2, y2 = record.boxes.T
        inside = (
            (x1 >= 0) & (y1 >= 0) & (x2 <= record.width) & (y2 <= record.height) & (x1 <= x2) & (y1 <= y2)
        )
        if not np.isfinite(record.boxes).all() or not inside.all():
            raise WrongError(f"boxes {record.boxes} of an image of {record.width} x {record.height}")
        if ((record.labels < 0) | (record.labels >= labels)).any():
            raise WrongError(f"labels {record.labels} of {labels} classes")
    for index in range(len(dataset)):
        assert dataset[index].image.ndim == 3
    json.dumps(dataset.ground_truth(), allow_nan=False)


def _crowd() -> list[Any]:
    body = {
        "tag": "person",
        "fbox": [1, 2, 10, 20],
        "vbox": [1, 2, 9, 18],
        "hbox": [2, 3, 4, 4],
        "extra": {"box_id": 0},
    }
    return [
        {"ID": "a", "gtboxes": [body, {**body, "fbox": [-4, 0, 90, 40], "extra": {"ignore": 1}}]},
        {"ID": "a", "gtboxes": [{**body, "tag": "mask", "head_attr": {}}]},
    ]
