"""Clients that go away, dawdle, ask for too much or speak strangely, over plain sockets."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import cv2
import numpy as np
import pytest

from asag_deploy.errors import ConfigError
from asag_deploy.serving.limits import Limits
from support.served import (
    IMAGE,
    SECONDS,
    GatedDetector,
    Served,
    in_threads,
    listening,
    png,
    serving,
    until,
)
from support.tiny_bundle import picture

POST = b"POST /detect HTTP/1.1\r\nHost: x\r\n"
WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One server for all tests that leave it as it is."""
    with serving(GatedDetector(), max_bytes=100_000, max_pixels=5000) as server:
        yield server


def connect(server: Served) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=SECONDS)


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Read one answer."""
    head, body = whole_answer(connection)
    return int(head.split()[1]), json.loads(body)


def whole_answer(connection: socket.socket) -> tuple[str, bytes]:
    """Read one answer: its head, and its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        assert more, f"closed after {data!r}"
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(n.split(b":")[1]) for n in head.lower().split(b"\r\n") if n.startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head.decode(), body


def said(server: Served, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    with connect(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return answer(connection)


def in_hand(server: Served) -> int:
    return int(server.ask("GET", "/health")[1]["requests"])


def test_clients_that_have_gone_are_not_computed(detector: GatedDetector) -> None:
    """Only what the network had begun with; the others' places are free at once."""
    detector.gate.clear()
    with serving(detector, queue=60) as server:
        with connect(server) as first:
            first.sendall(WHOLE)
            until(lambda: detector.running == 1)
            with ExitStack() as clients:
                for number in range(60):
                    client = clients.enter_context(connect(server))
                    if number % 2:  # half of them in a hurry: the connection is reset
                        linger = struct.pack("ii", 1, 0)
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    client.sendall(WHOLE)
                until(lambda: in_hand(server) == 61)
            until(lambda: in_hand(server) == 1)
            threads, results = in_threads(1, lambda: server.detect(IMAGE)[0])
            until(lambda: in_hand(server) == 2)
            detector.gate.set()
            assert answer(first)[0] == 200
            threads[0].join(SECONDS)
        assert results == [200]
    assert detector.calls == 2


def test_a_burst_of_clients_that_have_gone_takes_no_place(detector: GatedDetector) -> None:
    """They have sent and gone before the server looks at any of them."""
    listener = listening()
    for _ in range(60):
        with socket.create_connection(listener.getsockname()) as gone:
            gone.sendall(WHOLE)
    with socket.create_connection(listener.getsockname(), timeout=SECONDS) as last:
        last.sendall(WHOLE)
        with serving(detector, listener=listener, queue=4):
            assert answer(last)[0] == 200


def test_a_client_that_goes_while_it_sends_frees_its_place(detector: GatedDetector) -> None:
    with serving(detector, queue=0) as server:
        with connect(server) as client:
            client.sendall(WHOLE[:-5])
            until(lambda: in_hand(server) == 1)
        until(lambda: in_hand(server) == 0)
        assert server.detect(IMAGE)[0] == 200


def test_waiting_has_an_end(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, queue_seconds=0.05) as server:
        threads, results = in_threads(1, lambda: server.detect(IMAGE)[0])
        until(lambda: detector.running == 1)
        status, told, headers = server.ask("POST", "/detect", IMAGE)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "no time within 0.05 seconds" in told["error"]
        detector.gate.set()
        threads[0].join(SECONDS)
        assert results == [200]
        assert server.detect(IMAGE)[0] == 200


@pytest.mark.parametrize(
    ("head", "status", "sentence"),
    [
        (b"Content-Length: 100001\r\nExpect: 100-continue\r\n", 413, "larger than"),
        (b"Content-Encoding: gzip\r\nContent-Length: 5\r\n", 415, "compressed (gzip)"),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400, "says twice how long"),
        (b"Content-Length: five\r\n", 400, "no HTTP request"),
        (b"Content-Length: -5\r\n", 400, "no HTTP request"),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n", 400, "no HTTP request"),
        (b"Transfer-Encoding: gzip\r\n", 501, "no HTTP request"),
        (b"X: " + b"a" * 20_000 + b"\r\n", 431, "headers"),
        (b"".join(b"X%d: a\r\n" % i for i in range(101)), 431, "more than 100 headers"),
        (b"Host: y\r\n", 400, "no HTTP request"),
        (b" folded: x\r\n\0: y\r\n", 400, "no HTTP request"),
    ],
)
def test_heads_that_are_refused(served: Served, head: bytes, status: int, sentence: str) -> None:
    got, told = said(served, POST + head + b"\r\n")
    assert (got, list(told)) == (status, ["error"])
    assert sentence in told["error"]
    assert served.detect(IMAGE)[0] == 200


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /detect HTTP/1.1", 405),
        (b"OPTIONS /detect HTTP/1.1", 405),
        (b"GET /detect/ HTTP/1.1", 404),
        (b"OPTIONS * HTTP/1.1", 404),
        (b"GET /health HTTP/1.0", 200),
        (b"GET http://x/health HTTP/1.1", 200),
        (b"GET /health?" + b"a" * 3000 + b" HTTP/1.1", 414),
        (b"GET /" + b"a" * 30_000 + b" HTTP/1.1", 414),
        (b"GET /health HTTP/9.9", 505),
        (b"\x16\x03\x01\x02\x00 TLS", 400),
        (b"PRI * HTTP/2.0", 505),
    ],
)
def test_first_lines(served: Served, line: bytes, status: int) -> None:
    got, told = said(served, line + b"\r\nHost: x\r\n\r\n")
    assert got == status
    assert (status == 200) == ("error" not in told)
    assert "\n" not in told.get("error", "")


