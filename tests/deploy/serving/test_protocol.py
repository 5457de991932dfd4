"""The Open Inference Protocol, spoken by Triton's own client and by hand."""

from __future__ import annotations

import base64
import json
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from asag_deploy import Detector
from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.serving.protocol import Model
from asag_deploy.serving.tensors import MOST_IMAGES, OUTPUTS
from support.served import IMAGE, SECONDS, GatedDetector, Served, in_threads, png, serving, until
from support.tiny_bundle import make_bundle, picture, tiny_manifest

PICTURES = (picture(4, 2), picture(0), picture(3, size=(80, 64)))
FILES = tuple(png(image) for image in PICTURES)
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    with Detector.load(make_bundle(tmp_path_factory.mktemp("serving") / "bundle")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(real: Detector) -> Iterator[Served]:
    with serving(real, requests=2, max_bytes=20_000) as server:
        yield server


@pytest.fixture
def triton() -> Any:
    return pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")


def asked(files: tuple[bytes, ...], *, binary: bool = True) -> Any:
    from tritonclient.http import InferInput

    data: list[Any] = list(files) if binary else [base64.b64encode(file).decode() for file in files]
    tensor = InferInput("image", [len(files)], "BYTES")
    return tensor.set_data_from_numpy(np.array(data, dtype=np.object_), binary_data=binary)


def by_json(**changes: Any) -> bytes:
    data = [base64.b64encode(IMAGE).decode()]
    the_input = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
    request: dict[str, Any] = {"id": "7", "inputs": [{**the_input, **changes.pop("input", {})}], **changes}
    return json.dumps(request).encode()


def test_what_tritons_client_asks_before(triton: Any, served: Served) -> None:
    with triton.InferenceServerClient(f"{served.host}:{served.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert not client.is_model_ready("other")
        assert not client.is_model_ready("tiny", "2")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        metadata = client.get_model_metadata("tiny")
        assert metadata == client.get_model_metadata("tiny", "1")
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [output["name"] for output in metadata["outputs"]] == [spec.name for spec in OUTPUTS]
    assert json.loads(metadata["properties"]["classes"]) == ["round", "square", "other"]
    assert json.loads(metadata["properties"]["category_ids"]) == [10, 20, 30]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_what_tritons_client_is_answered(
    triton: Any, served: Served, real: Detector, binary_in: bool, binary_out: bool | None
) -> None:
    """None: no outputs are named, which are then all of them, as binary data."""
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput(spec.name, binary_data=binary_out) for spec in OUTPUTS]
    with triton.InferenceServerClient(f"{served.host}:{served.port}") as client:
        result = client.infer(
            "tiny",
            [asked(FILES, binary=binary_in)],
            outputs=outputs,
            request_id="mine",
            parameters={"threshold": 0.2, "max_level": "P4"},
        )
    expected = [real(image, channel_order="rgb", threshold=0.2, max_level="P4") for image in PICTURES]
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("tiny", "1", "mine")
    assert result.as_numpy("counts").tolist() == [len(each) for each in expected]
    assert sum(map(len, expected)) > 0
    for name, field in (("boxes", "xyxy"), ("scores", "confidence"), ("labels", "class_id")):
        whole = np.concatenate([getattr(each, field) for each in expected])
        got = result.as_numpy(name)
        assert got.dtype == whole.dtype
        np.testing.assert_array_equal(got, whole)
    traces = [json.loads(text) for text in result.as_numpy("trace")]
    assert traces == [json.loads(json.dumps(each.trace.to_dict())) for each in expected]


def test_one_output_of_several(triton: Any, served: Served) -> None:
    with triton.InferenceServerClient(f"{served.host}:{served.port}") as client:
        result = client.infer("tiny", [asked(FILES[:1])], outputs=[triton.InferRequestedOutput("scores")])
    assert [output["name"] for output in result.get_response()["outputs"]] == ["scores"]


def test_nothing_found_is_empty_tensors(triton: Any, served: Served) -> None:
    with triton.InferenceServerClient(f"{served.host}:{served.port}") as client:
        result = client.infer("tiny", [asked(FILES[:1])], parameters={"threshold": 1})
    assert result.as_numpy("boxes").shape == (0, 4)
    assert result.as_numpy("counts").tolist() == [0]


def test_what_tritons_client_is_refused(triton: Any, served: Served) -> None:
    with triton.InferenceServerClient(f"{served.host}:{served.port}") as client:
        for model, files, parameters, sentence in (
            ("other", FILES[:1], {}, "there is no model 'other'; there is 'tiny' alone"),
            ("tiny", (FILES[0], b"no image"), {}, "is damaged or is not an image"),
            ("tiny", FILES[:1], {"max_level": "P2"}, "max_level is 'P2'"),
            ("tiny", FILES[:1], {"level": 1}, "unknown parameter 'level'; there are threshold, mode"),
            ("tiny", FILES[:1], {"threshold": True}, "threshold is of the wrong type; expected a number"),
            ("tiny", (bytes(100_000),), {}, "larger than"),
        ):
            with pytest.raises(triton.InferenceServerException) as raised:
                client.infer(model, [asked(files)], parameters=parameters)
            assert sentence in str(raised.value)


def test_a_timeout_is_a_deadline(triton: Any, detector: GatedDetector) -> None:
    """In microseconds, as that client has it."""
    with (
        serving(detector) as server,
        triton.InferenceServerClient(f"{server.host}:{server.port}") as client,
    ):
        client.infer("tiny", [asked(FILES[:1])], timeout=20_000_000)
        client.infer("tiny", [asked(FILES[:1])], timeout=0)
        with pytest.raises(triton.InferenceServerException, match="of timeout had passed"):
            client.infer("tiny", [asked(FILES[:1])], timeout=1)
    assert 0 < detector.asked[0]["deadline_ms"] < 20_000
    assert detector.asked[1:] == [{}]


def test_several_threads_with_tritons_client(triton: Any, served: Served, real: Detector) -> None:
    expected = [len(real(image, channel_order="rgb", threshold=0.3)) for image in PICTURES]
    wrong: list[str] = []

    def work(number: int) -> None:
        with triton.InferenceServerClient(f"{served.host}:{served.port}") as client:
            for step in range(8):
                one = (number + step) % len(FILES)
                count = client.infer("tiny", [asked((FILES[one],))]).as_numpy("counts").tolist()
                if count != [expected[one]]:
                    wrong.append(f"{one}: {count}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert wrong == []


def test_by_hand_in_json(served: Served) -> None:
    status, answer, _ = served.ask("POST", INFER, by_json())
    assert (status, answer["id"], answer["model_name"]) == (200, "7", "tiny")
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["boxes"]["shape"] == [outputs["counts"]["data"][0], 4]
    assert len(outputs["boxes"]["data"]) == 4 * outputs["counts"]["data"][0]
    nested = {"shape": [1, 1], "data": [[base64.b64encode(IMAGE).decode()]]}
    assert served.ask("POST", "/v2/models/tiny/versions/1/infer", by_json(input=nested))[0] == 200


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "no JSON that can be read"),
        (b"[]", "not a JSON object"),
        (b'{"inputs": ' + b"[" * 100_00 + b"}", "no JSON that can be read"),
        (b"\xff\xfe\xfd", "no JSON that can be read"),
        (b"{}", "one input, called 'image'"),
        (by_json(inputs=[]), "one input, called 'image'"),
        (by_json(id=5), "id is no string"),
        (by_json(input={"name": "images"}), "there is no input 'images'"),
        (by_json(input={"datatype": "UINT8"}), "of type UINT8; send image files, as BYTES"),
        (by_json(input={"shape": [2]}), "holds 1 image, and its shape says 2"),
        (by_json(input={"shape": [1, 2]}), "is of shape [1, 2]; expected [n] or [n, 1]"),
        (by_json(input={"shape": [0]}), "is of shape [0]"),
        (by_json(input={"shape": 1}), "is of shape 1;"),
        (by_json(input={"shape": [MOST_IMAGES + 1]}), f"send {MOST_IMAGES} at most"),
        (by_json(input={"data": ["not base64!"]}), "no base64"),
        (by_json(input={"data": [7]}), "no base64"),
        (by_json(input={"data": None}), "neither data nor binary_data_size"),
        (by_json(input={"parameters": []}), "are no JSON object"),
        (by_json(input={"parameters": {"binary_data_size": 5}}), "is 5, but 0 bytes follow"),
        (by_json(parameters={"binary_data_output": 1}), "neither true nor false"),
        (by_json(parameters={"deadline_ms": 0}), "deadline_ms is '0'"),
        (by_json(parameters={"deadline_ms": 5, "timeout": 5}), "timeout is given, and so is deadline_ms"),
        (by_json(parameters={"timeout": -5}), "timeout is -5; expected a number of microseconds"),
        (by_json(parameters={"timeout": 1e18}), "timeout is 1e+18; expected"),
        (by_json(parameters={"timeout": False}), "timeout is of the wrong type"),
        (by_json().replace(b'"id": "7"', b'"id": "7", "id": "8"'), "`id` stands there twice; give it once"),
        (by_json(input={"shape": [True]}), "is of shape [true]"),
        (by_json(parameters={"timeout": "5"}), "timeout is of the wrong type; expected a number of micro"),
        (by_json(parameters={"threshold": None}), "threshold is of the wrong type"),
        (by_json(parameters={"threshold": " 0.5"}), "threshold is ' 0.5', which is not a number"),
        (by_json(parameters={"max_detections": "0_1"}), "max_detections is '0_1', which is not a whole"),
        (by_json(outputs=[{"name": "masks"}]), "there is no output 'masks'; there are boxes, scores"),
        (by_json(outputs=[{"name": "boxes", "parameters": {"classification": 2}}]), "'classification'"),
        (by_json(outputs=7), "no list of objects"),
    ],
)
def test_a_request_that_is_refused(served: Served, body: bytes, sentence: str) -> None:
    status, answer, _ = served.ask("POST", INFER, body)
    assert (status, list(answer)) == (400, ["error"]), answer
    assert sentence in answer["error"]
    assert len(answer["error"].splitlines()) == 1


