"""`asag-serve` over loopback: answers, refusals, limits, and how it stops."""

from __future__ import annotations

import errno
import http.client
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from asag_deploy import Detector
from asag_deploy._version import __version__
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.playground import cli as playground_cli
from asag_deploy.serving import cli
from asag_deploy.serving.app import make_app
from asag_deploy.serving.limits import Limits
from asag_deploy.serving.server import address_of, allow_connections, bind, listen, make_server
from support.served import (
    IMAGE,
    SECONDS,
    Client,
    GatedDetector,
    Served,
    in_threads,
    listening,
    png,
    serving,
    until,
)
from support.tiny_bundle import make_bundle, picture


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Served, GatedDetector]]:
    """One server for all tests that leave it as it is."""
    gated = GatedDetector()
    with serving(gated, max_bytes=10_000) as server:
        yield server, gated


@pytest.fixture
def served(shared: tuple[Served, GatedDetector]) -> Served:
    return shared[0]


@pytest.fixture
def failing(shared: tuple[Served, GatedDetector]) -> Iterator[GatedDetector]:
    """The detector of `served`, to be given an `error`."""
    yield shared[1]
    shared[1].error = None


def test_answer_is_what_the_detector_says(tmp_path: Path) -> None:
    image = picture(4, 2)
    with Detector.load(make_bundle(tmp_path / "bundle")) as real:
        expected = real(image, channel_order="rgb").filter(0.5).to_json()
        with serving(real) as server:
            status, answer = server.detect(png(image), "?threshold=0.5")
    assert status == 200
    assert answer["trace"]["exit_level"] == "P3"
    assert {**answer, "times_ms": None} == {**expected, "times_ms": None}
    assert set(answer["times_ms"]) == set(expected["times_ms"])


def test_curl_needs_no_content_type(served: Served) -> None:
    """`curl --data-binary` says application/x-www-form-urlencoded of any file."""
    assert served.detect(IMAGE, **{"Content-Type": "application/x-www-form-urlencoded"})[0] == 200


def test_threshold_of_the_server_and_of_the_request(served: Served) -> None:
    everything = served.detect(IMAGE, "?threshold=0")[1]["detections"]
    usual = served.detect(IMAGE)[1]["detections"]
    assert [d for d in everything if d["confidence"] >= 0.3] == usual
    assert served.detect(IMAGE, "?threshold=1")[1]["detections"] == []
    assert everything


def test_health(served: Served) -> None:
    status, answer, _ = served.ask("GET", "/health")
    assert status == 200
    assert answer == {
        "status": "ok",
        "version": __version__,
        "variant": "tiny",
        "trained": False,
        "classes": 3,
        "backend": "onnxruntime",
        "requests": 0,
    }


@pytest.mark.parametrize(
    ("body", "query", "headers", "status", "sentence"),
    [
        (b"", "", {}, 400, "no body"),
        (IMAGE, "?threshold=2", {}, 400, "threshold is '2'"),
        (IMAGE, "?threshold=nan", {}, 400, "threshold is 'nan'"),
        (IMAGE, "?threshold=much", {}, 400, "threshold is 'much'"),
        (IMAGE, "?treshold=0.5", {}, 400, "unknown parameter 'treshold'"),
        (b"no image at all", "", {}, 422, "'request body' is damaged or is not an image"),
        (IMAGE[:-20], "", {}, 422, "truncated"),
        (IMAGE, "", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "multipart/form-data"),
        (IMAGE, "", {"Content-Type": "multipart/mixed; boundary=x"}, 415, "multipart/mixed"),
        (bytes(10_001), "", {}, 413, "larger than"),
        ([bytes(6_000), bytes(6_000)], "", {}, 413, "larger than"),  # chunked: no length announced
    ],
)
def test_bad_request_is_one_sentence(
    served: Served, body: Any, query: str, headers: dict[str, str], status: int, sentence: str
) -> None:
    got, answer = served.detect(iter(body) if isinstance(body, list) else body, query, **headers)
    assert got == status
    assert list(answer) == ["error"]
    assert sentence in answer["error"]
    assert "\n" not in answer["error"]
    assert served.detect(IMAGE)[0] == 200  # and the server goes on


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/detect", 405), ("POST", "/health", 405), ("GET", "/", 404)]
)
def test_wrong_path_or_method(served: Served, method: str, path: str, status: int) -> None:
    got, answer, headers = served.ask(method, path)
    assert got == status
    assert "POST /detect" in answer["error"]
    assert (headers["Allow"] is not None) == (status == 405)