@pytest.mark.parametrize("host", [b"[::1", b"a b", b"x:y:z", b"\xff"])
def test_strange_hosts(served: Served, host: bytes) -> None:
    assert said(served, b"GET /nowhere HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")[0] in (400, 404)


def test_head_has_no_body(served: Served) -> None:
    with connect(served) as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = b"".join(iter(lambda: connection.recv(4096), b""))
    assert got.startswith(b"HTTP/1.1 200 ")
    assert got.endswith(b"\r\n\r\n")


def test_requests_in_a_row_on_one_connection(served: Served) -> None:
    """Sent at once, one of them with chunks, one that is refused when its body has been read."""
    no_image = POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    with connect(served) as connection:
        connection.sendall(WHOLE + no_image + WHOLE)
        reader = connection.makefile("rb")
        statuses = []
        for _ in range(3):
            statuses.append(int(reader.readline().split()[1]))
            length = 0
            while (line := reader.readline().strip().lower()) != b"":
                length = int(line.split(b":")[1]) if line.startswith(b"content-length") else length
            reader.read(length)
    assert statuses == [200, 422, 200]


def test_a_body_that_waits_to_be_asked_for(served: Served) -> None:
    with connect(served) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(IMAGE))
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(IMAGE)
        assert answer(connection)[0] == 200


@pytest.mark.parametrize("head", [POST + b"Connection: close\r\n", b"POST /detect HTTP/1.0\r\n"])
def test_what_comes_after_the_last_request_is_not_read(detector: GatedDetector, head: bytes) -> None:
    """Some clients end a body with a line; the answer is under way by then."""
    detector.gate.clear()
    with serving(detector) as server, connect(server) as connection:
        connection.sendall(head + WHOLE.removeprefix(POST) + b"\r\n")
        until(lambda: detector.running == 1)
        connection.sendall(b"\r\nGET /health HTTP/1.1\r\n\r\n")
        until(lambda: in_hand(server) == 1)
        time.sleep(0.05)
        detector.gate.set()
        assert answer(connection)[0] == 200


def test_a_refused_client_may_end_what_it_sends(served: Served) -> None:
    """The answer would be lost with the connection."""
    body = bytes(30_000_000)
    for _ in range(3):
        status, told = served.detect(body)
        assert status == 413
        assert "larger than" in told["error"]


@pytest.mark.parametrize(
    "image",
    [
        png(picture(3, size=(71, 71))),
        bytes(cv2.imencode(".png", np.zeros((71, 71), np.uint16))[1]),
        png(picture(3))[:16] + struct.pack(">II", 100_000, 100_000) + png(picture(3))[24:],
    ],
    ids=["8 bits", "16 bits", "claims"],
)
def test_too_many_pixels(served: Served, image: bytes) -> None:
    status, told = served.detect(image)
    assert status in (413, 422)  # 422 where the checksum is wrong
    assert "\n" not in told["error"]


