"""The recipes of docs/serving: for KServe, Ray Serve and Triton."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request as StarletteRequest

from asag_deploy import Detector
from asag_deploy.errors import ConfigError
from asag_deploy.serving import cli
from asag_deploy.serving import options as serving_options
from asag_deploy.serving.endpoints import ENDPOINTS
from asag_deploy.serving.options import MOST_DEADLINE_MS
from asag_deploy.serving.tensors import INPUT, OUTPUTS
from support.served import IMAGE, GatedDetector, png
from support.tiny_bundle import make_bundle, picture

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "docs" / "serving"
TRITON_TYPES = {"FP32": "FP32", "INT64": "INT64", "BYTES": "STRING"}


def kserve() -> tuple[dict[str, Any], dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    runtime, service = yaml.safe_load_all((RECIPES / "kserve.yaml").read_text(encoding="utf-8"))
    return runtime, service


def test_kserve_starts_what_there_is() -> None:
    runtime, service = kserve()
    (container,) = runtime["spec"]["containers"]
    assert container["args"][0] in (ROOT / "docker" / "entrypoint.sh").read_text(encoding="utf-8")
    assert f"-t {container['image']} " in (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    name = service["metadata"]["name"]
    options = cli._parser().parse_args([arg.replace("{{.Name}}", name) for arg in container["args"][1:]])
    assert (str(options.bundle), options.model_name) == ("/mnt/models", name)
    assert options.host == "0.0.0.0"
    assert options.warm_up
    assert [port["containerPort"] for port in container["ports"]] == [options.port]
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == str(options.port)
    paths = {endpoint.path: endpoint for endpoint in ENDPOINTS if endpoint.method == "GET"}
    for probe in (container["readinessProbe"]["httpGet"], container["livenessProbe"]["httpGet"]):
        assert probe["port"] == options.port
        assert paths[probe["path"]].of_crowd
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/path"] in paths
    assert container["securityContext"]["runAsNonRoot"]
    assert re.search(r"USER \d", (ROOT / "docker" / "serve.Dockerfile").read_text(encoding="utf-8"))


def test_kserve_finds_the_runtime_and_lets_it_end() -> None:
    runtime, service = kserve()
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [(one["name"], one["version"]) for one in runtime["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    options = cli._parser().parse_args(["bundle", *runtime["spec"]["containers"][0]["args"][2:]])
    assert predictor["terminationGracePeriodSeconds"] > options.drain_seconds + options.grace_seconds


class Tensor:
    """Triton's, as far as a model sees it."""

    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class Request:
    def __init__(self, images: list[bytes], parameters: dict[str, Any], timeout: int = 0) -> None:
        self.tensors = [Tensor(INPUT, np.array(images, dtype=np.object_))]
        self._parameters, self._timeout = parameters, timeout

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def timeout(self) -> int:
        return self._timeout


class TritonError(Exception):
    def message(self) -> str:
        return str(self)


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.error = error
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}


def triton_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe, over a stand-in for what Triton gives to a model."""
    utils = ModuleType("triton_python_backend_utils")
    vars(utils).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=Response,
        get_input_tensor_by_name=lambda request, name: next(t for t in request.tensors if t.name() == name),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    return loaded(RECIPES / "triton" / "model.py").TritonPythonModel()


def loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(**values: str) -> dict[str, str]:
    parameters = {name: {"string_value": value} for name, value in values.items()}
    return {"model_config": json.dumps({"parameters": parameters} if values else {})}


def test_tritons_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    model = triton_model(monkeypatch)
    model.initialize(config_of(bundle=str(bundle.path), backend="onnxruntime", threshold="0.2"))
    pictures = [picture(4, 2), picture(0)]
    files = [png(image) for image in pictures]
    requests = [
        Request(files, {}),
        Request(files[:1], {"max_level": "P4", "threshold": 0}),
        Request([files[0], b"no image"], {}),
        Request(files[:1], {"max_level": "P2"}),
        Request(files[:1], {}, timeout=1),
    ]
    whole, one, damaged, wrong, late = model.execute(requests)
    with Detector.load(bundle) as detector:
        expected = [detector(image, channel_order="rgb", threshold=0.2) for image in pictures]
        shallow = detector(pictures[0], channel_order="rgb", max_level="P4")
    assert list(whole.outputs) == [spec.name for spec in OUTPUTS]
    assert whole.outputs["counts"].tolist() == [len(each) for each in expected]
    np.testing.assert_array_equal(whole.outputs["boxes"], np.concatenate([each.xyxy for each in expected]))
    traces = [json.loads(text) for text in whole.outputs["trace"]]
    assert [trace["exit_level"] for trace in traces] == [each.trace.exit_level for each in expected]
    np.testing.assert_array_equal(one.outputs["scores"], shallow.confidence)
    assert "'image 2 of 2' is damaged or is not an image" in damaged.error.message()
    assert "max_level is 'P2'" in wrong.error.message()
    assert "the 0.001 ms of timeout had passed" in late.error.message()
    model.finalize()


class Late(GatedDetector):
    """A detector whose every call takes a quarter of an hour, by the clock of deadlines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.late = 0.0
        clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + self.late)
        monkeypatch.setattr(serving_options, "time", clock)

    def __call__(self, images: Any, **options: Any) -> Any:
        self.late += 900
        return super().__call__(images, **options)

    def close(self) -> None:
        """There is nothing to let go of."""


