"""Request ids, traces, and the line that each request leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.errors import ConfigError
from asag_deploy.serving import access_log
from asag_deploy.serving.access_log import AccessLog
from asag_deploy.serving.exchange import request_id_of, trace_of
from support.served import IMAGE, SECONDS, Client, GatedDetector, Served, serving, until
from support.tiny_bundle import make_bundle

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


class Lines:
    """Takes lines as a log does."""

    lost = None

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def close(self) -> None:
        """There is nothing to close."""


@contextmanager
def logged(detector: GatedDetector, **limits: Any) -> Iterator[tuple[Served, list[dict[str, Any]]]]:
    log = Lines()
    with serving(detector, settings={"log": log}, **limits) as server:
        yield server, log.lines


def test_a_line_has_everything(detector: GatedDetector) -> None:
    with logged(detector) as (server, lines):
        headers = {"X-Request-Id": "mine-1", "traceparent": PARENT}
        status, _, answered = server.ask("POST", "/detect?threshold=0.6&max_level=P4", IMAGE, headers)
        until(lambda: len(lines) == 1)
    assert status == 200
    assert answered["X-Request-Id"] == "mine-1"
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", answered["traceparent"])
    line = lines[0]
    assert line["span_id"] == answered["traceparent"].split("-")[2] != line["parent_id"]
    assert line["sent"] > 100
    assert line["ms"] > 0
    assert line["queue_ms"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    varying = ("time", "ms", "queue_ms", "sent", "span_id")
    assert {name: value for name, value in line.items() if name not in varying} == {
        "id": "mine-1",
        "trace_id": TRACE,
        "parent_id": "00f067aa0ba902b7",
        "method": "POST",
        "path": "/detect",
        "status": 200,
        "bytes": len(IMAGE),
        "images": 1,
        "exit_level": "P4",
        "stop": ["nothing selected"],
        "patches": 6,
        "anchors": 12,
        "detections": 1,
        "options": {"threshold": 0.6, "max_level": "P4"},
    }


def test_refusals_say_why(detector: GatedDetector) -> None:
    with logged(detector) as (server, lines):
        told = [
            server.detect(b"no image")[1],
            server.detect(IMAGE, "?threshold=2")[1],
            server.ask("GET", "/nowhere%0Aelse")[1],
        ]
        server.say(b"no HTTP\r\n\r\n")
        until(lambda: len(lines) == 4)
    assert [line["status"] for line in lines] == [422, 400, 404, 400]
    assert [line["refused"] for line in lines] == [
        "not_an_image",
        "bad_parameter",
        "not_found",
        "bad_request",
    ]
    for line, answer in zip(lines, told, strict=False):
        assert line["error"] == answer["error"]
    assert "\n" not in lines[2]["path"]


def test_paths_are_whole(detector: GatedDetector) -> None:
    """However long a path may be that is answered; also one with what cannot be printed."""
    version = "/v2/models/" + "m" * 100 + "/versions/1/ready"
    odd = "/" + "%01" * 600
    with logged(detector) as (server, lines):
        for path in (version, odd, "/" + "a" * 9000):
            server.ask("GET", path)
        until(lambda: len(lines) == 3)
    assert lines[0]["path"] == version
    assert lines[1]["path"] == "/" + r"\x01" * 600
    assert len(lines[2]["path"]) < 5000


@pytest.mark.parametrize("path", ["/detect", "/v2/models/tiny/infer"])
@pytest.mark.parametrize("connections", [256, 1])
def test_chunks_that_are_none(detector: GatedDetector, path: str, connections: int) -> None:
    """Answered, counted and logged once, as what they are, also beyond the connections that there may be."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with logged(detector, connections=connections) as (server, lines):
        got = server.say(head.encode() + b"3\r\nabc\r\nzz\r\n")
        until(lambda: len(lines) == 1)
        assert server.ask("GET", "/health")[1]["requests"] == 0
        assert server.detect(IMAGE)[0] == 200
        figures = server.ask_plainly("GET", "/metrics")[1].decode()
    assert got.startswith(b"HTTP/1.1 400 ")
    assert json.loads(got.partition(b"\r\n\r\n")[2]) == {"error": lines[0]["error"]}
    assert (lines[0]["status"], lines[0]["path"], lines[0]["refused"]) == (400, path, "bad_request")
    assert "no HTTP request that can be read" in lines[0]["error"]
    assert 'status="499"' not in figures
    assert 'endpoint="none"' not in figures
    assert 'asag_refusals_total{reason="bad_request"} 1.0' in figures