def test_pixels_are_counted_before_they_are_decoded(served: Served) -> None:
    status, told = served.detect(png(picture(3, size=(71, 71))))
    assert status == 413
    assert told["error"] == (
        "'request body' has 71 x 71 pixels, more than the 0.01 million pixels that this server takes; send a "
        "smaller one"
    )


@pytest.mark.parametrize("query", ["threshold=0.1&threshold=0.9", "threshold=", "threshold=inf", "a%0Ab=1"])
def test_thresholds_that_make_no_sense(served: Served, query: str) -> None:
    status, told = served.detect(IMAGE, f"?{query}")
    assert status == 400
    assert "\n" not in told["error"]


@pytest.mark.parametrize("start", [b"", b"\r\n", b"POST /detect HTT", POST])
def test_a_head_that_never_comes(detector: GatedDetector, start: bytes) -> None:
    """At once, and after a request on the same connection."""
    with serving(detector, head_seconds=0.1) as server:
        for before in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
            with connect(server) as connection:
                if before:
                    if not start:
                        continue  # that is an idle connection
                    connection.sendall(before)
                    assert answer(connection)[0] == 200
                connection.sendall(start)
                rest = b"".join(iter(lambda: connection.recv(4096), b""))
                assert rest.startswith(b"HTTP/1.1 408 ") == bool(start.strip())


def test_too_many_connections(detector: GatedDetector) -> None:
    with serving(detector, connections=3) as server, ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(connect(server))
        status, told = server.detect(IMAGE)
        assert status == 503
        assert "too many connections" in told["error"]
        assert server.ask("GET", "/health")[0] == 200
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert b"too_many_connections" in server.ask_plainly("GET", "/metrics")[1]
        crowd = [clients.enter_context(connect(server)) for _ in range(40)]
        head, _ = whole_answer(crowd[-1])
        assert head.startswith("HTTP/1.1 503 ")
        assert "retry-after: 1" in head.lower()
        clients.close()
        until(lambda: server.detect(IMAGE)[0] == 200)


@pytest.mark.slow
def test_an_answer_that_is_not_read(detector: GatedDetector) -> None:
    """It is thrown away, with the connection."""
    requests = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 200
    listener, connection = listening(), socket.socket()
    # What the system buffers for both takes thousands of answers to fill.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.settimeout(SECONDS)
    with serving(detector, answer_seconds=0.2, listener=listener) as server, connection:
        connection.connect((server.host, server.port))
        with pytest.raises(ConnectionError):  # as soon as it is cut
            _send_on(connection, requests)
        until(lambda: not server.server.server_state.connections)
        assert server.ask("GET", "/health")[0] == 200


def _send_on(connection: socket.socket, data: bytes) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        connection.sendall(data)


def test_what_is_cut_off_at_the_end_is_told(
    detector: GatedDetector, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The time to end in is over, and two requests have not arrived, one of which was answered already."""
    with serving(detector, grace_seconds=1) as server:
        with connect(server) as connection, connect(server) as other:
            other.sendall(WHOLE[:-5].replace(b"/detect", b"/detect?threshold=2"))
            assert other.recv(4096).startswith(b"HTTP/1.1 400 ")
            connection.sendall(WHOLE[:-5])
            until(lambda: in_hand(server) == 1)
            server.server.should_exit = True
            head, body = whole_answer(connection)
        assert head.startswith("HTTP/1.1 503 ")
        assert "retry-after: 1" in head.lower()
        assert json.loads(body) == {"error": "the server is stopping; send the image again"}
    said = "2 requests were cut off: --grace-seconds (1) had passed"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "name", ["head_seconds", "queue_seconds", "answer_seconds", "connections", "max_pixels"]
)
def test_limits_that_make_no_sense(name: str) -> None:
    wrong: Callable[..., Limits] = Limits
    with pytest.raises(ConfigError, match="must be"):
        wrong(**{name: 0})
