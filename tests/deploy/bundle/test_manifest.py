"""`manifest.json`: what is written can be read, and what is wrong is named."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from asag_deploy.bundle.manifest import SCHEMA_VERSION, GraphSpec, Manifest, TensorSpec
from asag_deploy.bundle.manifest_json import manifest_from_json, manifest_to_json
from asag_deploy.errors import BundleCorruptError, BundleVersionError
from support.tiny_bundle import tiny_manifest

TENSOR = TensorSpec(name="image", dtype="float32", shape=("batch", 3, "height", "width"))
GRAPHS = tuple(
    GraphSpec(name=name, file=f"{name}.onnx", sha256="0" * 64, inputs=(TENSOR,), outputs=(TENSOR, TENSOR))
    for name in ("normalize", "backbone", "decoder")
)


def manifest() -> Manifest:
    return dataclasses.replace(
        tiny_manifest(nms_iou=0.7, max_patches=60),
        graphs=GRAPHS,
        parity={"passed": True, "stages": [{"a": 1.5}]},
    )


def as_data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(manifest_to_json(manifest()))
    return data


def read(data: object) -> Manifest:
    return manifest_from_json(json.dumps(data), "demo/manifest.json")


def test_round_trip() -> None:
    assert manifest_from_json(manifest_to_json(manifest()), "m") == manifest()


def test_round_trip_of_fields_that_may_be_null() -> None:
    plain = tiny_manifest()
    assert plain.postprocessing.nms_iou is None
    assert manifest_from_json(manifest_to_json(plain), "m") == plain


def test_whole_numbers_are_numbers() -> None:
    data = as_data()
    data["preprocessing"]["mean"] = [1, 2, 3]
    mean = read(data).preprocessing.mean
    assert mean == (1.0, 2.0, 3.0)
    assert all(type(value) is float for value in mean)


def test_parity_report_may_hold_what_json_cannot() -> None:
    odd = dataclasses.replace(manifest(), parity={"rows": [{"difference": float("inf")}, float("nan")]})
    text = manifest_to_json(odd)
    assert json.loads(text, parse_constant=pytest.fail)["parity"] == {"rows": [{"difference": "inf"}, "nan"]}


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("variant", 5, "`variant` is 5, expected text"),
        ("trained", 1, "`trained` is 1, expected true or false"),
        ("opset", "18", '`opset` is "18", expected a whole number'),
        ("opset", 18.0, "`opset` is 18.0, expected a whole number"),
        ("opset", True, "`opset` is true, expected a whole number"),
        ("precision", "int4", "`precision` is \"int4\", expected 'fp32' or 'fp16' or 'int8'"),
        ("categories", {}, "`categories` is {}, expected a list"),
        ("categories.1", "dog", '`categories[1]` is "dog", expected an object'),
        ("categories.0.id", None, "`categories[0].id` is null, expected a whole number"),
        ("preprocessing", None, "`preprocessing` is null, expected an object"),
        ("preprocessing.mean", [1, 2], "`preprocessing.mean` has 2 values, expected 3"),
        ("preprocessing.std.2", "1", '`preprocessing.std[2]` is "1", expected a number'),
        ("preprocessing.std.2", float("nan"), "`preprocessing.std[2]` is NaN, expected a number"),
        ("preprocessing.std.2", 10**400, f"`preprocessing.std[2]` is {'1' + '0' * 36}..., expected a number"),
        (
            "probing.levels.0.level",
            "P2",
            "`probing.levels[0].level` is \"P2\", expected 'P5' or 'P4' or 'P3'",
        ),
        ("probing.max_patches", "60", '`probing.max_patches` is "60", expected a whole number or null'),
        ("postprocessing.nms_iou", [], "`postprocessing.nms_iou` is [], expected a number or null"),
        (
            "graphs.0.precision",
            "half",
            "`graphs[0].precision` is \"half\", expected 'fp32' or 'fp16' or 'int8' or null",
        ),
        ("graphs.2.sha256", 7, "`graphs[2].sha256` is 7, expected text"),
        (
            "graphs.1.inputs.0.shape.2",
            1.5,
            "`graphs[1].inputs[0].shape[2]` is 1.5, expected a whole number or text",
        ),
        ("parity", [], "`parity` is [], expected an object"),
        ("schema_version", "1", '`schema_version` is "1", expected a whole number'),
    ],
)
def test_wrong_type(where: str, value: object, message: str) -> None:
    data = as_data()
    place, key = _find(data, where)
    place[key] = value
    with pytest.raises(BundleCorruptError) as error:
        read(data)
    assert str(error.value) == (
        f"in 'demo/manifest.json', {message}; "
        "export it again with `asag-export --checkpoint FILE --output-dir DIR`"
    )


def test_every_field_must_be_there() -> None:
    fields = [where for where in _fields(as_data()) if not where.startswith("parity.") and where not in LATER]
    assert len(fields) > 60
    for where in fields:
        data = as_data()
        place, key = _find(data, where)
        del place[key]
        with pytest.raises(BundleCorruptError, match="is missing") as error:
            read(data)
        assert f"`{_shown(where)}`" in str(error.value)


LATER = ["probing.cap_can_be_lowered", *(f"graphs.{i}.precision" for i in range(9))]


def test_the_cap_of_bundles_of_earlier_releases_is_fixed() -> None:
    data = as_data()
    data["probing"]["cap_can_be_lowered"] = True
    assert read(data).probing.cap_can_be_lowered
    del data["probing"]["cap_can_be_lowered"]
    assert not read(data).probing.cap_can_be_lowered


@pytest.mark.parametrize("version", [1, 2])
def test_a_manifest_of_an_earlier_schema(version: int) -> None:
    """Its graphs held the NMS, and took other inputs."""
    data = as_data()
    del data["probing"]["patch_nms_iou"]
    with pytest.raises(
        BundleVersionError, match=f"schema version {version}, of an earlier .* export it again"
    ):
        read({**data, "schema_version": version})


def test_graphs_in_another_precision() -> None:
    half = dataclasses.replace(manifest(), precision="fp16")
    graphs = [
        dataclasses.replace(graph, precision="fp32") if graph.name in ("normalize", "decoder") else graph
        for graph in half.graphs
    ]
    found = read(json.loads(manifest_to_json(dataclasses.replace(half, graphs=tuple(graphs)))))
    assert [found.precision_of(name) for name in ("normalize", "backbone", "decoder")] == [
        "fp32",
        "fp16",
        "fp32",
    ]
    assert found.precision_in_words == "fp16 (but normalize, decoder in fp32)"


def test_no_other_field_may_be_there() -> None:
    for where in ("extra", "probing.extra", "graphs.0.outputs.1.extra"):
        data = as_data()
        place, key = _find(data, where)
        place[key] = 1
        with pytest.raises(BundleCorruptError, match="is not a known field") as error:
            read(data)
        assert f"`{_shown(where)}`" in str(error.value)


def test_newer_schema_is_refused_before_anything_else() -> None:
    with pytest.raises(BundleVersionError, match=r"reads up to .*; upgrade asag-deploy$"):
        read({"schema_version": SCHEMA_VERSION + 1, "another": "layout"})


@pytest.mark.parametrize("version", [0, -1])
def test_impossible_schema_version(version: int) -> None:
    with pytest.raises(BundleCorruptError, match=f"impossible schema version {version}"):
        read({**as_data(), "schema_version": version})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b'{"schema_version": 1', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_not_a_manifest(text: bytes, message: str) -> None:
    with pytest.raises(BundleCorruptError, match=message):
        manifest_from_json(text, "demo/manifest.json")


def test_data_are_not_changed_by_reading() -> None:
    data = as_data()
    before = copy.deepcopy(data)
    read(data)
    assert data == before


def _find(data: Any, where: str) -> tuple[Any, Any]:
    """The object or list that holds a place such as `graphs.2.sha256`, and the key of it in there."""
    *path, last = (int(part) if part.isdigit() else part for part in where.split("."))
    for part in path:
        data = data[part]
    return data, last


def _shown(where: str) -> str:
    shown = ""
    for part in where.split("."):
        shown += f"[{part}]" if part.isdigit() else f".{part}"
    return shown.removeprefix(".")


def _fields(data: Any, where: str = "") -> Iterator[str]:
    """Every place in nested data that is a field of an object."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        place = f"{where}.{key}" if where else str(key)
        if isinstance(data, dict):
            yield place
        yield from _fields(value, place)
