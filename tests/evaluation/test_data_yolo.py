"""YOLO's layout becomes COCO's, and COCO's becomes YOLO's."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy.errors import BackendError, DataError, OutputError
from asag_evaluation.data.cli import main
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.yolo import convert_yolo, label_file
from asag_evaluation.data.yolo_writing import part_of, upright_boxes, write_yolo
from support.coco_files import box, gradient, write_coco, write_image

yaml = pytest.importorskip("yaml", reason="PyYAML reads data.yaml")

YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [cup, ball]\n"


def write(root: Path, labels: Mapping[str, str | None], description: str = YAML) -> Path:
    """A data set whose images of 40 x 60 pixels have these names and rows; None is no label file."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(description)
    for name, rows in labels.items():
        image = root / name
        write_image(image, gradient(40, 60))
        if rows is not None:
            label = label_file(image)
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(rows)
    return root


def convert(root: Path, part: str = "train") -> tuple[CocoDataset, tuple[str, ...]]:
    """The data set that a conversion gives, and its remarks."""
    out = root.parent / "coco"
    made = convert_yolo(root, out, part=part, split="s")
    return CocoDataset.open(out, "s"), made.remarks


def test_boxes_and_classes(tmp_path: Path) -> None:
    rows = "1 0.5 0.5 0.5 0.25\n0 0.1 0.2 0.2 0.4\n"
    root = write(tmp_path / "yolo", {"images/train/b.png": rows, "images/train/a.png": "1 0.5 0.5 1 1\n"})
    dataset, remarks = convert(root)
    assert [category.name for category in dataset.categories] == ["cup", "ball"]
    assert [category.id for category in dataset.categories] == [1, 2]
    assert [record.file_name for record in dataset.records] == ["a.png", "b.png"]
    assert dataset[0].boxes.tolist() == [[0, 0, 60, 40]]
    np.testing.assert_allclose(dataset[1].boxes, [[15, 15, 45, 25], [0, 0, 12, 16]], atol=1e-5)
    assert dataset[1].labels.tolist() == [1, 0]
    assert remarks == ()


@pytest.mark.parametrize(
    ("description", "place"),
    [
        ("train: images/train\nnames: {0: cup, 1: ball}\n", "images/train"),
        ("train: images/train\nnames: {'0': cup, '1': ball}\nnc: '2'\n", "images/train"),
        ("train: ../train/images\nnames: [cup, ball]\nnc: 2\n", "train/images"),  # Roboflow's
        ("train: [images/one, images/two]\nnames: [cup, ball]\n", "images/two"),
        ("path: ../yolo\ntrain: images\nnames: [cup, ball]\n", "images/deep/er"),
        ("train: train.txt\nnames: [cup, ball]\n", "images/train"),
        ("path: sub\ntrain: images/train\nnames: [cup, ball]\n", "sub/images/train"),
        ("train: plain\nnames: [cup, ball]\n", "plain"),
    ],
)
def test_where_images_and_labels_lie(tmp_path: Path, description: str, place: str) -> None:
    root = write(tmp_path / "yolo", {f"{place}/a.png": "1 0.5 0.5 0.5 0.5\n"}, description)
    (root / "train.txt").write_text(f"./{place}/a.png\n\n")
    (root / "images" / "one").mkdir(parents=True, exist_ok=True)
    dataset, _ = convert(root)
    assert dataset[0].boxes.tolist() == [[15, 10, 45, 30]]


