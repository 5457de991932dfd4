"""The page of what works together: its Python runs, and its commands and options are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from asag_evaluation.data.cli import main as asag_data
from support.coco_files import box, gradient, write_coco, write_image
from support.tiny_bundle import make_bundle

PAGE = (Path(__file__).parent.parent / "docs" / "fits.md").read_text(encoding="utf-8")


def below(heading: str) -> str:
    """What stands below a heading."""
    return PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def program(heading: str) -> str:
    """The Python below a heading."""
    (found,) = re.findall(r"```python\n(.*?)```", below(heading), re.DOTALL)
    return str(found)


def commands(heading: str) -> list[list[str]]:
    """The arguments of `asag-data` below a heading."""
    said = re.findall(r"^asag-data (.*?)(?:\s+#.*)?$", below(heading), re.MULTILINE)
    return [line.split() for line in said]


def test_what_an_example_imports_is_told_how_to_install() -> None:
    ours = {*sys.stdlib_module_names, "asag_deploy", "cv2", "numpy"}  # the base install brings these
    examples = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    seen = 0
    for heading, text in examples:
        code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        for module in {*re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)} - ours:
            seen += 1
            assert re.search(rf"pip install [^`\n]*{module}", text), (heading, module)
    assert seen == 2


@pytest.fixture
def _street(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the bundle and the picture that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    noise = np.random.default_rng(0).integers(0, 255, (48, 96, 3), dtype=np.uint8)
    cv2.imwrite("street.jpg", noise)


@pytest.mark.usefixtures("_street")
def test_supervision() -> None:
    pytest.importorskip("supervision", reason="supervision draws detections")
    names: dict[str, Any] = {}
    exec(program("supervision"), names)
    assert len(names["found"]) > 0
    assert (names["annotated"] != names["picture"]).any()


class Sample(dict[str, Any]):
    """Stands for FiftyOne's: fields by name."""

    def __init__(self, filepath: str) -> None:
        super().__init__(filepath=filepath)


class Label:
    """Stands for FiftyOne's Detection and Detections: holds what it is given by name."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)


@pytest.mark.usefixtures("_street")
def test_fiftyone(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("fiftyone")
    vars(stand_in).update(Sample=Sample, Detection=Label, Detections=Label)
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    names: dict[str, Any] = {}
    exec(program("FiftyOne"), names)
    (sample,) = names["samples"]
    found = vars(sample["asag"])["detections"]
    assert sample["exit_level"] in ("P5", "P4", "P3")
    assert found
    for one in map(vars, found):
        x, y, w, h = one["bounding_box"]
        assert -1e-6 <= x <= x + w <= 1 + 1e-6
        assert -1e-6 <= y <= y + h <= 1 + 1e-6
        assert isinstance(one["confidence"], float)
        assert isinstance(one["label"], str)


def test_commands_of_yolo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, from what its last one writes."""
    pytest.importorskip("yaml", reason="PyYAML reads data.yaml")
    monkeypatch.chdir(tmp_path)
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "start", [box(1, [1, 2, 3, 4])], split=split)
        assert asag_data(["to-yolo", "start", "--output-dir", "street", "--split", split]) == 0
    said = commands("Data sets in YOLO layout")
    assert len(said) == 4
    for arguments in said:
        assert asag_data(arguments) == 0, arguments


def test_commands_of_voc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    xml = "<object><name>bus</name><bndbox>{}</bndbox></object>".format(
        "".join(
            f"<{tag}>{value}</{tag}>" for tag, value in (("xmin", 1), ("ymin", 1), ("xmax", 9), ("ymax", 9))
        )
    )
    for folder, part in (("VOCdevkit/VOC2007", "train"), ("street", "val")):
        for place, name, text in (("ImageSets/Main", f"{part}.txt", "a"), ("Annotations", "a.xml", xml)):
            file = tmp_path / folder / place / name
            file.parent.mkdir(parents=True)
            file.write_text(text if text == "a" else f"<annotation>{text}</annotation>")
        write_image(tmp_path / folder / "JPEGImages" / "a.jpg", gradient(40, 60))
    for folder in ("robo/train", "robo/valid"):
        write_image(tmp_path / folder / "a.jpg", gradient(40, 60))
        (tmp_path / folder / "a.xml").write_text(f"<annotation>{xml}</annotation>")
    said = commands("Data sets in Pascal VOC's layout")
    assert len(said) == 4
    for arguments in said:
        assert asag_data(arguments) == 0, arguments
