"""Ids of COCO results: an annotation file's, or numbers that are told of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.bundle.manifest import Category
from asag_deploy.detect.coco_ids import annotated_ids, made_ids
from asag_deploy.errors import ConfigError
from asag_deploy.images.sources import Source

CATEGORIES = (Category(id=0, name="car"), Category(id=1, name="traffic light"))


def image_source(name: str | Path) -> Source:
    return Source(name=str(name), kind="image")


def annotation_file(folder: Path, images: Any, categories: Any = None) -> Path:
    """An annotation file of these pairs of names and ids."""
    content: dict[str, Any] = {"images": [{"file_name": name, "id": number} for name, number in images]}
    if categories is not None:
        content["categories"] = [{"name": name, "id": number} for name, number in categories]
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def ids_of(folder: Path, images: Any, names: Sequence[str | Path]) -> list[int | str | None]:
    sources = [image_source(name) for name in names]
    ids = annotated_ids(annotation_file(folder, images), sources, CATEGORIES)
    return [ids.image(source, number) for number, source in enumerate(sources)]


def test_numbers_of_file_names_if_all_have_one() -> None:
    numbered = [image_source("a/000000000139.jpg"), image_source("a/000000000285.jpg")]
    ids = made_ids(numbered)
    assert [ids.image(source, 7) for source in numbered] == [139, 285]
    assert "numbers that the file names are" in ids.said[0]
    for others in (
        image_source("a/street.jpg"),
        image_source("b/139.png"),
        Source(name="1.gif", kind="animation"),
    ):
        ids = made_ids([*numbered, others])
        assert [ids.image(source, number) for number, source in enumerate(numbered)] == [1, 2]
        assert len(ids.said) == 1
        assert "count the images from 1" in ids.said[0]
        assert "--coco-annotations" in ids.said[0]


@pytest.mark.parametrize(
    ("listed", "given"),
    [
        ("frame10.jpg", "in/frame10.jpg"),
        ("val/a.jpg", "/data/val/a.jpg"),
        ("val\\a.jpg", "data/val/a.jpg"),
        ("./a.jpg", "a.jpg"),
        ("/elsewhere/val2017/a.jpg", "here/a.jpg"),
        ("val2017/a.jpg", "a.jpg"),
        ("caf\u00e9.jpg", "in/cafe\u0301.jpg"),
        ("IMG_1.JPG", "in/img_1.jpg"),
        ("https://host/val/a%20b.jpg?size=2", "in/a b.jpg"),
    ],
)
def test_by_file_name(tmp_path: Path, listed: str, given: str) -> None:
    assert ids_of(tmp_path, [(listed, 42), ("other.jpg", 1)], [given]) == [42]


def test_by_address_where_there_is_no_file_name(tmp_path: Path) -> None:
    """As LVIS has it."""
    file = tmp_path / "lvis.json"
    file.write_text(json.dumps({"images": [{"coco_url": "http://host/val2017/a.jpg", "id": 42}]}))
    source = image_source("a.jpg")
    assert annotated_ids(file, [source], CATEGORIES).image(source, 0) == 42


def test_ids_as_the_file_writes_them(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    assert ids_of(tmp_path, [("c.jpg", 3.0), ("b.jpg", "x"), ("a.jpg", 900)], names) == [900, "x", 3]


def test_folders_tell_images_of_one_name_apart(tmp_path: Path) -> None:
    images = [("day/a.jpg", 1), ("night/a.jpg", 2)]
    assert ids_of(tmp_path, images, ["x/night/a.jpg", "x/day/a.jpg"]) == [2, 1]
    with pytest.raises(ConfigError, match=r"'x/a\.jpg' could be any of 2 images"):
        ids_of(tmp_path, images, ["x/a.jpg"])
    with pytest.raises(ConfigError, match="would both be image 1"):
        ids_of(tmp_path, images, ["x/day/a.jpg", "y/day/a.jpg"])
    with pytest.raises(ConfigError, match="could be any of 2"):
        ids_of(tmp_path, [("a.jpg", 1), ("a.jpg", 2)], ["a.jpg"])


def test_what_is_not_listed_is_told(tmp_path: Path) -> None:
    file = annotation_file(tmp_path, [("a.jpg", 5)])
    sources = [image_source("b.jpg"), image_source("a.jpg"), Source(name="a.mp4", kind="video")]
    ids = annotated_ids(file, sources, CATEGORIES)
    assert [ids.image(source, number) for number, source in enumerate(sources)] == [None, 5, None]
    assert ids.incomplete
    assert "2 of 3 sources are not listed" in ids.said[0]
    assert "'b.jpg'" in ids.said[0]
    with pytest.raises(ConfigError, match="lists none of the 1 sources"):
        annotated_ids(file, sources[:1], CATEGORIES)


def test_categories_by_name(tmp_path: Path) -> None:
    source = image_source("a.jpg")
    file = annotation_file(tmp_path, [("a.jpg", 5)], [("Traffic  Light", 10), ("car", 3), ("cow", 21)])
    ids = annotated_ids(file, [source], CATEGORIES)
    assert ids.categories == {0: 3, 1: 10}
    assert ids.said == ()
    alike = [
        ("car", 0.0),
        ("Car", 9),
        ("traffic light", "7"),
    ]  # as the bundle's are, whose ids tell them apart
    ids = annotated_ids(annotation_file(tmp_path, [("a.jpg", 5)], alike), [source], CATEGORIES)
    assert ids.categories == {0: 0, 1: "7"}
    ids = annotated_ids(annotation_file(tmp_path, [("a.jpg", 5)], [("car", 3)]), [source], CATEGORIES)
    assert ids.categories == {0: 3}
    assert "1 of the bundle's 2 classes are not in" in ids.said[0]
    file = annotation_file(tmp_path, [("a.jpg", 5)], [("car", 0), ("car", 9)])  # the first is a heading
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": [{"category_id": 9}, None]}))
    assert annotated_ids(file, [source], CATEGORIES).categories == {0: 9}
    for categories, sentence in (
        ([("cow", 1)], "knows none of the bundle's 2 classes"),
        ([("car", 1), ("Car", 2)], "two categories are called"),
        ([("car", None)], r"categories\[0\] has no 'name' and 'id'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            annotated_ids(annotation_file(tmp_path, [("a.jpg", 5)], categories), [source], CATEGORIES)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "does not hold JSON"),
        (b"\xff\xfe\x00", "does not hold JSON"),
        (b"[" * 100_000, "does not hold JSON"),
        (b"[]", "has no list 'images'"),
        (b'{"images": 3}', "has no list 'images'"),
        (b'{"images": [1]}', r"images\[0\] has no 'file_name'"),
        (b'{"images": [{"file_name": "a.jpg"}]}', "has no 'id' that is a number"),
        (b'{"images": [{"file_name": "a.jpg", "id": true}]}', "has no 'id' that is a number"),
    ],
)
def test_what_is_no_annotation_file(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        annotated_ids(file, [image_source("a.jpg")], CATEGORIES)
    with pytest.raises(ConfigError, match="cannot be read"):
        annotated_ids(tmp_path / "gone.json", [image_source("a.jpg")], CATEGORIES)