def test_labels_lie_under_the_last_folder_images() -> None:
    assert label_file(Path("/images/a/images/b/c.jpg")) == Path("/images/a/labels/b/c.txt")
    assert label_file(Path("/data/c.tar.jpg")) == Path("/data/c.tar.txt")


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    rows = {
        "background": None,
        "empty": "\n",
        "outline": "0 0.25 0.25 0.75 0.25 0.75 0.5\n",
        "beyond": "0 0.9 0.5 0.4 0.5\n0 1.5 0.5 0.2 0.2\n",
        "flat": "0 0.5 0.5 0 0.5\n0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n",
    }
    root = write(tmp_path / "yolo", {f"images/train/{name}.png": text for name, text in rows.items()})
    (root / "labels" / "train" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (root / "labels" / "train" / "classes.txt").write_text("cup\nball\n")
    dataset, remarks = convert(root)
    said = "\n".join(remarks)
    assert "1 image without a label file, taken as background" in said
    assert "1 label file without a row, taken as background" in said
    assert "1 label file without an image, passed over" in said
    assert "gone.txt" in said
    assert "1 outline instead of boxes" in said
    assert "1 row with a box reaching beyond the picture" in said
    assert "1 row with a box wholly outside the picture" in said
    assert "1 row with a box without width or height" in said
    assert "1 row standing in a file twice, taken once (the first is line 3 of " in said
    assert len(remarks) == 8
    by_name = {record.file_name: record.boxes.tolist() for record in dataset.records}
    assert by_name["background.png"] == by_name["empty.png"] == []
    assert by_name["outline.png"] == [[15, 10, 45, 20]]
    np.testing.assert_allclose(by_name["beyond.png"], [[42, 10, 60, 30]], atol=1e-5)
    assert len(by_name["flat.png"]) == 1


def test_images_that_share_labels_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    rows = "1 0.5 0.5 0.5 0.25\n"
    description = "path: /nowhere/x\ntrain: images\nnames: [cup, ball]\n"
    root = write(tmp_path / "yolo", {"images/x.jpg": rows, "images/x.png": rows}, description)
    dataset, remarks = convert(root)
    assert [len(dataset[i].boxes) for i in range(2)] == [1, 1]
    assert [remark.partition("(")[0] for remark in remarks] == [
        "1 image with the label file of another, whose objects it got as well ",
        "`path` in data.yaml is '/nowhere/x', which is not there: images are looked for beside data.yaml",
    ]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("2 0.5 0.5 0.1 0.1\n", r"line 1 of .*a\.txt' is of class 2, but .* names the classes 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1\n", "is of class -1"),
        ("0.5 0.5 0.5 0.1 0.1\n", r"is of class 0\.5"),
        ("cup 0.5 0.5 0.1 0.1\n", "expected a class and numbers"),
        ("0 nan 0.5 0.1 0.1\n", "expected a class and numbers"),
        ("0 0.5 0.5 0.1\n", "has 3 numbers after the class, expected 4"),
        ("0 0.5 0.5 0.1 0.1 0.9\n", "a confidence, they are a detector's results"),
        ("0 30 20 10 10\n", "has the number 30, expected from -2 to 2: YOLO's boxes are relative"),
        ("0 0.5 2.5 0.1 0.1\n", "has the number 2.5, expected from -2 to 2"),
        ("0 0.5 -2.5 0.1 0.1\n", "has the number -2.5, expected from -2 to 2"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, rows: str, problem: str) -> None:
    root = write(tmp_path / "yolo", {"images/train/a.png": rows})
    with pytest.raises(DataError, match=problem):
        convert(root)
    assert not (tmp_path / "coco").exists()


def test_paths_are_said_as_the_data_set_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    labels = {"images/train/a.png": "7 0.5 0.5 0.1 0.1\n", "images/train/b.png": None}
    write(tmp_path / "yolo", labels)
    with pytest.raises(DataError) as caught:
        convert(Path("../yolo"))
    wanted = "line 1 of '../yolo/labels/train/a.txt' is of class 7, but '../yolo/data.yaml' names"
    assert str(caught.value).startswith(wanted)
    with pytest.raises(DataError, match=f"line 1 of '{tmp_path}/yolo/labels/train/a.txt' is"):
        convert(tmp_path / "yolo")
    (tmp_path / "yolo" / "labels" / "train" / "a.txt").write_text("1 0.5 0.5 0.1 0.1\n")
    assert "(the first is '../yolo/images/train/b.png')" in convert(Path("../yolo"))[1][0]
    write(tmp_path / "other", {"images/train/a.png": "1 0.5 0.5 0.1 0.1\n"})
    with pytest.raises(
        OutputError, match=r"^there is a '../coco/s' already .* the images in '../other/images/"
    ):
        convert(Path("../other"))


def test_another_data_set_is_in_the_way(tmp_path: Path) -> None:
    """Whether the images make one link, or a folder of links."""
    for name, more in (("one", {}), ("two", {}), ("three", {"images/train/deep/b.png": None})):
        write(tmp_path / name, {"images/train/a.png": "0 0.5 0.5 0.1 0.1\n", **more})
    (tmp_path / "three" / "list.txt").write_text("images/train/a.png\n")
    (tmp_path / "three" / "data.yaml").write_text("train: list.txt\nnames: [cup, ball]\n")
    out = tmp_path / "coco"
    convert_yolo(tmp_path / "one", out, part="train", split="s")
    for other in ("two", "three"):
        with pytest.raises(OutputError, match=r"coco/s' already that does not lead to .*: remove it, or"):
            convert_yolo(tmp_path / other, out, part="train", split="s")


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("[1, 2", "is no YAML"),
        ("just text", "holds no keys"),
        ("train: images/train\n", "data.yaml' has no `names`: list there what the classes are called"),
        ("train: images/train\nnames: {1: cup, 2: ball}\n", "are not 0, 1, 2 and so on"),
        (
            "train: images/train\nnames: [cup, ball]\nnc: 3\n",
            r"gives 3 as the number of classes \(nc\), but",
        ),
        ("train: images/train\nnames: [cup, '']\n", "class 1 in .* has no name"),
        (
            "train: images/train\nnames: [cup, yes]\n",
            "class 1 in .* as True, which is no text: put it between",
        ),
        ("train: images/train\nnames: [null, ball]\n", "class 0 in .* as None, which is no text"),
        ("train: images/train\nnames: [cup, cup]\n", "two classes in .* are called 'cup'"),
        ("train: images\\\\train\nnames: [cup, ball]\n", r"; write / instead of \\ between folders$"),
        ("val: images/train\nnames: [cup, ball]\n", "no part 'train' in .*; it has val"),
        ("train: elsewhere\nnames: [cup, ball]\n", "elsewhere', which is `train` in .*, is not there"),
        ("train: {a: 1}\nnames: [cup, ball]\n", "expected a folder of images"),
        ("train: list.txt\nnames: [cup, ball]\n", "line 1 of .* names the image 'gone.jpg'"),
        ("path: [1]\ntrain: images\nnames: [cup, ball]\n", "expected the folder of the data set"),
        ("train: empty\nnames: [cup, ball]\n", "there are no images of 'train'"),
        ("train: images/bare\nnames: [cup, ball]\n", "has a label file"),
        ("train: images/train\nnames: [cup]\nkpt_shape: many\n", "`kpt_shape` in"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, description: str, problem: str) -> None:
    labels = {"images/train/a.png": "0 0.5 0.5 0.1 0.1\n", "images/bare/b.png": None}
    root = write(tmp_path / "yolo", labels, description)
    (root / "list.txt").write_text("gone.jpg\n")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=problem):
        convert(root)


