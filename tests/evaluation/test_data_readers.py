"""The quick reader of annotation files and the careful one: what the first one takes, both read alike."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asag_deploy.errors import DataError
from asag_evaluation.data import quick_reader
from asag_evaluation.data.annotation_file import content_of
from asag_evaluation.data.annotations import AnnotationReader
from asag_evaluation.data.image_files import ImageFiles
from asag_evaluation.data.quick_reader import read_quickly
from asag_evaluation.data.records import FlatAnnotations
from asag_evaluation.data.shared_bytes import SharedBytes
from support.coco_files import box, gradient, write_image

IMAGES = [{"id": i, "file_name": f"{i}.png", "height": 40 + i, "width": 60} for i in (1, 2, 5)]
CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 3, "name": "ball"}]

ODD = st.sampled_from(
    [None, "1", "7", 1.0, 3.0, "3", True, [], {}, "x", -5, 1e13, float("nan"), float("inf"), 2**63, 2**70, "",
     [1, 2], 0.5, [{"b": 1}, {"c": 2}], {"rotation": 90}, {"rotation": 180.0}, -(2**63), "\ud800"]
)  # fmt: skip
SIDES = st.sampled_from([0, 0.25, 1, 5, 30.5, 70, -8, -0.0])
USUAL: dict[str, st.SearchStrategy[Any]] = {
    "image_id": st.sampled_from([1, 2, 5, 9]),
    "category_id": st.sampled_from([3, 7, 8, 0]),
    "bbox": st.lists(SIDES, min_size=4, max_size=4),
}
MORE: dict[str, st.SearchStrategy[Any]] = {
    "id": st.integers(0, 400),
    "area": st.sampled_from([0, -1, 5, 12.5, 999.25, None]),
    "iscrowd": st.sampled_from([0, 1, False, None]),
    "ignore": st.sampled_from([0, 1]),
    "segmentation": st.sampled_from([[[0, 0, 5, 0, 5, 5]], [], {"counts": [0, 20], "size": [41, 60]}, None]),
    "attributes": st.sampled_from([{"occluded": False}, {"rotation": 0.0}]),
}
RECORDS = st.fixed_dictionaries(USUAL, optional=MORE)
ODD_NAMES = [*USUAL, *MORE, "isCrowd", "bbox_mode", "rotation", "extra"]
ODD_RECORDS = st.tuples(RECORDS, st.sampled_from(ODD_NAMES), ODD).map(lambda odd: {**odd[0], odd[1]: odd[2]})
LISTS = st.lists(RECORDS, max_size=8) | st.lists(RECORDS | ODD_RECORDS, max_size=4)
IMAGE_RECORDS = st.fixed_dictionaries(
    {
        "id": st.sampled_from([1, 2, 5]),
        "file_name": st.sampled_from(["1.png", "2.png", "3.png", "./1.png", "sub/4.png", "none.png", " "]),
        "height": st.integers(0, 60),
        "width": st.integers(1, 60),
    },
    optional={"kind": st.sampled_from(["tiny", "large", 5, None]), "path": st.just("2.png")},
)
ODD_IMAGES = st.tuples(IMAGE_RECORDS, st.sampled_from(["id", "file_name", "height", "width"]), ODD).map(
    lambda odd: {**odd[0], odd[1]: odd[2]}
)
IMAGE_LISTS = st.just(IMAGES) | st.lists(IMAGE_RECORDS, max_size=3) | st.lists(ODD_IMAGES, max_size=2)
HEADED = [{"id": 0, "name": "all"}, {"id": 3, "name": "b", "supercategory": "all"}]
CLASSES = st.sampled_from([CATEGORIES, [*CATEGORIES, {"id": 0, "name": "all"}], HEADED])
OUTLINE = [[5, 6, 15, 6, 5, 26]]


@pytest.fixture(params=["with msgspec", "without"])
def _readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.setattr(quick_reader, "_typed", dict)
    else:
        pytest.importorskip("msgspec")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("1.png", "2.png", "3.png", "sub/4.png"):
        write_image(folder / name, gradient(41, 60))
    return folder


def written(**changes: Any) -> str:
    return json.dumps({"images": IMAGES, "annotations": [], "categories": CATEGORIES, **changes})


def quick(text: str, folder: Path) -> FlatAnnotations | None:
    digest = hashlib.sha256()
    data = text.encode("utf-8", "surrogatepass")
    found = read_quickly(io.BytesIO(data), Path("a.json"), ImageFiles(folder), digest, as_stored=False)
    if found is None:
        return None
    assert digest.digest() == hashlib.sha256(data).digest()  # so that it is kept for what was read
    return FlatAnnotations(SharedBytes.in_memory(found.packed()))


def careful(text: str, folder: Path) -> FlatAnnotations:
    path = Path("a.json")
    content = content_of(text.encode("utf-8", "surrogatepass"), path)
    return FlatAnnotations(
        SharedBytes.in_memory(AnnotationReader(path, content, ImageFiles(folder), False).found().packed())
    )


def everything(flat: FlatAnnotations) -> dict[str, Any]:
    """Return all that a file was found to hold, to be compared."""
    arrays = (flat.image_ids, flat.sides, flat.kind_of, flat.objects_per_image, flat.ends, flat.boxes)
    return {
        "said": (flat.categories, flat.counts, flat.doubts, flat.kinds),
        "names": [flat.file_name(i) for i in range(len(flat))],
        "arrays": [(array.dtype.str, array.tolist()) for array in (*arrays, *flat.objects)],
    }


@pytest.mark.usefixtures("_readers")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    IMAGE_LISTS, LISTS, CLASSES, st.sampled_from([None, 1]), st.integers(20, 400), st.permutations(range(4))
)
def test_what_the_quick_reader_takes_is_what_the_careful_one_reads(
    pictures: Path,
    images: list[Any],
    annotations: list[Any],
    classes: list[Any],
    indent: int | None,
    block: int,
    order: list[int],
) -> None:
    members = [
        ("images", images),
        ("annotations", annotations),
        ("categories", classes),
        ("info", {"a": [{}, {}]}),
    ]
    text = json.dumps(dict(members[i] for i in order), indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick_reader, "_BLOCK", block)
        found = quick(text, pictures)
    if found is not None:
        assert everything(found) == everything(careful(text, pictures))


@pytest.mark.usefixtures("_readers")
@pytest.mark.parametrize(
    "annotations",
    [
        [],
        [box(1, [5, 6, 10, 20], id=4, area=7.5, iscrowd=0), box(2, [-5, 0.5, 100, 20], 7, id=5, iscrowd=1)],
        [box(9, [5, 6, 10, 20]), box(1, [5, 6, 10, 20], 99), box(1, [5, 6, 0, 20]), box(1, [0, 0, 0, 0])],
        [box(1, [5, 6, 10, 20], segmentation=OUTLINE, ignore=1, attributes={"a": 1})],
        [box(1, [5, 6, 10, 20]), box(1, [5, 6, 10, 20])],
    ],
)  # fmt: skip
def test_usual_files_are_read_quickly(annotations: list[Any], tmp_path: Path) -> None:
    text = written(annotations=annotations)
    found = quick(text, tmp_path)
    assert found is not None
    assert everything(found) == everything(careful(text, tmp_path))


@pytest.mark.usefixtures("_readers")
@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": [{**box(1, [5, 6, 10, 20]), "image_id": "1"}]},
        {"annotations": [box(1, [5, 6, 10, 20], id=1), box(1, [5, 6, 10, 20], id=1)]},
        {"annotations": [box(1, [5, 6, 10, "20"])]},
        {"annotations": [box(1, [5, 6, 10, 20], isCrowd=1)]},
        {"annotations": [box(1, [5, 6, 10, 20], bbox_mode=0)]},
        {"annotations": [box(1, [5, 6, 10, 20], rotation=30)]},
        {"annotations": [box(1, [0, 0, 0, 0], segmentation=OUTLINE)]},
        {"annotations": [{"image_id": 1, "category_id": 3, "segmentation": OUTLINE}]},
        {"annotations": [{**box(1, [5, 6, 10, 20]), "category_id": "ball"}]},
        {"annotations": [box(1, [5, 6, 10, 20], iscrowd="0")]},
        {"images": [*IMAGES, IMAGES[0]]},
    ],
)
def test_what_is_written_otherwise_is_left_to_the_careful_reader(changes: Any, tmp_path: Path) -> None:
    text = written(**changes)
    assert quick(text, tmp_path) is None
    careful(text, tmp_path)  # which takes all of these


@pytest.mark.usefixtures("_readers")
@pytest.mark.parametrize(
    "text",
    [
        '{"images": [], "annotations": [], "categories": []}',
        '{"annotations": [], "images": [], "images": []}',
        written(annotations={}),
        written(annotations=[5]),
        written(annotations=[box(1, [1, 2, 3, float("nan")])]),
        written(annotations=[box(1, [1, 2, 3, 10**400])]),
        written(annotations=[box(1, [1, 2, 3])]),
        written(images=[*IMAGES, {**IMAGES[0], "id": 77}]),
        written()[:-1],
        '{"a": ' + "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_damaged_is_left_to_the_careful_reader(text: str, tmp_path: Path) -> None:
    assert quick(text, tmp_path) is None
    with pytest.raises(DataError, match=r"a\.json"):
        careful(text, tmp_path)


@pytest.mark.usefixtures("_readers")
def test_a_box_on_the_edge_of_what_a_number_can_be(tmp_path: Path) -> None:
    values = [0.1, 1e-300, 123456789.123456789, 1e12]
    text = written(annotations=[box(1, values)])
    found = quick(text, tmp_path)
    assert found is not None
    assert np.array_equal(found.objects.xywh, [values])