def test_backend_failure_is_its_sentence(served: Served, failing: GatedDetector) -> None:
    failing.error = BackendError("the backend ran out of memory")
    assert served.detect(IMAGE) == (500, {"error": "the backend ran out of memory"})


def test_a_bug_tells_the_client_nothing(served: Served, failing: GatedDetector) -> None:
    failing.error = KeyError("secret")
    status, answer = served.detect(IMAGE)
    assert status == 500
    assert answer == {"error": "the server failed at /detect; its log says why"}
    failing.error = None
    assert served.detect(IMAGE)[0] == 200


def test_a_body_that_never_comes(detector: GatedDetector) -> None:
    with serving(detector, body_seconds=0.05) as server:
        with socket.create_connection((server.host, server.port), timeout=SECONDS) as connection:
            connection.sendall(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        until(lambda: server.ask("GET", "/health")[1]["requests"] == 0)


def test_concurrency_is_bounded(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, requests=2, queue=1) as server:
        threads, results = in_threads(3, lambda: server.detect(IMAGE)[0])
        until(lambda: server.ask("GET", "/health")[1]["requests"] == 3 and detector.running == 2)
        status, answer, headers = server.ask("POST", "/detect", IMAGE)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "busy with 3 images" in answer["error"]
        detector.gate.set()
        for thread in threads:
            thread.join(SECONDS)
        assert results == [200, 200, 200]
        assert server.detect(IMAGE)[0] == 200
    assert detector.most_running == 2


def test_stopping_lets_requests_finish(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector) as server:
        threads, results = in_threads(1, lambda: server.detect(IMAGE)[0])
        until(lambda: detector.running == 1)
        server.server.should_exit = True
        until(lambda: _refuses(server))
        assert results == []
        detector.gate.set()
        threads[0].join(SECONDS)
    assert results == [200]


def _refuses(server: Client) -> bool:
    try:
        socket.create_connection((server.host, server.port), timeout=1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    make_bundle(tmp_path / "bundle")
    command = [sys.executable, "-W", "error", "-m", "asag_deploy.serving.cli", str(tmp_path / "bundle")]
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"asag-serve: tiny at http://127\.0\.0\.1:(\d+)\n", line)
            assert match is not None, line
            connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=SECONDS)
            connection.request("POST", "/detect", IMAGE)
            assert connection.getresponse().status == 200
            connection.close()
            os.kill(process.pid, number)
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert (process.returncode, out) == (128 + number, "")
    assert err == "asag-serve: warning: the bundle's weights are untrained\n"