def test_keypoints_are_passed_over(tmp_path: Path) -> None:
    rows = "0 0.5 0.5 0.5 0.5 0.4 0.4 2 0.6 0.6 2\n"
    root = write(tmp_path / "yolo", {"images/train/a.png": rows}, YAML + "kpt_shape: [2, 3]\n")
    dataset, _ = convert(root)
    assert dataset[0].boxes.tolist() == [[15, 10, 45, 30]]


def test_no_data_set_and_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no data set"):
        convert(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no data\.yaml"):
        convert(tmp_path)
    root = write(tmp_path / "yolo", {"images/train/a.png": ""})
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(BackendError, match=r"needs the package yaml.*asag-deploy\[yolo\]"):
        convert(root)


def test_there_and_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    objects = []
    for number in range(60):
        x, y = rng.uniform(0, 30, 2)
        w, h = rng.uniform(1, 8, 2)
        objects.append(box(1 + number % 3, [x, y, w, h], int(rng.choice([3, 7]))))
    objects.append(box(1, [-5, 30, 20, 30], 7))  # reaches beyond
    objects.append({**box(2, [0, 0, 30, 30], 3), "iscrowd": 1})
    write_coco(tmp_path / "coco", objects, split="val2017", shapes=((40, 60), (50, 50), (64, 37)))
    before = CocoDataset.open(tmp_path / "coco", "val2017")
    made = write_yolo(before, tmp_path / "yolo", split="val2017", part="val")
    assert any("1 crowd annotation left out" in remark for remark in made.remarks)
    assert yaml.safe_load(made.file.read_text()) == {"val": "images/val2017", "names": {0: "ball", 1: "cup"}}
    back = convert_yolo(tmp_path / "yolo", tmp_path / "again", part="val", split="val2017")
    assert back.remarks == ()
    after = CocoDataset.open(tmp_path / "again", "val2017")
    assert [c.name for c in after.categories] == [c.name for c in before.categories]
    for one, other in zip(before.records, after.records, strict=True):
        assert (one.file_name, one.height, one.width) == (other.file_name, other.height, other.width)
        assert one.labels.tolist() == other.labels.tolist()
        np.testing.assert_allclose(other.boxes, one.boxes, atol=1e-5)


def test_parts_are_put_together_and_strangers_stay(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", [box(1, [1, 2, 3, 4])], split=split)
    arguments = ["to-yolo", str(tmp_path / "coco"), "--output-dir", str(tmp_path / "yolo"), "--split"]
    assert [main([*arguments, split]) for split in ("train2017", "val2017", "val2017")] == [0, 0, 0]
    content = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())
    assert (content["train"], content["val"]) == ("images/train2017", "images/val2017")
    dataset = CocoDataset.open(tmp_path / "coco", "val2017")
    stranger = tmp_path / "other" / "data.yaml"
    stranger.parent.mkdir()
    stranger.write_text("names: [cup]\n")
    with pytest.raises(OutputError, match="was not written by this"):
        write_yolo(dataset, stranger.parent, split="val2017", part="val")
    assert stranger.read_text() == "names: [cup]\n"
    notes = tmp_path / "third" / "labels" / "val2017" / "1.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("by hand")
    with pytest.raises(OutputError, match="so it is not replaced"):
        write_yolo(dataset, tmp_path / "third", split="val2017", part="val")
    assert notes.read_text() == "by hand"


@pytest.mark.parametrize("upright", [True, False])
def test_photographs_with_an_orientation(tmp_path: Path, upright: bool) -> None:
    """Whichever way they were annotated, labels lie where the object is on the upright picture."""
    image = pytest.importorskip("PIL.Image", reason="Pillow writes orientations")
    images, annotations = [], []
    marked = np.zeros((40, 60), dtype=np.uint8)
    marked[4:12, 40:56] = 255
    (tmp_path / "coco" / "s").mkdir(parents=True)
    for orientation in range(1, 9):
        exif = image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "coco" / "s" / f"{orientation}.png"
        image.fromarray(marked).save(path, exif=exif)
        turned = upright and orientation >= 5
        images.append({"id": orientation, "file_name": path.name, "width": 60, "height": 40})
        stored = np.array([[40 / 60, 4 / 40, 56 / 60, 12 / 40]])
        x1, y1, x2, y2 = (upright_boxes(stored, orientation) if upright else stored)[0]
        if turned:
            images[-1] |= {"width": 40, "height": 60}
        w, h = images[-1]["width"], images[-1]["height"]
        annotations.append(
            {"id": orientation, "image_id": orientation, "category_id": 1, "iscrowd": 0}
            | {"bbox": [x1 * w, y1 * h, (x2 - x1) * w, (y2 - y1) * h]}
        )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "mark"}]}
    file = tmp_path / "coco" / "annotations" / "instances_s.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    dataset = CocoDataset.open(tmp_path / "coco", "s", orientation="upright" if upright else "stored")
    made = write_yolo(dataset, tmp_path / "yolo", split="s", part="train")
    assert any("7 photographs turned" in remark for remark in made.remarks) is not upright
    back = convert_yolo(tmp_path / "yolo", tmp_path / "again", part="train", split="s")
    assert "7 photographs with an orientation, taken upright" in back.remarks[0]
    again = CocoDataset.open(tmp_path / "again", "s", orientation="upright")
    for sample in (again[i] for i in range(len(again))):
        (x1, y1, x2, y2), pixels = sample.boxes[0].round().astype(int).tolist(), sample.image[..., 0] > 127
        assert pixels[y1:y2, x1:x2].all()
        assert pixels.sum() == 8 * 16


