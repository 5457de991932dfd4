"""HTTP: whatever a client sends to a running `asag-serve`."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from endurance.damage import damaged_bytes
from endurance.judging import Target, WrongError
from support.coco_files import gradient
from support.tiny_bundle import make_bundle

_ADDRESS = re.compile(r"http://([\d.]+):(\d+)")
_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[!-9;-~]+:[^\r\n]*\r\n)*)\r\n")
_STATUSES = (200, *range(400, 500), 501, 503, 504, 505)
"""All but what says that the server itself has failed."""
_SILENCE_SECONDS, _ANSWER_SECONDS = 0.1, 10.0
_HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@contextmanager
def open_requests(folder: Path) -> Iterator[Target]:
    """What is sent over one connection."""
    make_bundle(folder / "bundle")
    program = [sys.executable, "-m", "asag_deploy.serving.cli", str(folder / "bundle")]
    options = [
        "--port",
        "0",
        "--threads",
        "1",
        "--body-seconds",
        "1",
        "--max-megabytes",
        "1",
        "--grace-seconds",
        "1",
    ]
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([*program, *options], stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert process.stdout is not None
        found = _ADDRESS.search(process.stdout.readline().decode())
        assert found is not None, log.read_text()
        server = _Server(process, (found[1], int(found[2])), log)
        yield Target(inputs=_requests(), run=server.answer)
    finally:
        process.kill()
        process.communicate()


class _Server:
    def __init__(self, process: subprocess.Popen[bytes], address: tuple[str, int], log: Path) -> None:
        self.process, self.address, self.log = process, address, log
        self._logged = 0

    def answer(self, data: bytes) -> None:
        """Send it, and look at every answer; the server has to be well afterwards, without a traceback."""
        _check_answers(self._exchange(data, _SILENCE_SECONDS), b"HEAD" in data)
        status = _check_answers(self._exchange(_HEALTH, _ANSWER_SECONDS), False)
        if status != [200] or self.process.poll() is not None:
            raise WrongError(f"the server is not well: {status}, {self.process.poll()}")
        text = self.log.read_bytes()
        new, self._logged = text[self._logged :], len(text)
        if b"Traceback" in new:
            raise WrongError(f"the server logged {new[-3000:].decode(errors='replace')}")

    def _exchange(self, data: bytes, silence: float) -> bytes:
        """Send, and read until the server closes or is silent for some seconds, but never in mid-answer."""
        got = b""
        with socket.create_connection(self.address, timeout=_ANSWER_SECONDS) as connection:
            try:
                connection.sendall(data)
                begin = time.monotonic()
                while time.monotonic() - begin < _ANSWER_SECONDS:
                    connection.settimeout(silence)
                    try:
                        part = connection.recv(65536)
                    except TimeoutError:
                        if not got or _is_whole(got):
                            break
                        continue
                    if not part:
                        break
                    got += part
            except (ConnectionResetError, BrokenPipeError):  # it may hang up on what it refuses
                pass
        return got


def _answers(data: bytes) -> Iterator[tuple[int, dict[str, str], bytes, bool]]:
    """Yield status, headers and body of each answer, and whether the body is whole."""
    while data:
        head = _HEAD.match(data)
        if head is None:
            raise WrongError(f"not an HTTP answer: {data[:200]!r}")
        lines = [line.partition(b":") for line in head[2].splitlines()]
        headers = {name.decode().lower(): value.strip().decode("latin-1") for name, _, value in lines}
        length, rest = int(headers.get("content-length", 0)), data[head.end() :]
        if rest.startswith(b"HTTP/1.1 "):  # the next answer: this one was to HEAD, whose length is not sent
            length = 0
        yield int(head[1]), headers, rest[:length], len(rest) >= length
        data = rest[length:]


def _is_whole(data: bytes) -> bool:
    return all(whole for *_, whole in _answers(data))


def _check_answers(data: bytes, may_lack_body: bool) -> list[int]:
    seen = []
    for status, headers, body, whole in _answers(data):
        if status == 100:
            continue
        seen.append(status)
        if not body and may_lack_body:
            continue
        if not whole or headers.get("content-type") != "application/json":
            raise WrongError(f"answer {status} is not whole, or not JSON: {headers}, {body[:200]!r}")
        content = json.loads(body)
        if status not in _STATUSES:
            raise WrongError(f"answer {status}: {content}")
        if status != 200:
            sentence = content["error"]
            if not sentence.isprintable() or len(sentence) > 1500:
                raise WrongError(f"answer {status}: {sentence!r}")
    return seen


def _requests() -> SearchStrategy[bytes]:
    encoded, ndarray = cv2.imencode(".png", np.ascontiguousarray(gradient(16, 16)))
    assert encoded
    picture = ndarray.tobytes()
    names = (
        b"Host",
        b"Content-Length",
        b"Content-Type",
        b"Transfer-Encoding",
        b"Connection",
        b"Expect",
        b"Upgrade",
        b"Inference-Header-Content-Length",
        b"X-Request-Id",
        b"traceparent",
        b"X",
    )
    values = (
        *(
            b"a",
            b"",
            b"0",
            b"5",
            b"-1",
            b"99999999999999999999",
            b"1e3",
            b"chunked",
            b"gzip, chunked",
            b"close",
        ),
        *(
            b"keep-alive",
            b"100-continue",
            b"multipart/form-data; boundary=x",
            b"multipart/form-data",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            b"h2c",
            b"image/png",
            b"\xff\xfe",
            b"x" * 9000,
        ),
    )
    lines = (
        *(
            b"POST /detect HTTP/1.1",
            b"GET /health HTTP/1.1",
            b"GET /detect HTTP/1.1",
            b"HEAD /health HTTP/1.1",
        ),
        *(b"POST /detect?threshold=0.5 HTTP/1.1", b"POST /detect?threshold=nan HTTP/1.0", b"PUT / HTTP/1.1"),
        *(b"GET /health/../x%00%ff%0a HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET http://b/health HTTP/1.1"),
        *(b"POST /detect?threshold=1e999&threshold=0 HTTP/1.1", b"POST /detect?x=\xe2\x80\xae HTTP/1.1"),
        *(b"PRI * HTTP/2.0", b"GET /health", b"CONNECT a:1 HTTP/1.1", b"GET /" + b"a" * 70000 + b" HTTP/1.1"),
        *(
            b"POST /detect?threshold=" + b"9" * 5000 + b" HTTP/1.1",
            b"TRACE /health HTTP/1.1",
            b"GET /health HTTP/3.7",
        ),
        *(
            b"POST /detect?max_level=P4&deadline_ms=1 HTTP/1.1",
            b"POST /detect?mode=fast&anchor_cap=-1 HTTP/1.1",
        ),
        *(
            b"POST /v2/models/tiny/infer HTTP/1.1",
            b"POST /v2/models/tiny/infer HTTP/1.1",
            b"GET /v2 HTTP/1.1",
        ),
        *(b"GET /openapi.json HTTP/1.1", b"GET /v2/models/%00 HTTP/1.1", b"GET /v2/health/ready HTTP/1.1"),
    )

    form = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + picture
        + b"\r\n--x--\r\n"
    )
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [1],
        "data": [base64.b64encode(picture).decode()],
    }
    infer = json.dumps({"id": "1", "inputs": [tensor], "parameters": {"threshold": 0.5}}).encode()
    binary = json.dumps(
        {"inputs": [{**tensor, "data": None, "parameters": {"binary_data_size": 7}}]}
    ).encode()

    @st.composite
    def written(draw: DrawFn) -> bytes:
        body = draw(
            st.sampled_from(
                (
                    *(picture, picture[:40], b"", b"0\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"x" * 2000),
                    *(form, form[:-9], infer, infer[:-5], binary + b"\3\0\0\0abc"),
                )
            )
        )
        length = draw(st.sampled_from((len(body), len(body), len(body) + 5, max(len(body) - 5, 0))))
        headers: list[tuple[bytes, bytes]] = [
            (b"Host", b"a"),
            (b"Content-Length", str(length).encode()),
            (b"Connection", b"close"),
        ]
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(headers)))
            if headers and draw(st.integers(0, 1)) == 1:
                del headers[min(at, len(headers) - 1)]
            else:
                headers.insert(at, (draw(st.sampled_from(names)), draw(st.sampled_from(values))))
        head = [draw(st.sampled_from(lines)), *(name + b": " + value for name, value in headers)]
        return b"\r\n".join(head) + b"\r\n\r\n" + body

    whole = (
        b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(picture)
        + picture
    )
    raw = damaged_bytes(
        [whole, _HEALTH, _HEALTH.replace(b"close", b"keep-alive") + whole], [b"\r\n\r\n", b": ", b"HTTP/1.1"]
    )
    return st.one_of(written(), written(), raw)