def test_the_command_says_that_it_is_not_ready_before_it_stops(tmp_path: Path) -> None:
    """It goes on meanwhile; being told again ends it."""
    make_bundle(tmp_path / "bundle")
    command = [sys.executable, "-m", "asag_deploy.serving.cli", str(tmp_path / "bundle"), "--port", "0"]
    with subprocess.Popen([*command, "--drain-seconds", "600"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            client = Client.at(process.stdout.readline())
            assert client.ask("GET", "/v2/health/ready")[0] == 200
            process.terminate()
            until(lambda: client.ask("GET", "/v2/health/ready")[0] == 503)
            assert client.detect(IMAGE)[0] == 200
            process.terminate()
            assert process.wait(SECONDS) == 128 + signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "BUNDLE"),
        (["BUNDLE", "--batch", "0"], "--batch is 0"),
        (["BUNDLE", "--batch-wait-ms", "-1"], "--batch-wait-ms is -1"),
        (["BUNDLE", "--drain-seconds", "nan"], "--drain-seconds is nan"),
        (["BUNDLE", "--model-name", "a/b"], "--model-name is 'a/b'"),
        (
            ["BUNDLE", "--access-log", "/no/such/folder/log"],
            "access log '/no/such/folder/log' cannot be opened",
        ),
        (["BUNDLE", "--max-detections", "1000"], "error: --max-detections is 1000, and the"),
        (["BUNDLE", "--port", "70000"], "--port is 70000"),
        (["BUNDLE", "--host", "no such host"], "could not listen on no such host"),
        (["BUNDLE", "--requests", "0"], "--requests is 0"),
        (["BUNDLE", "--queue", "-1"], "--queue is -1"),
        (["BUNDLE", "--max-megabytes", "0"], "--max-megabytes is 0"),
        (["BUNDLE", "--max-megabytes", "nan"], "--max-megabytes is nan"),
        (["BUNDLE", "--max-megabytes", "inf"], "--max-megabytes is inf"),
        (["BUNDLE", "--body-seconds", "nan"], "--body-seconds is nan"),
        (["BUNDLE", "--grace-seconds", "0"], "--grace-seconds is 0"),
        (["BUNDLE", "--threshold", "1.5"], "--threshold is 1.5"),
        (["BUNDLE", "--backend", "caffe"], "unknown backend 'caffe'"),
        (["BUNDLE", "--loop", "device"], "loop 'device' needs a backend that runs on a GPU"),
        (["BUNDLE", "--loop", "gpu"], "argument --loop: invalid choice: 'gpu'"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_usage_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], sentence: str
) -> None:
    make_bundle(tmp_path / "bundle")
    given = [str(tmp_path / "bundle") if a == "BUNDLE" else a for a in arguments]
    assert cli.main([*given[:1], "--port", "0", *given[1:]]) == 2  # others may listen at the usual one
    out, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert out == ""
    assert error.startswith("asag-serve: error: ")
    assert sentence in error


@pytest.mark.parametrize(
    ("arguments", "loop", "requests"),
    [([], "auto", 1), (["--loop", "host", "--requests", "3"], "host", 3)],
)
def test_what_the_detector_is_loaded_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], loop: str, requests: int
) -> None:
    """The threads are divided among the images in work at once."""
    make_bundle(tmp_path / "bundle")
    asked: dict[str, Any] = {}

    def load(bundle: Bundle, **options: Any) -> Detector:
        asked.update(options)
        raise BackendError("enough")

    monkeypatch.setattr(Detector, "load", load)
    assert cli.main([str(tmp_path / "bundle"), "--port", "0", *arguments]) == 2
    assert (asked["loop"], asked["requests"]) == (loop, requests)