def test_a_client_that_has_gone(detector: GatedDetector) -> None:
    with logged(detector) as (server, lines):
        server.leave(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nabc")
        until(lambda: len(lines) == 1)
    assert (lines[0]["status"], lines[0]["error"]) == (499, "the client went away")


@pytest.mark.parametrize("given", ["", "a b", "a\nb", "ä", "x" * 129, "<script>", '"'])
def test_ids_that_are_not_taken(given: str) -> None:
    made = request_id_of([(b"x-request-id", given.encode("latin-1"))])
    assert re.fullmatch("[0-9a-f]{32}", made)


def test_ids_that_are_taken() -> None:
    for given in ("1", "x" * 128, "f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "Root=1-67891233-abcdef:9/a+b"):
        assert request_id_of([(b"X-Request-Id", given.encode())]) == given
    assert request_id_of([(b"x-request-id", b"a"), (b"x-request-id", b"b")]) not in ("a", "b")


@pytest.mark.parametrize(
    "given",
    [
        "",
        PARENT.upper(),
        PARENT[:-1],
        f"{PARENT}-00",
        PARENT.replace(TRACE, "0" * 32),
        PARENT.replace("00f067aa0ba902b7", "0" * 16),
        PARENT.replace("00-", "ff-", 1),
    ],
)
def test_traces_that_cannot_be_read(given: str) -> None:
    """By the specification: a later version may say more, a 00 may not."""
    assert trace_of([(b"traceparent", given.encode())]) is None
    later = PARENT.replace("00-", "cc-", 1) + "-what"
    trace = trace_of([(b"traceparent", later.encode())])
    assert trace is not None
    assert trace.trace_id == TRACE


def test_every_answer_has_an_id(detector: GatedDetector) -> None:
    with serving(detector) as server:
        for method, path in (("GET", "/health"), ("GET", "/nowhere"), ("POST", "/detect"), ("GET", "/v2")):
            assert server.ask(method, path)[2]["X-Request-Id"]


def test_a_file_is_appended_to_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has been moved away, its place is taken anew."""
    monkeypatch.setattr(access_log, "_LOOK_AGAIN_S", 0.0)
    path = tmp_path / "log"
    path.write_text("before\n")
    log = AccessLog(path)
    log.write({"a": "\n\ud800é"})
    until(lambda: path.read_text().count("\n") == 2)
    path.rename(tmp_path / "old")
    log.write({"b": 2})
    log.close()
    assert (tmp_path / "old").read_text() == 'before\n{"a":"\\n\\ud800\\u00e9"}\n'
    assert path.read_text() == '{"b":2}\n'


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"access log '.*' cannot be opened: .*name another --access-log"):
        AccessLog(tmp_path / "no" / "log")


def test_a_full_disk_ends_nothing() -> None:
    lost: list[int] = []
    log = AccessLog(Path("/dev/full"))
    log.lost = lost.append
    for number in range(3):
        log.write({"number": number})
    log.close()
    assert sum(lost) == 3


def test_nobody_waits_for_a_log_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that is full: lines are lost, and counted."""
    monkeypatch.setattr(access_log, "_WAITING_LINES", 10)
    monkeypatch.setattr(access_log, "_PATIENCE_S", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    lost: list[int] = []
    log = AccessLog(pipe)
    log.lost = lost.append
    for number in range(2000):
        log.write({"number": number, "long": "x" * 100})
    log.close()
    assert sum(lost) > 1000
    os.close(reader)  # the thread that writes gets an error, and ends
    until(lambda: not any(thread.name == "asag-access-log" for thread in threading.enumerate()))


@pytest.mark.parametrize("target", ["file", "-", "closed"])
def test_the_command_writes_it(tmp_path: Path, target: str) -> None:
    """Also to an stderr whose reader has gone, which ends nothing."""
    make_bundle(tmp_path / "bundle")
    path = tmp_path / "log"
    command = [sys.executable, "-m", "asag_deploy.serving.cli", str(tmp_path / "bundle"), "--port", "0"]
    command += ["--access-log", str(path) if target == "file" else "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            if target == "closed":
                process.stderr.close()
            server = Client.at(line)
            for _ in range(3):
                assert server.detect(IMAGE)[0] == 200
            lost = server.ask_plainly("GET", "/metrics")[1].decode()
            if target == "closed":
                end = time.monotonic() + SECONDS
                while "asag_access_log_lost_lines_total 0" in lost and time.monotonic() < end:
                    lost = server.ask_plainly("GET", "/metrics")[1].decode()
                assert "asag_access_log_lost_lines_total 0" not in lost
                return
            process.terminate()
            err = process.communicate(timeout=SECONDS)[1]
        finally:
            process.kill()
    text = path.read_text() if target == "file" else err.partition("untrained\n")[2]
    statuses = [json.loads(one)["path"] for one in text.splitlines()]
    assert statuses == ["/detect"] * 3 + ["/metrics"]
