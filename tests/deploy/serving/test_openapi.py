"""The OpenAPI document: valid, and true in both directions."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from asag_deploy import Detector
from asag_deploy.serving.endpoints import ENDPOINTS, known_path
from asag_deploy.serving.limits import Limits, RefusedError
from asag_deploy.serving.openapi import document
from asag_deploy.serving.options import PARAMETERS, Defaults, checked, read_asked
from asag_deploy.serving.tensors import OUTPUTS, read_request
from support.served import IMAGE, GatedDetector, Served, png, serving
from support.tiny_bundle import make_bundle, picture, tiny_manifest

DOCUMENT = document(tiny_manifest(), Limits(), Defaults(threshold=0.3))
OPERATIONS = [
    (method, path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with (
        Detector.load(make_bundle(tmp_path_factory.mktemp("serving") / "bundle")) as loaded,
        serving(loaded) as server,
    ):
        yield server


def is_valid(value: Any, schema: dict[str, Any]) -> None:
    """Hold an answer against a schema of the document."""
    validator = jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    validator.validate(value)


def test_it_is_valid() -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="it is not installed")
    validator.validate(DOCUMENT)


def test_it_is_what_the_server_gives(served: Served) -> None:
    assert served.ask("GET", "/openapi.json")[1] == json.loads(json.dumps(DOCUMENT))


def test_it_has_every_endpoint_once() -> None:
    described = [(method.upper(), path) for method, path, _ in OPERATIONS]
    assert sorted(described) == sorted((endpoint.method, endpoint.path) for endpoint in ENDPOINTS)
    names = [operation["operationId"] for *_, operation in OPERATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("method", "path", "operation"), OPERATIONS, ids=[f"{m} {p}" for m, p, _ in OPERATIONS]
)
def test_what_it_says_is_answered(served: Served, method: str, path: str, operation: dict[str, Any]) -> None:
    """With its schema, and a wrong method is refused by its own."""
    body: bytes | None = None
    if path == "/detect":
        body = png(picture(4, 2))
    elif method == "post":
        data = [base64.b64encode(IMAGE).decode()]
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
        body = json.dumps({"id": "1", "inputs": [tensor]}).encode()
    real = path.replace("{model}", "tiny").replace("{version}", "1")
    status, answer, headers = served.ask_plainly(method.upper(), real, body)
    assert status == 200
    kind, content = next(iter(operation["responses"]["200"]["content"].items()))
    assert str(headers["Content-Type"]).startswith(kind)
    if kind == "application/json":
        is_valid(json.loads(answer), content["schema"])
    status, answer, headers = served.ask_plainly("DELETE", real)
    described = operation["responses"][str(status)]
    assert status == 405
    is_valid(json.loads(answer), described["content"]["application/json"]["schema"])
    assert method.upper() in headers["Allow"]
    assert described["headers"]["Allow"]["required"]


def test_refusals_are_described(served: Served) -> None:
    for path, body, wanted in (
        ("/detect", b"", 400),
        ("/detect", b"no image", 422),
        ("/v2/models/other/infer", b"", 404),
        ("/v2/models/tiny/infer", b"", 400),
        ("/health", b"", 405),
    ):
        status, answer, _ = served.ask("POST", path, body)
        template = path.replace("other", "{model}").replace("tiny", "{model}")
        ((_, operation), *_) = DOCUMENT["paths"][template].items()
        described = operation["responses"]
        assert (status, str(status) in described) == (wanted, True)
        is_valid(answer, {"$ref": "#/components/schemas/Error"})


def test_parameters_are_those_that_are_read() -> None:
    names = [parameter.name for parameter in PARAMETERS]
    detect = DOCUMENT["paths"]["/detect"]["post"]
    query = {p["name"]: p["schema"] for p in detect["parameters"] if p["in"] == "query"}
    form = detect["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    infer = DOCUMENT["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    options = infer["application/json"]["schema"]["properties"]["parameters"]["properties"]
    assert list(query) == names
    assert list(form) == ["image", *names]
    assert list(options) == [*names, "timeout", "binary_data_output"]
    assert query["threshold"]["default"] == 0.3
    outputs = infer["application/json"]["schema"]["properties"]["outputs"]["items"]["properties"]["name"]
    assert outputs["enum"] == [spec.name for spec in OUTPUTS]


def test_defaults_are_those_that_the_server_was_started_with() -> None:
    given = {"mode": "fast", "max_level": "P4", "anchor_cap": 6, "max_detections": 2, "deadline_ms": 50.0}
    with serving(GatedDetector(), settings=given) as server:
        told = server.ask("GET", "/openapi.json")[1]
    query = {p["name"]: p["schema"] for p in told["paths"]["/detect"]["post"]["parameters"]}
    options = infer_schema(told)["properties"]["parameters"]["properties"]
    for schemas in (query, options):
        assert {name: schemas[name]["default"] for name in given} == given


def infer_schema(served_by: dict[str, Any] = DOCUMENT) -> dict[str, Any]:
    operation = served_by["paths"]["/v2/models/{model}/infer"]["post"]
    schema: dict[str, Any] = operation["requestBody"]["content"]["application/json"]["schema"]
    return schema


@pytest.mark.parametrize(
    "shape",
    [[1], [1, 1], [2], [64, 1], [0], [0, 1], [65], [1, 0], [1, 2], [1, 1, 1], [], 1, [-1], ["1"], [True]],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_shapes_of_images_that_are_taken(shape: Any, nested: bool) -> None:
    """The same ones, by the document and by the server; each image may stand in a list of its own."""
    image = base64.b64encode(IMAGE).decode()
    count = shape[0] if isinstance(shape, list) and shape and type(shape[0]) is int else 1
    data = [[image] if nested else image] * count
    request = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": shape, "data": data}]}
    try:
        read_request(json.dumps(request).encode(), None)
        taken = True
    except RefusedError:
        taken = False
    assert jsonschema.Draft202012Validator(infer_schema()).is_valid(request) == taken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("threshold", value)
            for value in (0.5, "0.5", ".5", "1e-1", "+1", "0_1", " 1", "nan", "x", "", 2, True)
        ),
        *(("deadline_ms", value) for value in (5, "5", "1e3", "inf", "\u0665", 0)),
        *(("max_detections", value) for value in (5, "5", "5.0", "0x5", "5 ", "1_0", 0, None)),
        *(("anchor_cap", value) for value in (6, "6", "six", [6])),
        *(("mode", value) for value in ("fast", "1", 1)),
    ],
)
def test_numbers_that_may_be_given_as_text(name: str, value: Any) -> None:
    """Everything but the range of a text is the same by the document and by the server."""
    try:
        read_asked([(name, value)], tiny_manifest(), Defaults(threshold=0.3))
        taken = True
    except RefusedError:
        taken = False
    options = infer_schema()["properties"]["parameters"]
    assert jsonschema.Draft202012Validator(options).is_valid({name: value}) == taken


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda parameter: str(parameter.name))
def test_a_schema_allows_what_is_taken(parameter: Any) -> None:
    """The same values, by jsonschema and by the server."""
    schema = parameter.schema(tiny_manifest())
    for value in (0, 1, -1, 5, 0.5, 24, 25, 1e12, "P5", "P4", "P2", "fast", "slow", ""):
        try:
            checked(parameter.name, schema, value)
            taken = True
        except RefusedError:
            taken = False
        if isinstance(value, float) and value.is_integer():
            continue  # JSON schema's integers may be written so, ours may not
        assert jsonschema.Draft202012Validator(schema).is_valid(value) == taken, value


def test_what_is_alike_is_no_endpoint() -> None:
    assert known_path("/openapi.json") == "/openapi.json"
    assert known_path("/v2/models/a.b/versions/1/infer") is not None
    assert known_path("/openapiXjson") is None