def test_deadlines_of_the_command_are_the_servers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The detector has none that would count from its own beginning; with batches, a sentence warns of it."""
    make_bundle(tmp_path / "bundle")
    told: list[tuple[str, dict[str, Any]]] = []

    def app_of(detector: Detector, limits: Limits, **settings: Any) -> None:
        told.append((detector(picture(4, 2)).trace.stop.value, settings))

    monkeypatch.setattr(cli, "make_app", app_of)
    monkeypatch.setattr(cli, "make_server", lambda *_, **__: None)
    monkeypatch.setattr(cli, "run", lambda *_: None)
    command = [str(tmp_path / "bundle"), "--port", "0", "--batch", "2"]
    limits = ["--mode", "fast", "--max-level", "P4", "--anchor-cap", "6"]
    assert cli.main([*command, "--deadline-ms", "0.001", *limits]) == 0
    warned = capsys.readouterr().err
    assert cli.main(command) == 0
    assert cli.main([*command, "--deadline-ms", "2592000000"]) == 0
    stop, settings = told[0]
    assert (
        "with --deadline-ms nothing is batched but requests that lift it (deadline_ms=2592000000)" in warned
    )
    assert "--deadline-ms" not in capsys.readouterr().err
    assert stop != "deadline"
    names = ("deadline_ms", "mode", "max_level", "anchor_cap")
    assert [settings[name] for name in names] == [0.001, "fast", "P4", 6]


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as taken:
        listen(taken)
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=rf"port {port}: .*another --host or --port"):
            bind("127.0.0.1", port)


def test_a_port_that_two_take_at_once() -> None:
    """The system lets both, as neither listens yet."""
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:
            listen(second)
            with pytest.raises(ConfigError, match=rf"127\.0\.0\.1, port {port}: .*another --host or --port"):
                listen(first)


@pytest.mark.parametrize("main", [cli.main, playground_cli.main])
def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(Bundle, "open", opened.append)
    monkeypatch.setattr(playground_cli, "check_gradio", lambda: None)  # nor is it needed for this
    with listening() as taken:
        port = taken.getsockname()[1]
        assert main(["bundle", "--port", str(port)]) == 2
    out, err = capsys.readouterr()
    assert (out, opened, len(err.splitlines())) == ("", [], 1)
    assert f"error: could not listen on 127.0.0.1, port {port}: Address already in use; name another" in err


@pytest.mark.parametrize("main", [cli.main, playground_cli.main])
def test_clients_are_refused_while_it_loads(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], int]
) -> None:
    monkeypatch.setattr(playground_cli, "check_gradio", lambda: None)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    refused: list[bool] = []

    def opening(_path: object) -> NoReturn:
        with socket.socket() as client:
            refused.append(client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED)
        raise BackendError("enough")

    monkeypatch.setattr(Bundle, "open", opening)
    assert main(["bundle", "--port", str(port)]) == 2
    assert refused == [True]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model-name", "a/b"], "--model-name is 'a/b'"),
        (["--access-log", "/no/log"], "cannot be opened"),
    ],
)
def test_what_is_wrong_is_told_before_the_network_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    make_bundle(tmp_path / "bundle")
    loaded: list[Any] = []
    monkeypatch.setattr(Detector, "load", lambda *_, **options: loaded.append(options))
    assert cli.main([str(tmp_path / "bundle"), "--port", "0", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert loaded == []


def test_a_host_that_is_not_set() -> None:
    with pytest.raises(ConfigError, match="--host is empty; name the address"):
        bind("", 0)


@pytest.mark.parametrize(("connections", "then"), [(1000, 1224), (100, 1024)])
def test_open_files_for_every_connection(
    monkeypatch: pytest.MonkeyPatch, connections: int, then: int
) -> None:
    allowed = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: allowed[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: allowed.append(both))
    allow_connections(Limits(connections=connections))
    assert allowed[-1] == (then, 4096)


@pytest.mark.parametrize(
    ("hard", "remedy"),
    [(400, r" \(`ulimit -n`\), or give --connections 176 at most"), (90, r" \(`ulimit -n`\)$")],
)
def test_fewer_open_files_than_connections(monkeypatch: pytest.MonkeyPatch, hard: int, remedy: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))
    sentence = f"300 connections take 524 open files, and {hard} are allowed here: allow more{remedy}"
    with pytest.raises(ConfigError, match=sentence):
        allow_connections(Limits(connections=300))


WITHOUT_EXTRA = r"pip install 'asag-deploy\[serve\]'"


def test_without_starlette(monkeypatch: pytest.MonkeyPatch, detector: GatedDetector) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(ConfigError, match=WITHOUT_EXTRA):
        make_app(detector, Limits(), backend="onnxruntime", threshold=0.3)


def test_without_uvicorn(monkeypatch: pytest.MonkeyPatch, detector: GatedDetector) -> None:
    app = make_app(detector, Limits(), backend="onnxruntime", threshold=0.3)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=WITHOUT_EXTRA):
        make_server(app, Limits(), grace_seconds=1)