def test_images_that_cannot_have_labels_of_their_own(tmp_path: Path) -> None:
    def dataset(*names: str) -> CocoDataset:
        root: Path = tmp_path / str(len(list(tmp_path.iterdir())))
        images: list[dict[str, Any]] = []
        for number, name in enumerate(names, start=1):
            write_image(root / "s" / name, gradient(40, 60))
            images.append({"id": number, "file_name": name, "height": 40, "width": 60})
        content = {"images": images, "annotations": [box(1, [1, 2, 3, 4], 1) | {"id": 1}]}
        file = root / "annotations" / "instances_s.json"
        file.parent.mkdir()
        file.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cup"}]}))
        return CocoDataset.open(root, "s")

    with pytest.raises(DataError, match="would share a label"):
        write_yolo(dataset("a.png", "a.jpg"), tmp_path / "y", split="s", part="train")
    with pytest.raises(DataError, match="rename that folder"):
        write_yolo(dataset("images/a.png"), tmp_path / "y", split="s", part="train")
    write_yolo(dataset("one/a.png", "two/a.png"), tmp_path / "y", split="s", part="train")
    back = convert_yolo(tmp_path / "y", tmp_path / "c", part="train", split="s")
    assert len(CocoDataset.from_files(back.file, tmp_path / "c" / "s")) == 2


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "yolo", {"images/val/a.png": "1 0.5 0.5 0.5 0.5\n", "images/val/b.png": None})
    out = tmp_path / "coco"
    assert main(["yolo", str(root), "--output-dir", str(out), "--part", "val"]) == 0
    said = capsys.readouterr().out
    assert "instances_val2017.json: 2 images, 1 object, 1 empty image" in said
    assert "1 image without a label file" in said
    assert main(["check", str(out), "--split", "val2017"]) == 0
    assert main(["yolo", str(root), "--output-dir", str(out)]) == 2
    assert "images/train', which is `train`" in capsys.readouterr().err
    assert [part_of(name) for name in ("val2017", "Test", "mine")] == ["val", "test", "train"]


def test_one_that_is_not_converted_is_known(tmp_path: Path) -> None:
    root = write(tmp_path / "yolo", {"images/train/a.png": ""})
    with pytest.raises(DataError, match="is a data set in YOLO layout: convert it with `asag-data yolo"):
        CocoDataset.open(root)


def test_files_of_others_stay(tmp_path: Path) -> None:
    root = write(tmp_path / "yolo", {"images/train/a.png": "1 0.5 0.5 0.5 0.5\n"})
    file = tmp_path / "coco" / "annotations" / "instances_s.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(OutputError, match="was not written by this"):
        convert(root)
    assert file.read_text() == "{}"
