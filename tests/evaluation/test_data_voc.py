"""Pascal VOC's layout becomes COCO's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest

from asag_deploy.errors import DataError, OutputError
from asag_evaluation.data import voc
from asag_evaluation.data.cli import main
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.data.voc import convert_voc
from asag_evaluation.data.yolo_writing import write_yolo
from support.coco_files import gradient, write_image

SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"


def thing(name: str, *corners: object, more: str = "") -> str:
    """An object, with the corners of its box."""
    tags = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, corners, strict=False))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def xml(*objects: str, size: str = SIZE) -> str:
    return f"<annotation><filename>else.jpg</filename>{size}{''.join(objects)}</annotation>"


BALL = xml(thing("ball", 1, 2, 21, 32))


def write(
    root: Path, files: Mapping[str, str | None], lists: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """A data set whose images of 40 x 60 pixels have these XML files (None: none), and these lists."""
    for name, content in files.items():
        write_image(root / "JPEGImages" / f"{name}.png", gradient(40, 60))
        (root / "Annotations").mkdir(exist_ok=True)
        if content is not None:
            (root / "Annotations" / f"{name}.xml").write_text(content)
    for name, lines in (lists or {}).items():
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    return root


def convert(root: Path, **options: object) -> tuple[CocoDataset, tuple[str, ...]]:
    """The data set that a conversion gives, and its remarks."""
    made = convert_voc(root, root.parent / "coco", split="s", **options)  # type: ignore[arg-type]
    return CocoDataset.open(root.parent / "coco", "s"), made.remarks


def test_boxes_classes_and_lists(tmp_path: Path) -> None:
    files = {
        "a": xml(thing("cup", 0, 0, 60, 40), thing("ball", "1.5", 2, 21, 32)),
        "b": BALL,
        "c": xml(thing("arm", 5, 5, 9, 9)),
    }
    root = write(tmp_path / "voc", files, {"train": ["b", "a.png", ""], "val": ["c"]})
    dataset, remarks = convert(root)
    assert [record.file_name for record in dataset.records] == ["b.png", "a.png"]
    assert [(c.id, c.name) for c in dataset.categories] == [(1, "arm"), (2, "ball"), (3, "cup")]
    assert dataset[0].boxes.tolist() == [[1, 2, 21, 32]]
    assert dataset[1].boxes.tolist() == [[0, 0, 60, 40], [1.5, 2, 21, 32]]
    assert dataset[1].labels.tolist() == [2, 1]
    assert remarks == ()
    dataset, _ = convert(root, part="val", classes=["cup", "ball", "arm"])
    assert [c.name for c in dataset.categories] == ["cup", "ball", "arm"]
    assert dataset[0].labels.tolist() == [2]


def test_a_size_that_is_not_the_images_is_said(tmp_path: Path) -> None:
    other = xml(thing("ball", 1, 2, 21, 32), size="<size><width>61</width><height>40</height></size>")
    turned = xml(thing("ball", 1, 2, 21, 32), size="<size><width>40</width><height>60</height></size>")
    _, remarks = convert(write(tmp_path / "voc", {"a": BALL, "b": other, "c": turned}))
    (said,) = remarks
    assert said.startswith("2 images of another size than the XML says, which is taken: ")
    assert said.endswith("b.png')")


@pytest.mark.parametrize("classes", [None, ["ball"]])
def test_every_xml_file_is_read_once(
    classes: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    whole = voc._root

    def counting(xml: Path) -> Element:
        read.append(xml)
        return whole(xml)

    monkeypatch.setattr(voc, "_root", counting)
    convert(write(tmp_path / "voc", {"a": BALL, "b": BALL}), classes=classes)
    assert sorted(xml.name for xml in read) == ["a.xml", "b.xml"]


def test_pixels_counted_from_one(tmp_path: Path) -> None:
    root = write(tmp_path / "voc", {"a": xml(thing("cup", 1, 1, 60, 40))})
    assert convert(root)[0][0].boxes.tolist() == [[1, 1, 60, 40]]
    assert convert(root, count_from_one=True)[0][0].boxes.tolist() == [[0, 0, 60, 40]]
    write(root, {"a": xml(thing("cup", 3, 0, 60, 40))})
    with pytest.raises(DataError, match=r"object 1 in .*a\.xml' begins at 0, so pixels are counted from 0"):
        convert(root, count_from_one=True)


def test_xml_beside_the_images_and_no_lists(tmp_path: Path) -> None:
    root = tmp_path / "voc"
    for name in ("b.one", "a"):
        write_image(root / f"{name}.png", gradient(40, 60))
    (root / "b.one.xml").write_text(xml(thing("ball", 1, 2, 21, 32), size="<size><width>0</width></size>"))
    (root / "gone.xml").write_text(BALL)
    dataset, remarks = convert(root)
    assert [record.file_name for record in dataset.records] == ["a.png", "b.one.png"]
    assert (dataset.records[1].height, dataset.records[1].width) == (40, 60)
    assert [len(dataset[i].boxes) for i in range(2)] == [0, 1]
    assert [remark.partition(" (")[0] for remark in remarks] == [
        "1 image without an XML file, taken as background",
        "1 XML file without an image, passed over",
    ]
    with pytest.raises(DataError, match=r"has no lists in .*: leave --part train out"):
        convert(root, part="train")


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>7</xmin></bndbox></part>"
    content = xml(
        thing("ball", 1, 2, 21, 32, more=part),
        thing("ball", 1, 2, 21, 32),
        thing("ball", 9, 9, 9, 20),
        thing("ball", 5, 5, 25, 25, more="<difficult>1</difficult>"),
        thing("ball", -4, 5, 80, 25),
    )
    dataset, remarks = convert(write(tmp_path / "voc", {"a": content}, {"train": ["a", "a"]}))
    assert [remark.partition(" (")[0] for remark in remarks] == [
        "1 object with a box without width or height, left out",
        "1 object standing in a file twice, taken once",
        "1 object marked as difficult, taken as crowds, which are not learned from",
        "1 line naming an image again, passed over",
    ]
    assert dataset[0].boxes.tolist() == [[1, 2, 21, 32], [0, 5, 60, 25]]
    assert (dataset.counts.crowd, dataset.counts.clipped) == (1, 1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("<annotation><object>", r"a\.xml' is no XML \(.*\): export it again"),
        ('<?xml version="1.0" encoding="no"?><annotation/>', "is no XML"),
        ("<annotations/>", "is no XML of Pascal VOC: it begins with 'annotations'"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "declares a document type"),
        (xml(thing(" ", 1, 2, 3, 4)), "object 1 in .* has no name"),
        (
            xml(thing("cup", 1, 2, 3, 4), "<object><name>cup</name></object>"),
            "object 2 .* has no bndbox, only",
        ),
        (xml("<object><name>cup</name><robndbox/></object>"), "only 'name, robndbox': export boxes that are"),
        (xml(thing("cup", 1, 2, 3)), "has None for ymax, expected pixels"),
        (xml(thing("cup", 1, 2, "nan", 4)), "has 'nan' for xmax, expected pixels"),
    ],
)
def test_xml_that_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    root = write(tmp_path / "voc", {"a": content})
    with pytest.raises(DataError, match=problem):
        convert(root)
    assert not (tmp_path / "coco").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"part": "test"}, r"there is no list '.*test\.txt'; its lists are train, val, all, empty"),
        ({"part": "val"}, "line 2 of .* names the image 'gone', which is not in"),
        ({"part": "all"}, "line 1 of .*; a list with -1, 0 or 1 behind the names is of one class"),
        ({"part": "empty"}, "lists no images"),
        ({"classes": ["cup"]}, "has an object 'ball', which is none of --classes: add it"),
        ({"classes": ["cup", "cup"]}, "'cup' is named twice"),
        ({"classes": ["cup", " "]}, "has no letters"),
    ],
)
def test_lists_and_classes_that_are_refused(
    tmp_path: Path, options: Mapping[str, object], problem: str
) -> None:
    lists = {"train": ["a"], "val": ["a", "gone"], "all": ["a  -1"], "empty": [" "]}
    root = write(tmp_path / "voc", {"a": BALL}, lists)
    with pytest.raises(DataError, match=problem):
        convert(root, **options)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set"):
        convert(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no XML files, .*: check the path"):
        convert(tmp_path)
    root = write(tmp_path / "repository" / "voc", {"a": None})
    (root / "Annotations" / "b.xml").write_text(BALL)
    with pytest.raises(DataError, match=r"has no XML files, .*; give '.*repository/voc', which has some"):
        convert(tmp_path / "repository")
    with pytest.raises(DataError, match=r"none of the 1 image has an XML file \(looked for .*a\.xml'\)"):
        convert(root)
    with pytest.raises(DataError, match="in Pascal VOC's layout: convert it with `asag-data voc"):
        CocoDataset.open(root)
    write_image(root / "JPEGImages" / "a.jpg", gradient(40, 60))
    (root / "Annotations" / "a.xml").write_text(BALL)
    with pytest.raises(DataError, match=r"a\.jpg' and 'a\.png' would share the file 'a\.xml'"):
        convert(root)
    (root / "JPEGImages" / "a.jpg").unlink()
    (root / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DataError, match="there are no images in"):
        convert(root)
    (root / "Annotations" / "b.xml").unlink()
    write(root, {"a": xml()})
    with pytest.raises(DataError, match="has an object: name the classes with --classes"):
        convert(root)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a": BALL, "b": xml(thing("cup", 9, 9, 9, 9), thing("cup", 0, 0, 5, 5))}
    root = write(tmp_path / "voc", files, {"train": ["a"], "val": ["b"]})
    arguments = ["voc", str(root), "--output-dir", str(tmp_path / "coco"), "--classes", "cup", "ball"]
    assert [main(arguments), main([*arguments, "--part", "val"])] == [0, 0]
    said = capsys.readouterr().out
    assert "instances_train2017.json: 1 image, 1 object\n" in said
    assert "instances_val2017.json: 1 image, 1 object\n1 object with a box without width or height" in said
    assert [c.name for c in CocoDataset.open(tmp_path / "coco", "val2017").categories] == ["cup", "ball"]
    assert main(["check", str(tmp_path / "coco")]) == 0
    stranger = tmp_path / "coco" / "annotations" / "instances_mine.json"
    stranger.write_text("{}")
    with pytest.raises(OutputError, match="that was not written by this"):
        convert_voc(root, tmp_path / "coco", split="mine")
    assert stranger.read_text() == "{}"


def test_parts_do_not_see_each_others_images(tmp_path: Path) -> None:
    root = write(
        tmp_path / "voc", {"a": BALL, "b": BALL, "c": BALL}, {"train": ["a"], "all": ["a", "b", "c"]}
    )
    assert convert(root, part="all")[0].path(0).parent.is_symlink()  # all that there are: one link will do
    dataset, _ = convert(root)
    assert sorted(path.name for path in dataset.image_dir.iterdir()) == [".asag-data", "a.png"]
    assert (root / "JPEGImages" / "b.png").is_file()
    dataset, _ = convert(root, part="all")  # again, over what was made before
    assert len(dataset) == 3
    dataset[2]
    (dataset.image_dir / "mine.png").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"mine\.png' is no link that was made here"):
        convert(root)
    assert (dataset.image_dir / "mine.png").read_bytes() == b"x"


def test_yolo_gets_the_listed_images_alone(tmp_path: Path) -> None:
    write(tmp_path / "voc", {"a": BALL, "b": BALL}, {"train": ["a"]})
    made = convert_voc(tmp_path / "voc", tmp_path / "coco", split="s")
    dataset = CocoDataset.from_files(made.file, tmp_path / "voc" / "JPEGImages")  # which holds more
    write_yolo(dataset, tmp_path / "yolo", split="s", part="train")
    names = sorted(path.name for path in (tmp_path / "yolo" / "images" / "s").glob("*.*"))
    assert names == [".asag-data", "a.png"]


def test_a_document_type_in_any_encoding(tmp_path: Path) -> None:
    root = write(tmp_path / "voc", {"a": BALL})
    text = f"<?xml version='1.0' encoding='utf-16'?><!DOCTYPE a [<!ENTITY b 'c'>]>{BALL}"
    (root / "Annotations" / "a.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match="declares a document type"):
        convert(root)


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("IMG_1.png", "img_1.xml"),
        ("a.png", "a.XML"),
        ("a.png", "a.png.xml"),
        ("caf\u00e9.png", "cafe\u0301.xml"),
    ],
)
def test_xml_of_a_name_that_is_meant(tmp_path: Path, image: str, file: str) -> None:
    write_image(tmp_path / "voc" / "images" / image, gradient(40, 60))
    (tmp_path / "voc" / "annotations").mkdir()
    (tmp_path / "voc" / "annotations" / file).write_text(BALL)
    dataset, remarks = convert(tmp_path / "voc")
    assert (dataset.records[0].file_name, len(dataset[0].boxes), remarks) == (image, 1, ())


def test_exact_names_go_before_those_alike(tmp_path: Path) -> None:
    root = write(tmp_path / "voc", {"a": BALL, "A": xml(thing("cup", 1, 2, 3, 4), thing("cup", 5, 6, 7, 8))})
    dataset, _ = convert(root)
    assert [(record.file_name, len(record.boxes)) for record in dataset.records] == [
        ("A.png", 2),
        ("a.png", 1),
    ]
    (root / "Annotations" / "a.png.xml").write_text(BALL)
    with pytest.raises(DataError, match=r"a\.png\.xml' and 'a\.xml' may both be of .*a\.png': remove one"):
        convert(root)


def test_lists_with_folders_and_beside_main(tmp_path: Path) -> None:
    root = write(tmp_path / "voc", {"a": BALL, "b": BALL}, {"train": ["data/images/b.PNG"]})
    (root / "ImageSets" / "Main" / "train.txt").rename(root / "ImageSets" / "train.txt")
    (root / "Annotations" / "gone.xml").write_text(BALL)
    dataset, remarks = convert(root)
    assert [record.file_name for record in dataset.records] == ["b.png"]
    assert [remark.partition(" (")[0] for remark in remarks] == ["1 XML file without an image, passed over"]


def test_what_does_not_stop_a_conversion_is_said(tmp_path: Path) -> None:
    odd = xml(thing("Cup", 20, 30, 10, 5), thing("cup", 1, 2, 3, 4, more="<difficult>very</difficult>"))
    root = write(tmp_path / "voc", {"a": odd, "b": "<annotation>"}, {"train": ["a"]})
    dataset, remarks = convert(root)
    assert dataset[0].boxes.tolist() == [[10, 5, 20, 30], [1, 2, 3, 4]]
    assert [remark.partition(" (")[0].partition(":")[0] for remark in remarks] == [
        "1 object with a box that ends before it begins, whose corners were exchanged",
        "1 object with something else than 0 or 1 for difficult, taken as not difficult",
        "1 XML file of other images not to be read, passed over",
        "2 class names differing from another in capitals alone, taken as another class",
    ]
    write_image(root / "JPEGImages" / "more" / "c.png", gradient(40, 60))
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    (root / "Annotations" / "b.xml").unlink()
    assert any("1 folder beside the images, passed over" in remark for remark in convert(root)[1])


def test_the_folder_that_is_meant_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "voc", {"a": BALL})
    (root / "images").mkdir()  # empty, beside JPEGImages
    assert len(convert(root)[0]) == 1
    with pytest.raises(DataError, match=r"there are no images in .*; give '.*/voc', the folder above"):
        convert(root / "Annotations")
    for name in ("train", "valid"):
        write_image(tmp_path / "robo" / name / "a.png", gradient(40, 60))
        (tmp_path / "robo" / name / "a.xml").write_text(BALL)
    (tmp_path / "robo" / "empty" / "Annotations").mkdir(parents=True)
    with pytest.raises(DataError, match=r"; '.*/train', '.*/valid' have some: convert each, with a --split"):
        convert(tmp_path / "robo")


def test_names_of_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "voc", {"a": BALL}, {"val": ["a"]})
    arguments = ["voc", str(root), "--output-dir", str(tmp_path / "coco")]
    for name in ("", "..", "a/b"):
        assert main([*arguments, "--part", "val", "--split", name]) == 2
        assert "is no name of a part" in capsys.readouterr().err
    assert main([*arguments, "--part", "val.txt"]) == 0
    assert (tmp_path / "coco" / "annotations" / "instances_val2017.json").is_file()


def test_parts_of_other_classes_are_told_how_to_agree(tmp_path: Path) -> None:
    both = xml(thing("ball", 1, 2, 21, 32), thing("cup", 1, 2, 21, 32))
    for name, content in (("train", BALL), ("val", both)):
        write(tmp_path / name, {"a": content})
        convert_voc(tmp_path / name, tmp_path / "coco", split=name)
    known = CocoDataset.open(tmp_path / "coco", "train").categories
    with pytest.raises(DataError, match="asag-data voc --classes` gives all parts the same"):
        CocoDataset.open(tmp_path / "coco", "val", categories=known)


def test_an_interruption_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("asag_evaluation.data.cli.convert_voc", interrupted)
    assert main(["voc", str(tmp_path), "--output-dir", str(tmp_path / "coco")]) == 130
    assert "asag-data: interrupted\n" in capsys.readouterr().err