def test_which_of_several_images_is_bad(served: Served) -> None:
    data = [base64.b64encode(each).decode() for each in (IMAGE, b"no image")]
    status, answer, _ = served.ask("POST", INFER, by_json(input={"shape": [2], "data": data}))
    assert status == 422
    assert answer["error"].startswith("'image 2 of 2' is damaged or is not an image")
    only = by_json(input={"shape": [1], "data": data[1:]})
    assert served.ask("POST", INFER, only)[1]["error"].startswith("'image 1 of 1' is damaged")


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"Content-Encoding": "gzip"}, "the body is compressed (gzip); send the request as it is"),
        (
            {"Content-Type": "multipart/mixed"},
            "(multipart/mixed); send the inference request itself as the body",
        ),
    ],
)
def test_a_request_that_has_to_be_unpacked(served: Served, headers: dict[str, str], sentence: str) -> None:
    status, answer, _ = served.ask("POST", INFER, by_json(), headers)
    assert (status, sentence in answer["error"]) == (415, True), answer


@pytest.mark.parametrize(
    ("length", "binary", "sentence"),
    [
        ("9999", b"", "is '9999', which is not the length"),
        ("-1", b"", "is '-1'"),
        ("0", b"", "is '0'"),
        ("x", b"", "is 'x'"),
        (None, struct.pack("<I", 500) + b"abc", "breaks off"),
        (None, b"abc", "breaks off"),
        (None, b"", "0 images"),
    ],
)
def test_binary_data_that_is_refused(
    served: Served, length: str | None, binary: bytes, sentence: str
) -> None:
    head = by_json(input={"data": None, "parameters": {"binary_data_size": len(binary)}})
    headers = {"Inference-Header-Content-Length": length or str(len(head))}
    status, answer, _ = served.ask("POST", INFER, head + binary, headers)
    assert status == 400
    assert sentence in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/tiny/versions/2/ready", 404),
        ("GET", "/v2/models/tiny/config", 404),
        ("GET", INFER, 405),
        ("POST", "/v2/health/ready", 405),
    ],
)
def test_paths_that_there_are_not(served: Served, method: str, path: str, status: int) -> None:
    got, answer, _ = served.ask(method, path)
    assert (got, list(answer)) == (status, ["error"])