def test_a_request_of_tritons_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with it: what `execute` raises would be every request's answer."""
    model = triton_model(monkeypatch)
    monkeypatch.setattr(Detector, "load", lambda *_, **__: GatedDetector())
    model.initialize(config_of(bundle="bundle"))
    broken = Request([IMAGE], {})
    monkeypatch.setattr(broken, "parameters", lambda: "{")
    none, text, many, twice, failing, fine = model.execute(
        [
            Request([], {}),
            Request(["text"], {}),  # type: ignore[list-item]
            Request([IMAGE] * 65, {}),
            Request([IMAGE], {"deadline_ms": 5}, timeout=5000),
            broken,
            Request([IMAGE], {"deadline_ms": MOST_DEADLINE_MS}),
        ]
    )
    assert none.error.message() == "the input 'image' holds 0 images; send 1 to 64"
    assert "send image files, as BYTES" in text.error.message()
    assert "holds 65 images" in many.error.message()
    assert "timeout is given, and so is deadline_ms" in twice.error.message()
    assert failing.error.message() == "the model failed at this request; the server's log says why"
    assert fine.error is None


def test_images_of_a_request_of_tritons_share_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    model = triton_model(monkeypatch)
    detector = Late(monkeypatch)
    monkeypatch.setattr(Detector, "load", lambda *_, **__: detector)
    model.initialize(config_of(bundle="bundle"))
    (fine,) = model.execute([Request([IMAGE] * 3, {"deadline_ms": 3_000_000})])
    (refused,) = model.execute([Request([IMAGE] * 3, {"deadline_ms": 1_000_000 + detector.late * 1000})])
    assert fine.error is None
    left = [call["deadline_ms"] for call in detector.asked]
    assert [round(each / 1e5) for each in left] == [30, 21, 12, 10, 1]
    assert "of deadline_ms had passed" in refused.error.message()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "config.pbtxt has no parameter 'bundle'"),
        (
            {"bundle": "b", "threshold": "much"},
            "parameter 'threshold' is 'much', which is not a number between",
        ),
        ({"bundle": "b", "threshold": "2"}, "parameter 'threshold' is '2'"),
    ],
)
def test_a_configuration_of_tritons_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        triton_model(monkeypatch).initialize(config_of(**values))


def ray_recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe, over a stand-in for what it needs of Ray; an application is what it is bound to."""

    def deployment(**_: Any) -> Any:
        def deployed(cls: Any) -> Any:
            cls.bind = staticmethod(lambda *given: given)
            return cls

        return deployed

    ray = ModuleType("ray")
    vars(ray)["serve"] = SimpleNamespace(deployment=deployment, Application=tuple)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return loaded(RECIPES / "ray_serve.py")


def test_arguments_of_rays_application(monkeypatch: pytest.MonkeyPatch) -> None:
    app = ray_recipe(monkeypatch).app
    assert app({"bundle": "b"}) == ("b", None, 0.3)
    assert app({"bundle": "b", "backend": "openvino", "threshold": "0.5"}) == ("b", "openvino", 0.5)
    for arguments, sentence in (
        ({}, "no bundle is named; say `serve run ray_serve:app bundle="),
        ({"bundle": "b", "treshold": "1"}, "no argument 'treshold'; there are bundle, backend, threshold"),
        ({"bundle": "b", "threshold": "much"}, "threshold is 'much', which is not a number between 0 and 1"),
        ({"bundle": "b", "threshold": "2"}, "threshold is 2, which is not between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            app(arguments)


def asked_of(replica: Any, query: str, body: bytes, kind: str = "image/png") -> Any:
    """Send a request to a replica, in the event loop that there is; return status and answer."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": query.encode(),
        "headers": [(b"content-type", kind.encode())],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def ask() -> tuple[int, Any]:
        answer = await replica(StarletteRequest(scope, receive))
        return answer.status_code, json.loads(answer.body)

    return ask()


def test_a_deadline_counts_the_wait_in_rays_replica(
    monkeypatch: pytest.MonkeyPatch, detector: GatedDetector
) -> None:
    recipe = ray_recipe(monkeypatch)
    monkeypatch.setattr(Detector, "load", lambda *_, **__: detector)
    detector.gate.clear()

    async def sent() -> list[Any]:
        replica = recipe.AsagDetector("bundle")
        busy = [asyncio.ensure_future(asked_of(replica, "", IMAGE)) for _ in range(recipe.CALLS_AT_ONCE)]
        while detector.running < recipe.CALLS_AT_ONCE:
            await asyncio.sleep(0.001)
        queries = ("deadline_ms=20", "deadline_ms=60000")
        waiting = [asyncio.ensure_future(asked_of(replica, query, IMAGE)) for query in queries]
        await asyncio.sleep(0.05)
        detector.gate.set()
        return await asyncio.gather(*busy, *waiting)

    *busy, (status, told), patient = asyncio.run(sent())
    assert [answer[0] for answer in (*busy, patient)] == [200] * 3
    assert (status, "the 20 ms of deadline_ms had passed" in told["error"]) == (503, True)
    assert detector.calls == 3
    assert 0 < detector.asked[2]["deadline_ms"] <= 59_950


def test_what_rays_replica_answers(monkeypatch: pytest.MonkeyPatch, detector: GatedDetector) -> None:
    """A body or a form, with the same sentences as the server."""
    recipe = ray_recipe(monkeypatch)
    monkeypatch.setattr(Detector, "load", lambda *_, **__: detector)
    part = "--x\r\nContent-Disposition: form-data; name={}\r\n\r\n"
    head = part.format('"image"; filename="a.png"').encode()
    level, threshold = part.format("max_level"), part.format("threshold")
    fields = f"\r\n{level}P4\r\n{threshold}0.6\r\n--x--\r\n".encode()
    form = "multipart/form-data; boundary=x"

    async def sent() -> list[Any]:
        replica = recipe.AsagDetector("bundle")
        return [
            await asked_of(replica, "threshold=0", IMAGE),
            await asked_of(replica, "", head + IMAGE + fields, form),
            await asked_of(replica, "", head + b"no image" + fields, form),
            await asked_of(replica, "", b""),
            await asked_of(replica, "max_level=P2", IMAGE),
        ]

    body, by_form, damaged, empty, wrong = asyncio.run(sent())
    assert (body[0], len(body[1]["detections"])) == (200, 3)
    assert (by_form[0], len(by_form[1]["detections"])) == (200, 1)
    assert detector.asked == [{}, {"max_level": "P4"}]
    assert (damaged[0], "'file of the form' is damaged" in damaged[1]["error"]) == (422, True)
    assert (empty[0], "has no body" in empty[1]["error"]) == (400, True)
    assert (wrong[0], "max_level is 'P2'" in wrong[1]["error"]) == (400, True)


def test_tritons_configuration_is_that_of_the_model() -> None:
    text = (RECIPES / "triton" / "config.pbtxt").read_text(encoding="utf-8")
    found = re.findall(r'{ name: "(\w+)" data_type: TYPE_(\w+) dims: \[ ([-\d, ]+) \] }', text)
    written = [(name, kind, tuple(int(side) for side in dims.split(","))) for name, kind, dims in found]
    outputs = [(spec.name, TRITON_TYPES[spec.datatype], spec.shape) for spec in OUTPUTS]
    assert written == [(INPUT, "STRING", (-1,)), *outputs]


RAY = """
import json, sys, urllib.error, urllib.request
import ray
from ray import serve
sys.path.insert(0, sys.argv[1])
import ray_serve
ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, object_store_memory=10**8)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[4])})
serve.run(ray_serve.app({"bundle": sys.argv[2]}))

def ask(query, body):
    url = f"http://127.0.0.1:{sys.argv[4]}/{query}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=60) as answer:
            return [answer.status, json.loads(answer.read())]
    except urllib.error.HTTPError as error:
        return [error.code, json.loads(error.read())]

image = open(sys.argv[3], "rb").read()
print("ANSWERS" + json.dumps([ask("", image), ask("?max_level=P9", image), ask("", b"no image")]))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
def test_ray_serves_it(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    import socket

    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "image.png").write_bytes(IMAGE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [str(RECIPES), str(bundle.path), str(tmp_path / "image.png"), str(port)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", RAY, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    fine, wrong, damaged = json.loads(run.stdout.partition("ANSWERS")[2].splitlines()[0])
    with Detector.load(bundle) as detector:
        expected = detector(picture(3), channel_order="rgb", threshold=0.3).to_json()
    assert fine[0] == 200
    assert {**fine[1], "times_ms": None} == {**expected, "times_ms": None}
    assert wrong[0] == 400
    assert "max_level is 'P9'" in wrong[1]["error"]
    assert damaged[0] == 422