def test_an_image_of_several_is_refused_with_all(detector: GatedDetector) -> None:
    """And what is left of the others takes no place."""
    detector.error = BackendError("out of memory")
    images = [base64.b64encode(IMAGE).decode()] * 5
    with serving(detector, requests=2) as server:
        status, answer, _ = server.ask("POST", INFER, by_json(input={"shape": [5], "data": images}))
        assert (status, answer) == (500, {"error": "out of memory"})
        detector.error = None
        until(lambda: server.ask("GET", "/health")[1]["requests"] == 0)
        assert server.detect(IMAGE)[0] == 200


def test_unready_while_the_network_is_tried(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, settings={"warm_up": True}) as server:
        status, answer, _ = server.ask("GET", "/v2/health/ready")
        assert (status, answer) == (503, {"ready": False, "error": "the network is being tried"})
        assert server.ask("GET", "/v2/models/tiny/ready")[0] == 503
        assert server.ask("GET", "/v2/health/live")[0] == 200
        detector.gate.set()
        until(lambda: server.ask("GET", "/v2/health/ready")[0] == 200)


def test_unready_before_it_stops(detector: GatedDetector) -> None:
    """It goes on until it is told again."""
    with serving(detector, drain_seconds=3600) as server:
        assert server.ask("GET", "/v2/health/ready")[1] == {"ready": True}
        server.server.handle_exit(15, None)
        server.server._captured_signals.clear()
        status, answer, _ = server.ask("GET", "/v2/health/ready")
        assert (status, answer["error"]) == (503, "the server is stopping")
        assert server.detect(IMAGE)[0] == 200
        server.server.handle_exit(15, None)
        server.server._captured_signals.clear()
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_ready_though_full(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, queue=0) as server:
        threads, _ = in_threads(1, lambda: server.detect(IMAGE))
        until(lambda: detector.running == 1)
        assert server.detect(IMAGE)[0] == 503
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        detector.gate.set()
        threads[0].join(SECONDS)


def test_a_model_by_another_name(detector: GatedDetector) -> None:
    with serving(detector, settings={"model_name": "cells-2.1"}) as server:
        assert server.ask("GET", "/v2/models/cells-2.1")[1]["name"] == "cells-2.1"
        assert server.ask("GET", "/v2/models/tiny")[0] == 404


@pytest.mark.parametrize("name", ["", "a/b", "a b", "-a", "ä", "a" * 200])
def test_names_that_cannot_stand_in_an_address(name: str) -> None:
    with pytest.raises(ConfigError, match="--model-name is"):
        Model(name, tiny_manifest())
